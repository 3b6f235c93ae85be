"""A network by name or from the user's own file."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ..errors import ModelError, UnknownNameError
from ..seeds import derive
from .vgg import vgg16, vgg_small

InputShape = tuple[int, int, int]

MODELS: dict[str, Callable[..., nn.Module]] = {"vgg16": vgg16, "vgg-small": vgg_small}


def build_model(name: str, *, input_shape: InputShape | None, num_classes: int, seed: int) -> nn.Module:
    """A freshly initialised network.

    Args:
        name: "vgg16", "vgg-small", or "file.py:factory". A factory is called with those of the keyword
            arguments num_classes and input_shape that it takes.
        input_shape: channels, height and width; None for the network's own default.
        num_classes: number of outputs.
        seed: of the run; initial weights depend on it only.

    Raises:
        UnknownNameError: no such model.
        ModelError: the file or factory does not give an nn.Module.
    """
    factory = _from_file(name) if ":" in name or name.endswith(".py") else MODELS.get(name)
    if factory is None:
        raise UnknownNameError("model", name, [*MODELS, "file.py:factory"])
    offered = {"num_classes": num_classes, **({"input_shape": input_shape} if input_shape else {})}
    taken = inspect.signature(factory).parameters
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "initial weights"))
        try:
            model = factory(**{key: value for key, value in offered.items() if key in taken})
        except Exception as error:  # the user's own code may raise anything
            raise ModelError(f"{name} failed to build the network: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned {type(model).__name__}, but a torch.nn.Module was expected.")
    return model


def input_shape_of(model: nn.Module) -> InputShape | None:
    """What the model itself says of its input (an attribute `input_shape`), or None."""
    shape = getattr(model, "input_shape", None)
    return (int(shape[0]), int(shape[1]), int(shape[2])) if shape is not None and len(shape) == 3 else None


def load_function(spec: str, purpose: str) -> Callable[..., object]:
    """A function from the user's file, "file.py:function".

    Raises:
        ModelError: no such file or function, or the file itself fails.
    """
    path_text, _, name = spec.rpartition(":")
    path = Path(path_text)
    if not path_text.endswith(".py") or not name:
        raise ModelError(f"{spec!r} is no {purpose}.", hint=f"Expected file.py:function, such as mine.py:{purpose}.")
    if not path.is_file():
        raise ModelError(f"There is no file {path}.", hint=f"Expected file.py:function for the {purpose}.")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # the user's own code may raise anything
        raise ModelError(f"{path} failed to load: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UnknownNameError(f"function in {path}", name, known)
    return function  # type: ignore[no-any-return]


def _from_file(name: str) -> Callable[..., nn.Module]:
    return load_function(name, "factory")  # type: ignore[return-value]
