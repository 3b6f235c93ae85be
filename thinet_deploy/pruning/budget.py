"""How many channels stay: uniform widths for a keep ratio, or for a budget of multiply-accumulates or size."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import GateError
from .graph import Branch, ChannelGraph, ChannelGroup

Widths = dict[str, int]  # group's name → channels that stay


@dataclass(frozen=True)
class Wish:
    """What the user asks of widths.

    Attributes:
        keep: share of channels that stay in every group, where no budget is given.
        macs: most multiply-accumulates for one input; None for no such budget.
        size: most bytes of weights, by the papers' rule (4 per weight, biases not counted); None for no such budget.
        grid: widths are multiples of this number.
        soft: whether the grid is halved for groups narrower than two of its steps, until they can become narrower.
        layers: pattern of producers → keep ratio of theirs, whatever the others get.
    """

    keep: float = 0.5
    macs: float | None = None
    size: float | None = None
    grid: int = 1
    soft: bool = False
    layers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """Of a network for one input: multiply-accumulates, and bytes of its weights by the papers' rule."""

    macs: int
    size: int


def kept_note(groups: Sequence[ChannelGroup], widths: Widths) -> str:
    """How much of all channels that can go is left, in words."""
    whole = {group.name: len(group.channels) for group in groups}
    return f"{sum(widths.get(name, width) for name, width in whole.items())} of {sum(whole.values())} filters stay"


def cost(tensors: Mapping[str, torch.Tensor], graph: ChannelGraph, kept: NDArray[np.bool_]) -> Cost:
    """What a network costs when only some channels stay; nothing is run.

    Args:
        tensors: parameters and buffers of the original by name.
        graph: its channels.
        kept: per channel, whether it stays.
    """
    stays, counts = np.append(kept, True), dict[str, list[int]]()
    for axis in graph.axes:
        left = counts.setdefault(axis.site.parameter, list(tensors[axis.site.parameter].shape))
        left[axis.site.dim] = int(stays[axis.channels].sum()) // axis.groups
    macs = size = 0
    for name, tensor in tensors.items():
        elements = math.prod(counts.get(name, tensor.shape))
        macs += graph.work.get(name, 0) * elements
        if tensor.dim() > 1 or name.endswith((".weight", ".running_mean")):
            size += 4 * elements
    return Cost(macs, size)


def possible(group: ChannelGroup, grid: int) -> list[int]:
    """Widths that a group can have: equal shares of its cells, multiples of the grid, or all of it."""
    widths = [group.width(step) for step in range(1, group.steps + 1)]
    return [width for width in widths if width % grid == 0 or width == len(group.channels)]


def choices(group: ChannelGroup, wish: Wish) -> list[int]:
    """Widths that a group can have on the grid wished for."""
    grid = wish.grid
    while wish.soft and grid > 1 and 2 * grid > len(group.channels):
        grid //= 2
    return possible(group, grid)


def softened(
    tensors: Mapping[str, torch.Tensor], graph: ChannelGraph, groups: Sequence[ChannelGroup], wish: Wish
) -> Wish:
    """A soft wish with its grid halved until the narrowest widths cost at most half of what is wished for.

    So there is room to choose where widths go. Without a budget, what the keep ratio leaves is wished for. Where more
    than half of it is taken by what cannot go at all, half of what is left beside that.
    """
    if not wish.soft:
        return wish

    def cost_at(ratio: float, grid: int) -> Cost:
        return cost(tensors, graph, some(graph, groups, uniform(groups, ratio, replace(wish, grid=grid))))

    macs, size = wish.macs or math.inf, wish.size or math.inf
    if wish.macs is None and wish.size is None:
        macs = cost_at(wish.keep, 1).macs

    def crowded(least: int, stays: int, most: float) -> bool:
        beside = stays if stays > most / 2 else 0
        return least - beside > (most - beside) / 2

    grid, stays = wish.grid, cost_at(0.0, 1)
    while grid > 1:
        least = cost_at(0.0, grid)
        if not (crowded(least.macs, stays.macs, macs) or crowded(least.size, stays.size, size)):
            break
        grid //= 2
    return replace(wish, grid=grid)


