"""A grouped convolution whose groups read channels of all groups before it (ShuffleNet, Zhang et al., CVPR 2018)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class ShuffledConv2d(nn.Conv2d):
    """A convolution behind a channel shuffle: Reshape, Transpose and Reshape in ONNX, which every runtime has.

    Args:
        shuffle: groups of the convolution before, whose channels are dealt out one by one.
        arguments: of nn.Conv2d, as well as all other named ones.
    """

    def __init__(self, *arguments: Any, shuffle: int, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.shuffle = shuffle

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        """Shape (n, c, h, w) → (n, filters, h', w')."""
        count, channels, height, width = x_nchw.shape
        apart = x_nchw.reshape(count, self.shuffle, channels // self.shuffle, height, width)
        return super().forward(apart.transpose(1, 2).reshape(count, channels, height, width))

    def extra_repr(self) -> str:
        """Of nn.Conv2d, and the shuffle."""
        return f"{nn.Conv2d.extra_repr(self)}, shuffle={self.shuffle}"  # type: ignore[no-untyped-call]
