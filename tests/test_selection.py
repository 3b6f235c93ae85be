"""Which channels stay: the papers' greedy loops, and what follows from them (thinet.md, sections 1 and 6)."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from thinet_deploy.errors import InputError
from thinet_deploy.pruning.selection import NOISE, by_score, keep_count, thinet, thinet_omp

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


# --- greedy addition (TPAMI) -------------------------------------------------------------------------------------


def direct_addition(rows: NDArray[np.float64], keep: int) -> list[int]:
    """TPAMI's rule on the rows themselves, every refit from scratch; ties as `thinet_omp` has them."""
    target, energy, chosen = rows.sum(1), (rows**2).sum(0), list[int]()
    floor = (NOISE * np.sqrt(energy).sum()) ** 2
    while len(chosen) < keep:
        residual = target - rows[:, chosen] @ np.linalg.lstsq(rows[:, chosen], target)[0] if chosen else target
        scores = {}
        for j in set(range(rows.shape[1])) - set(chosen):
            score = (rows[:, j] @ residual) ** 2 / energy[j] if energy[j] > 0 else -1.0
            scores[j] = 0.0 if 0 <= score <= floor else float(score)
        best = max(scores.values())
        chosen.append(min(j for j, score in scores.items() if score >= best - NOISE * abs(best)))
    return sorted(chosen)


def error_of(rows: NDArray[np.float64], kept: NDArray[np.int64]) -> float:
    target = rows.sum(1)
    return float(np.linalg.norm(target - rows[:, kept] @ np.linalg.lstsq(rows[:, kept], target)[0]))


def test_addition_from_the_gram_matrix_equals_refits_on_the_rows_in_150_cases() -> None:
    rng = np.random.default_rng(1)
    for _ in range(150):
        channels = int(rng.integers(2, 20))
        rows, keep = some_rows(rng, channels), int(rng.integers(1, channels + 1))
        assert thinet_omp(rows.T @ rows, keep).tolist() == direct_addition(rows, keep)


@settings(deadline=None)
@given(st.integers(2, 10), st.integers(1, 12), st.integers(0, 2**31), st.data())
def test_addition_with_dead_and_repeated_channels_and_any_rank(
    channels: int, samples: int, seed: int, data: st.DataObject
) -> None:
    rows = np.random.default_rng(seed).normal(size=(samples, channels))
    index = st.integers(0, channels - 1)
    for one, other in data.draw(st.lists(st.tuples(index, index), max_size=4)):
        rows[:, one] = rows[:, other]
    rows[:, sorted(data.draw(st.sets(index, max_size=channels - 1)))] = 0
    keep = data.draw(st.integers(1, channels))
    kept = thinet_omp(rows.T @ rows, keep)
    assert kept.tolist() == direct_addition(rows, keep)
    alive = np.flatnonzero((rows**2).sum(0))
    # All live ones, or live ones only.
    assert set(kept) >= set(alive) or set(kept) <= set(alive)


@settings(deadline=None)
@given(st.integers(2, 10), st.data())
def test_ties_of_the_addition_go_to_the_lowest_index(channels: int, data: st.DataObject) -> None:
    values = st.lists(st.integers(-1, 1), min_size=channels, max_size=channels)
    rows = np.array(data.draw(st.lists(values, min_size=1, max_size=6)), dtype=np.float64)
    keep = data.draw(st.integers(1, channels))
    assert thinet_omp(rows.T @ rows, keep).tolist() == direct_addition(rows, keep)


