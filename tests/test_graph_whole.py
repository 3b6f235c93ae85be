"""Why channels stay: not understood, or needed by others; with operation and line (design.md, D1)."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphs import SHAPE, graph_of, passes, two
from nets import Forward, conv
from torch import nn
from torch.nn import functional as F

from thinet_deploy.pruning.retrace import settled_plan
from thinet_deploy.pruning.surgery import apply
from thinet_deploy.pruning.trace import example_inputs


class Cut(nn.Module):
    """Parts that have numbers, and that something else happens to each."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :2], x[:, 2:].relu()], 1)


class Grouped(nn.Module):
    """Normalises in a number of groups that stands in the code."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, 3)


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
    assert graph.whole["a"] == f"its output enters cumsum ({Path(__file__).name}:{line}), which is not understood"


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
