"""How sure a figure is that no image has for itself, such as mAP and mIoU: ten groups of images, left out in turn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ..intervals import Interval
from .base import Accuracy

GROUPS = 10
# Student's t at 97.5 %, for 1 to 9 degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Grouped:
    """Figures of all images, and the one that decides without each group of images.

    Attributes:
        accuracy: on all images.
        without: the figure that decides without each group, in percent, shape (groups,).
    """

    accuracy: Accuracy
    without: NDArray[np.float64]

    def behind(self, other: Self) -> Interval:
        """By how many points the other is better, both without the same groups in turn."""
        return jackknife(other.accuracy.main - self.accuracy.main, other.without - self.without)


def grouped(names: Sequence[str], whole: NDArray[np.float64], without: NDArray[np.float64], images: int) -> Grouped:
    """Figures with their intervals.

    Args:
        names: of the figures; the first one decides.
        whole: on all images, in percent, shape (figures,).
        without: each group, shape (groups, figures).
        images: how many there are.
    """
    intervals = [jackknife(float(value), left) for value, left in zip(whole, without.T, strict=True)]
    within = [Interval(each.value, max(0.0, each.low), min(100.0, each.high)) for each in intervals]
    return Grouped(Accuracy(dict(zip(names, within, strict=True)), images), without[:, 0])


def jackknife(value: float, without: NDArray[np.float64]) -> Interval:
    """95 % interval of a figure from its values without each of up to ten groups of images.

    An interval without width says no more than that no group of these images made a difference.

    Source: the delete-a-group jackknife, P. S. Kott, Journal of Official Statistics 17 (2001), 521-526.

    Args:
        value: on all images.
        without: the same without each group, shape (groups,).
    """
    groups = len(without)
    if groups < 2 or not np.isfinite(without).all():
        return Interval(value, value - 100, value + 100)
    variance = (groups - 1) / groups * float(np.square(without - without.mean()).sum())
    half = _T[groups - 2] * math.sqrt(variance)
    return Interval(value, value - half, value + half)
