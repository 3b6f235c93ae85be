"""What stands in the place of a residual branch that has vanished: its mean, and nothing."""

from __future__ import annotations

import torch
from torch import nn


class Constant(nn.Module):
    """Says the same at every place, whatever it reads; where a convolution was whose inputs have all gone.

    Args:
        bias_c: what it says in each channel, (channels,).
        rank: dimensions of a map, 2 for images.

    Attributes:
        bias: the same, trainable.
    """

    def __init__(self, bias_c: torch.Tensor, rank: int) -> None:
        super().__init__()
        self.bias, self.rank = nn.Parameter(bias_c), rank

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        """Shape (1, channels, 1, 1): the addition that it goes into spreads it."""
        return self.bias.view(1, -1, *[1] * self.rank)


class Nothing(nn.Module):
    """In the place of a layer whose outputs nobody needs: code that works on them still runs, on a single zero.

    Args:
        rank: dimensions of a map, 2 for images.
    """

    blank: torch.Tensor

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.register_buffer("blank", torch.zeros(1, 1, *[1] * rank), persistent=False)

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        """Shape (1, 1, 1, 1); a new tensor, for what follows may write into it."""
        return self.blank.clone()
