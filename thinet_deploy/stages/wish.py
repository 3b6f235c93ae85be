"""What the options ask of widths, in numbers for the job's network."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from ..errors import InputError, UnknownNameError
from ..pruning.budget import Cost, Wish, cost, may_vanish, softened
from ..pruning.graph import Branch, ChannelGraph, ChannelGroup
from ..pruning.trace import named_tensors
from .job import Job
from .tools import Tools

_NEW_HEAD = "new head.weight"


def counted(job: Job, model: nn.Module, graph: ChannelGraph) -> tuple[dict[str, torch.Tensor], ChannelGraph]:
    """What a budget counts: tensors by name, and the graph that knows their work.

    Where the head is going to be replaced (ThiNet-GAP), the new one in its place: it is what ships.
    """
    tensors = dict(named_tensors(model))
    if (head := job.new_head) is None:
        return tensors, graph
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier.")}
    axes = tuple(axis for axis in graph.axes if axis.site.parameter in tensors)
    tensors[_NEW_HEAD] = torch.empty(head.classes, head.features, device="meta")
    return tensors, replace(graph, axes=axes, work={**graph.work, _NEW_HEAD: 1})


def cost_of(model: nn.Module, graph: ChannelGraph) -> Cost:
    """What the original costs, with the head that it has."""
    return cost(dict(named_tensors(model)), graph, np.ones(graph.channels, dtype=bool))


def wish_of(tools: Tools, model: nn.Module, graph: ChannelGraph, groups: Sequence[ChannelGroup]) -> Wish:
    """What the options ask of widths, in numbers for this network.

    Raises:
        UnknownNameError: a pattern of --keep-layer is of no layer that is pruned.
        InputError: the budget is no less than what the network has.
    """
    options = tools.job.options
    names = {producer for group in groups for producer in group.producers}
    for pattern in options.keep_layer:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise UnknownNameError("layer that is pruned, for --keep-layer,", pattern, names)
    everything = np.ones(graph.channels, dtype=bool)
    most_macs = options.most_macs(cost_of(model, graph).macs)
    tensors, graph = counted(tools.job, model, graph)
    whole = cost(tensors, graph, everything)
    _check_budget(tools.job, "macs", most_macs, whole.macs, whole)
    _check_budget(tools.job, "size", options.most_bytes, whole.size, whole)
    sizes = {producer: len(group.channels) for group in groups for producer in group.producers}
    fixed = {producer: width / sizes[producer] for producer, width in tools.job.widths.items()}
    wish = Wish(
        keep=options.keep,
        macs=most_macs,
        size=options.most_bytes,
        grid=tools.job.grid,
        soft=options.round_to is None,
        layers={**options.keep_layer, **fixed},
    )
    return softened(tensors, graph, groups, wish)


def _check_budget(job: Job, name: str, most: float | None, now: int, whole: Cost) -> None:
    asked = f"--{name} {getattr(job.options, name)}"
    hint = "Ask for less: --macs 2x halves the multiply-accumulates."
    if most == 0:
        raise InputError(f"{asked} would leave nothing of the network.", hint=hint)
    if most is not None and most >= now:
        head = " with its new head" if job.replaces_head else ""
        raise InputError(
            f"{asked} asks for no less than the original has{head} ({whole.macs / 1e6:.4g} M multiply-accumulates, "
            f"{whole.size / 2**20:.4g} MB), so nothing would be pruned.",
            hint=hint,
        )


def branches_of(tools: Tools, graph: ChannelGraph, groups: Sequence[ChannelGroup], wish: Wish) -> tuple[Branch, ...]:
    """The residual branches that may vanish."""
    options = tools.job.options
    able = options.drop_branches and not options.layerwise and options.selection == "elimination"
    return may_vanish(graph, groups, wish) if able else ()
