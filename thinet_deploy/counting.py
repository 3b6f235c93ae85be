"""#Param and #FLOPs by the rule that reproduces the papers' tables (thinet.md, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


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


def count(model: nn.Module, input_shape: tuple[int, int, int]) -> Count:
    """Count a network by running it once on a zero image of shape (channels, height, width)."""
    seen: dict[nn.Module, int] = {}

    def note(module: nn.Module, _: object, output: torch.Tensor) -> None:
        positions = output.shape[2:].numel() if isinstance(module, nn.Conv2d) else 1
        seen[module] = seen.get(module, 0) + positions

    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, kinds)]
    try:
        model.eval()
        with torch.inference_mode():
            parameter = next(model.parameters())
            model(torch.zeros(1, *input_shape, dtype=parameter.dtype, device=parameter.device))
    finally:
        for hook in hooks:
            hook.remove()
    parameters = flops = macs = 0
    for module, positions in seen.items():
        if isinstance(module, nn.BatchNorm2d):
            weights = module.num_features * (2 if module.affine else 1)  # its mean and its scale
        else:
            weights = module.get_parameter("weight").numel()
            macs += weights * positions
        parameters += weights
        flops += 2 * weights * positions
    return Count(parameters, flops, macs)
