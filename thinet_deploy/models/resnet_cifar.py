"""ResNets for 32×32 images (He et al., 2016, section 4.2); parameter names of akamaster/pytorch_resnet_cifar10."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from .blocks import check_input, initialise

WIDTHS = (16, 32, 64)  # of the three stages


class Padding(nn.Module):
    """A shortcut without parameters: every `stride`-th pixel, and zero channels, half of them on either side.

    Args:
        stride: of the subsampling.
        more: channels that the output has more than the input.
    """

    def __init__(self, stride: int, more: int) -> None:
        super().__init__()
        self.stride, self.more = stride, more

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        """Shape (n, c, h, w) → (n, c + more, h / stride, w / stride)."""
        sparse = x_nchw[:, :, :: self.stride, :: self.stride]
        return F.pad(sparse, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut.

    Args:
        before: channels of the input.
        width: channels of the output.
        stride: of the first convolution.
    """

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity() if width == before else Padding(stride, width - before)

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        """Shape (n, before, h, w) → (n, width, h / stride, w / stride)."""
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x_nchw)))))
        return torch.relu(out + self.shortcut(x_nchw))


class CifarResNet(nn.Module):
    """A ResNet of three stages, 6n + 2 layers deep.

    Args:
        blocks: n, in each stage.
        input_shape: channels, height and width of the input.
        num_classes: number of outputs.
        widths: of the stages.
    """

    def __init__(
        self,
        blocks: int,
        *,
        input_shape: tuple[int, int, int],
        num_classes: int,
        widths: Sequence[int] = WIDTHS,
    ) -> None:
        super().__init__()
        check_input(f"ResNet-{6 * blocks + 2}", input_shape, 1)
        first, second, third = widths
        self.conv1, self.bn1 = nn.Conv2d(input_shape[0], first, 3, 1, 1, bias=False), nn.BatchNorm2d(first)
        self.layer1 = _stage(first, first, blocks, 1)
        self.layer2 = _stage(first, second, blocks, 2)
        self.layer3 = _stage(second, third, blocks, 2)
        self.linear = nn.Linear(third, num_classes)
        self.input_shape = input_shape
        self.apply(initialise)

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        """Logits (n, classes) of images (n, channels, height, width)."""
        x_nchw = torch.relu(self.bn1(self.conv1(x_nchw)))
        x_nchw = self.layer3(self.layer2(self.layer1(x_nchw)))
        return self.linear(x_nchw.mean((2, 3)))  # type: ignore[no-any-return]


def _stage(before: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(Block(before, width, stride), *(Block(width, width, 1) for _ in range(blocks - 1)))


def resnet_cifar(depth: int, input_shape: tuple[int, int, int] = (3, 32, 32), num_classes: int = 10) -> CifarResNet:
    """The ResNet of that depth, 6n + 2: 20, 32, 44, 56, 110."""
    return CifarResNet((depth - 2) // 6, input_shape=input_shape, num_classes=num_classes)
