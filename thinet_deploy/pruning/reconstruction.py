"""Least squares on the consumer, from second moments."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def scale(gram_cc: NDArray[np.float64], kept: NDArray[np.int64]) -> NDArray[np.float64]:
    """ThiNet's ŵ (ICCV 2017, equation 7): one scalar per kept channel, shared by all output filters, no intercept.

    argmin_w Σ (ŷ − wᵀx̂*)² with ŷ = Σ_c x̂_c, so ŵ = G_SS⁻¹ G_S,all·1.

    Args:
        gram_cc: G = X̂ᵀX̂ over all channels.
        kept: indices of the kept channels S.

    Returns:
        ŵ, one per kept channel; 1 for dead channels, whose scale is free.
    """
    weights, energy = np.ones(len(kept)), np.diagonal(gram_cc)
    alive = np.flatnonzero(energy[kept] > 0)
    live = kept[alive]
    if len(live) == np.count_nonzero(energy):  # all that contribute are kept: ŷ is their plain sum
        return weights
    system, target = gram_cc[np.ix_(live, live)], gram_cc[live].sum(1)
    # Channels that are multiples of one another make the system singular: lstsq takes the smallest ŵ.
    weights[alive] = np.linalg.lstsq(system, target, rcond=1e-10)[0]
    return weights


def relative_error(gram_cc: NDArray[np.float64], kept: NDArray[np.int64], weights: NDArray[np.float64]) -> float:
    """‖ŷ − wᵀx̂*‖² / ‖ŷ‖² on the rows behind the Gram matrix; 0 when the consumer's output is all zero."""
    coefficients = np.ones(len(gram_cc))
    coefficients[kept] -= weights
    total = float(gram_cc.sum())
    return max(0.0, float(coefficients @ gram_cc @ coefficients)) / total if total > 0 else 0.0
