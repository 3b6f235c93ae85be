"""Networks with what can go in them, and what is checked of them (design.md, D1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nets import Forward, Net, conv
from numpy.typing import NDArray
from torch import nn

from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.graph import ChannelGraph
from thinet_deploy.pruning.proof import prove
from thinet_deploy.pruning.retrace import settled_plan

SHAPE = (3, 8, 8)
ENDS: dict[str, Any] = {"first": lambda: conv(3, 6), "last": lambda: conv(6, 2)}
THREE: dict[str, Any] = {**ENDS, "a": lambda: conv(6, 6)}


@dataclass(frozen=True)
class Case:
    """A network and what can go in it.

    Attributes:
        build: the network.
        groups: what goes together, as "a+b c": a with b, and c.
        whole: producers that stay, as "d e".
        shapes: of the inputs.
    """

    build: Callable[[], nn.Module]
    groups: str
    whole: str = "last"
    shapes: tuple[tuple[int, ...], ...] = (SHAPE,)

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """A batch of two."""
        rng = torch.Generator().manual_seed(1)
        return tuple(torch.randn(2, *shape, generator=rng) for shape in self.shapes)

    def check(self) -> None:
        """All that can go is found, and what is left is the same network."""
        model, inputs = self.build().eval(), self.inputs()
        graph = channel_graph(model, inputs)
        found = {frozenset(group.producers) for group in graph.groups}
        assert found == {frozenset(part.split("+")) for part in self.groups.split()}, graph.whole
        assert set(graph.whole) == set(self.whole.split())
        for seed in range(4):
            kept = choose(graph, seed)
            if not graph.leaves_filters(kept):
                continue
            plan = settled_plan(model, graph, kept, inputs)
            assert kept.all() or plan.keep
            result = prove(model, graph, plan, inputs, seed=seed)
            assert result.passed, result

    def check_alone(self) -> None:
        """Every group can go alone."""
        model, inputs = self.build().eval(), self.inputs()
        graph = channel_graph(model, inputs)
        for group in graph.groups:
            kept, others = choose(graph, 0), ~np.isin(np.arange(graph.channels), group.channels)
            plan = settled_plan(model, graph, kept | others, inputs)
            assert prove(model, graph, plan, inputs, seed=0).passed


def net(groups: str, forward: Forward, *, whole: str = "last", shapes: Any = (SHAPE,), **parts: Any) -> Case:
    """A network whose parts are made anew, so that cases share nothing."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Net(forward, **{name: make() for name, make in parts.items()})

    return Case(build, groups, whole, shapes)


def choose(graph: ChannelGraph, seed: int) -> NDArray[np.bool_]:
    """Any width in every group, any channels in every cell."""
    rng, kept = np.random.default_rng(seed), np.zeros(graph.channels, dtype=bool)
    for group in graph.groups:
        share = int(rng.integers(1, group.steps + 1)) / group.steps
        for cell in np.unique(group.cells):
            mine = rng.permutation(group.channels[group.cells == cell])
            kept[mine[: round(len(mine) * share)]] = True
    return kept
