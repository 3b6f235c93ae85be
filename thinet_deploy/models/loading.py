"""A network by name or from the user's own file."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

import torch
from torch import nn

from ..errors import ModelError, ThinetDeployError, UnknownNameError
from ..seeds import derive
from .alexnet import alexnet, alexnet_owt
from .fcn import fcn8s
from .presets import CONV, PRESETS, RESNETS, TINY, VGGS, build_preset
from .resnet_cifar import resnet_cifar
from .squeezenet import squeezenet, squeezenet1_0, squeezenet1_1
from .ssd import ssd300
from .vgg import vgg_small

InputShape = tuple[int, int, int]
_USERS = "_users_"  # what the names of modules made from a user's file begin with

MODELS: dict[str, Callable[..., nn.Module]] = {
    **VGGS,
    "vgg-small": vgg_small,
    "alexnet": alexnet,
    "alexnet-owt": alexnet_owt,
    "squeezenet": squeezenet,
    "squeezenet1_0": squeezenet1_0,
    "squeezenet1_1": squeezenet1_1,
    **RESNETS,
    **{f"resnet{depth}": partial(resnet_cifar, depth) for depth in (20, 32, 44, 56, 110)},
    **{preset: partial(build_preset, preset) for preset in PRESETS},
    # Detectors and segmenters on the papers' backbones; ThiNet-Tiny has no fully connected layers.
    "ssd300-vgg16": ssd300,
    "ssd300-vgg16_bn": partial(ssd300, norm=True),
    "ssd300-thinet-conv": partial(ssd300, stages=CONV),
    "ssd300-thinet-tiny": partial(ssd300, stages=TINY),
    "fcn8s-vgg16": fcn8s,
    "fcn8s-vgg16_bn": partial(fcn8s, norm=True),
    "fcn8s-thinet-conv": partial(fcn8s, stages=CONV),
    "fcn8s-thinet-tiny": partial(fcn8s, stages=TINY, hidden=()),
}


def build_model(name: str, *, input_shape: InputShape | None, num_classes: int | None, seed: int) -> nn.Module:
    """A freshly initialised network.

    Args:
        name: one of `MODELS`, or "file.py:factory". A factory is called with those of the keyword
            arguments num_classes and input_shape that it takes (with **kwargs, num_classes).
        input_shape: channels, height and width; None for the network's own default.
        num_classes: number of outputs; None for the network's own default.
        seed: of the run; initial weights depend on it only.

    Raises:
        UnknownNameError: no such model.
        ModelError: the file or factory does not give an nn.Module, or the images are too small for it, or
            its weights are no float32.
    """
    factory = _from_file(name) if ":" in name or name.endswith(".py") else MODELS.get(name)
    if factory is None:
        raise UnknownNameError("model", name, [*MODELS, "file.py:factory"])
    known = {"num_classes": num_classes, "input_shape": input_shape}
    offered = {key: value for key, value in known.items() if value is not None}
    taken = inspect.signature(factory).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())  # torchvision's way
    given = {key: value for key, value in offered.items() if key in taken or (passes_on and key == "num_classes")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "initial weights"))
        try:
            model = factory(**given)
        except ThinetDeployError:
            raise
        except Exception as error:  # the user's own code may raise anything
            raise ModelError(
                f"{name} failed to build the network: {type(error).__name__}: {error}",
                hint=f"It was called with {', '.join(f'{key}={offered[key]}' for key in given) or 'no arguments'}.",
            ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{name} returned {type(model).__name__}, but a torch.nn.Module was expected.",
            hint="The function has to return the network itself, not its weights or a tuple.",
        )
    if name in MODELS:
        return model
    for weight, each in model.named_parameters():
        if each.is_floating_point() and each.dtype != torch.float32:
            raise ModelError(
                f"{name} has weights in {str(each.dtype).removeprefix('torch.')} ({weight}), but float32 was expected.",
                hint="Return network.float() from the function; engines compute in --precision.",
            )
    with contextlib.suppress(Exception):  # one that cannot be copied is refused with its reason, see stages/job.py
        return copy.deepcopy(model)  # a factory may hand out the same one again, and it is going to be trained
    return model


def input_shape_of(model: nn.Module) -> InputShape | None:
    """What the model itself says of its input (an attribute `input_shape`), or None."""
    try:
        channels, height, width = model.input_shape  # type: ignore[misc]
        return int(channels), int(height), int(width)
    except (AttributeError, TypeError, ValueError):  # none, or one that means something else
        return None


class _Source(SourceFileLoader):
    """Runs the source itself, which is what stages are keyed by, and leaves no __pycache__ beside the user's file."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def load_function(spec: str, purpose: str) -> Callable[..., object]:
    """A function from the user's file, "file.py:function".

    Raises:
        ModelError: no such file or function, or the file itself fails.
    """
    path_text, _, name = spec.rpartition(":")
    path = Path(path_text)
    if not path_text.endswith(".py") or not name:
        raise ModelError(
            f"{spec!r} names no function in a file.", hint=f"Expected file.py:function, such as mine.py:{purpose}."
        )
    if not path.is_file():
        raise ModelError(f"There is no file {path}.", hint=f"Expected file.py:function for the {purpose}.")
    module = _loaded(path)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UnknownNameError(f"function in {path}", name, known)
    return function  # type: ignore[no-any-return]


_LOADED: dict[Path, tuple[bytes, ModuleType]] = {}


def _loaded(path: Path) -> ModuleType:
    """The user's file as a module; executed once, for what it registers elsewhere cannot be registered twice."""
    # A name of its own, so that a model.py or random.py of the user's stands in nobody's way.
    module_spec, text = _spec_of(f"{_USERS}{path.stem}", path), path.read_bytes()
    before, module = _LOADED.get(path.resolve(), (b"", None))
    if module is not None and before == text:
        sys.modules[module.__name__] = module
        return module
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    if (folder := str(path.parent.resolve())) not in sys.path:
        sys.path.append(folder)  # it may import what lies beside it; last, so that it stands in for nothing of ours
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything, or be a program
        del sys.modules[module.__name__]
        raise ModelError(
            f"{path} failed to load: {type(error).__name__}: {error}",
            hint='Only definitions may run on import; put the rest under `if __name__ == "__main__":`.',
        ) from error
    _LOADED[path.resolve()] = text, module
    return module


def _spec_of(name: str, path: Path | str) -> ModuleSpec:
    spec = importlib.util.spec_from_file_location(name, path, loader=_Source(name, str(path)))
    assert spec is not None
    return spec


class UsersFiles(MetaPathFinder):
    """Lets another process import what `load_function` has loaded here, under the same names.

    Args:
        paths: of the files by the modules' names, see `users_files`.
    """

    def __init__(self, paths: Mapping[str, str]) -> None:
        self.paths = paths

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        return _spec_of(fullname, self.paths[fullname]) if fullname in self.paths else None


def users_files() -> dict[str, str]:
    """Name → path of the modules that `load_function` made."""
    found = {name: module.__spec__ for name, module in sys.modules.items() if name.startswith(_USERS)}
    return {name: str(Path(spec.origin).resolve()) for name, spec in found.items() if spec and spec.origin}


def _from_file(name: str) -> Callable[..., nn.Module]:
    return load_function(name, "factory")  # type: ignore[return-value]
