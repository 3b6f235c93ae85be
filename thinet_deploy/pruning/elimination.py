"""Backward elimination: the channel whose removal costs least goes, the rest is refitted in closed form, and so on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

# From so many channels on, one in a hundred goes at once.
_ONE_BY_ONE = 256
# Of the channels, gone before the inverse is worked out anew.
_SHARE = 8


class Part:
    """A consumer, or a block of a grouped one, as the elimination of a group's channels sees it.

    Removing channel c takes H_:,c H_cc⁻¹ H_c,: off H and W_:,c H_cc⁻¹ H_c,: off W. W and the blocks H_cc, which the
    costs need, are kept up to date. H itself, which is large, is kept as it was together with the rows taken off since,
    and worked out when an eighth of its channels has gone: so most of the work is one matrix product.
    """

    def __init__(self, channels: torch.Tensor, weight_ocs: torch.Tensor, inverse: torch.Tensor) -> None:
        """Start with all channels.

        Args:
            channels: of the group that it reads, as indices into the group's channels, (c,).
            weight_ocs: refitted for all inputs, in units of what is judged; s inputs per channel.
            inverse: H = (Σ + λI)⁻¹ of its inputs, restricted to those, (c · s, c · s).
        """
        self.channels = channels
        self._weight_cso = weight_ocs.permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
        self._begin(inverse)

    def _begin(self, inverse: torch.Tensor) -> None:
        count, size = self._weight_cso.shape[:2]
        self._inverse = inverse
        self._rows, self._gains = inverse.new_empty(0, len(inverse)), inverse.new_empty(0, len(inverse))
        self._blocks = inverse.view(count, size, count, size).diagonal(dim1=0, dim2=2).movedim(-1, 0).clone()
        self._alive = torch.ones(count, dtype=torch.bool)

    def weight(self) -> torch.Tensor:
        """Of what is left, (O, c, s)."""
        return self._weight_cso[self._alive].permute(2, 0, 1)

    def costs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Channels that are left, and what the squared error grows by if each goes and all others are refitted.

        That is tr(W_c H_cc⁻¹ W_cᵀ).
        """
        weight = self._weight_cso[self._alive]
        shares: torch.Tensor = torch.linalg.solve(self._blocks[self._alive], torch.bmm(weight, weight.mT))
        return self.channels[self._alive], shares.diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, channels: torch.Tensor) -> None:
        """Remove some channels (indices into the group's) and refit the rest."""
        count, size, filters = self._weight_cso.shape
        gone = torch.nonzero(torch.isin(self.channels, channels) & self._alive)[:, 0]
        if not len(gone):
            return
        columns = _inputs(gone, size)
        rows = self._inverse[columns] - self._rows[:, columns].T @ self._gains
        gain = torch.linalg.solve(rows[:, columns], rows)  # H_cc⁻¹ H_c,:
        flat = self._weight_cso.view(-1, filters)
        flat.addmm_(gain.T, flat[columns], alpha=-1)
        row_blocks, gain_blocks = (each.view(-1, count, size).transpose(0, 1) for each in (rows, gain))
        self._blocks.baddbmm_(row_blocks.mT, gain_blocks, alpha=-1)
        self._rows, self._gains = torch.cat([self._rows, rows]), torch.cat([self._gains, gain])
        self._alive[gone] = False
        if len(self._rows) >= len(self._inverse) // _SHARE:
            self._work_out()

    def _work_out(self) -> None:
        left = _inputs(torch.nonzero(self._alive)[:, 0], self._weight_cso.shape[1])
        inverse = self._inverse[left][:, left].addmm_(self._rows[:, left].T, self._gains[:, left], alpha=-1)
        self.channels, self._weight_cso = self.channels[self._alive], self._weight_cso[self._alive]
        self._begin(inverse)


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
        gone = _cheapest(costs, left, cells, count - len(order) - keep)
        for channel in gone:
            alive[channel] = False
            left[cells[channel]] -= 1
            order.append(channel)
            error.append(error[-1] + max(0.0, float(costs[channel])))
        for part in parts:
            part.remove(torch.from_numpy(gone))
    return Removal(np.array(order, dtype=np.int64), np.array(error))


def _total(parts: Sequence[Part], count: int) -> NDArray[np.float64]:
    total = torch.zeros(count, dtype=torch.float64)
    for part in parts:
        total.index_add_(0, *part.costs())
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
