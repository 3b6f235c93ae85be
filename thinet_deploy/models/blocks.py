"""What several networks are made of: initialisation, channel shuffle, and the check that an image is large enough."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import ModelError


class ChannelShuffle(nn.Module):
    """Deals the channels of each group out to all groups (ShuffleNet, Zhang et al., CVPR 2018, section 3.1).

    Exported as Reshape, Transpose, Reshape, which every runtime has.

    Args:
        groups: of the convolution before it; a divisor of the number of channels.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        """Shape (n, c, h, w) → the same; channel i of group g, of c / groups each, becomes channel i · groups + g."""
        images, channels, height, width = x_nchw.shape
        by_group = x_nchw.reshape(images, self.groups, channels // self.groups, height, width)
        return by_group.transpose(1, 2).reshape(images, channels, height, width)

    def extra_repr(self) -> str:
        """What print(model) says of it."""
        return f"groups={self.groups}"


def initialise(module: nn.Module) -> None:
    """He initialisation everywhere, biases zero: without BatchNorm, N(0, 0.01) in the head does not start to learn."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def check_input(network: str, input_shape: tuple[int, int, int], least: int) -> None:
    """Raise ModelError for images smaller than `least` pixels on a side: a map would have no pixel left."""
    channels, height, width = input_shape
    if min(height, width) < least or channels < 1:
        raise ModelError(
            f"{network} needs images of at least {least}x{least} pixels, and {channels}x{height}x{width} was given.",
            hint="Give a larger --input-shape, or a network for small images: vgg16-cifar, resnet20, vgg-small.",
        )
