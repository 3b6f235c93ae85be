"""VGG: plain 3×3 convolutions with bias, max pooling, fully connected head (ThiNet, section 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

# One tuple of widths per stage; a max pool follows every stage.
Stages = Sequence[Sequence[int]]

VGG16: Stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
VGG_SMALL: Stages = ((32, 32), (64, 64), (128, 128), (128, 128))


class VGG(nn.Module):
    """A VGG-style network; parameter names equal torchvision's.

    Args:
        stages: conv widths, stage by stage.
        hidden: widths of the hidden fully connected layers.
        input_shape: channels, height and width of the input.
        num_classes: number of outputs.
        dropout: probability in the head while training.
        norm: a BatchNorm behind every convolution (torchvision's vgg16_bn); the papers' network has none.
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
    ) -> None:
        super().__init__()
        channels, height, width = input_shape
        layers: list[nn.Module] = []
        for stage in stages:
            for filters in stage:
                layers.append(nn.Conv2d(channels, filters, 3, padding=1))
                layers += [nn.BatchNorm2d(filters)] if norm else []
                layers.append(nn.ReLU(inplace=True))
                channels = filters
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        map_size = (height >> len(stages), width >> len(stages))
        self.avgpool = nn.AdaptiveAvgPool2d(map_size)
        size = channels * map_size[0] * map_size[1]
        head: list[nn.Module] = []
        for units in hidden:
            head += [nn.Linear(size, units), nn.ReLU(inplace=True), nn.Dropout(dropout)]
            size = units
        self.classifier = nn.Sequential(*head, nn.Linear(size, num_classes))
        self.input_shape = input_shape
        self.apply(_initialise)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (n, classes) of images (n, channels, height, width)."""
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))  # type: ignore[no-any-return]


def _initialise(module: nn.Module) -> None:
    """He initialisation everywhere, biases zero: without BatchNorm, N(0, 0.01) in the head does not start to learn."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def vgg16(input_shape: tuple[int, int, int] = (3, 224, 224), num_classes: int = 1000) -> VGG:
    """VGG-16 as in the papers: 138.34M weights and 30.94B FLOPs at 224×224 with 1,000 classes."""
    return VGG(VGG16, (4096, 4096), input_shape=input_shape, num_classes=num_classes)


def vgg_small(input_shape: tuple[int, int, int] = (3, 32, 32), num_classes: int = 10) -> VGG:
    """An eight-conv VGG for 32×32 images, VGG-16's shape with narrower layers."""
    return VGG(VGG_SMALL, (256, 256), input_shape=input_shape, num_classes=num_classes, dropout=0.2)
