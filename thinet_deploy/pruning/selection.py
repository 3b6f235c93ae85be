"""Which channels stay: pure functions on second moments."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError


def keep_count(channels: int, ratio: float) -> int:
    """Channels kept at keep ratio r: int(C·r), truncated as in ThiNet (ICCV 2017, section 3.2), at least 1."""
    if not 0 < ratio <= 1:
        raise InputError(
            f"The keep ratio is {ratio}, but it must be above 0 and at most 1.",
            hint="--keep 0.5 keeps half of the filters.",
        )
    return max(1, int(channels * ratio))


def thinet(gram_cc: NDArray[np.float64], keep: int, cells: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """ThiNet's greedy removal (ICCV 2017, algorithm 1) in Gram form.

    Repeatedly removes the channel j that minimises ‖Σ_{t∈T} x̂_t + x̂_j‖₂ over the removed set T; with
    G = X̂ᵀX̂ that is the argmin of G_jj + 2·Σ_{t∈T} G_tj. Ties go to the lowest index.

    Args:
        gram_cc: G, (channels, channels).
        keep: channels to keep.
        cells: per channel, the cell it is in; every cell keeps the same share (`ChannelGroup`). None: one cell.

    Returns:
        Kept channels, ascending.
    """
    channels = len(gram_cc)
    cells = np.zeros(channels, dtype=np.int64) if cells is None else cells
    sizes = np.bincount(cells)
    left = sizes - sizes * keep // channels  # to be removed from each cell
    cost = np.diagonal(gram_cc).copy()
    kept = np.ones(channels, dtype=bool)
    for _ in range(int(left.sum())):
        j = int(np.argmin(np.where(kept & (left[cells] > 0), cost, np.inf)))
        kept[j] = False
        left[cells[j]] -= 1
        cost += 2 * gram_cc[:, j]
    return np.flatnonzero(kept)
