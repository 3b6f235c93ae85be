"""Elimination against brute force: solve every least-squares problem anew."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinet_deploy.pruning.elimination import Part, eliminate
from thinet_deploy.pruning.reconstruction import Ridge, Solver

RIDGE = 1e-3


def problem(channels: int, size: int, filters: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Covariance (D, D) of correlated inputs, and a weight (filters, D)."""
    rng = torch.Generator().manual_seed(seed)
    width = channels * size
    rows = torch.randn(4 * width, width, generator=rng, dtype=torch.float64)
    rows = rows @ torch.randn(width, width, generator=rng, dtype=torch.float64)
    return torch.cov(rows.T), torch.randn(filters, width, generator=rng, dtype=torch.float64)


def objective(covariance: torch.Tensor, weight: torch.Tensor, penalty: float, columns: list[int]) -> float:
    """min over W' on some columns of tr((W − W')Σ(W − W')ᵀ) + λ‖W − W'‖²."""
    system = covariance + penalty * torch.eye(len(covariance), dtype=torch.float64)
    new = torch.zeros_like(weight)
    new[:, columns] = torch.linalg.solve(system[columns][:, columns], (weight @ system)[:, columns].T).T
    gap = weight - new
    return float((gap @ system * gap).sum())


def part(covariance: torch.Tensor, weight: torch.Tensor, size: int) -> tuple[Part, float]:
    system = Ridge(covariance.clone(), RIDGE)
    channels = weight.shape[1] // size
    return Part(torch.arange(channels), weight.reshape(len(weight), channels, size), system.inverse()), system.penalty


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 6), st.integers(1, 3), st.integers(1, 4), st.integers(0, 1000))
def test_every_step_is_the_cheapest_of_all_refits(channels: int, size: int, filters: int, seed: int) -> None:
    covariance, weight = problem(channels, size, filters, seed)
    mine, penalty = part(covariance, weight, size)
    removal = eliminate([mine], np.zeros(channels, dtype=np.int64), channels, 1)
    left = list(range(channels))
    for step, gone in enumerate(removal.order):
        errors = {}
        for candidate in left:
            columns = [c * size + k for c in left if c != candidate for k in range(size)]
            errors[candidate] = objective(covariance, weight, penalty, columns)
        assert errors[gone] <= min(errors.values()) * (1 + 1e-8) + 1e-12
        assert np.isclose(errors[gone], removal.error[step + 1], rtol=1e-6, atol=1e-9)
        left.remove(gone)


def test_the_weights_left_are_the_closed_form_refit() -> None:
    covariance, weight = problem(6, 2, 3, 7)
    mine, penalty = part(covariance, weight, 2)
    removal = eliminate([mine], np.zeros(6, dtype=np.int64), 6, 3)
    kept = torch.ones(1, 12, dtype=torch.bool)
    for channel in removal.order:
        kept[0, 2 * channel : 2 * channel + 2] = False
    ridge = penalty / float(covariance[kept[0]][:, kept[0]].diagonal().mean())
    expected = Solver(covariance[None], kept, ridge)((weight @ covariance)[None], weight[None])[0]
    assert torch.allclose(mine.weight().flatten(1), expected[:, kept[0]], atol=1e-9)


def test_consumers_add_up_and_a_channel_that_nobody_reads_goes_first() -> None:
    first, second = problem(3, 1, 2, 1), problem(2, 1, 2, 2)
    parts = [part(*first, 1)[0], part(*second, 1)[0]]
    parts[1].channels = torch.tensor([0, 2])
    costs = parts[0].costs()[1].clone()
    costs[[0, 2]] += parts[1].costs()[1]
    removal = eliminate(parts, np.zeros(4, dtype=np.int64), 4, 2)
    assert removal.order[0] == 3
    assert removal.order[1] == int(costs.argmin())
    assert np.isclose(removal.error[2], float(costs.min()))


def test_every_cell_keeps_the_same_share_after_each_round() -> None:
    covariance, weight = problem(12, 1, 3, 3)
    cells = np.array([0] * 8 + [1] * 4)
    removal = eliminate([part(covariance, weight, 1)[0]], cells, 4)
    for step in range(5):
        left = np.setdiff1d(np.arange(12), removal.order[: 3 * step])
        assert np.bincount(cells[left], minlength=2).tolist() == [8 - 2 * step, 4 - step]


def test_duplicates_and_dead_channels_cost_nothing() -> None:
    covariance, weight = problem(3, 1, 4, 5)
    index = [0, 1, 2, 0, 1, 2]
    twice = covariance[index][:, index].clone()
    dead = torch.zeros(8, 8, dtype=torch.float64)
    dead[:6, :6] = twice
    wide = torch.cat([weight / 2, weight / 2, torch.randn(4, 2, dtype=torch.float64)], 1)
    mine = Part(torch.arange(8), wide.reshape(4, 8, 1), Ridge(dead, 1e-9).inverse())
    removal = eliminate([mine], np.zeros(8, dtype=np.int64), 8, 3)
    assert {6, 7} <= set(removal.order.tolist())
    assert removal.error[-1] < 1e-6 * float((weight @ covariance * weight).sum())
    assert {channel % 3 for channel in set(range(6)) - set(removal.order.tolist())} == {0, 1, 2}


def test_in_a_wide_layer_several_go_at_once_with_nearly_the_same_error() -> None:
    covariance, weight = problem(300, 1, 8, 4)
    removal = eliminate([part(covariance, weight, 1)[0]], np.zeros(300, dtype=np.int64), 300, 150)
    assert len(np.unique(removal.order)) == 150
    assert np.all(np.diff(removal.error) >= 0)
