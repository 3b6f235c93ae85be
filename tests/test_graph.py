"""Channel groups: what they say, and why others stay whole, with operation and line (design.md, D1)."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from nets import Forward, Net, conv
from torch import nn
from torch.nn import functional as F

from thinet_deploy.errors import GateError, ModelError
from thinet_deploy.models.vgg import vgg16
from thinet_deploy.pruning.budget import Wish, choose_widths, cost, possible, some, uniform
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.graph import STAYS, ChannelGraph
from thinet_deploy.pruning.proof import prove
from thinet_deploy.pruning.retrace import settled_plan
from thinet_deploy.pruning.surgery import apply
from thinet_deploy.pruning.trace import example_inputs, named_tensors

SHAPE = (3, 8, 8)


def graph_of(model: nn.Module, shape: tuple[int, ...] = SHAPE, **options: Any) -> ChannelGraph:
    return channel_graph(model, example_inputs(model, shape), **options)


def two(forward: Forward, **parts: Any) -> nn.Module:
    """Parts other: 3 → 6, a: 6 → 6 and b: 6 → 4 channels, and others."""
    torch.manual_seed(0)
    return Net(forward, **{"other": conv(3, 6), "a": conv(6, 6), "b": conv(6, 4), **parts}).eval()


def passes(model: nn.Module, graph: ChannelGraph, kept: np.ndarray | None = None) -> bool:
    if kept is None:
        wish = Wish(keep=0.5)
        kept = some(graph, graph.groups, uniform(graph.groups, 0.5, wish))
    images = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    plan = settled_plan(model, graph, kept, example_inputs(model, SHAPE))
    return prove(model, graph, plan, (images,), seed=0).passed


class Cut(nn.Module):
    """Parts that have numbers, and that something else happens to each."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :2], x[:, 2:].relu()], 1)


class Grouped(nn.Module):
    """Normalises in a number of groups that stands in the code."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, 3)


# --- what is not understood --------------------------------------------------------------------------------------

# name → (between a and b, operation that the reason names). `other` in front of them all goes on.
FROZEN: dict[str, tuple[Forward, str]] = {
    "softmax over channels": (lambda m, x: x.softmax(1), "softmax"),
    "mean over channels": (lambda m, x: x - x.mean(1, keepdim=True), "sub"),
    "maximum over channels": (lambda m, x: x * x.amax(1, keepdim=True), "mul"),
    "GroupNorm over several channels": (lambda m, x: m.n(x), "group_norm"),
    "LayerNorm over channels": (lambda m, x: m.l(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), "layer_norm"),
    "sum that runs along": (lambda m, x: x.cumsum(1), "cumsum"),
    "every second channel": (lambda m, x: torch.cat([x[:, ::2], x[:, 1::2].relu()], 1), "slice"),
    "parts of fixed numbers": (lambda m, x: m.cut(x), "slice"),
    "copies that are shuffled": (lambda m, x: m.s(m.d(x))[:, :6], ""),
    "sorting": (lambda m, x: x.sort(1).values, "sort"),
    "products of channels": (lambda m, x: torch.einsum("nchw,dc->ndhw", x, m.w), ""),
    "attention": (lambda m, x: (y := x.flatten(2), (y @ y.transpose(1, 2) @ y).reshape(x.shape))[1], ""),
    "channels and constants": (lambda m, x: torch.where(m.mask > 0, x, x * 2), "where"),
    "cat of channels along the rows": (
        lambda m, x: F.interpolate(x.flatten(1)[:, None, :, None], (384, 1)).view(x.shape) * x.sum(1, keepdim=True),
        "",
    ),
    "channels into rows": (lambda m, x: x.reshape(x.shape[0], 3, 2, 8, 8).flip(1).reshape(x.shape) + x, ""),
    "a number computed from the width": (lambda m, x: x * x.shape[1] ** -0.5, "mul"),
    "groups in the code": (lambda m, x: m.g(x), "group_norm"),
    "channels cut off": (lambda m, x: F.pad(x, (0, 0, 0, 0, -1, 1)), "pad"),
    "local response normalisation": (lambda m, x: F.local_response_norm(x, 3), ""),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_is_not_understood_freezes_what_reaches_it_and_says_where(name: str) -> None:
    between, operation = FROZEN[name]
    parts = {
        "n": nn.GroupNorm(2, 6),
        "l": nn.LayerNorm(6),
        "cut": Cut(),
        "g": Grouped(),
        "d": conv(6, 12, groups=6),
        "s": nn.ChannelShuffle(2),
        "w": nn.Parameter(torch.randn(6, 6)),
        "mask": nn.Parameter(torch.rand(6, 8, 8) - 0.5),
    }
    model = two(lambda m, x: m.b(between(m, m.a(F.relu(m.other(x))))), **parts)
    graph = graph_of(model)
    assert [group.producers for group in graph.groups] in ([("other",)], [("other",), ("a",)])
    if len(graph.groups) == 1:
        assert set(graph.whole) == {"a", "b"}
        assert operation in graph.whole["a"]
        assert ".py:" in graph.whole["a"]
    assert passes(model, graph)


class Summed(nn.Module):
    """A sum over channels that runs along."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(1)


