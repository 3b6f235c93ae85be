"""How many channels of a group may go: grids, shares, cells, grouped convolutions, and what is left costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graphs import SHAPE, graph_of, passes, two
from nets import conv
from torch import nn

from thinet_deploy.errors import GateError
from thinet_deploy.pruning.budget import Wish, choose_widths, cost, possible, some, uniform
from thinet_deploy.pruning.graph import STAYS
from thinet_deploy.pruning.retrace import settled_plan
from thinet_deploy.pruning.surgery import apply
from thinet_deploy.pruning.trace import example_inputs, named_tensors


def test_rounding_to_eight_does_not_skip_twelve_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 12), nn.ReLU(), conv(12, 32), nn.ReLU(), conv(32, 4)).eval()
    graph = graph_of(model)
    assert [possible(group, 8) for group in graph.groups] == [[8, 12], [8, 16, 24, 32]]
    assert uniform(graph.groups, 0.5, Wish(grid=8)) == {"0": 8, "2": 16}
    assert uniform(graph.groups, 0.05, Wish(grid=8)) == {"0": 8, "2": 8}
    assert uniform(graph.groups, 0.9, Wish(grid=8)) == {"0": 12, "2": 32}
    tensors = dict(named_tensors(model))
    everything = cost(tensors, graph, np.ones(graph.channels, dtype=bool))
    wish = Wish(macs=everything.macs / 2, grid=8)
    widths = choose_widths(tensors, graph, graph.groups, wish)
    assert cost(tensors, graph, some(graph, graph.groups, widths)).macs <= everything.macs / 2
    assert all(width % 8 == 0 or width == 12 for width in widths.values())
    with pytest.raises(GateError, match="budget cannot be reached"):
        choose_widths(tensors, graph, graph.groups, Wish(macs=everything.macs / 100, grid=8))


def test_seven_tenths_in_front_of_four_groups_leave_44_of_64() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 64, 1), nn.ReLU(), conv(64, 8, 1, groups=4), conv(8, 2, 1)).eval()
    graph = graph_of(model)
    group = graph.group("0")
    assert np.bincount(group.cells).tolist() == [16] * 4
    assert uniform(graph.groups, 0.7, Wish())["0"] == 44
    assert passes(model, graph, some(graph, graph.groups, uniform(graph.groups, 0.7, Wish())))
    assert uniform(graph.groups, 0.01, Wish())["0"] == 4  # never below one filter per group


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_costs_are_those_of_the_pruned_network(groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 16, stride=2, groups=groups), nn.ReLU()),
        *(conv(16, 16, groups=16), nn.ConvTranspose2d(16, 4, 2, 2), nn.Flatten(), nn.Linear(256, 3)),
    ).eval()
    graph = graph_of(model)
    for ratio in (0.3, 0.5, 1.0):
        kept = some(graph, graph.groups, uniform(graph.groups, ratio, Wish()))
        thin = apply(settled_plan(model, graph, kept, example_inputs(model, SHAPE)), model)
        after = graph_of(thin)
        everything = np.ones(after.channels, dtype=bool)
        assert cost(dict(named_tensors(model)), graph, kept) == cost(dict(named_tensors(thin)), after, everything)


def test_overrides_by_name() -> None:
    graph = graph_of(two(lambda m, x: m.b(m.a(m.other(x)))))
    assert uniform(graph.groups, 0.5, Wish(layers={"oth*": 0.9})) == {"other": 5, "a": 3}


def test_every_cell_keeps_the_same_share() -> None:
    """A shuffle between three and three groups: what one writes another reads, a third of it each."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(conv(3, 6), conv(6, 18, 1, groups=3), nn.ChannelShuffle(3), conv(18, 6, 1, groups=3), conv(6, 2))
    ).eval()
    group = graph_of(model).group("1")
    assert np.bincount(group.cells).tolist() == [2] * 9
    assert group.steps == 2
    assert group.width(1) == 9


def test_groups_that_leave_no_choice_stay_and_say_so() -> None:
    """12 channels, shuffled between three groups each: thirds of four."""
    torch.manual_seed(0)
    model = nn.Sequential(
        conv(3, 6), conv(6, 12, 1, groups=3), nn.ChannelShuffle(3), conv(12, 6, 1, groups=3), conv(6, 2)
    )
    graph = graph_of(model.eval())
    assert [group.name for group in graph.groups] == ["0", "3"]
    assert "no choice of equal shares" in graph.whole["1"]
    assert passes(model, graph)


@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(8, 4, 4), (8, 8, 4), (12, 4, 4)])
def test_groups_of_a_single_filter_stay(inputs: int, outputs: int, groups: int) -> None:
    torch.manual_seed(0)
    layers = conv(3, inputs), conv(inputs, outputs, groups=groups), conv(outputs, 2)
    graph = graph_of(model := nn.Sequential(*layers).eval())
    assert [group.name for group in graph.groups] == (["0"] if outputs == groups else ["0", "1"])
    if outputs == groups:
        assert "groups of a single channel" in graph.whole["1"]
    for share in (0.1, 0.5):
        assert passes(model, graph, some(graph, graph.groups, uniform(graph.groups, share, Wish())))


def test_a_grouped_convolution_that_reads_one_channel_per_group_keeps_them() -> None:
    """Behind a depthwise convolution with two filters for each channel."""
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 4), conv(4, 8, groups=4), conv(8, 8, 1, groups=4), conv(8, 2)).eval()
    graph = graph_of(model)
    assert [group.name for group in graph.groups] == ["2"]
    assert "groups of a single channel" in graph.whole["0"]
    assert passes(model, graph)


def test_channels_are_numbered_through_and_axes_cover_them() -> None:
    graph = graph_of(two(lambda m, x: m.b(torch.cat([m.a(m.other(x)), x], 1)), b=conv(9, 4)))
    numbers = np.concatenate([group.channels for group in graph.groups])
    assert sorted(numbers.tolist()) == list(range(graph.channels))
    last = next(axis for axis in graph.axes if axis.site == ("b.weight", 1))
    assert last.channels[6:].tolist() == [STAYS] * 3
    assert {axis.site.parameter for axis in graph.axes if axis.producer} == {"other.weight", "a.weight"}
