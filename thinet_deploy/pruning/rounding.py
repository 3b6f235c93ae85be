"""Weights on a grid of integers, refitted while they are rounded: what a quantised consumer can still say.

Rounding each weight to the nearest step treats the inputs as if they were independent. Here each rounding error is made
up for by the weights that are not rounded yet, in closed form, from the inverse moments of what the layer really reads
(optimal brain quantisation: Frantar et al., GPTQ, ICLR 2023, equations 2 and 3); what is left of the mean goes into the
bias. Pure functions on moments: see moments.py for the words.
"""

from __future__ import annotations

import torch

from .moments import Centred
from .reconstruction import Solver

# λ as a share of the inputs' mean variance: inputs that hardly vary are not worth moving other weights for.
RIDGE = 0.01


def steps_of(weight_god: torch.Tensor, most: int) -> torch.Tensor:
    """Symmetric step of every filter, such that its largest weight is `most` steps, (G, O); of an empty one, tiny."""
    step = weight_god.abs().amax(2) / most
    return step.clamp(min=1e-6 * (float(step.max()) or 1 / most))


def nearest(weight_god: torch.Tensor, step_go: torch.Tensor, most: int) -> torch.Tensor:
    """Every weight to its nearest step, as whole numbers between -most and most, (G, O, D)."""
    return torch.clamp(torch.round(weight_god / step_go[..., None]), -most, most)


def with_feedback(
    weight_god: torch.Tensor, covariance_gdd: torch.Tensor, step_go: torch.Tensor, most: int, ridge: float = RIDGE
) -> torch.Tensor:
    """Round input by input, and let the inputs not rounded yet make up for each error.

    The inputs that vary most come first: their errors matter most, and most others are left to make up for them.

    Args:
        weight_god: in float64.
        covariance_gdd: of what the layer reads, once it is quantised.
        step_go: of every filter.
        most: largest whole number.
        ridge: λ as a share of the mean variance.

    Returns:
        Whole numbers between -most and most, (G, O, D).
    """
    blocks = zip(weight_god, covariance_gdd, step_go, strict=True)
    return torch.stack([_block(weight, covariance, step, most, ridge) for weight, covariance, step in blocks])


def _block(
    weight_od: torch.Tensor, covariance_dd: torch.Tensor, step_o: torch.Tensor, most: int, ridge: float
) -> torch.Tensor:
    order = torch.argsort(covariance_dd.diagonal(), descending=True, stable=True)
    penalty = ridge * float(covariance_dd.diagonal().mean()) or 1.0
    system = covariance_dd[order][:, order] + penalty * torch.eye(len(order), dtype=covariance_dd.dtype)
    # Row j of this factor is row j of the inverse of what is left once the inputs before j are rounded.
    factor = torch.linalg.cholesky(torch.linalg.inv(system), upper=True)
    left, rounded = weight_od[:, order].clone(), torch.empty_like(weight_od)
    for place in range(len(order)):
        column = left[:, place]
        whole = torch.clamp(torch.round(column / step_o), -most, most)
        rounded[:, order[place]] = whole
        error = (column - whole * step_o) / factor[place, place]
        left[:, place:] -= error[:, None] * factor[place, place:]
    return rounded


def refitted(weight_god: torch.Tensor, moments: Centred, ridge: float = RIDGE) -> torch.Tensor:
    """The weights that say on quantised inputs what was said on exact ones, before they are rounded, (G, O, D).

    Args:
        weight_god: of the exact layer.
        moments: of the quantised inputs, with the exact layer's outputs as targets.
        ridge: towards the given weights.
    """
    everything = torch.ones(weight_god.shape[0], weight_god.shape[2], dtype=torch.bool)
    return Solver(moments.covariance.clone(), everything, ridge)(moments.cross, weight_god)


def corrected_shift(weight_god: torch.Tensor, moments: Centred) -> torch.Tensor:
    """The bias with which these weights say the targets' mean on the inputs' mean, (G, O)."""
    return moments.target - (weight_god @ moments.mean[..., None])[..., 0]


def output_error(weight_god: torch.Tensor, shift_go: torch.Tensor, moments: Centred, variance: torch.Tensor) -> float:
    """Mean squared error of the layer's outputs against the targets, summed over filters.

    Args:
        weight_god: of the quantised layer.
        shift_go: its bias.
        moments: of what it reads and should say.
        variance: of the targets, (G, O).
    """
    explained = 2 * (weight_god * moments.cross).sum(2) - ((weight_god @ moments.covariance) * weight_god).sum(2)
    off = corrected_shift(weight_god, moments) - shift_go
    return float((variance - explained + off.square()).sum())
