"""How sure an accuracy is: confidence intervals of one network's and of the difference of two on the same images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
# Halvings of the range from -1 to 1: the bounds are exact to 1e-13.
_HALVINGS = 44


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        value: the estimate, in percent (of a difference: in percentage points).
        low: lower bound, in the same unit.
        high: upper bound.
    """

    value: float
    low: float
    high: float


def accuracy_interval(correct: int, images: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval of an accuracy; it holds its level with few images and near 0 and 100 % too.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927),
    209–212; recommended over the textbook's ±z·σ by Brown, Cai and DasGupta, Statistical Science 16 (2001), 101–133.

    Args:
        correct: images whose class was found.
        images: all images, at least 1.
        level: confidence, between 0 and 1.

    Returns:
        In percent.

    Raises:
        ValueError: there are no images, more correct ones than images, or `level` is no confidence.
    """
    if not 0 <= correct <= images or images < 1:
        raise ValueError(f"{correct} of {images} images is no accuracy.")
    z2 = _quantile(level) ** 2
    share = correct / images
    centre = (share + z2 / (2 * images)) / (1 + z2 / images)
    half = math.sqrt(z2 * (share * (1 - share) + z2 / (4 * images)) / images) / (1 + z2 / images)
    # The bound next to 0 or 1 is exactly there; rounding may leave 1e-17.
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == images else centre + half
    return Interval(100 * share, 100 * low, 100 * high)


def difference_interval(first: NDArray[np.bool_], second: NDArray[np.bool_], level: float = LEVEL) -> Interval:
    """Tango's score interval of the difference of two networks' accuracies on the same images, `first` - `second`.

    Images on which both are right or both are wrong say nothing but their number; what counts are those where one
    alone is right. So the interval is far narrower than two separate ones when the networks agree mostly. It has 0
    inside exactly when McNemar's test (without continuity correction) finds no difference at this level.

    Source: T. Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design, Statistics in Medicine 17 (1998), 891–908.

    Args:
        first: whether the first network is right, per image, shape (n,).
        second: the same of the second, for the same images in the same order.
        level: confidence, between 0 and 1.

    Returns:
        In percentage points.

    Raises:
        ValueError: there are no images, the shapes differ, or `level` is no confidence.
    """
    if first.shape != second.shape or first.ndim != 1 or not first.size:
        raise ValueError(f"Two networks on the same images, but the shapes are {first.shape} and {second.shape}.")
    if first.dtype != np.bool_ or second.dtype != np.bool_:
        raise ValueError(f"Right or wrong per image is asked for, but these are {first.dtype} and {second.dtype}.")
    gained, lost = int((first & ~second).sum()), int((~first & second).sum())
    return _paired(gained, lost, len(first), _quantile(level))


def unpaired_difference(first: Interval, second: Interval) -> Interval:
    """Newcombe's interval of the difference of two accuracies, `first` - `second`, from their Wilson intervals.

    For different images, or where it is not known which images each network got right: wider than a paired interval
    when two networks see the same images.

    Source: R. G. Newcombe, Interval estimation for the difference between independent proportions, Statistics in
    Medicine 17 (1998), 873-890, method 10.

    Args:
        first: from `accuracy_interval`.
        second: from `accuracy_interval`, at the same level.

    Returns:
        In percentage points.
    """
    difference = first.value - second.value
    down = math.hypot(first.value - first.low, second.high - second.value)
    up = math.hypot(first.high - first.value, second.value - second.low)
    return Interval(difference, difference - down, difference + up)


def _paired(gained: int, lost: int, images: int, z: float) -> Interval:
    """Tango's interval from the discordant pairs: right in the first alone, in the second alone."""
    high = _bound(gained, lost, images, z)
    low = -_bound(lost, gained, images, z)  # by symmetry
    return Interval(100 * (gained - lost) / images, 100 * low, 100 * high)


def _bound(gained: int, lost: int, images: int, z: float) -> float:
    """The largest difference whose score test does not refuse the counts; the score falls as the difference grows."""
    low, high = (gained - lost) / images, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _score(gained, lost, images, middle) >= -z:
            low = middle
        else:
            high = middle
    return high


def _score(gained: int, lost: int, images: int, difference: float) -> float:
    """Standardised distance of the counts from a difference, with the discordant share that fits it best (Tango, 4)."""
    linear = (2 * images - gained + lost) * difference - gained - lost
    constant = -lost * difference * (1 - difference)
    # The share of images on which the second alone is right, by maximum likelihood under this difference.
    share = (math.sqrt(linear**2 - 8 * images * constant) - linear) / (4 * images)
    variance = images * (2 * share + difference * (1 - difference))
    distance = gained - lost - images * difference
    if variance <= 0:  # no spread: the difference is -1, 0 or 1, and all images have to show it
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / math.sqrt(variance)


def _quantile(level: float) -> float:
    """The standard normal's quantile that leaves (1 - level) / 2 on either side."""
    if not 0 < level < 1:
        raise ValueError(f"A confidence level is between 0 and 1, but this is {level}.")
    return NormalDist().inv_cdf((1 + level) / 2)
