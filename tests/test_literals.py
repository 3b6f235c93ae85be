"""Numbers in the user's code that count channels are found, changed and proved; else what meets them stays."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.graph import ChannelGraph
from thinet_deploy.pruning.proof import prove
from thinet_deploy.pruning.retrace import settled_plan
from thinet_deploy.pruning.surgery import apply
from thinet_deploy.pruning.trace import example_inputs

SHAPE = (3, 8, 8)


class ByArithmetic(nn.Module):
    """Shuffles with the number of channels that its input has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        return x.reshape(n, 3, c // 3, h, w).transpose(1, 2).flatten(1, 2)


class ByAttribute(nn.Module):
    """Shuffles with a number of channels that it was made with."""

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.groups = 18, 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.view(len(x), self.groups, self.channels // self.groups, *x.shape[2:])
        return x.transpose(1, 2).reshape(len(x), self.channels, *x.shape[3:])


class ByNumber(nn.Module):
    """Shuffles with a number that stands in the code."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, h, w = x.shape[0], x.shape[2], x.shape[3]
        x = x.view(n, 3, 6, h, w)
        return x.transpose(1, 2).reshape(n, 18, h, w)


class Around(nn.Module):
    """A shuffle between grouped convolutions, another layer before and behind them."""

    def __init__(self, shuffle: nn.Module) -> None:
        super().__init__()
        self.first, self.a = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 18, 1, groups=3)
        self.shuffle = shuffle
        self.b, self.last = nn.Conv2d(18, 12, 1, groups=3), nn.Conv2d(12, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.relu(self.b(self.shuffle(F.relu(self.a(self.first(x)))))))  # type: ignore[no-any-return]


class Parts(nn.Module):
    """Splits into parts of numbers that it was made with, as Res2Net and CSP blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.width, self.sizes = nn.Conv2d(3, 12, 1), 4, [4, 8]
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.wide(x)
        one = torch.split(x, self.width, 1)
        two = torch.split(x, self.sizes, 1)
        return torch.cat([one[0] + self.first(one[1]), one[2], self.second(two[1])], 1)


class Sliced(nn.Module):
    """Takes the first channels, by a number that it was made with."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.few = nn.Conv2d(3, 12, 1), 3
        self.inner = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.wide(x)
        return torch.cat([self.inner(x[:, : self.few]), x[:, self.few :]], 1)


class Halves(nn.Module):
    """Gates one half with the other, with a number in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.wide, self.after = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 12, 1), nn.Conv2d(6, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.wide(F.relu(self.before(x)))
        return self.after(x[:, :6] * torch.sigmoid(x[:, 6:]))  # type: ignore[no-any-return]


class Flat(nn.Module):
    """Flattens to a number in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.wide, self.after = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Linear(384, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.wide(self.before(x))
        x = x.view(-1, 384)
        return self.after(x)  # type: ignore[no-any-return]


class FlatBlurred(nn.Module):
    """Blurs every channel with a fixed kernel, and counts them with an attribute (as timm's BlurPool does)."""

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.first, self.last = 6, nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1)
        self.kernel: torch.Tensor
        self.register_buffer("kernel", torch.full((6, 1, 2, 2), 0.25))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.conv2d(self.first(x), self.kernel, groups=self.channels))  # type: ignore[no-any-return]


def graph_of(model: nn.Module) -> ChannelGraph:
    return channel_graph(model, example_inputs(model, SHAPE))


def prunes(model: nn.Module, graph: ChannelGraph) -> nn.Module:
    """A network of a random part of the channels, proved."""
    thin = model
    for seed in range(3):
        rng, kept = np.random.default_rng(seed), np.zeros(graph.channels, dtype=bool)
        for group in graph.groups:
            share = int(rng.integers(1, group.steps)) / group.steps
            for cell in np.unique(group.cells):
                mine = rng.permutation(group.channels[group.cells == cell])
                kept[mine[: round(len(mine) * share)]] = True
        plan = settled_plan(model, graph, kept, example_inputs(model, SHAPE))
        images = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(seed))
        assert prove(model, graph, plan, (images,), seed=seed).passed
        thin = apply(plan, model)
    return thin


def names(graph: ChannelGraph) -> list[tuple[str, ...]]:
    return [group.producers for group in graph.groups]


