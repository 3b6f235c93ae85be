"""Three convolutions with anything between them, their channel graph, and whether half of it can go."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from nets import Forward, Net, conv
from torch import nn

from thinet_deploy.pruning.budget import Wish, some, uniform
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.graph import ChannelGraph
from thinet_deploy.pruning.proof import prove
from thinet_deploy.pruning.retrace import settled_plan
from thinet_deploy.pruning.trace import example_inputs

SHAPE = (3, 8, 8)


def two(forward: Forward, **parts: Any) -> nn.Module:
    """Parts other: 3 → 6, a: 6 → 6 and b: 6 → 4 channels, and others."""
    torch.manual_seed(0)
    return Net(forward, **{"other": conv(3, 6), "a": conv(6, 6), "b": conv(6, 4), **parts}).eval()


def graph_of(model: nn.Module, shape: tuple[int, ...] = SHAPE, **options: Any) -> ChannelGraph:
    """What can go in it."""
    return channel_graph(model, example_inputs(model, shape), **options)


def passes(model: nn.Module, graph: ChannelGraph, kept: np.ndarray | None = None) -> bool:
    """Whether the proof of its surgery holds, for half of every group unless channels are named."""
    if kept is None:
        kept = some(graph, graph.groups, uniform(graph.groups, 0.5, Wish(keep=0.5)))
    images = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    plan = settled_plan(model, graph, kept, example_inputs(model, SHAPE))
    return prove(model, graph, plan, (images,), seed=0).passed
