"""Widths for a budget: what the network loses least by, per multiply-accumulate or byte saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .budget import Cost, Widths, Wish, matching, possible, unreachable
from .graph import STAYS, ChannelGraph, ChannelGroup


@dataclass(frozen=True)
class Curve:
    """What narrower widths of a group cost.

    Attributes:
        widths: descending, the whole group first.
        error: at each width, in any unit that is the same for all groups; never falling.
    """

    widths: NDArray[np.int64]
    error: NDArray[np.float64]


class Costs:
    """Multiply-accumulates and bytes of a network as a function of its groups' widths (see `budget.cost`)."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], graph: ChannelGraph, groups: Sequence[ChannelGroup]
    ) -> None:
        owner = np.full(graph.channels + 1, -1)
        for number, group in enumerate(groups):
            owner[group.channels] = number
        axes: dict[str, list[tuple[float, NDArray[np.float64], int]]] = {}
        sizes = np.array([len(group.channels) for group in groups])
        for axis in graph.axes:
            owners = owner[axis.channels]
            assert STAYS == -1
            owners[axis.channels == STAYS] = -1
            share = np.bincount(owners[owners >= 0], minlength=len(groups)) / sizes / axis.groups
            fixed = float((owners < 0).sum()) / axis.groups
            axes.setdefault(axis.site.parameter, []).append((fixed, share, axis.site.dim))
        self._rows: list[tuple[float, float, list[tuple[float, NDArray[np.float64]]]]] = []
        for name, tensor in tensors.items():
            mine = axes.get(name, [])
            rest = float(np.prod([size for dim, size in enumerate(tensor.shape) if dim not in {a[2] for a in mine}]))
            counted = tensor.dim() > 1 or name.endswith((".weight", ".running_mean"))
            work = graph.work.get(name, 0)
            if work or counted:
                self._rows.append((work * rest, 4 * rest * counted, [(fixed, share) for fixed, share, _ in mine]))
        self._names = [group.name for group in groups]

    def __call__(self, widths: Widths) -> tuple[float, float]:
        """(multiply-accumulates, bytes)."""
        vector = np.array([widths[name] for name in self._names], dtype=np.float64)
        macs = size = 0.0
        for work, weigh, factors in self._rows:
            product = 1.0
            for fixed, share in factors:
                product *= fixed + float(share @ vector)
            macs += work * product
            size += weigh * product
        return macs, size


def allocate(costs: Costs, groups: Sequence[ChannelGroup], curves: Mapping[str, Curve], wish: Wish) -> Widths:
    """Widths within a budget: again and again the group that loses least per unit saved becomes narrower.

    A group goes straight to the width with the best ratio of all narrower ones, so a flat stretch behind a step of its
    curve is found. What is left of the budget at the end goes back to where it helps most.

    Args:
        costs: of the network.
        groups: to prune.
        curves: group's name → its curve.
        wish: the budget, the grid, and keep ratios of some layers; widths that it rules out are not used.

    Raises:
        GateError: the budget cannot be reached with these groups.
    """
    choices = {group.name: sorted(possible(group, wish.grid), reverse=True) for group in groups}
    fixed = {group.name: ratio for group in groups if (ratio := matching(group, wish)) is not None}
    widths = {group.name: len(group.channels) for group in groups}
    error = {
        name: dict(zip(curve.widths.tolist(), curve.error.tolist(), strict=True)) for name, curve in curves.items()
    }
    for group in groups:
        if group.name in fixed:
            goal = len(group.channels) * fixed[group.name]
            widths[group.name] = min(choices[group.name], key=lambda width: (abs(width - goal), width))
    free = [group.name for group in groups if group.name not in fixed]

    def over(at: Widths) -> float:
        """How far beyond the budget, in units of it; saving is what this falls by."""
        macs, size = costs(at)
        return max(macs / wish.macs if wish.macs else 0.0, size / wish.size if wish.size else 0.0)

    now = over(widths)
    while now > 1:
        steps = [
            ((error[name][width] - error[name][widths[name]]) / saved, name, width)
            for name in free
            for width in choices[name]
            if width < widths[name] and (saved := now - over({**widths, name: width})) > 0
        ]
        if not steps:
            macs, size = costs(widths)
            raise unreachable(Cost(int(macs), int(size)))
        _, name, width = min(steps)
        # Not further than needed: the least narrow width on the way that reaches the budget.
        enough = [each for each in choices[name] if width <= each < widths[name] and over({**widths, name: each}) <= 1]
        widths[name] = max([width, *enough])
        now = over(widths)
    while True:  # what is left of the budget
        wider = [
            (error[name][widths[name]] - error[name][width], name, width)
            for name in free
            for width in choices[name]
            if width > widths[name] and over({**widths, name: width}) <= 1
        ]
        if not wider or max(wider)[0] <= 0:
            return widths
        _, name, width = max(wider)
        widths[name] = width
