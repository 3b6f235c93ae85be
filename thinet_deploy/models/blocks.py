"""What several networks are made of: initialisation, and the check that an image is large enough."""

from __future__ import annotations

from torch import nn

from ..errors import ModelError


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
