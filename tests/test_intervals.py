"""intervals.py: published values, edges, and that 95 % of the intervals hold the truth."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from thinet_deploy.intervals import Interval, accuracy_interval, difference_interval

REPETITIONS = 2000
# Of the share of 2,000 intervals that hold the truth, with 95 % expected: ±3 σ, and the discreteness of small samples.
COVERED = (0.93, 0.97)


def pair(both: int, gained: int, lost: int, neither: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Right or wrong per image of two networks, from the four counts."""
    cells = np.repeat([[1, 1], [1, 0], [0, 1], [0, 0]], [both, gained, lost, neither], axis=0).astype(bool)
    return cells[:, 0], cells[:, 1]


def holds(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


@pytest.mark.parametrize(
    ("correct", "images", "low", "high"),
    [(81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05), (0, 20, 0.0, 16.11), (1, 29, 0.61, 17.18), (20, 20, 83.89, 100)],
)
def test_wilson_as_published(correct: int, images: int, low: float, high: float) -> None:
    """Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3; the last by symmetry."""
    found = accuracy_interval(correct, images)
    assert found.value == pytest.approx(100 * correct / images)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.006)


def test_tango_as_published() -> None:
    """Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014), 2850-2875: Bentur's trial, 1, 1, 7, 12."""
    found = difference_interval(*pair(1, 1, 7, 12))
    assert found.value == pytest.approx(-100 * 6 / 21)
    assert (found.low, found.high) == pytest.approx((-51.7, -2.6), abs=0.06)


@given(*[st.integers(0, 40)] * 4)
@settings(max_examples=150, deadline=None)
def test_the_bounds_of_a_difference_are_where_the_score_is_z(both: int, gained: int, lost: int, neither: int) -> None:
    """Against the likelihood itself: the discordant shares that fit best, by brute force, and their score."""
    images = both + gained + lost + neither
    if not images:
        return
    found = difference_interval(*pair(both, gained, lost, neither))
    assert -100 <= found.low <= found.value <= found.high <= 100
    for bound in (found.low / 100, found.high / 100):
        if abs(bound) > 0.999:
            continue
        # Second alone right: share; first alone: share + bound. The rest agrees.
        shares = np.linspace(max(0, -bound), (1 - bound) / 2, 40001)[1:-1]
        loglik = gained * np.log(shares + bound) + lost * np.log(shares)
        if rest := both + neither:
            loglik = loglik + rest * np.log1p(-2 * shares - bound)
        best = shares[loglik.argmax()]
        score = (gained - lost - images * bound) / math.sqrt(images * (2 * best + bound - bound**2))
        assert abs(score) == pytest.approx(1.96, abs=0.02)


@given(*[st.integers(0, 60)] * 4)
@settings(max_examples=100, deadline=None)
def test_a_difference_is_mirrored_and_agrees_with_mcnemar(both: int, gained: int, lost: int, neither: int) -> None:
    if not both + gained + lost + neither:
        return
    first, second = pair(both, gained, lost, neither)
    found, mirrored = difference_interval(first, second), difference_interval(second, first)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), abs=1e-9)
    differ = abs(gained - lost) > 1.959964 * math.sqrt(gained + lost)
    assert holds(found, 0) is not differ


def test_order_and_images_alike_in_both_change_little() -> None:
    first, second = pair(700, 40, 20, 240)
    order = np.random.default_rng(0).permutation(1000)
    assert difference_interval(first[order], second[order]) == difference_interval(first, second)
    assert difference_interval(*pair(240, 40, 20, 700)) == difference_interval(first, second), "how both agree is one"


def test_pairing_narrows() -> None:
    first, second = pair(8600, 100, 60, 1240)
    paired = difference_interval(first, second)
    apart = [accuracy_interval(int(each.sum()), len(each)) for each in (first, second)]
    assert paired.low > 0
    assert apart[0].low < apart[1].high, "the separate intervals overlap"


def test_more_confidence_is_wider() -> None:
    for narrow, wide in (
        (accuracy_interval(80, 100, 0.9), accuracy_interval(80, 100, 0.99)),
        (difference_interval(*pair(70, 9, 4, 17), 0.9), difference_interval(*pair(70, 9, 4, 17), 0.99)),
    ):
        assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


@pytest.mark.parametrize(("images", "truth"), [(40, 0.9), (900, 0.97), (900, 0.5), (10000, 0.87)])
def test_an_accuracy_is_covered(images: int, truth: float) -> None:
    rng = np.random.default_rng(images)
    drawn = rng.binomial(images, truth, REPETITIONS)
    covered = np.mean([holds(accuracy_interval(int(correct), images), 100 * truth) for correct in drawn])
    assert COVERED[0] < covered < COVERED[1]


@pytest.mark.parametrize(
    ("images", "shares"),
    [
        (10000, (0.85, 0.03, 0.02, 0.10)),  # a pruned network on CIFAR-10's test images
        (10000, (0.30, 0.57, 0.01, 0.12)),  # one that lost nearly all
        (897, (0.95, 0.015, 0.015, 0.02)),  # the digits: a dozen images on either side
        (400, (0.90, 0.03, 0.01, 0.06)),  # photos10
        (100, (0.60, 0.20, 0.10, 0.10)),
    ],
)
def test_a_difference_is_covered(images: int, shares: tuple[float, ...]) -> None:
    rng = np.random.default_rng(images)
    truth = 100 * (shares[1] - shares[2])
    intervals = [difference_interval(*pair(*counts)) for counts in rng.multinomial(images, shares, REPETITIONS)]
    assert COVERED[0] < np.mean([holds(each, truth) for each in intervals]) < COVERED[1]


def test_what_is_no_result_is_refused() -> None:
    for correct, images in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="no accuracy"):
            accuracy_interval(correct, images)
    right = np.ones(3, bool)
    with pytest.raises(ValueError, match="shapes"):
        difference_interval(right, right[:2])
    with pytest.raises(ValueError, match="shapes"):
        difference_interval(right[:0], right[:0])
    with pytest.raises(ValueError, match="Right or wrong"):
        difference_interval(right.astype(int), right)
    for level in (0.0, 1.0, 95.0):
        with pytest.raises(ValueError, match="confidence"):
            accuracy_interval(1, 2, level)