def test_the_reason_names_the_line_of_the_users_code() -> None:
    graph = graph_of(two(lambda m, x: m.b(m.sums(m.a(m.other(x)))), sums=Summed()))
    line = inspect.getsourcelines(Summed.forward)[1] + 1
    assert graph.whole["a"] == f"its output enters cumsum (test_graph.py:{line}), which is not understood"


@pytest.mark.parametrize(
    ("forward", "whole", "reason"),
    [
        (lambda m, x: m.b(F.conv2d(m.other(x), m.a.weight * 2, padding=1)), "other", "computed"),
        (lambda m, x: F.conv_transpose2d(m.b(m.a(m.other(x))), m.b.weight), "a", "outputs of the network"),
        (lambda m, x: m.b(y := m.a(m.other(x))) + y.sum(), "a", "add"),
        (lambda m, x: (y := m.a(m.other(x)), m.b(y), y)[1:], "a", "outputs of the network"),
        (lambda m, x: m.b(m.a(m.other(x))) * m.a.weight.norm(), "a", "reads a.weight whole"),
    ],
    ids=["computed weight", "output", "a scalar", "an inner output", "weight used elsewhere"],
)
def test_weights_and_outputs_that_stay(forward: Forward, whole: str, reason: str) -> None:
    model = two(forward)
    graph = graph_of(model)
    assert reason in graph.whole[whole]
    assert passes(model, graph)


def test_ignored_layers_stay_and_so_does_what_goes_with_them() -> None:
    model = two(lambda m, x: m.b((y := m.other(x)) + m.a(y)))
    assert [group.producers for group in graph_of(model).groups] == [("other", "a")]
    graph = graph_of(model, ignore=["oth*"])
    assert not graph.groups
    assert graph.whole["a"] == graph.whole["other"] == "it was asked to stay (--ignore)"


def test_an_unused_parameter_is_left_alone() -> None:
    model = two(lambda m, x: m.b(m.a(m.other(x))), unused=conv(6, 6), also=nn.Parameter(torch.rand(6)))
    graph = graph_of(model)
    assert [group.name for group in graph.groups] == ["other", "a"]
    assert not any(name in graph.whole for name in ("unused", "also"))
    thin = apply(settled_plan(model, graph, np.arange(graph.channels) % 2 == 0, example_inputs(model, SHAPE)), model)
    assert torch.equal(thin.get_parameter("unused.weight"), model.get_parameter("unused.weight"))
    assert passes(model, graph)


def test_an_output_of_one_channel_works_and_a_single_filter_stays() -> None:
    model = two(lambda m, x: m.last(m.one(m.a(m.other(x)))), one=conv(6, 1), last=conv(1, 1))
    graph = graph_of(model)
    assert [group.name for group in graph.groups] == ["other", "a"]
    assert graph.whole["one"] == "it is a single filter"
    assert passes(model, graph)


def test_a_group_norm_without_weights_gets_thinner_too() -> None:
    model = two(lambda m, x: m.b(m.n(m.a(m.other(x)))), n=nn.GroupNorm(3, 6, affine=False))
    graph = graph_of(model)
    assert [(group.name, group.steps) for group in graph.groups] == [("other", 6), ("a", 3)]
    kept = np.ones(graph.channels, dtype=bool)
    kept[graph.group("a").channels[:1]] = False  # with the other one of its two
    thin = apply(settled_plan(model, graph, kept, example_inputs(model, SHAPE)), model)
    norm: Any = thin.get_submodule("n")
    assert (norm.num_groups, norm.num_channels) == (2, 4)
    assert passes(model, graph, kept)


def test_a_linear_layer_along_positions_is_no_consumer_of_channels() -> None:
    model = two(lambda m, x: m.b(m.mix(m.a(m.other(x)).flatten(2)).relu().unflatten(2, (8, 8))), mix=nn.Linear(64, 64))
    graph = graph_of(model)
    assert [each.weight for each in graph.group("a").consumers] == ["b.weight"]
    assert passes(model, graph)


