"""#Param and #FLOPs by the rule that reproduces the papers' tables (thinet.md, section 3), and multiply-accumulates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Count:
    """Size and work of a network for one image.

    Attributes:
        parameters: weights without biases; BatchNorm counts its mean and its scale.
        flops: 2 × multiply-accumulates of convolutions; 2 × weights of everything else.
        macs: multiply-accumulates of convolutions and linear layers.
    """

    parameters: int
    flops: int
    macs: int


@dataclass(frozen=True)
class LayerCount:
    """What one layer adds to the `Count` of its network.

    Attributes:
        name: of the module.
        kind: its class.
        output: shape of what it gives for one image, without the batch.
        parameters: by the papers' rule; 0 for layers that the papers do not have.
        learned: everything in it that training learns, biases too.
        flops: by the papers' rule.
        macs: multiply-accumulates.
    """

    name: str
    kind: str
    output: tuple[int, ...]
    parameters: int
    learned: int
    flops: int
    macs: int


def count(model: nn.Module, input_shape: tuple[int, int, int]) -> Count:
    """Count a network by running it once on a zero image of shape (channels, height, width)."""
    layers = count_layers(model, input_shape)
    return Count(*(sum(getattr(each, name) for each in layers) for name in ("parameters", "flops", "macs")))


def count_layers(model: nn.Module, input_shape: tuple[int, int, int]) -> tuple[LayerCount, ...]:
    """The same layer by layer, in the order in which they run; a network on the meta device takes no memory."""
    seen: dict[nn.Module, list[tuple[torch.Size, torch.Size]]] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        shapes = [getattr(each, "shape", torch.Size()) for each in ((*inputs, None)[0], output)]
        seen.setdefault(module, []).append((shapes[0], shapes[1]))

    layers = [each for each in model.modules() if isinstance(each, NORMS) or any(True for _ in each.parameters(False))]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        model.eval()
        with torch.inference_mode():
            like = next(model.parameters(), torch.zeros(0))
            model(torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device))
    finally:
        for hook in hooks:
            hook.remove()
    names = {module: name for name, module in model.named_modules()}
    return tuple(_layer(names[module], module, calls) for module, calls in seen.items())


def _layer(name: str, module: nn.Module, calls: list[tuple[torch.Size, torch.Size]]) -> LayerCount:
    weights = macs = 0
    if isinstance(module, NORMS):
        weights = module.num_features * (2 if module.affine else 1)  # its mean and its scale
    elif isinstance(module, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)):
        weights = module.weight.numel()
        macs = weights * sum(_positions(module, *call) for call in calls)
    flops = macs if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) else weights * len(calls)
    learned = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    return LayerCount(name, type(module).__name__, tuple(calls[0][1][1:]), weights, learned, 2 * flops, macs)


def _positions(module: nn.Module, before: torch.Size, after: torch.Size) -> int:
    """How often every weight is used for one image."""
    if isinstance(module, nn.Linear):
        return after[1:-1].numel()
    return (before if isinstance(module, TRANSPOSED) else after)[2:].numel()