@settings(deadline=None)
@given(st.integers(2, 16), st.integers(0, 2**31), st.data())
def test_the_order_and_number_of_rows_do_not_matter(channels: int, seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    rows, keep = some_rows(rng, channels), data.draw(st.integers(1, channels))
    shuffled = np.concatenate([rows] * data.draw(st.integers(1, 3)))
    rng.shuffle(shuffled)
    shuffled *= data.draw(st.sampled_from([1.0, 1e-6, 1e6]))  # nor their unit
    expected = thinet_omp(rows.T @ rows, keep)
    np.testing.assert_array_equal(thinet_omp(shuffled.T @ shuffled, keep), expected)


@pytest.mark.parametrize("seed", range(10))
def test_permuting_channels_permutes_the_addition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, order = some_rows(rng, 17), rng.permutation(17)
    shuffled = rows[:, order]
    assert set(order[thinet_omp(shuffled.T @ shuffled, 6)]) == set(thinet_omp(rows.T @ rows, 6))


def test_every_further_channel_is_an_addition_and_the_error_never_grows() -> None:
    rows = some_rows(np.random.default_rng(4), 20)
    before = rows.T @ rows
    kept = [thinet_omp(before, keep) for keep in range(1, 21)]
    np.testing.assert_array_equal(before, rows.T @ rows)  # the input is not used up
    for fewer, more in itertools.pairwise(kept):
        assert set(fewer) < set(more)
        assert error_of(rows, more) <= error_of(rows, fewer) + 1e-9
    assert error_of(rows, kept[-1]) < 1e-9


def test_one_channel_of_each_pair_is_enough_and_then_the_lowest_are_filled_up() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 4))[:, [0, 0, 1, 1, 2, 2, 3, 3]]
    gram = rows.T @ rows
    assert thinet_omp(gram, 4).tolist() == [0, 2, 4, 6]
    assert thinet_omp(gram, 6).tolist() == [0, 1, 2, 3, 4, 6]


def test_an_ill_conditioned_gram_matrix_breaks_nothing() -> None:
    rng = np.random.default_rng(0)
    line = rng.normal(size=(100, 1))
    rows = line + 1e-7 * rng.normal(size=(100, 12))  # all but one singular value within float noise of G
    rows[:, 3], rows[:, 7] = 0, 1e-160
    kept = thinet_omp(rows.T @ rows, 11)
    assert len(set(kept)) == 11
    assert 3 not in kept


def test_a_dead_layer_keeps_as_many_as_asked_by_addition() -> None:
    assert thinet_omp(np.zeros((5, 5)), 2).tolist() == [0, 1]


# --- scores and cells --------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.sampled_from([-1.0, 0.0, -0.0, 0.5, 2.0, math.inf]), min_size=1, max_size=12), st.data())
def test_the_highest_scores_stay_and_the_lowest_index_of_equal_ones(scores: list[float], data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, len(scores)))
    expected = sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:keep]
    assert by_score(np.array(scores), keep).tolist() == sorted(expected)


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(InputError, match=r"1 of 3 channels have NaN") as caught:
        by_score(np.array([1.0, math.nan, 2.0]), 2)
    assert caught.value.hint


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.data())
def test_every_cell_keeps_its_share_by_every_rule(seed: int, unit: int, data: st.DataObject) -> None:
    """Cells of 2·unit and unit channels, mixed."""
    rng = np.random.default_rng(seed)
    cells = rng.permutation(np.repeat([0, 0, 1, 2, 2], unit))
    step = data.draw(st.integers(0, unit))
    rows = some_rows(rng, 5 * unit)
    scores = rng.integers(3, size=5 * unit).astype(np.float64)
    gram = rows.T @ rows
    for kept in (thinet(gram, 5 * step, cells), thinet_omp(gram, 5 * step, cells), by_score(scores, 5 * step, cells)):
        assert np.bincount(cells[kept], minlength=3).tolist() == [2 * step, step, 2 * step]
        assert (np.diff(kept) > 0).all()
    for cell in range(3):
        mine = np.flatnonzero(cells == cell)
        share = len(mine) * step // unit
        kept = by_score(scores, 5 * step, cells)
        assert kept[cells[kept] == cell].tolist() == mine[by_score(scores[mine], share)].tolist()


def test_a_full_cell_is_passed_over_by_the_addition() -> None:
    rows = np.diag([4.0, 3.0, 2.0, 1.0])
    assert thinet_omp(rows.T @ rows, 2).tolist() == [0, 1]
    assert thinet_omp(rows.T @ rows, 2, np.array([0, 0, 1, 1])).tolist() == [0, 2]
