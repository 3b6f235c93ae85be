"""ResNet-50 with bottleneck blocks (He et al., 2016); parameter names equal torchvision's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .blocks import check_input, initialise

BLOCKS = (3, 4, 6, 3)  # of the four stages
INNER = (64, 128, 256, 512)  # channels between the convolutions of a block
OUTPUTS = (256, 512, 1024, 2048)  # of a block


class Bottleneck(nn.Module):
    """Three convolutions, 1×1, 3×3, 1×1, beside a shortcut.

    Args:
        before: channels of the input.
        inner: filters of the first two convolutions.
        after: channels of the output.
        stride: of the block.
        stride_first: whether the first convolution takes the steps (Caffe), or the second (torchvision).
    """

    def __init__(self, before: int, inner: int, after: int, stride: int, *, stride_first: bool) -> None:
        super().__init__()
        first, second = (stride, 1) if stride_first else (1, stride)
        self.conv1, self.bn1 = nn.Conv2d(before, inner, 1, first, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, second, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, after, 1, bias=False), nn.BatchNorm2d(after)
        self.downsample: nn.Module | None = None
        if before != after:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        """Shape (n, before, h, w) → (n, after, h / stride, w / stride)."""
        out = torch.relu(self.bn1(self.conv1(x_nchw)))
        out = self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(out)))))
        return torch.relu(out + (x_nchw if self.downsample is None else self.downsample(x_nchw)))


class ResNet50(nn.Module):
    """ResNet-50, or a thinner one of the same outer widths.

    Args:
        inner: filters of the first two convolutions of each block, per stage.
        input_shape: channels, height and width of the input.
        num_classes: number of outputs.
        stride_first: where blocks take their steps, see `Bottleneck`.
    """

    def __init__(
        self,
        inner: Sequence[int] = INNER,
        *,
        input_shape: tuple[int, int, int],
        num_classes: int,
        stride_first: bool,
    ) -> None:
        super().__init__()
        check_input("ResNet-50", input_shape, 1)
        self.conv1, self.bn1 = nn.Conv2d(input_shape[0], 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        widths = zip((64, *OUTPUTS), inner, OUTPUTS, strict=False)
        stages = [
            _stage(width, blocks, stride, stride_first=stride_first)
            for width, blocks, stride in zip(widths, BLOCKS, (1, 2, 2, 2), strict=True)
        ]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(OUTPUTS[-1], num_classes)
        self.input_shape = input_shape
        self.apply(initialise)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (n, classes) of images (n, channels, height, width)."""
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def _stage(widths: tuple[int, int, int], blocks: int, stride: int, *, stride_first: bool) -> nn.Sequential:
    before, inner, after = widths
    first = Bottleneck(before, inner, after, stride, stride_first=stride_first)
    return nn.Sequential(
        first, *(Bottleneck(after, inner, after, 1, stride_first=stride_first) for _ in range(blocks - 1))
    )


def resnet50(
    input_shape: tuple[int, int, int] = (3, 224, 224),
    num_classes: int = 1000,
    *,
    inner: Sequence[int] = INNER,
    stride_first: bool = False,
) -> ResNet50:
    """ResNet-50 as torchvision has it: a block's 3×3 convolution takes its steps."""
    return ResNet50(inner, input_shape=input_shape, num_classes=num_classes, stride_first=stride_first)


def resnet50_caffe(
    input_shape: tuple[int, int, int] = (3, 224, 224), num_classes: int = 1000, **table: Any
) -> ResNet50:
    """ResNet-50 as in the papers: a block's first 1×1 convolution takes its steps, 7.72B FLOPs instead of 8.18B."""
    return resnet50(input_shape, num_classes, stride_first=True, **table)
