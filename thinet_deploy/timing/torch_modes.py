"""The ways that torch can run a model in training: as it is, channels last, with AMP, as a CUDA graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from ..errors import MissingError, UnknownNameError

if TYPE_CHECKING:
    from torch import Tensor

Mode = Literal["eager", "channels-last", "amp", "cuda-graph"]
MODES: tuple[Mode, ...] = get_args(Mode)


_CHANNELS_LAST = frozenset({"channels-last", "amp"})


def check_mode(mode: Mode, *, cuda: bool) -> None:
    """Refuse what cannot be.

    Raises:
        UnknownNameError: no such mode.
        MissingError: a CUDA graph without a CUDA device.
    """
    if mode not in MODES:
        raise UnknownNameError("mode", mode, MODES)
    if mode == "cuda-graph" and not cuda:
        raise MissingError("There is no CUDA graph on a CPU.", hint="Measure with device cuda, or in mode eager.")


def laid_out(images: Tensor, mode: Mode) -> Tensor:
    """Images (n, channels, height, width) in the layout that a mode takes."""
    return images.to(memory_format=torch.channels_last) if mode in _CHANNELS_LAST else images


def in_mode(model: nn.Module, images: Tensor, mode: Mode) -> nn.Module:
    """A model that runs in a mode; the one given is changed.

    AMP computes in fp16 on a CUDA device and in bf16 on a CPU, channels last. A CUDA graph replays the forward and the
    backward pass as one launch each, in fp32.

    Args:
        model: on the device of the images.
        images: `laid_out`, of the shape that it will be run on; a CUDA graph takes no other.
        mode: how to run.
    """
    if mode in _CHANNELS_LAST:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if mode == "amp":
        return _Autocast(model, torch.float16 if images.is_cuda else torch.bfloat16)
    if mode == "cuda-graph":
        torch.cuda.make_graphed_callables(model, (images,))  # a module's forward is replaced in place
    return model


class _Autocast(nn.Module):
    """A model that chooses the type of each operation itself; the backward pass follows."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, images: Tensor) -> Any:
        with torch.autocast(images.device.type, self.dtype):
            return self.model(images)
