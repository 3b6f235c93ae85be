"""VGG: plain 3×3 convolutions with bias, max pooling, fully connected head (ThiNet, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from .blocks import check_input, initialise
from .shuffle import ShuffledConv2d

# One tuple of widths per stage; a max pool follows every stage.
Stages = Sequence[Sequence[int]]

VGG16: Stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
VGG_SMALL: Stages = ((32, 32), (64, 64), (128, 128), (128, 128))
# Groups per stage of VGG-16. With ThiNet-Tiny's widths they leave the papers' 2.66 MB; which layers the papers group,
# and in how many groups, is not known: this layout is ours (thinet.md, section 2).
GCOS = (1, 1, 1, 2, 4)


class VGG(nn.Module):
    """A VGG-style network; parameter names equal torchvision's.

    Args:
        stages: conv widths, stage by stage.
        hidden: widths of the hidden fully connected layers.
        input_shape: channels, height and width of the input.
        num_classes: number of outputs.
        dropout: probability in the head while training.
        norm: a BatchNorm behind every convolution (torchvision's vgg16_bn); the papers' network has none.
        gap: ThiNet-GAP's head: no pool behind the last stage, the average over its map, and one linear layer.
        groups: of the convolutions, stage by stage, with a channel shuffle between two that have groups (gcos).

    Raises:
        ModelError: the images are too small for that many pools.
    """

    def __init__(
        self,
        stages: Stages,
        hidden: Sequence[int],
        *,
        input_shape: tuple[int, int, int],
        num_classes: int,
        dropout: float = 0.5,
        norm: bool = False,
        gap: bool = False,
        groups: Sequence[int] = (),
    ) -> None:
        super().__init__()
        pools = len(stages) - gap
        check_input(f"A VGG with {pools} pools", input_shape, 2**pools)
        layers = convolutions(stages, input_shape[0], groups or [1] * len(stages), norm=norm)
        self.features = nn.Sequential(*layers[: -1 if gap else None])
        height, width = (1, 1) if gap else (size >> pools for size in input_shape[1:])
        self.avgpool = nn.AdaptiveAvgPool2d((height, width))
        size = stages[-1][-1] * height * width
        head: list[nn.Module] = []
        for units in () if gap else hidden:
            head += [nn.Linear(size, units), nn.ReLU(inplace=True), nn.Dropout(dropout)]
            size = units
        self.classifier = nn.Sequential(*head, nn.Linear(size, num_classes))
        self.input_shape = input_shape
        self.apply(initialise)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (n, classes) of images (n, channels, height, width)."""
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))  # type: ignore[no-any-return]


def convolutions(stages: Stages, channels: int, groups: Sequence[int], *, norm: bool) -> list[nn.Module]:
    """VGG's layers in front of the head, a max pool behind every stage.

    Args:
        stages: conv widths, stage by stage.
        channels: of the input.
        groups: of the convolutions, stage by stage.
        norm: a BatchNorm behind every convolution.
    """
    layers: list[nn.Module] = []
    before = 1
    for stage, mine in zip(stages, groups, strict=True):
        for filters in stage:
            kind = partial(ShuffledConv2d, shuffle=before) if before > 1 and mine > 1 else nn.Conv2d
            layers.append(kind(channels, filters, 3, padding=1, groups=mine))
            layers += [nn.BatchNorm2d(filters)] if norm else []
            layers.append(nn.ReLU(inplace=True))
            channels, before = filters, mine
        layers.append(nn.MaxPool2d(2))
    return layers


def vgg16(
    input_shape: tuple[int, int, int] = (3, 224, 224),
    num_classes: int = 1000,
    *,
    stages: Stages = VGG16,
    hidden: Sequence[int] = (4096, 4096),
    norm: bool = False,
    gap: bool = False,
    groups: Sequence[int] = (),
) -> VGG:
    """VGG-16 as in the papers: 138.34M weights and 30.94B FLOPs at 224×224 with 1,000 classes; or other widths."""
    shape = input_shape
    return VGG(stages, hidden, input_shape=shape, num_classes=num_classes, norm=norm, gap=gap, groups=groups)


def vgg16_bn(input_shape: tuple[int, int, int] = (3, 224, 224), num_classes: int = 1000, **table: Any) -> VGG:
    """VGG-16 with a BatchNorm behind every convolution; `table` as for `vgg16`."""
    return vgg16(input_shape, num_classes, norm=True, **table)


def vgg16_cifar(input_shape: tuple[int, int, int] = (3, 32, 32), num_classes: int = 10, **table: Any) -> VGG:
    """VGG-16 for 32×32 images: BatchNorm, and one hidden layer of 512 units (Li et al., ICLR 2017, section 4.1)."""
    return vgg16(input_shape, num_classes, norm=True, hidden=(512,), **table)


def vgg_small(input_shape: tuple[int, int, int] = (3, 32, 32), num_classes: int = 10) -> VGG:
    """An eight-conv VGG for 32×32 images, VGG-16's shape with narrower layers."""
    return VGG(VGG_SMALL, (256, 256), input_shape=input_shape, num_classes=num_classes, dropout=0.2)
