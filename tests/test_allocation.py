"""Widths from error curves: budgets are met, and what is cheap to lose goes."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from thinet_deploy.errors import GateError
from thinet_deploy.pruning.allocation import Costs, Curve, allocate
from thinet_deploy.pruning.budget import Wish, cost, possible, some
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.graph import ChannelGraph, ChannelGroup
from thinet_deploy.pruning.trace import named_tensors


class Net(nn.Module):
    """A plain layer, a grouped one, a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.c, self.d = nn.Conv2d(12, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.e = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))))
        return self.e(torch.relu(y + self.d(y)).mean((2, 3)))  # type: ignore[no-any-return]


MODEL = Net().eval()
GRAPH: ChannelGraph = channel_graph(MODEL, (torch.zeros(2, 3, 8, 8),))
GROUPS = GRAPH.groups
TENSORS = dict(named_tensors(MODEL))
COSTS = Costs(TENSORS, GRAPH, GROUPS)
DENSE = cost(TENSORS, GRAPH, np.ones(GRAPH.channels, dtype=bool))


def curves(seed: int, groups: tuple[ChannelGroup, ...] = GROUPS) -> dict[str, Curve]:
    rng = np.random.default_rng(seed)
    made = {}
    for group in groups:
        widths = np.array(sorted(possible(group, 1), reverse=True))
        made[group.name] = Curve(widths, np.concatenate([[0.0], rng.random(len(widths) - 1).cumsum()]))
    return made


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_costs_are_those_of_the_graph(data: st.DataObject) -> None:
    widths = {group.name: data.draw(st.sampled_from(possible(group, 1))) for group in GROUPS}
    expected = cost(TENSORS, GRAPH, some(GRAPH, GROUPS, widths))
    assert COSTS(widths) == (expected.macs, expected.size)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(1.05, 4), st.sampled_from(["macs", "size"]), st.sampled_from([1, 2, 4]))
def test_the_budget_is_met_on_the_grid(seed: int, factor: float, unit: str, grid: int) -> None:
    wish = Wish(grid=grid, **{unit: getattr(DENSE, unit) / factor})
    least = COSTS({group.name: possible(group, grid)[0] for group in GROUPS})
    if least[unit == "size"] > getattr(DENSE, unit) / factor:
        with pytest.raises(GateError, match="cannot be reached"):
            allocate(COSTS, GROUPS, curves(seed), wish)
        return
    widths = allocate(COSTS, GROUPS, curves(seed), wish)
    macs, size = COSTS(widths)
    assert (macs if unit == "macs" else size) <= getattr(DENSE, unit) / factor
    for group in GROUPS:
        assert widths[group.name] in possible(group, grid)


@pytest.mark.parametrize("seed", range(6))
def test_it_is_near_the_best_of_all_widths(seed: int) -> None:
    made = curves(seed)
    wish = Wish(macs=DENSE.macs / 2)
    errors = {name: dict(zip(each.widths.tolist(), each.error.tolist(), strict=True)) for name, each in made.items()}

    def total(widths: dict[str, int]) -> float:
        return float(sum(errors[name][width] for name, width in widths.items()))

    names = [group.name for group in GROUPS]
    every = (dict(zip(names, each, strict=True)) for each in itertools.product(*(possible(g, 1) for g in GROUPS)))
    best = min(total(widths) for widths in every if COSTS(widths)[0] <= DENSE.macs / 2)
    assert total(allocate(COSTS, GROUPS, made, wish)) <= 1.35 * best


def test_layers_with_a_ratio_of_their_own_keep_it_and_the_rest_makes_up_for_it() -> None:
    name = GROUPS[0].name
    widths = allocate(COSTS, GROUPS, curves(0), Wish(macs=DENSE.macs / 2, layers={name: 1.0}))
    assert widths[name] == len(GROUPS[0].channels)
    assert COSTS(widths)[0] <= DENSE.macs / 2


def test_a_free_group_goes_down_first_and_what_is_left_of_the_budget_is_used() -> None:
    made = curves(1)
    name = GROUPS[0].name
    made[name] = Curve(made[name].widths, np.where(made[name].widths >= 4, 0.0, 1e6))
    widths = allocate(COSTS, GROUPS, made, Wish(macs=DENSE.macs / 1.3))
    assert widths[name] == 4
    for group in GROUPS:
        wider = [width for width in possible(group, 1) if width > widths[group.name]]
        gains = [made[group.name].error[made[group.name].widths.tolist().index(width)] for width in wider]
        here = made[group.name].error[made[group.name].widths.tolist().index(widths[group.name])]
        for width, error in zip(wider, gains, strict=True):
            assert error >= here or COSTS({**widths, group.name: width})[0] > DENSE.macs / 1.3