def uniform(groups: Sequence[ChannelGroup], ratio: float, wish: Wish) -> Widths:
    """One keep ratio for all groups, each at a width it can have.

    Without a grid the number is int(C·r) as in ThiNet, or the next lower one that keeps shares equal; with one it is
    the nearest on the grid.
    """
    widths = {}
    for group in groups:
        mine = matching(group, wish)
        goal, there = len(group.channels) * (ratio if mine is None else mine), choices(group, wish)
        if wish.grid > 1:
            widths[group.name] = min(there, key=lambda width: (abs(width - goal), width))
        else:
            widths[group.name] = max((width for width in there if width <= goal + 1e-9), default=there[0])
    return widths


def matching(group: ChannelGroup, wish: Wish) -> float | None:
    """The keep ratio that the user asked for this group by a pattern of names; None without one."""
    patterns = (
        ratio
        for pattern, ratio in wish.layers.items()
        if any(fnmatch.fnmatchcase(producer, pattern) for producer in group.producers)
    )
    return next(patterns, None)


def choose_widths(
    tensors: Mapping[str, torch.Tensor],
    graph: ChannelGraph,
    groups: Sequence[ChannelGroup],
    wish: Wish,
    branches: Sequence[Branch] = (),
) -> Widths:
    """Widths for what the user asks: the largest uniform ones within the budget; else without what may vanish.

    Raises:
        GateError: the budget cannot be reached with these groups.
    """
    if wish.macs is None and wish.size is None:
        return uniform(groups, wish.keep, wish)

    def fits(widths: Widths) -> bool:
        now = cost(tensors, graph, some(graph, groups, widths))
        return now.macs <= (wish.macs or math.inf) and now.size <= (wish.size or math.inf)

    least = {**uniform(groups, 0.0, wish), **{name: 0 for branch in branches for name in branch.groups}}
    if not fits(least):
        left = cost(tensors, graph, some(graph, groups, least))
        raise unreachable(left, cost(tensors, graph, np.ones(graph.channels, dtype=bool)))
    if not fits(uniform(groups, 0.0, wish)):
        return least
    return uniform(groups, _largest(lambda ratio: fits(uniform(groups, ratio, wish))), wish)


def unreachable(least: Cost, whole: Cost) -> GateError:
    """The error for a budget below the narrowest widths, given what these and the whole network cost."""
    return GateError(
        f"The budget cannot be reached: with the narrowest widths {least.macs / 1e6:.3g} of {whole.macs / 1e6:.3g} M "
        f"multiply-accumulates and {least.size / 2**20:.3g} of {whole.size / 2**20:.3g} MB are left.",
        hint="Ask for less (`thinet-deploy prune --feasibility` shows what can be had), lower --round-to, prune the "
        "shortcuts too (--prune-shortcuts), let branches vanish (--drop-branches), or ignore fewer layers.",
    )


def _largest(within: Callable[[float], bool]) -> float:
    """The largest ratio up to 1 that is within the budget; wider is never cheaper."""
    if within(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return low


def may_vanish(graph: ChannelGraph, groups: Sequence[ChannelGroup], wish: Wish) -> tuple[Branch, ...]:
    """The branches of which every group may become narrower, and for none of which a ratio was asked."""
    free = {group.name for group in groups if matching(group, wish) is None}
    return tuple(branch for branch in graph.branches if free.issuperset(branch.groups))


def some(graph: ChannelGraph, groups: Sequence[ChannelGroup], widths: Widths) -> NDArray[np.bool_]:
    """A keep set of the widths asked for, whichever channels these are: costs depend on numbers only."""
    kept = np.ones(graph.channels, dtype=bool)
    for group in groups:
        for cell in np.unique(group.cells):
            mine = group.channels[group.cells == cell]
            kept[mine[len(mine) * widths[group.name] // len(group.channels) :]] = False
    return kept
