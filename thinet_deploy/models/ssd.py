"""SSD: objects found in one pass, from default boxes on maps of several sizes (Liu et al., ECCV 2016)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .blocks import check_input, initialise
from .vgg import VGG16, Stages, convolutions

# Shapes of the default boxes on each map, width divided by height; those of the first and of the last two maps are
# fewer. Each stands for itself and its inverse; a square and a larger square come on top.
_FEW, _MANY = (2.0,), (2.0, 3.0)
_EXTRAS = 4  # maps behind the backbone's two, at most


class SSD(nn.Module):
    """SSD on a VGG of any widths; the backbone's parameters are called as in a VGG of the same widths.

    It differs from the paper in one layer: where the paper divides the fourth stage's map by its length over all
    channels, here is a BatchNorm, which keeps the channels apart, so that filters can go.

    Args:
        stages: conv widths of the backbone, stage by stage; five of them.
        input_shape: channels, height and width of the input.
        num_classes: classes with the background, which is class 0.
        norm: a BatchNorm behind every convolution of the backbone and of the maps behind it.

    Attributes:
        default_boxes: centre x, centre y, width and height as shares of the image, shape (k, 4).

    Raises:
        ModelError: the images are too small.
    """

    task: Literal["detection"] = "detection"

    def __init__(
        self, stages: Stages, *, input_shape: tuple[int, int, int], num_classes: int, norm: bool = False
    ) -> None:
        super().__init__()
        check_input("SSD", input_shape, 32)
        self.input_shape, self.num_classes = input_shape, num_classes
        self.features = nn.Sequential(*_backbone(stages, input_shape[0], norm=norm))
        # The fourth stage's map is read in front of its pool.
        self.early = [index for index, layer in enumerate(self.features) if isinstance(layer, nn.MaxPool2d)][3]
        self.early_norm = nn.BatchNorm2d(stages[3][-1])
        last, width = stages[4][-1], 2 * stages[4][-1]
        self.top = nn.Sequential(
            *_convolution(last, width, 3, norm=norm, padding=6, dilation=6), *_convolution(width, width, 1, norm=norm)
        )
        sizes = _sizes(input_shape[1:])
        widths = [stages[3][-1], width, *(width // 2 if index == 0 else width // 4 for index in range(len(sizes) - 2))]
        self.extras = nn.ModuleList(
            _extra(before, after, size, norm=norm)
            for (before, after), size in zip(pairwise(widths[1:]), sizes[1:-1], strict=True)
        )
        self.apply(initialise)
        ratios = _ratios(len(sizes))
        self.default_boxes = default_boxes(sizes, ratios)
        boxes = [2 + 2 * len(each) for each in ratios]
        self.classes = nn.ModuleList(_head(c, n * num_classes) for c, n in zip(widths, boxes, strict=True))
        self.boxes = nn.ModuleList(_head(c, n * 4) for c, n in zip(widths, boxes, strict=True))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Class logits (n, classes, k) and encoded boxes (n, 4, k) of images (n, channels, height, width)."""
        early = self.features[: self.early](x)
        maps = [self.early_norm(early), self.top(self.features[self.early :](early))]
        for extra in self.extras:
            maps.append(extra(maps[-1]))
        logits = [
            head(each).unflatten(1, (self.num_classes, -1)) for head, each in zip(self.classes, maps, strict=True)
        ]
        boxes = [head(each).unflatten(1, (4, -1)) for head, each in zip(self.boxes, maps, strict=True)]
        return torch.cat([each.flatten(2) for each in logits], 2), torch.cat([each.flatten(2) for each in boxes], 2)


def default_boxes(sizes: Sequence[tuple[int, int]], ratios: Sequence[Sequence[float]]) -> NDArray[np.float32]:
    """The boxes that predictions are relative to, in the order of the network's outputs.

    Sizes are the paper's (section 2.2), as its code rounds them: 0.1 of the image on the first map, and from 0.2 to
    0.9 on the others.

    Args:
        sizes: height and width of the maps.
        ratios: width divided by height, on each map.

    Returns:
        Centre x, centre y, width and height as shares of the image, shape (k, 4): map by map, and there shape by
        shape, row by row.
    """
    step = math.floor(70 / max(1, len(sizes) - 2)) / 100
    scales = [0.1, *(0.2 + step * index for index in range(len(sizes)))]
    parts = []
    for (height, width), mine, (scale, larger) in zip(sizes, ratios, pairwise(scales), strict=True):
        shapes = [(scale, scale), (math.sqrt(scale * larger),) * 2]
        shapes += [(scale * math.sqrt(each), scale / math.sqrt(each)) for r in mine for each in (r, 1 / r)]
        y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
        parts += [np.stack([x, y, np.full_like(x, w), np.full_like(x, h)], 2).reshape(-1, 4) for w, h in shapes]
    return np.concatenate(parts).astype(np.float32)


def ssd300(
    input_shape: tuple[int, int, int] = (3, 300, 300),
    num_classes: int = 21,
    *,
    stages: Stages = VGG16,
    norm: bool = False,
) -> SSD:
    """SSD300 on VGG-16 (8,732 default boxes at 300×300), or on other widths."""
    return SSD(stages, input_shape=input_shape, num_classes=num_classes, norm=norm)


def _backbone(stages: Stages, channels: int, *, norm: bool) -> list[nn.Module]:
    """VGG's convolutions; its pools round up, and the last one keeps the size."""
    layers = convolutions(stages, channels, [1] * len(stages), norm=norm)
    layers = [nn.MaxPool2d(2, ceil_mode=True) if isinstance(each, nn.MaxPool2d) else each for each in layers]
    return [*layers[:-1], nn.MaxPool2d(3, stride=1, padding=1)]


def _convolution(before: int, after: int, kernel: int, *, norm: bool, **how: int) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(before, after, kernel, **how)]  # type: ignore[arg-type]  # sizes are numbers
    return [*layers, *([nn.BatchNorm2d(after)] if norm else []), nn.ReLU(inplace=True)]


def _extra(before: int, after: int, size: tuple[int, int], *, norm: bool) -> nn.Sequential:
    """From a map of this size to a smaller one."""
    how = {} if _valid(size) else {"stride": 2, "padding": 1}
    narrow = max(1, after // 2)
    return nn.Sequential(*_convolution(before, narrow, 1, norm=norm), *_convolution(narrow, after, 3, norm=norm, **how))


def _valid(size: tuple[int, int]) -> bool:
    """Whether the next map is what a 3×3 convolution without padding leaves, as behind the 5×5 map of SSD300."""
    return min(size) >= 3 and max(size) <= 5


def _sizes(image: tuple[int, int]) -> list[tuple[int, int]]:
    """Height and width of the maps, for an image of this height and width."""
    eighth = (-(-image[0] // 8), -(-image[1] // 8))
    sizes = [eighth, ((eighth[0] + 1) // 2, (eighth[1] + 1) // 2)]
    while len(sizes) < 2 + _EXTRAS and max(sizes[-1]) > 1:
        height, width = sizes[-1]
        valid = _valid((height, width))
        sizes.append((height - 2, width - 2) if valid else ((height + 1) // 2, (width + 1) // 2))
    return sizes


def _ratios(maps: int) -> list[Sequence[float]]:
    return [_FEW if index == 0 or index >= max(2, maps - 2) else _MANY for index in range(maps)]


def _head(channels: int, outputs: int) -> nn.Conv2d:
    """Scores or boxes of a map; near zero at first, where no default box is sure of anything."""
    head = nn.Conv2d(channels, outputs, 3, padding=1)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)  # type: ignore[arg-type]  # it has one
    return head
