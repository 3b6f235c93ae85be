"""Layers with too many inputs for their moments: one factor per channel, as in the papers' ŵ, and a new bias.

A linear layer behind a flattened 512×7×7 map has 25,088 inputs; their second moments would take 5 GB. But what
channel c says to output o, y_oc = Σ_s w_ocs x_cs, has the moments G_cd = Σ_o E[y_oc y_od], C × C, which is ThiNet's
Gram matrix with all filters and positions. Least squares over all outputs at once, t_o ≈ b_o + Σ_c α_c y_oc, is then
an ordinary one with C inputs and a single filter, whose present weights are α = 1: elimination and refit need to know
no more. The biases b_o are free, so the means of every output are taken off: Σ_cd = G_cd − Σ_o E[y_oc] E[y_od].
"""

from __future__ import annotations

import torch

from .moments import Centred, Moments
from .sums import add_gram, mirror

_NUMBERS = 1 << 24  # contributions at a time


class ChannelSums:
    """Moments of what the channels say: patches (1, D), squares (1, C, C), targets (1, O), cross (1, 1, C)."""

    def __init__(self, weight_cso: torch.Tensor) -> None:
        """No rows yet; the weight is that of C channels with s inputs each, in float32."""
        channels, size, filters = weight_cso.shape

        def zeros(*sizes: int) -> torch.Tensor:
            return torch.zeros(1, *sizes, dtype=torch.float64)

        self.pieces = list[torch.Tensor]()  # never kept
        self._weight = weight_cso
        self._sums = Moments(0, zeros(channels * size), zeros(channels, channels), zeros(filters), zeros(1, channels))

    def add(self, patches_ngd: torch.Tensor, targets: torch.Tensor | None = None) -> None:
        """Take rows: patches (n, 1, D) and targets (n, O), if they are wanted, in float32."""
        channels, size, filters = self._weight.shape
        sums, step = self._sums, max(1, _NUMBERS // (channels * filters))
        sums.count += len(patches_ngd)
        sums.patches += patches_ngd.sum(0, dtype=torch.float64)
        for start in range(0, len(patches_ngd), step):
            inputs_cns = patches_ngd[start : start + step].reshape(-1, channels, size).transpose(0, 1)
            said = torch.bmm(inputs_cns, self._weight).flatten(1)  # (C, n · O)
            add_gram(sums.squares[0], said)
            if targets is not None:
                wanted = targets[start : start + step]
                sums.targets += wanted.sum(0, dtype=torch.float64)
                sums.cross[0, 0] += said @ wanted.flatten()

    def moments(self) -> Moments:
        """Of all rows; this ends the gathering."""
        mirror(self._sums.squares)
        return self._sums


def saying_by_channel(moments: Moments, weight_cso: torch.Tensor, shift_1o: torch.Tensor) -> Moments:
    """As `Moments.saying`: what all channels say together, and the shift, as targets."""
    said_co = _said(moments.patches, weight_cso)
    targets = said_co.sum(0)[None] + moments.count * shift_1o
    cross = moments.squares.sum(2)[:, None] + (said_co @ shift_1o[0])[None, None]
    return Moments(moments.count, moments.patches, moments.squares, targets, cross)


def centred_by_channel(moments: Moments, weight_cso: torch.Tensor, *, intercept: bool) -> Centred:
    """As `moments.centred`, for one filter over the channels; mean and target remain those of inputs and outputs."""
    count = max(moments.count, 1)
    mean, target = moments.patches / count, moments.targets / count
    if not intercept:
        mean, target = torch.zeros_like(mean), torch.zeros_like(target)
    said_co = _said(mean, weight_cso)
    covariance = moments.squares / count - said_co @ said_co.T
    return Centred(mean, covariance, target, moments.cross / count - (said_co @ target[0])[None, None])


def _said(inputs_1d: torch.Tensor, weight_cso: torch.Tensor) -> torch.Tensor:
    """What the channels say to one input, (C, O), in float64."""
    channels, size, _ = weight_cso.shape
    return torch.bmm(inputs_1d.view(channels, 1, size).to(weight_cso.dtype), weight_cso)[:, 0].double()