def make(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def numbers(graph: ChannelGraph, kind: str) -> set[tuple[str, int | None]]:
    return {(each.name, each.index) for each in graph.attributes if each.module == kind}


def test_a_shuffle_by_shape_arithmetic_is_free() -> None:
    model = make(lambda: Around(ByArithmetic()))
    graph = graph_of(model)
    assert names(graph) == [("first",), ("a",), ("b",)]
    assert prunes(model, graph).get_submodule("a").get_parameter("weight").shape[0] == 9


def test_a_shuffle_by_an_attribute_is_free_and_the_attribute_changed() -> None:
    model = make(lambda: Around(ByAttribute()))
    graph = graph_of(model)
    assert names(graph) == [("first",), ("a",), ("b",)]
    assert numbers(graph, "shuffle") == {("channels", None)}
    thin = prunes(model, graph)
    shuffle: Any = thin.get_submodule("shuffle")
    assert (shuffle.channels, shuffle.groups) == (9, 3)
    assert model.get_submodule("shuffle").channels == 18


def test_a_shuffle_by_numbers_in_the_code_stays_and_the_line_is_named() -> None:
    model = make(lambda: Around(ByNumber()))
    graph = graph_of(model)
    assert names(graph) == [("first",), ("b",)]
    source, first = inspect.getsourcelines(ByNumber.forward)
    lines = [first + index for index, line in enumerate(source) if "view" in line or "reshape" in line]
    why = graph.whole["a"]
    assert "fixed number of channels" in why
    assert any(f"(test_literals.py:{line})" in why for line in lines), why
    prunes(model, graph)


def test_a_list_and_a_number_of_parts_are_changed() -> None:
    model = make(lambda: nn.Sequential(Parts(), nn.Conv2d(14, 2, 1)))
    graph = graph_of(model)
    assert "0.wide" not in graph.whole
    assert numbers(graph, "0") == {("width", None), ("sizes", 0), ("sizes", 1)}
    part: Any = prunes(model, graph).get_submodule("0")
    assert 3 * part.width == sum(part.sizes) == part.get_submodule("wide").out_channels


def test_a_slice_by_an_attribute_is_changed() -> None:
    model = make(lambda: nn.Sequential(Sliced(), nn.Conv2d(13, 2, 1)))
    graph = graph_of(model)
    assert "0.wide" not in graph.whole
    assert numbers(graph, "0") == {("few", None)}
    thin = prunes(model, graph).get_submodule("0")
    assert thin.few == thin.get_submodule("inner").in_channels


@pytest.mark.parametrize(("kind", "text"), [(Halves, ":6]"), (Flat, "384)")])
def test_numbers_in_the_code_freeze_what_meets_them_alone(kind: type[nn.Module], text: str) -> None:
    model = make(lambda: nn.Sequential(kind(), nn.BatchNorm1d(5) if kind is Flat else nn.Conv2d(5, 2, 1)))
    graph = graph_of(model)
    assert ("0.before",) in names(graph)
    source, first = inspect.getsourcelines(kind.forward)
    line = first + next(index for index, each in enumerate(source) if text in each.replace(" ", ""))
    assert f"(test_literals.py:{line}) works with a fixed number of channels" in graph.whole["0.wide"]
    prunes(model, graph)


def test_a_blur_of_every_channel_is_free() -> None:
    model = make(FlatBlurred)
    graph = graph_of(model)
    assert names(graph) == [("first",)]
    thin = prunes(model, graph)
    assert thin.channels == thin.get_buffer("kernel").shape[0] < 6


def test_the_same_kind_of_module_learns_once_for_all() -> None:
    model = make(lambda: nn.Sequential(Sliced(), nn.Conv2d(13, 3, 1), Sliced(), nn.Conv2d(13, 2, 1)))
    graph = graph_of(model)
    assert numbers(graph, "0") == numbers(graph, "2") == {("few", None)}
    prunes(model, graph)


def test_attributes_that_equal_a_width_by_chance_are_left_alone_where_nothing_fails() -> None:
    model = make(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1)))
    model.classes = 6  # type: ignore[assignment]
    graph = graph_of(model)
    assert prunes(model, graph).classes == 6
