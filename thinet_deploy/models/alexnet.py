"""AlexNet: the original with its grouped convolutions, and the later one without (torchvision's)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .blocks import check_input, initialise

POOLED = (0, 1, 4)  # convolutions with a max pool behind them
KERNELS = (11, 5, 3, 3, 3)


@dataclass(frozen=True)
class AlexNetTable:
    """What the two versions differ in.

    Attributes:
        widths: filters of the five convolutions.
        groups: of the five convolutions.
        padding: of the first convolution; the others keep the size of their map.
        least: pixels on a side, below which a map has none left.
        local_norm: local response normalisation behind the first two.
        dropout_first: whether a dropout stands before a hidden layer (torchvision) or behind it (Caffe).
    """

    widths: tuple[int, ...]
    groups: tuple[int, ...]
    padding: int
    least: int
    local_norm: bool
    dropout_first: bool


CAFFE = AlexNetTable((96, 256, 384, 384, 256), (1, 2, 1, 2, 2), 0, 67, local_norm=True, dropout_first=False)
ONE_WEIRD_TRICK = AlexNetTable((64, 192, 384, 256, 256), (1,) * 5, 2, 63, local_norm=False, dropout_first=True)


class AlexNet(nn.Module):
    """AlexNet from its table; the parameter names of the ungrouped one equal torchvision's.

    Args:
        table: which version.
        input_shape: channels, height and width of the input.
        num_classes: number of outputs.

    Raises:
        ModelError: the images are too small.
    """

    def __init__(self, table: AlexNetTable, *, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        check_input("AlexNet", input_shape, table.least)
        self.features = nn.Sequential(*_features(table, input_shape[0]))
        side = [_map_size(size + 2 * table.padding) for size in input_shape[1:]]
        self.avgpool = nn.AdaptiveAvgPool2d((side[0], side[1]))  # changes nothing; torchvision's name
        self.classifier = _head(table, table.widths[-1] * side[0] * side[1], num_classes)
        self.input_shape = input_shape
        self.apply(initialise)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (n, classes) of images (n, channels, height, width)."""
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))  # type: ignore[no-any-return]


def _features(table: AlexNetTable, channels: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for index, (filters, groups, kernel) in enumerate(zip(table.widths, table.groups, KERNELS, strict=True)):
        stride, padding = (1, kernel // 2) if index else (4, table.padding)
        layers += [nn.Conv2d(channels, filters, kernel, stride, padding, groups=groups), nn.ReLU(inplace=True)]
        if table.local_norm and index < 2:
            layers.append(nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0))
        layers += [nn.MaxPool2d(3, 2)] if index in POOLED else []
        channels = filters
    return layers


def _map_size(padded: int) -> int:
    """Pixels on a side behind the last pool."""
    size = (padded - KERNELS[0]) // 4 + 1
    for _ in POOLED:
        size = (size - 3) // 2 + 1
    return size


def _head(table: AlexNetTable, size: int, num_classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs in (size, 4096):
        hidden: list[nn.Module] = [nn.Linear(inputs, 4096), nn.ReLU(inplace=True)]
        layers += [nn.Dropout(), *hidden] if table.dropout_first else [*hidden, nn.Dropout()]
    return nn.Sequential(*layers, nn.Linear(4096, num_classes))


def alexnet(input_shape: tuple[int, int, int] = (3, 227, 227), num_classes: int = 1000) -> AlexNet:
    """AlexNet as the papers count it: two groups in conv2, conv4 and conv5 (Krizhevsky et al., 2012; Caffe)."""
    return AlexNet(CAFFE, input_shape=input_shape, num_classes=num_classes)


def alexnet_owt(input_shape: tuple[int, int, int] = (3, 224, 224), num_classes: int = 1000) -> AlexNet:
    """AlexNet without groups (Krizhevsky, "One weird trick", 2014), which torchvision calls alexnet."""
    return AlexNet(ONE_WEIRD_TRICK, input_shape=input_shape, num_classes=num_classes)
