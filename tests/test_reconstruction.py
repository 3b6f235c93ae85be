"""Least squares on the consumer: one scalar per kept channel, folded into its weights (thinet.md, section 1)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.graph import ChannelGroup
from thinet_deploy.pruning.plan import empty_plan, plan_channels
from thinet_deploy.pruning.reconstruction import relative_error, scale
from thinet_deploy.pruning.selection import thinet
from thinet_deploy.pruning.surgery import apply, fold_scale
from thinet_deploy.pruning.trace import example_inputs

Rows = NDArray[np.float64]


def some_rows(seed: int, channels: int = 10, rows: int = 60) -> Rows:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.normal(size=(rows, channels)) @ (rng.normal(size=(channels, channels)) + np.eye(channels)))


def error_on(rows: Rows, kept: NDArray[np.int64], weights: NDArray[np.float64]) -> float:
    """‖ŷ − wᵀx̂*‖² / ‖ŷ‖², on the rows themselves."""
    target = rows.sum(1)
    return float(((target - rows[:, kept] @ weights) ** 2).sum() / (target**2).sum())


def random_case(seed: int, channels: int) -> tuple[Rows, NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    kept = np.sort(rng.permutation(channels)[: int(rng.integers(1, channels + 1))])
    return some_rows(seed, channels), kept


cases = st.builds(random_case, st.integers(0, 10**6), st.integers(2, 14))


@settings(max_examples=60, deadline=None)
@given(cases)
def test_weights_are_those_of_least_squares_on_the_rows(case: tuple[Rows, NDArray[np.int64]]) -> None:
    rows, kept = case
    expected = np.linalg.lstsq(rows[:, kept], rows.sum(1))[0]
    np.testing.assert_allclose(scale(rows.T @ rows, kept), expected, rtol=1e-5, atol=1e-6)


def test_a_nearly_dead_channel_does_not_get_a_huge_weight() -> None:
    rows = some_rows(1)
    rows[:, 3] *= 1e-8  # least squares on the rows would give it a weight of some millions
    kept = np.array([0, 3, 5, 6, 8])
    weights = scale(rows.T @ rows, kept)
    assert np.abs(weights).max() < 10
    others = np.array([0, 5, 6, 8])
    np.testing.assert_allclose(weights[[0, 2, 3, 4]], scale(rows.T @ rows, others), rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(cases)
def test_least_squares_is_never_worse_than_no_weights(case: tuple[Rows, NDArray[np.int64]]) -> None:
    rows, kept = case
    gram = rows.T @ rows
    with_weights = relative_error(gram, kept, scale(gram, kept))
    assert 0 <= with_weights <= relative_error(gram, kept, np.ones(len(kept))) + 1e-12


@settings(max_examples=60, deadline=None)
@given(cases)
def test_the_relative_error_is_that_of_the_rows(case: tuple[Rows, NDArray[np.int64]]) -> None:
    rows, kept = case
    weights = np.random.default_rng(0).normal(size=len(kept))
    expected = error_on(rows, kept, weights)
    assert relative_error(rows.T @ rows, kept, weights) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_error_of_a_silent_consumer_is_zero() -> None:
    assert relative_error(np.zeros((4, 4)), np.array([0, 2]), np.ones(2)) == 0


def with_dead_and_equal(rows: Rows) -> Rows:
    rows = rows.copy()
    rows[:, [1, 4]] = 0
    rows[:, 6] = rows[:, 5]
    rows[:, 8] = -3 * rows[:, 7]
    return rows


@pytest.mark.parametrize("damage", [np.copy, with_dead_and_equal, np.zeros_like])
def test_keeping_everything_gives_weights_of_exactly_one(damage: Callable[[Rows], Rows]) -> None:
    rows = damage(some_rows(2))
    assert scale(rows.T @ rows, np.arange(10)).tolist() == [1.0] * 10


def test_removing_dead_channels_only_gives_weights_of_exactly_one() -> None:
    rows = with_dead_and_equal(some_rows(2))
    gram = rows.T @ rows
    kept = thinet(gram, 8)
    assert kept.tolist() == [0, 2, 3, 5, 6, 7, 8, 9]
    assert scale(gram, kept).tolist() == [1.0] * 8
    assert relative_error(gram, kept, np.ones(8)) == 0


@pytest.mark.parametrize("kept", [[0, 1, 2], [1, 4], [1, 5, 6, 7], [0, 3, 5, 6], [4, 7, 8], [1]])
def test_dead_and_equal_channels_do_not_break_the_solve(kept: list[int]) -> None:
    rows, chosen = with_dead_and_equal(some_rows(3)), np.array(kept)
    weights = scale(rows.T @ rows, chosen)
    assert np.isfinite(weights).all()
    assert np.abs(weights).max() < 10
    assert (weights[np.isin(chosen, [1, 4])] == 1).all()  # dead: free, and left alone
    best = np.linalg.lstsq(rows[:, chosen], rows.sum(1))[0]
    assert error_on(rows, chosen, weights) == pytest.approx(error_on(rows, chosen, best), abs=1e-9)


def test_equal_channels_share_the_weight_of_the_removed_one() -> None:
    rows = some_rows(4, channels=3)
    rows = rows[:, [0, 0, 0, 1, 2]]
    np.testing.assert_allclose(scale(rows.T @ rows, np.array([0, 2, 3, 4])), [1.5, 1.5, 1, 1], rtol=1e-6)


def network(kind: str) -> tuple[nn.Module, ChannelGroup]:
    torch.manual_seed(0)
    rest: dict[str, list[nn.Module]] = {
        "conv": [nn.Conv2d(6, 5, 3)],
        "grouped": [nn.Conv2d(6, 4, 3, groups=2)],
        "transposed": [nn.ConvTranspose2d(6, 5, 3)],
        "linear": [nn.Flatten(), nn.Linear(6 * 16, 5)],
    }
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), *rest[kind]).eval()
    return model, channel_graph(model, example_inputs(model, (2, 6, 6))).groups[0]


KINDS = ["conv", "grouped", "transposed", "linear"]


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_everything_leaves_the_network_as_it_was(kind: str) -> None:
    model, group = network(kind)
    rows = some_rows(5, channels=6)
    kept = thinet(rows.T @ rows, 6, group.cells)
    plan = plan_channels(model, channel_graph(model, example_inputs(model, (2, 6, 6))), np.ones(6, dtype=bool))
    assert plan == empty_plan(model)
    thin = apply(plan, model)
    fold_scale(thin, group, plan, scale(rows.T @ rows, kept))
    images = torch.randn(3, 2, 6, 6)
    assert torch.equal(thin(images), model(images))


def scaled_by_hand(model: nn.Module, images: torch.Tensor, factors: NDArray[np.float64]) -> torch.Tensor:
    parts: Any = model
    outputs: torch.Tensor = parts[2:](parts[:2](images) * torch.from_numpy(factors).float().view(1, -1, 1, 1))
    return outputs


@pytest.mark.parametrize("kind", KINDS)
def test_folding_scales_what_each_channel_contributes_and_leaves_the_bias(kind: str) -> None:
    model, group = network(kind)
    weights = np.array([1.5, -2, 0, 1, 0.25, 3])
    scaled = copy.deepcopy(model)
    fold_scale(scaled, group, empty_plan(model), weights)
    images = torch.randn(3, 2, 6, 6)
    torch.testing.assert_close(scaled(images), scaled_by_hand(model, images, weights), rtol=1e-5, atol=1e-6)
    bias = group.consumers[0].weight.replace("weight", "bias")
    assert torch.equal(scaled.get_parameter(bias), model.get_parameter(bias))


@pytest.mark.parametrize("kind", KINDS)
def test_folding_into_a_pruned_network_scales_the_channels_that_are_left(kind: str) -> None:
    model, group = network(kind)
    graph, kept = channel_graph(model, example_inputs(model, (2, 6, 6))), np.isin(np.arange(6), [0, 1, 4, 5])
    plan = plan_channels(model, graph, kept)
    thin = apply(plan, model)
    weights = np.array([1.5, -2, 7, 1, 0.25, 3])
    fold_scale(thin, group, plan, weights)
    images = torch.randn(3, 2, 6, 6)
    expected = scaled_by_hand(model, images, np.where(kept, weights, 0))
    torch.testing.assert_close(thin(images), expected, rtol=1e-5, atol=1e-6)
