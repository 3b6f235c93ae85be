"""Which channels stay: pure functions on second moments or scores."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import NOT_FINITE, InputError

# Relative size of what `thinet_omp` takes for float noise: a Gram matrix in float64 knows no more about its columns.
NOISE = 1e-9


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
    cells = _one_cell(len(gram_cc)) if cells is None else cells
    left = np.bincount(cells) - _shares(cells, keep)  # to be removed from each cell
    cost = np.diagonal(gram_cc).copy()
    kept = np.ones(len(gram_cc), dtype=bool)
    for _ in range(int(left.sum())):
        j = int(np.argmin(np.where(kept & (left[cells] > 0), cost, np.inf)))
        kept[j] = False
        left[cells[j]] -= 1
        cost += 2 * gram_cc[:, j]
    return np.flatnonzero(kept)


def thinet_omp(gram_cc: NDArray[np.float64], keep: int, cells: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """ThiNet's greedy addition with refits (TPAMI 2019, orthogonal matching pursuit) in Gram form.

    Starts with the residual ρ = ŷ = Σ_c x̂_c; repeatedly adds the channel j that maximises (x̂_jᵀρ)² / x̂_jᵀx̂_j and
    takes out of ρ what all chosen channels explain by least squares. The refits are a Cholesky factorisation of the
    chosen part of G = X̂ᵀX̂ that grows by a row with every channel: O(channels · chosen) per step.

    Scores closer than NOISE of the best are equal, and so is everything once ρ is zero but for NOISE (the chosen
    channels explain ŷ): ties go to the lowest index. Dead channels (an all-zero x̂) come after all others. Channels
    that depend linearly on chosen ones leave ρ as it is. So there is an answer for every keep, whatever the rank.

    Args:
        gram_cc: G, (channels, channels).
        keep: channels to keep.
        cells: as in `thinet`.

    Returns:
        Kept channels, ascending.
    """
    cells = _one_cell(len(gram_cc)) if cells is None else cells
    left = _shares(cells, keep)  # to be added from each cell
    norm = np.sqrt(np.maximum(np.diagonal(gram_cc), 0))
    dead = norm == 0
    unit = np.where(dead, 1, norm)
    cosine_cc = gram_cc / unit[:, None] / unit
    # Everything below is in the span of x̂ / ‖x̂‖: products with ρ, and the chosen part's orthonormal basis.
    product = cosine_cc @ norm
    floor = NOISE * norm.sum()  # ‖ŷ‖ is at most this sum, and without its cancellations it sets the rounding
    basis_cs = np.zeros((len(gram_cc), int(left.sum())))
    chosen, rank = np.zeros(len(gram_cc), dtype=bool), 0
    for _ in range(basis_cs.shape[1]):
        score = np.where(np.abs(product) > floor, product**2, 0)
        score[dead] = -1
        score[chosen | (left[cells] == 0)] = -np.inf
        best = score.max()
        j = int(np.argmax(score >= best - NOISE * abs(best)))
        chosen[j] = True
        left[cells[j]] -= 1
        unexplained = cosine_cc[:, j] - basis_cs[:, :rank] @ basis_cs[j, :rank]
        if unexplained[j] > NOISE and not dead[j]:
            basis_cs[:, rank] = unexplained / np.sqrt(unexplained[j])
            product -= basis_cs[:, rank] * (product[j] / np.sqrt(unexplained[j]))
            rank += 1
    return np.flatnonzero(chosen)


def by_score(scores_c: NDArray[np.float64], keep: int, cells: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """The channels with the highest scores; of equal ones those with the lowest index.

    Args:
        scores_c: how much each channel is worth keeping, (channels,), from `scores`.
        keep: channels to keep.
        cells: as in `thinet`.

    Returns:
        Kept channels, ascending.

    Raises:
        InputError: a score is NaN.
    """
    if unclear := int(np.isnan(scores_c).sum()):
        raise InputError(
            f"{unclear} of {len(scores_c)} channels have NaN for a score, so they cannot be ranked.",
            hint=NOT_FINITE,
        )
    cells = _one_cell(len(scores_c)) if cells is None else cells
    order = np.argsort(-scores_c, kind="stable")
    best = [order[cells[order] == cell][:share] for cell, share in enumerate(_shares(cells, keep))]
    return np.sort(np.concatenate(best))


def _one_cell(channels: int) -> NDArray[np.int64]:
    return np.zeros(channels, dtype=np.int64)


def _shares(cells: NDArray[np.int64], keep: int) -> NDArray[np.int64]:
    """Channels that each cell keeps: the same share of every one."""
    return np.bincount(cells) * keep // len(cells)
