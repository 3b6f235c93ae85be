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
        most = max(map(len, axes.values()), default=0)
        lengths: list[tuple[list[float], list[NDArray[np.float64]]]] = []
        units = []
        for name, tensor in tensors.items():
            mine = axes.get(name, [])
            rest = float(np.prod([size for dim, size in enumerate(tensor.shape) if dim not in {a[2] for a in mine}]))
            counted = tensor.dim() > 1 or name.endswith((".weight", ".running_mean"))
            work = graph.work.get(name, 0)
            if work or counted:
                mine += [(1.0, np.zeros(len(groups)), -1)] * (most - len(mine))
                units.append((work * rest, 4 * rest * counted))
                lengths.append(([each for each, _, _ in mine], [each for _, each, _ in mine]))
        # Of each tensor: multiply-accumulates and bytes per product of its axes' lengths, which are linear in widths.
        self._units_r2 = np.array(units)
        self._fixed_ra, self._shares_rag = (np.array(each) for each in zip(*lengths, strict=True))
        self._names = [group.name for group in groups]

    def __call__(self, widths: Widths) -> tuple[float, float]:
        """(multiply-accumulates, bytes)."""
        name = self._names[0]
        macs, size = self.along(widths, name, np.array([widths[name]]))
        return float(macs[0]), float(size[0])

    def along(
        self, widths: Widths, name: str, choices_k: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The same where one group has other widths, each (k,)."""
        vector, group = np.array([widths[each] for each in self._names], dtype=np.float64), self._names.index(name)
        vector[group] = 0
        lengths_rak = (self._fixed_ra + self._shares_rag @ vector)[..., None]
        lengths_rak = lengths_rak + self._shares_rag[..., group, None] * choices_k
        macs, size = self._units_r2.T @ lengths_rak.prod(1)
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
    search = _Search(costs, groups, curves, wish)
    while search.beyond() > 1:
        if not search.narrow():
            macs, size = costs(search.widths)
            raise unreachable(Cost(int(macs), int(size)))
    while search.widen():
        pass
    return search.widths


class _Search:
    """Widths on their way into a budget."""

    def __init__(self, costs: Costs, groups: Sequence[ChannelGroup], curves: Mapping[str, Curve], wish: Wish) -> None:
        self.costs, self.curves, self.wish = costs, curves, wish
        self.choices = {group.name: np.array(sorted(possible(group, wish.grid))) for group in groups}
        self.widths = {group.name: len(group.channels) for group in groups}
        self.free = []
        for group in groups:
            ratio, name = matching(group, wish), group.name
            if ratio is None:
                self.free.append(name)
            else:
                goal = len(group.channels) * ratio
                self.widths[name] = min(self.choices[name].tolist(), key=lambda width: (abs(width - goal), width))

    def beyond(self) -> float:
        """How far beyond the budget, in units of it; saving is what this falls by."""
        macs, size = self.costs(self.widths)
        return max(macs / (self.wish.macs or np.inf), size / (self.wish.size or np.inf))

    def narrow(self) -> bool:
        """One group becomes narrower, if any can."""
        beyond, steps = self.beyond(), []
        for name in self.free:
            choices = self.choices[name][self.choices[name] < self.widths[name]]
            saved = beyond - self._beyond_with(name, choices)
            choices, saved = choices[saved > 0], saved[saved > 0]
            if len(choices):
                ratios = self._error_with(name, choices) / saved
                steps.append((float(ratios.min()), name, int(choices[ratios.argmin()])))
        if steps:
            _, name, width = min(steps)
            # Not further than needed: the least narrow width on the way that reaches the budget.
            way = self.choices[name][(width <= self.choices[name]) & (self.choices[name] < self.widths[name])]
            self.widths[name] = int(max(way[self._beyond_with(name, way) <= 1], default=width))
        return bool(steps)

    def widen(self) -> bool:
        """One group becomes wider, if that is still within the budget and helps."""
        steps = [(0.0, "", 0)]
        for name in self.free:
            choices = self.choices[name][self.choices[name] > self.widths[name]]
            choices = choices[self._beyond_with(name, choices) <= 1]
            gains = -self._error_with(name, choices)
            steps += zip(gains.tolist(), [name] * len(gains), choices.tolist(), strict=True)
        gain, name, width = max(steps)
        if gain > 0:
            self.widths[name] = width
        return gain > 0

    def _beyond_with(self, name: str, choices: NDArray[np.int64]) -> NDArray[np.float64]:
        macs, size = self.costs.along(self.widths, name, choices)
        return np.maximum(macs / (self.wish.macs or np.inf), size / (self.wish.size or np.inf))

    def _error_with(self, name: str, choices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Beyond that with the present width."""
        curve = self.curves[name]
        at = np.searchsorted(-curve.widths, -np.append(choices, self.widths[name]))  # widths are descending
        error: NDArray[np.float64] = curve.error[at] - curve.error[at[-1]]
        return error[:-1]
