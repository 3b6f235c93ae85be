"""A network with every kind of layer that is timed alone."""

import torch
from torch import nn


class Mixed(nn.Module):
    """Every kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5, stride=2, padding=2)
        self.deep = nn.Conv2d(8, 8, 3, padding="same", groups=8, dilation=2)
        self.pair, self.twice = nn.Conv2d(8, 12, 3, groups=2), nn.Conv2d(12, 12, 1)
        self.multiplied, self.head = nn.Conv2d(12, 24, 3, groups=12), nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(self.pair(self.deep(self.stem(x)))))
        return self.head(self.multiplied(x).mean((2, 3)))  # type: ignore[no-any-return]
