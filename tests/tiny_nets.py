"""Networks as a user's own file has them; copied into the folder of the fixture `tiny`, never imported from here."""

import torch
from torch import nn


class Plain(nn.Module):
    """Plain convolutions and a fully connected head; small enough to be trained in a blink."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.input_shape = (1, 8, 8)
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Linear(8 * 2 * 2, 12), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(12, num_classes)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        logits: torch.Tensor = self.classifier(x.reshape(x.size(0), -1))  # which is ambiguous for an empty batch
        return logits


class Block(nn.Module):
    """Two convolutions with a shortcut around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Residual(nn.Module):
    """BatchNorm, two blocks with shortcuts, no fully connected head."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.input_shape = (1, 8, 8)
        self.stem, self.bn = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.blocks = nn.Sequential(Block(6), Block(6))
        self.linear = nn.Linear(6, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(self.blocks(torch.relu(self.bn(self.stem(x)))).mean((2, 3)))
        return logits


class FrozenBatch(Plain):
    """Cannot be exported for any batch size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(self.features(x).reshape(int(x.shape[0]), -1))
        return logits


def plain(num_classes: int) -> nn.Module:
    return Plain(num_classes)


def residual(num_classes: int) -> nn.Module:
    return Residual(num_classes)


def norm_of_points(num_classes: int) -> nn.Module:
    """BatchNorm over maps of 1x1, which cannot be trained on one image."""
    net = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)),
        *(nn.Flatten(), nn.Linear(6, num_classes)),
    )
    net.input_shape = (1, 8, 8)  # type: ignore[assignment]
    return net


def frozen_batch(num_classes: int) -> nn.Module:
    return FrozenBatch(num_classes)
