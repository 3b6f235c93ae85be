"""SqueezeNet v1.0 and v1.1 (Iandola et al., 2016, and the authors' repository); parameter names equal torchvision's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .blocks import check_input, initialise


@dataclass(frozen=True)
class SqueezeNetTable:
    """What the versions differ in.

    Attributes:
        first: filters and kernel of the first convolution, whose stride is 2.
        pooled: how many fire modules stand behind the first, the second and the third pool.
        least: pixels on a side, below which a map has none left.
        padding: of the last convolution: v1.0 as the authors released it has 1, which adds a border to its map.
    """

    first: tuple[int, int]
    pooled: tuple[int, int, int]
    least: int
    padding: int = 0


# Filters of the squeeze layer and of each of the two expand layers, fire module by fire module.
FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
V1_0 = SqueezeNetTable((96, 7), (3, 4, 1), 21)
V1_0_CAFFE = SqueezeNetTable((96, 7), (3, 4, 1), 21, padding=1)
V1_1 = SqueezeNetTable((64, 3), (2, 2, 4), 17)


class Fire(nn.Module):
    """A squeeze layer and the two expand layers that it feeds, concatenated.

    Args:
        before: channels of the input.
        squeeze: channels in between.
        expand: channels of each expand layer.
    """

    def __init__(self, before: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(before, squeeze, 1)
        self.expand1x1, self.expand3x3 = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        """Shape (n, before, h, w) → (n, 2 · expand, h, w)."""
        x_nchw = torch.relu(self.squeeze(x_nchw))
        return torch.cat([torch.relu(self.expand1x1(x_nchw)), torch.relu(self.expand3x3(x_nchw))], 1)


class SqueezeNet(nn.Module):
    """SqueezeNet from its table; pools round up.

    Args:
        table: which version.
        input_shape: channels, height and width of the input.
        num_classes: number of outputs.

    Raises:
        ModelError: the images are too small.
    """

    def __init__(self, table: SqueezeNetTable, *, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        check_input("SqueezeNet", input_shape, table.least)
        channels, kernel = table.first
        layers: list[nn.Module] = [nn.Conv2d(input_shape[0], channels, kernel, 2), nn.ReLU(inplace=True)]
        fires = iter(FIRES)
        for count in table.pooled:
            layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
            for _, (squeeze, expand) in zip(range(count), fires, strict=False):
                layers.append(Fire(channels, squeeze, expand))
                channels = 2 * expand
        self.features = nn.Sequential(*layers)
        last = nn.Conv2d(channels, num_classes, 1, padding=table.padding)
        self.classifier = nn.Sequential(nn.Dropout(), last, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1))
        self.input_shape = input_shape
        self.apply(initialise)
        nn.init.normal_(last.weight, std=0.01)  # the authors': a ReLU stands behind it, and dead classes stay dead

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (n, classes) of images (n, channels, height, width)."""
        return torch.flatten(self.classifier(self.features(x)), 1)


def squeezenet(input_shape: tuple[int, int, int] = (3, 227, 227), num_classes: int = 1000) -> SqueezeNet:
    """SqueezeNet v1.0 as released and as the papers count it: 227×227 images, the last convolution padded by 1."""
    return SqueezeNet(V1_0_CAFFE, input_shape=input_shape, num_classes=num_classes)


def squeezenet1_0(input_shape: tuple[int, int, int] = (3, 224, 224), num_classes: int = 1000) -> SqueezeNet:
    """SqueezeNet v1.0 as torchvision has it."""
    return SqueezeNet(V1_0, input_shape=input_shape, num_classes=num_classes)


def squeezenet1_1(input_shape: tuple[int, int, int] = (3, 224, 224), num_classes: int = 1000) -> SqueezeNet:
    """SqueezeNet v1.1: as accurate as v1.0, at 2.4 times less work (the authors' repository)."""
    return SqueezeNet(V1_1, input_shape=input_shape, num_classes=num_classes)