class Auxiliary(nn.Module):
    """A second head that only training reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 6), conv(6, 4)
        self.aux = nn.Sequential(conv(6, 5), nn.ReLU(), conv(5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x).relu_()
        aux = self.aux(x)
        return self.b(x) + aux if self.training else self.b(x)  # type: ignore[no-any-return]


def test_what_only_training_reads_stays() -> None:
    torch.manual_seed(0)
    model = Auxiliary().eval()
    graph = graph_of(model)
    assert [group.name for group in graph.groups] == ["a"]
    assert graph.whole["aux.0"] == graph.whole["aux.2"] == "no output comes from it"
    assert passes(model, graph)
    thin = apply(settled_plan(model, graph, np.arange(6) % 2 == 0, example_inputs(model, SHAPE)), model)
    assert thin.train()(torch.zeros(2, *SHAPE)).shape == (2, 4, 8, 8)


def test_what_nobody_reads_holds_no_stream() -> None:
    """The last part of a network of equal stages adds to a stream what no stage reads any more."""
    model = two(lambda m, x: ((y := m.other(x)), y + m.a(y), m.b(y))[2])
    graph = graph_of(model)
    assert [group.producers for group in graph.groups] == [("other", "a")]
    assert passes(model, graph)


def test_a_sum_that_is_written_in_place_is_an_output() -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.b(m.other(x))
        y.add_(m.c(m.a(m.other(x))))
        return y.relu()

    graph = graph_of(two(forward, c=conv(6, 4)))
    assert [group.name for group in graph.groups] == ["other", "a"]


# --- what a group says -------------------------------------------------------------------------------------------


def test_groups_come_in_the_order_of_execution_and_know_their_maps_and_consumers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 4, stride=2), nn.ReLU(), nn.MaxPool2d(2), conv(4, 4), nn.Flatten(), nn.Linear(24, 2))
    graph = graph_of(model, (3, 12, 8))
    assert [group.name for group in graph.groups] == ["0", "3"]
    assert [group.map_size for group in graph.groups] == [(6, 4), (3, 2)]
    assert [(each.weight, each.dim, each.spread) for group in graph.groups for each in group.consumers] == [
        ("3.weight", 1, 1),
        ("5.weight", 1, 6),
    ]
    assert [group.shortcut for group in graph.groups] == [False, False]
    assert not graph.joins
    assert graph.group("3") is graph.groups[1]


def test_shortcuts_are_told() -> None:
    graph = graph_of(two(lambda m, x: m.b((y := m.other(x)) + m.c(m.a(y))), c=conv(6, 6)))
    assert [(group.producers, group.shortcut) for group in graph.groups] == [(("other", "c"), True), (("a",), False)]
    assert graph.joins


def test_producers_side_by_side_in_a_concatenation_share_consumers() -> None:
    """The same producer is read through several concatenations, at several places."""
    model = two(
        lambda m, x: m.b(torch.cat([y := m.other(x), z := m.a(y), m.c(torch.cat([z, y], 1))], 1)),
        c=conv(12, 5),
        b=conv(17, 4),
    )
    graph = graph_of(model)
    assert [group.name for group in graph.groups] == ["other", "a", "c"]
    first = graph.group("other")
    assert [each.weight for each in first.consumers] == ["a.weight", "b.weight", "c.weight"] or len(
        first.consumers
    ) == 3
    places = {each.weight: np.flatnonzero(np.isin(each.channels, first.channels)).tolist() for each in first.consumers}
    assert places == {"a.weight": [*range(6)], "c.weight": [*range(6, 12)], "b.weight": [*range(6)]}
    for seed in range(4):
        assert passes(model, graph, np.random.default_rng(seed).random(graph.channels) < 0.6)


@pytest.mark.parametrize("dim", [2, 3])
def test_a_concatenation_along_rows_or_columns_ties_the_two(dim: int) -> None:
    model = two(lambda m, x: m.b(torch.cat([m.other(x), m.c(x)], dim)), c=conv(3, 6))
    graph = graph_of(model)
    assert [group.producers for group in graph.groups] == [("other", "c")]
    assert passes(model, graph)


def test_finding_groups_changes_nothing() -> None:
    model = two(lambda m, x: m.b(m.n(m.a(m.other(x)))), n=nn.BatchNorm2d(6))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert graph_of(model).groups
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_all_convolutions_of_vgg16_are_free() -> None:
    with torch.device("meta"):
        model = vgg16()
    graph = channel_graph(model, (torch.zeros(2, 3, 224, 224, device="meta"),))
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert [group.name for group in graph.groups if group.map_size] == convs
    assert graph.group(convs[-1]).consumers[0].spread == 49
    assert set(graph.whole) == {"classifier.6"}


# --- how many may go ---------------------------------------------------------------------------------------------


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


# --- networks that cannot be traced ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.b(m.a(x)) if x.sum() > 0 else m.b(m.a(x) * 2),
        lambda m, x: m.b(m.other(x))[: int(x.max())],
        lambda m, x: m.b(m.b(m.other(x))),
        lambda m, x: m.missing(x),
        lambda m, x: (_ for _ in ()).throw(ValueError),
    ],
    ids=["branch on data", "size from data", "wrong channels", "bug", "error without words"],
)
def test_a_network_that_cannot_be_traced_is_a_model_error(forward: Forward) -> None:
    with pytest.raises(ModelError, match="cannot trace the network for inputs of 3x8x8") as caught:
        graph_of(two(forward))
    assert "forward()" in caught.value.hint
    assert caught.value.exit_code == 2


def test_a_wrong_input_shape_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="1x8x8"):
        graph_of(two(lambda m, x: m.b(m.other(x))), (1, 8, 8))


@pytest.mark.parametrize("layers", [[nn.Flatten(), nn.Linear(192, 2)], [nn.ReLU()]], ids=["linear", "no parameters"])
def test_a_network_without_convolutions_is_a_model_error(layers: list[nn.Module]) -> None:
    with pytest.raises(ModelError, match="no convolution"):
        graph_of(nn.Sequential(*layers))
