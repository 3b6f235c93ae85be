"""FCN-8s: a class for every pixel, from maps of three sizes (Long, Shelhamer and Darrell, CVPR 2015)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from .blocks import check_input, initialise
from .vgg import VGG16, Stages, convolutions


class FCN8s(nn.Module):
    """FCN-8s on a VGG of any widths; the backbone's parameters are called as in a VGG of the same widths.

    8s and not 16s or 32s: on VOC 2011 the paper gives 62.7 % mean IoU against 62.4 and 59.4 (its table 2), for two
    1×1 convolutions more. Two things are not the paper's: scores grow by bilinear interpolation, from which its
    transposed convolutions start, and no image is padded by 100 pixels, for maps of any size are brought to that of the
    map they are added to.

    Args:
        stages: conv widths of the backbone, stage by stage; five of them.
        hidden: widths of the fully connected layers as convolutions, 7×7 and then 1×1; () for none, as ThiNet-GAP.
        input_shape: channels, height and width of the input.
        num_classes: classes with the background, which is class 0.
        norm: a BatchNorm behind every convolution of the backbone.

    Raises:
        ModelError: the images are too small.
    """

    task: Literal["segmentation"] = "segmentation"

    def __init__(
        self,
        stages: Stages,
        hidden: Sequence[int],
        *,
        input_shape: tuple[int, int, int],
        num_classes: int,
        norm: bool = False,
    ) -> None:
        super().__init__()
        check_input("FCN-8s", input_shape, 32)
        self.input_shape = input_shape
        self.features = nn.Sequential(*convolutions(stages, input_shape[0], [1] * len(stages), norm=norm))
        pools = [index + 1 for index, layer in enumerate(self.features) if isinstance(layer, nn.MaxPool2d)]
        self.third, self.fourth = pools[2], pools[3]
        self.top, channels = nn.Sequential(), stages[4][-1]
        for index, units in enumerate(hidden):
            kernel = 1 if index else 7
            self.top.extend([nn.Conv2d(channels, units, kernel, padding=kernel // 2), nn.ReLU(inplace=True)])
            self.top.append(nn.Dropout2d(0.5))
            channels = units
        widths = (stages[2][-1], stages[3][-1], channels)
        self.score8, self.score16, self.score32 = (nn.Conv2d(width, num_classes, 1) for width in widths)
        self.apply(initialise)
        for score in (self.score8, self.score16, self.score32):  # as in the paper: all classes are equal at first
            nn.init.zeros_(score.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (n, classes, height, width) of images (n, channels, height, width)."""
        third = self.features[: self.third](x)
        fourth = self.features[self.third : self.fourth](third)
        top = self.top(self.features[self.fourth :](fourth))
        scores = self.score16(fourth)
        scores = scores + _grown(self.score32(top), scores)
        finer = self.score8(third)
        return _grown(finer + _grown(scores, finer), x)


def fcn8s(
    input_shape: tuple[int, int, int] = (3, 320, 320),
    num_classes: int = 21,
    *,
    stages: Stages = VGG16,
    hidden: Sequence[int] = (4096, 4096),
    norm: bool = False,
) -> FCN8s:
    """FCN-8s on VGG-16, or on other widths."""
    return FCN8s(stages, hidden, input_shape=input_shape, num_classes=num_classes, norm=norm)


def _grown(scores: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return F.interpolate(scores, size=like.shape[-2:], mode="bilinear", align_corners=False)
