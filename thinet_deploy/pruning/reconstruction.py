"""Least squares on the consumer, from second moments."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
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


class Ridge:
    """Σ + λI with λ = share · mean(diag Σ), factorised; of inputs that never change, λ is 1.

    Attributes:
        penalty: λ.
    """

    def __init__(self, covariance_dd: torch.Tensor, share: float) -> None:
        """Factorise; Σ is used up."""
        variance = float(covariance_dd.diagonal().mean()) if len(covariance_dd) else 0.0
        self.penalty = share * variance if variance else 1.0
        covariance_dd.diagonal().add_(self.penalty)
        self._factor, failed = torch.linalg.cholesky_ex(covariance_dd)
        self._inverse: torch.Tensor | None = None
        if int(failed):  # rounding made it indefinite
            self._inverse = torch.linalg.pinv(covariance_dd, hermitian=True)

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """(Σ + λI)⁻¹ R."""
        return torch.cholesky_solve(right, self._factor) if self._inverse is None else self._inverse @ right

    def inverse(self) -> torch.Tensor:
        """(Σ + λI)⁻¹."""
        return torch.cholesky_inverse(self._factor) if self._inverse is None else self._inverse


# Cross-covariances (G, O, D) and present weights (G, O, D) → new weights.
Solve = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Solver:
    """Ridge regressions of several targets on the same inputs, towards the present weights.

    W' = (B_S + λ W_S)(Σ_SS + λI)⁻¹, block by block. With the layer's own outputs as targets and all inputs kept W' = W.
    """

    def __init__(self, covariance_gdd: torch.Tensor, kept_gd: torch.Tensor, ridge: float) -> None:
        """Factorise.

        Args:
            covariance_gdd: Σ of G blocks with D inputs each.
            kept_gd: which inputs stay.
            ridge: λ as a share of the inputs' mean variance.
        """
        self._stay = [torch.nonzero(kept)[:, 0] for kept in kept_gd]
        self._ridges = [
            Ridge(covariance[stay][:, stay], ridge) for covariance, stay in zip(covariance_gdd, self._stay, strict=True)
        ]

    def __call__(self, cross_god: torch.Tensor, weight_god: torch.Tensor) -> torch.Tensor:
        """W' for B and W, (G, O, D), zero where inputs go."""
        new = torch.zeros_like(weight_god)
        for block, (stay, ridge) in enumerate(zip(self._stay, self._ridges, strict=True)):
            start = cross_god[block][:, stay] + ridge.penalty * weight_god[block][:, stay]
            new[block][:, stay] = ridge.solve(start.T).T
        return new
