"""Which channels stay: the paper's greedy loop, and what follows from it (thinet.md, sections 1 and 6)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from thinet_deploy.errors import InputError
from thinet_deploy.pruning.selection import keep_count, thinet

WIDTHS = (64, 128, 256, 512)


def direct_removal(rows: NDArray[np.float64], keep: int) -> list[int]:
    """ICCV 2017, algorithm 1, on the rows themselves."""
    removed: list[int] = []
    while rows.shape[1] - len(removed) > keep:
        rest = [j for j in range(rows.shape[1]) if j not in removed]
        costs = [float(((rows[:, removed].sum(1) + rows[:, j]) ** 2).sum()) for j in rest]
        removed.append(rest[int(np.argmin(costs))])
    return sorted(set(range(rows.shape[1])) - set(removed))


def some_rows(rng: np.random.Generator, channels: int) -> NDArray[np.float64]:
    """Correlated columns of different sizes, as activations are."""
    mix = rng.normal(size=(channels, channels)) * (rng.random((channels, channels)) < 0.4) + np.eye(channels)
    return np.asarray(rng.normal(size=(int(rng.integers(channels, 80)), channels)) @ mix * rng.gamma(1, size=channels))


def test_gram_form_equals_the_direct_loop_in_150_cases() -> None:
    rng = np.random.default_rng(0)
    for _ in range(150):
        channels = int(rng.integers(2, 20))
        rows, keep = some_rows(rng, channels), int(rng.integers(1, channels + 1))
        assert thinet(rows.T @ rows, keep).tolist() == direct_removal(rows, keep)


@settings(deadline=None)
@given(st.integers(2, 12), st.data())
def test_ties_go_to_the_lowest_index(channels: int, data: st.DataObject) -> None:
    # Small whole numbers make the sums exact, so that equal costs are equal.
    values = st.lists(st.integers(-1, 1), min_size=channels, max_size=channels)
    rows = np.array(data.draw(st.lists(values, min_size=1, max_size=6)), dtype=np.float64)
    keep = data.draw(st.integers(1, channels))
    assert thinet(rows.T @ rows, keep).tolist() == direct_removal(rows, keep)


def test_equal_channels_are_removed_front_to_back() -> None:
    assert thinet(np.eye(6), 2).tolist() == [4, 5]


def test_squares_of_sums_decide_and_not_sums_of_squares() -> None:
    # Removing two large channels that cancel costs nothing; each alone costs most.
    rows = np.array([[5.0, -5.0, 1.0, 2.0], [3.0, -3.0, -2.0, 1.0]]).repeat(4, 0)
    rows[:, 1] *= 0.99
    assert thinet(rows.T @ rows, 2).tolist() == direct_removal(rows, 2)
    big = np.array([[3.0, -3.0, 4.0]])
    assert thinet(big.T @ big, 1).tolist() == [2]


@pytest.mark.parametrize("seed", range(10))
def test_permuting_channels_permutes_the_answer(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, order = some_rows(rng, 17), rng.permutation(17)
    shuffled = rows[:, order]
    assert set(order[thinet(shuffled.T @ shuffled, 6)]) == set(thinet(rows.T @ rows, 6))


@pytest.mark.parametrize("keep", [1, 5, 12])
def test_the_answer_is_that_many_ascending_indices(keep: int) -> None:
    rows = some_rows(np.random.default_rng(keep), 12)
    gram = rows.T @ rows
    before = gram.copy()
    kept = thinet(gram, keep)
    assert len(kept) == keep
    assert (np.diff(kept) > 0).all()
    np.testing.assert_array_equal(gram, before)  # the input is not used up


@settings(deadline=None)
@given(st.integers(2, 16), st.data())
def test_dead_channels_go_first(channels: int, data: st.DataObject) -> None:
    dead = sorted(data.draw(st.sets(st.integers(0, channels - 1), min_size=1, max_size=channels - 1)))
    rows = some_rows(np.random.default_rng(channels), channels)
    rows[:, dead] = 0
    gram = rows.T @ rows
    assert thinet(gram, channels - len(dead)).tolist() == sorted(set(range(channels)) - set(dead))
    assert set(thinet(gram, channels - 1)) == set(range(channels)) - {dead[0]}


def test_a_dead_layer_keeps_as_many_as_asked() -> None:
    assert thinet(np.zeros((5, 5)), 2).tolist() == [3, 4]


@pytest.mark.parametrize(
    ("ratio", "kept"),
    [
        (0.7, (44, 89, 179, 358)),
        (0.5, (32, 64, 128, 256)),
        (0.3, (19, 38, 76, 153)),
        (0.4, (25, 51, 102, 204)),
        (0.1, (6, 12, 25, 51)),
        (1.0, WIDTHS),
    ],
)
def test_kept_widths_of_the_papers(ratio: float, kept: tuple[int, ...]) -> None:
    assert tuple(keep_count(width, ratio) for width in WIDTHS) == kept


@settings(deadline=None)
@given(st.integers(1, 4096), st.floats(0, 1, exclude_min=True))
def test_the_ratio_is_the_share_kept_truncated_and_never_none(channels: int, ratio: float) -> None:
    assert keep_count(channels, ratio) == max(1, int(channels * ratio)) <= channels


@settings(deadline=None)
@given(st.integers(1, 512))
def test_ratio_one_keeps_everything(channels: int) -> None:
    assert keep_count(channels, 1.0) == keep_count(channels, 1) == channels
    small = min(channels, 20)
    assert thinet(np.ones((small, small)), keep_count(small, 1.0)).tolist() == list(range(small))


@pytest.mark.parametrize("ratio", [0, -0.5, 1.0001, 2, 50, math.nan, math.inf, -math.inf])
def test_a_ratio_that_is_no_share_is_refused(ratio: float) -> None:
    with pytest.raises(InputError, match="keep ratio") as caught:
        keep_count(64, ratio)
    assert caught.value.hint
