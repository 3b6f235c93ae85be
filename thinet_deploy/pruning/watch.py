"""See what convolutions and linear layers read and write while a network runs, modules or plain functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .trace import named_tensors


@dataclass(frozen=True)
class Call:
    """A convolution or linear layer that has run.

    Attributes:
        weight: name of its weight.
        number: 0 for the first use of that weight, 1 for the second …
        given: its arguments by name, as `torch.nn.functional` has them.
        output: what it gave.
    """

    weight: str
    number: int
    given: dict[str, Any]
    output: torch.Tensor


_CONVOLUTION = {"input": None, "weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_ORDER = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_TRANSPOSED = {name: _CONVOLUTION.get(name, 0) for name in _ORDER}
# torch's functions have no Python signature: their arguments in order, with defaults.
_ARGUMENTS: dict[Any, dict[str, Any]] = {
    F.linear: {"input": None, "weight": None, "bias": None},
    **dict.fromkeys([F.conv1d, F.conv2d, F.conv3d], _CONVOLUTION),
    **dict.fromkeys([F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d], _TRANSPOSED),
}


class _Watch(TorchFunctionMode):
    def __init__(self, names: dict[int, str], see: Callable[[Call], None]) -> None:
        super().__init__()
        self.names, self.see, self.numbers = names, see, Counter[str]()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        if function in _ARGUMENTS:
            expected = _ARGUMENTS[function]
            given = {**expected, **dict(zip(expected, args, strict=False)), **(kwargs or {})}
            if name := self.names.get(id(given["weight"])):
                self.see(Call(name, self.numbers[name], given, output))
                self.numbers[name] += 1
        return output


@contextmanager
def watch(model: nn.Module, weights: Iterable[str], see: Callable[[Call], None]) -> Iterator[None]:
    """Meanwhile `see` is called for every convolution and linear layer that uses one of the weights."""
    wanted, names = set(weights), dict[int, str]()
    for name, tensor in named_tensors(model):
        if name in wanted:
            names.setdefault(id(tensor), name)
    with _Watch(names, see):
        yield
