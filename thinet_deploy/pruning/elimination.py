"""Backward elimination: the channel whose removal costs least goes, the rest is refitted in closed form, and so on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

# From so many channels on, one in a hundred goes at once.
_ONE_BY_ONE = 256


@dataclass
class Part:
    """A consumer, or a block of a grouped one, as the elimination of a group's channels sees it.

    Attributes:
        channels: of the group that it reads, as indices into the group's channels, (c,).
        weight: refitted for all inputs, in units of what is judged, (O, c, s): s inputs per channel.
        inverse: (Σ + λI)⁻¹ of its inputs, restricted to those, (c · s, c · s).
    """

    channels: torch.Tensor
    weight: torch.Tensor
    inverse: torch.Tensor

    def costs(self) -> torch.Tensor:
        """What the squared error grows by when a channel goes and all others are refitted: tr(W_c H_cc⁻¹ W_cᵀ)."""
        count, size = self.weight.shape[1:]
        blocks = self.inverse.view(count, size, count, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        energy = torch.einsum("ocs,oct->cst", self.weight, self.weight)
        shares: torch.Tensor = torch.linalg.solve(blocks, energy)
        return shares.diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, gone: torch.Tensor) -> None:
        """Remove channels (indices into `channels`) and refit the rest."""
        filters, count, size = self.weight.shape
        stays = torch.ones(count, dtype=torch.bool)
        stays[gone] = False
        left = torch.nonzero(stays)[:, 0]
        mine, others = _inputs(gone, size), _inputs(left, size)
        rows = self.inverse[mine]
        gain = torch.linalg.solve(rows[:, mine], rows[:, others])  # H_cc⁻¹ H_c,rest
        flat = self.weight.reshape(filters, -1)
        self.weight = (flat[:, others] - flat[:, mine] @ gain).reshape(filters, len(left), size)
        self.inverse = self.inverse[others][:, others].addmm_(rows[:, others].T, gain, alpha=-1)
        self.channels = self.channels[left]


@dataclass(frozen=True)
class Removal:
    """In which order channels go, and what that costs.

    Attributes:
        order: indices into the group's channels, the first to go first.
        error: squared error, summed over the consumers, after 0, 1, 2 … of them are gone.
    """

    order: NDArray[np.int64]
    error: NDArray[np.float64]


def eliminate(parts: Sequence[Part], cells: NDArray[np.int64], steps: int, keep: int = 0) -> Removal:
    """Remove the channels of a group one after another.

    Args:
        parts: the group's consumers; used up.
        cells: per channel, the cell it is in; after each of `steps` equal rounds every cell has kept the same share.
        steps: of the group (`ChannelGroup.steps`).
        keep: stop when so many are left.

    Returns:
        The order of removal, until `keep` are left.
    """
    count = len(cells)
    quota = np.bincount(cells) // steps
    alive, left = np.ones(count, dtype=bool), quota.copy()
    order: list[int] = []
    error = [0.0]
    while count - len(order) > keep:
        if not left.any():
            left = quota.copy()
        costs = _total(parts, count)
        costs[~(alive & (left[cells] > 0))] = np.inf
        for channel in _cheapest(costs, left, cells, count - len(order) - keep):
            alive[channel] = False
            left[cells[channel]] -= 1
            order.append(channel)
            error.append(error[-1] + max(0.0, float(costs[channel])))
            for part in parts:
                if len(found := torch.nonzero(part.channels == channel)[:, 0]):
                    part.remove(found)
    return Removal(np.array(order, dtype=np.int64), np.array(error))


def _total(parts: Sequence[Part], count: int) -> NDArray[np.float64]:
    total = torch.zeros(count, dtype=torch.float64)
    for part in parts:
        if len(part.channels):
            total.index_add_(0, part.channels, part.costs())
    return total.numpy()


def _cheapest(
    costs: NDArray[np.float64], left: NDArray[np.int64], cells: NDArray[np.int64], most: int
) -> NDArray[np.int64]:
    """The next channel to go; in wide layers the cheapest hundredth of what is left, ties to the lowest index."""
    free = int(np.isfinite(costs).sum())
    several = 1 if free < _ONE_BY_ONE or left.sum() < len(cells) // 100 else max(1, free // 100)
    several = min(several, most) if len(np.unique(cells)) == 1 else 1
    return np.argsort(costs, kind="stable")[: min(several, int(left.sum()))]


def _inputs(channels: torch.Tensor, size: int) -> torch.Tensor:
    return (channels[:, None] * size + torch.arange(size)).flatten()
