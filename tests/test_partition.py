"""Groups of a convolution by the error of what it says (gcos)."""

from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from thinet_deploy.pruning.partition import Layer, Partition, _Quota, balanced, by_position, choose, explained


def layer(
    weight_od: torch.Tensor, covariance: torch.Tensor, sources: NDArray[np.int64] | None = None, size: int = 1
) -> Layer:
    sources = np.zeros(len(covariance) // size, np.int64) if sources is None else sources
    return Layer(covariance, weight_od @ covariance, sources, 1e-6)


def covariance(inputs: int, seed: int = 0) -> torch.Tensor:
    mixing = torch.randn(inputs, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mixing @ mixing.T / inputs + 0.1 * torch.eye(inputs, dtype=torch.float64)


def partitions(count: int) -> list[NDArray[np.int64]]:
    """All ways to two equal groups."""
    return [np.isin(np.arange(count), chosen).astype(np.int64) for chosen in combinations(range(count), count // 2)]


# ---------------------------------------------------------------------------------------------- assignments


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([(1, 2), (2, 2), (3, 2), (1, 3), (2, 3), (1, 4), (1, 5)]), st.integers(0, 10**6))
def test_balanced_is_the_best_of_all(sizes: tuple[int, int], seed: int) -> None:
    each, groups = sizes
    gain = np.random.default_rng(seed).normal(size=(each * groups, groups))
    found = balanced(gain, np.zeros(len(gain), np.int64))
    assert (np.bincount(found, minlength=groups) == each).all()
    ways = set(permutations(np.repeat(np.arange(groups), each).tolist()))
    best = max(gain[np.arange(len(gain)), way].sum() for way in ways)
    assert gain[np.arange(len(gain)), found].sum() == pytest.approx(best, abs=1e-9)


def test_every_group_gets_as_many_of_every_kind() -> None:
    kinds = np.arange(24) % 3
    found = balanced(np.random.default_rng(0).normal(size=(24, 4)), kinds)
    assert (np.bincount(kinds * 4 + found) == 2).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 2), st.integers(0, 10**6))
def test_places_taken_in_any_order_leave_a_balanced_assignment(groups: int, each: int, kinds: int, seed: int) -> None:
    sources = np.arange(groups * each * kinds) % kinds
    rules, random = _Quota(sources, groups), np.random.default_rng(seed)
    for place in random.permutation(len(sources) * groups):
        rules.remove(int(place) // groups, int(place) % groups)
    found = rules.assignment()
    assert (np.bincount(sources * groups + found, minlength=groups * kinds) == each).all()


# ---------------------------------------------------------------------------------------------- partitions


@pytest.mark.parametrize(("groups", "size"), [(2, 1), (2, 9), (4, 1), (4, 4)])
def test_hidden_groups_are_found(groups: int, size: int) -> None:
    random = np.random.default_rng(1)
    inputs, filters = random.permutation(16) % groups, random.permutation(12) % groups
    same = torch.from_numpy(filters[:, None] == inputs[None]).repeat_interleave(size, 1)
    weight = torch.randn(12, 16 * size, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * same
    known = layer(weight, covariance(16 * size), size=size)
    found = choose(known, groups, seed=0)
    assert explained(known, found) == pytest.approx(1, abs=1e-4)
    agree = found.inputs[None] == found.filters[:, None]
    assert (agree == same[:, ::size].numpy()).all(), "the same inputs for every filter, whatever the groups' numbers"


@pytest.mark.parametrize("seed", range(4))
def test_near_the_best_of_all_partitions(seed: int) -> None:
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    known = layer(weight, covariance(6, seed))
    every = [explained(known, Partition(2, inputs, filters)) for inputs in partitions(6) for filters in partitions(6)]
    assert explained(known, choose(known, 2, seed=0)) >= np.quantile(every, 0.97)


def test_better_than_by_position_and_the_numbers_are_shares() -> None:
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    known = layer(weight, covariance(16, 3))
    chosen, plain = (explained(known, part) for part in (choose(known, 4, 0), by_position(16, 16, 4)))
    assert 0 < plain < chosen < 1


def test_every_source_goes_to_every_group_alike() -> None:
    sources = np.repeat([0, 1], 8)
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    part = choose(layer(weight, covariance(16, 4), sources), 4, seed=0)
    assert (np.bincount(sources * 4 + part.inputs) == 2).all()
    assert (np.bincount(part.filters) == 2).all()


def test_permuted_channels_give_the_permuted_partition() -> None:
    weight, sigma = torch.randn(8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64), covariance(8, 5)
    order = np.random.default_rng(6).permutation(8)
    first = choose(layer(weight, sigma), 2, seed=0)
    second = choose(layer(weight[:, order], sigma[order][:, order]), 2, seed=0)
    share = [explained(layer(weight, sigma), first), explained(layer(weight[:, order], sigma[order][:, order]), second)]
    assert share[0] == pytest.approx(share[1], rel=0.02)


def test_by_position_is_what_torch_does_behind_a_shuffle() -> None:
    part = by_position(12, 6, 3, shuffled_from=2)
    shuffled = torch.channel_shuffle(torch.arange(12.0).view(1, 12, 1, 1), 2).flatten().long()
    assert part.inputs[shuffled].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert by_position(12, 6, 3).inputs.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_dead_inputs_and_dead_filters_do_not_make_it_fail() -> None:
    sigma = covariance(8, 7)
    sigma[:3] = 0
    sigma[:, :3] = 0
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    weight[1] = 0
    part = choose(layer(weight, sigma), 2, seed=0)
    assert np.bincount(part.inputs).tolist() == [4, 4]
    assert np.bincount(part.filters).tolist() == [2, 2]
    assert np.isfinite(explained(layer(weight, sigma), part))
