"""Small networks by name, their channel graphs, and the networks pruned."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from thinet_deploy.models.vgg import VGG
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.graph import ChannelGraph
from thinet_deploy.pruning.plan import Plan
from thinet_deploy.pruning.retrace import settled_plan
from thinet_deploy.pruning.surgery import apply
from thinet_deploy.pruning.trace import example_inputs

SHAPE = (1, 8, 8)
Kept = NDArray[np.bool_]


def small_vgg() -> VGG:
    """With a fully connected head."""
    return VGG(((4, 5), (6,)), (7,), input_shape=SHAPE, num_classes=3)


def with_norms() -> nn.Module:
    """With BatchNorms."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3),
        nn.BatchNorm2d(5),
        nn.Flatten(),
        nn.Linear(180, 3),
    )


class Shuffled(nn.Module):
    """Grouped convolutions, a shuffle between them, a shortcut around them, tied weights, a module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.left, self.right = nn.Conv2d(12, 12, 1, groups=3), nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.once, self.again = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 1)
        self.again.weight = self.once.weight
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stem = torch.relu(self.norm(self.stem(x)))
        out = torch.relu(self.left(stem))
        n, c, h, w = out.shape
        out = out.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)
        out = self.again(torch.relu(self.once(self.right(out)))) + stem
        return self.head(self.once(out).mean((2, 3)))  # type: ignore[no-any-return]


NETWORKS: dict[str, Callable[[], nn.Module]] = {"VGG": small_vgg, "BatchNorm": with_norms, "shuffled": Shuffled}


@functools.cache
def graph_of(name: str) -> ChannelGraph:
    """The channel graph of a network by name."""
    model = network(name)
    return channel_graph(model, example_inputs(model, SHAPE))


def network(name: str, seed: int = 0) -> nn.Module:
    """A network by name, with random values in everything, BatchNorm's buffers too."""
    torch.manual_seed(seed)
    model = NETWORKS[name]().eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1)
    return model


def images(count: int = 3) -> torch.Tensor:
    """Inputs."""
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def some_kept(graph: ChannelGraph, keep: float, seed: int = 0, within: Kept | None = None) -> Kept:
    """Equal shares of every cell, out of those that `within` still has."""
    kept, rng = np.zeros(graph.channels, dtype=bool), np.random.default_rng(seed)
    for group in graph.groups:
        share = max(1, int(group.steps * keep)) / group.steps
        for cell in np.unique(group.cells):
            mine = group.channels[group.cells == cell]
            left = mine if within is None else mine[within[mine]]
            kept[rng.permutation(left)[: round(len(mine) * share)]] = True
    return kept


def prune(name: str, keep: float, seed: int = 0) -> tuple[nn.Module, Plan]:
    """A network by name, pruned, and the plan of it."""
    model = network(name)
    plan = settled_plan(model, graph_of(name), some_kept(graph_of(name), keep, seed), example_inputs(model, SHAPE))
    return apply(plan, model), plan
