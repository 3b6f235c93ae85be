"""Weights from files: .safetensors, or .pth read without executing anything."""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors.torch import load_file, save
from torch import nn

from ..artifact import write_bytes
from ..errors import WeightsError, first_line


def save_weights(model: nn.Module, path: Path) -> None:
    """Write all parameters and buffers as safetensors, whole or not at all."""
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    write_bytes(path, save(state, metadata={"format": "pt"}))


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a weights file into a model.

    Raises:
        WeightsError: no such file, not readable without executing code, made for another architecture (the first
            mismatching tensors are named), or with numbers that are none.
    """
    state = _without_wrapper(_read(path), model)
    _check(model, state, path)
    model.load_state_dict(state)


def no_weights(path: Path) -> WeightsError:
    """The error for a path that is no file."""
    return WeightsError(f"There is no weights file {path}.", hint="--weights takes a .safetensors or .pth file.")


def unused_weights(path: Path) -> list[str]:
    """The other weights of the same network in a file, such as their averages: state_dicts that are not loaded."""
    taken = _taken(data := _opened(path))
    others = [key for key, value in _states(data).items() if value is not taken and value.keys() == taken.keys()]
    return list(map(str, others))


def _read(path: Path) -> dict[str, torch.Tensor]:
    state = _taken(data := _opened(path))
    if not _is_state(state):
        held = list(map(str, _states(data)))
        where = f", but has one in {', '.join(held)}" if held else ""
        alone = (
            f'torch.save(torch.load("{path.name}")["{held[0]}"], FILE)'
            if held
            else "torch.save(model.state_dict(), FILE)"
        )
        raise WeightsError(f"{path} holds no state_dict of tensors{where}.", hint=f"Save it alone: {alone}.")
    return {str(name): tensor for name, tensor in state.items()}


def _taken(data: Any) -> Any:
    return data.get("state_dict", data.get("model", data)) if isinstance(data, dict) else data


def _states(data: Any) -> dict[Any, dict[Any, torch.Tensor]]:
    return {key: value for key, value in data.items() if _is_state(value) and value} if isinstance(data, dict) else {}


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise no_weights(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(action="ignore"):  # of pickle protocols, which we judge by the result
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is refused: it is no file of tensors alone, and loading anything else could execute code"
            f"{_named(error)}.",
            hint="Save the state_dict only: torch.save(model.state_dict(), FILE), or use safetensors.",
        ) from error
    except Exception as error:  # a damaged file makes torch raise anything
        raise WeightsError(
            f"{path} cannot be read as weights: {first_line(error)}",
            hint="The file may be truncated; expected is a .safetensors or .pth file with a state_dict.",
        ) from error


def _is_state(value: object) -> TypeGuard[dict[Any, torch.Tensor]]:
    return isinstance(value, dict) and all(isinstance(each, torch.Tensor) for each in value.values())


def _named(error: Exception) -> str:
    """What torch would not load, if it says so."""
    found = re.search(r"Unsupported (?:global: GLOBAL|class|operand) ([\w.]+)", str(error))
    return f" (it has a {found[1]})" if found else ""


def _without_wrapper(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Names without the prefixes that DataParallel and torch.compile put before all of them, in either order."""
    own = tuple(model.state_dict())
    prefixes = [each for each in ("module.", "_orig_mod.") if not any(name.startswith(each) for name in own)]
    while prefix := next((each for each in prefixes if state and all(name.startswith(each) for name in state)), ""):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _is_broken(tensor: torch.Tensor, *, buffer: bool) -> bool:
    """Whether there is a NaN, or an infinity that is learnt: a buffer may have it, as a mask has."""
    values = tensor.float()  # types of 8 bits cannot be asked
    return bool(values.isnan().any()) or (not buffer and bool(values.isinf().any()))


def _check(model: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    expected = model.state_dict()
    problems = [
        f"{name}: the file has {tuple(state[name].shape)}, the model {tuple(tensor.shape)}"
        if name in state
        else f"{name}: missing in the file"
        for name, tensor in expected.items()
        if (name not in state and not name.endswith("num_batches_tracked"))
        or (name in state and state[name].shape != tensor.shape)
    ]
    problems += [f"{name}: not in the model" for name in state if name not in expected]
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:5])
        more = f"\n  … and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise WeightsError(
            f"{path} was made for another architecture:\n{shown}{more}",
            hint="Give the --model and --input-shape that they belong to (the number of classes comes from --data).",
        )
    learnt = {name for name, _ in model.named_parameters()}
    if broken := [name for name, tensor in state.items() if _is_broken(tensor, buffer=name not in learnt)]:
        more = f" (and {len(broken) - 1} more tensors)" if len(broken) > 1 else ""
        raise WeightsError(
            f"{path} has NaN or infinity in {broken[0]}{more}.",
            hint="Its training diverged: take an earlier checkpoint.",
        )
    for name, tensor in expected.items():
        state.setdefault(name, tensor)
