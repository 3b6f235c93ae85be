"""Widths for a budget: what the network loses least by, per multiply-accumulate, byte or millisecond saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import GateError
from .budget import Cost, Widths, Wish, choices, matching, uniform, unreachable
from .graph import STAYS, Branch, ChannelGraph, ChannelGroup


@dataclass(frozen=True)
class Curve:
    """What narrower widths of a group cost.

    Attributes:
        widths: descending, the whole group first.
        error: at each width, in any unit that is the same for all groups; never falling.
    """

    widths: NDArray[np.int64]
    error: NDArray[np.float64]

    def at(self, width: int) -> float:
        """The error at a width; 0 where nothing is left for a layer that has vanished with its branch to say wrong."""
        if width == 0 and 0 not in self.widths:
            return 0.0
        return float(self.error[self.widths.tolist().index(width)])


def predicted_error(curves: Mapping[str, Curve], widths: Widths) -> float:
    """What a network of some widths loses: the sum of its groups' errors, in the curves' unit."""
    return sum(curve.at(widths[name]) for name, curve in curves.items())


class CostFunction(Protocol):
    """What a network costs at some widths, in k units."""

    @property
    def beside(self) -> Mapping[str, set[str]]:
        """Group's name → groups (itself too) whose widths say what narrowing it saves."""

    def __call__(self, widths: Widths) -> Sequence[float]:
        """The cost, (k,)."""

    def saved(self, widths: Widths, name: str, choices: NDArray[np.int64]) -> NDArray[np.float64]:
        """What other widths of one group would save, (k, choices); < 0 if they cost."""

    def unreachable(self, left: Sequence[float], whole: Sequence[float]) -> GateError:
        """The error for a budget below the narrowest widths, given what these and the whole network cost."""


@dataclass(frozen=True)
class Extent:
    """The size of a dimension as a function of widths: a part that stays, and a share of each group, (groups,)."""

    fixed: float
    share: NDArray[np.float64]

    def at(self, widths_gm: NDArray[np.float64]) -> NDArray[np.float64]:
        """For m choices of widths, (m,)."""
        return self.fixed + self.share @ widths_gm


def extents(graph: ChannelGraph, groups: Sequence[ChannelGroup]) -> dict[str, dict[int, Extent]]:
    """Parameter or buffer → dimension that goes with channels → its size."""
    owner = np.full(graph.channels + 1, -1)
    for number, group in enumerate(groups):
        owner[group.channels] = number
    found: dict[str, dict[int, Extent]] = {}
    sizes = np.array([len(group.channels) for group in groups])
    assert STAYS == -1
    for axis in graph.axes:
        owners = owner[axis.channels]
        owners[axis.channels == STAYS] = -1
        share = np.bincount(owners[owners >= 0], minlength=len(groups)) / sizes / axis.groups
        fixed = float((owners < 0).sum()) / axis.groups
        found.setdefault(axis.site.parameter, {})[axis.site.dim] = Extent(fixed, share)
    return found


@dataclass(frozen=True)
class _Row:
    """A tensor: (multiply-accumulates, bytes) of an element, and its pruned dimensions."""

    each: NDArray[np.float64]
    axes: list[Extent]

    def touches(self, group: int) -> bool:
        return any(axis.share[group] for axis in self.axes)

    def cost(self, widths_gm: NDArray[np.float64]) -> NDArray[np.float64]:
        """For m choices of widths, (2, m)."""
        elements = np.ones(widths_gm.shape[1])
        for axis in self.axes:
            elements = elements * axis.at(widths_gm)
        return self.each[:, None] * elements


class Costs:
    """Multiply-accumulates and bytes of a network as a function of its groups' widths (see `budget.cost`).

    Attributes:
        beside: group's name → groups (itself too) that share a tensor with it: only their widths say what it saves.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], graph: ChannelGraph, groups: Sequence[ChannelGroup]
    ) -> None:
        axes = extents(graph, groups)
        self._rows: list[_Row] = []
        for name, tensor in tensors.items():
            mine = axes.get(name, {})
            rest = float(np.prod([size for dim, size in enumerate(tensor.shape) if dim not in mine]))
            counted = tensor.dim() > 1 or name.endswith((".weight", ".running_mean"))
            work = graph.work.get(name, 0)
            if work or counted:
                each = np.array([work * rest, 4 * rest * counted])
                self._rows.append(_Row(each, list(mine.values())))
        self._place = {group.name: number for number, group in enumerate(groups)}
        self._touched = {name: [row for row in self._rows if row.touches(at)] for name, at in self._place.items()}
        self.beside = {
            name: {other for other, at in self._place.items() if any(row.touches(at) for row in rows)} | {name}
            for name, rows in self._touched.items()
        }

    def __call__(self, widths: Widths) -> tuple[float, float]:
        """(multiply-accumulates, bytes)."""
        macs, size = _total(self._rows, self._column(widths))[:, 0].tolist()
        return macs, size

    def saved(self, widths: Widths, name: str, choices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Multiply-accumulates and bytes that other widths of one group would save, (2, choices); < 0 if they cost."""
        now = self._column(widths)
        there = np.repeat(now, len(choices), axis=1)
        there[self._place[name]] = choices
        return _total(self._touched[name], now) - _total(self._touched[name], there)

    def unreachable(self, left: Sequence[float], whole: Sequence[float]) -> GateError:
        """The error for a budget below the narrowest widths."""
        return unreachable(Cost(*map(int, left)), Cost(*map(int, whole)))

    def _column(self, widths: Widths) -> NDArray[np.float64]:
        return np.array([[widths[name]] for name in self._place], dtype=np.float64)


def _total(rows: Sequence[_Row], widths_gm: NDArray[np.float64]) -> NDArray[np.float64]:
    """(2, m), in whole numbers, as they are but for rounding."""
    total = sum((row.cost(widths_gm) for row in rows), np.zeros((2, widths_gm.shape[1])))
    return np.rint(total)


def with_budget(costs: Costs, groups: Sequence[ChannelGroup], wish: Wish) -> Wish:
    """The same wish as a budget: what the keep ratio leaves, if it asks for nothing else."""
    if wish.macs is not None or wish.size is not None:
        return wish
    return replace(wish, macs=costs(uniform(groups, wish.keep, wish))[0])


def allocate(
    costs: Costs,
    groups: Sequence[ChannelGroup],
    curves: Mapping[str, Curve],
    wish: Wish,
    branches: Sequence[Branch] = (),
) -> Widths:
    """Widths within a budget: see `Descent`.

    Args:
        costs: of the network.
        groups: to prune.
        curves: group's name → its curve.
        wish: the budget, the grid, and keep ratios of some layers; widths that it rules out are not used.
        branches: that may vanish.

    Raises:
        GateError: the budget cannot be reached with these groups.
    """
    return Descent(costs, groups, curves, wish, branches).reach(wish.macs, wish.size)


@dataclass(frozen=True)
class _Step:
    """A way to become cheaper: error per share saved, and group's name → width."""

    ratio: float
    widths: dict[str, int]


class Descent:
    """The way down from whole groups: again and again the one that loses least per unit saved becomes narrower.

    A group goes straight to the width with the best ratio of all narrower ones, so a flat stretch behind a step of its
    curve is found. A branch that vanishes is one step of all its groups, and what its last layer says is lost then. The
    way is the same for all budgets, so one descent serves several.

    Args:
        costs: of the network.
        groups: to prune.
        curves: group's name → its curve.
        wish: the grid, and keep ratios of some layers; its budget is not looked at.
        branches: that may vanish.
        valued: a cost that is worth keeping (its first unit), such as multiply-accumulates where the budget is of time.
        worth: the error that losing one of its units counts as much as.
    """

    def __init__(
        self,
        costs: CostFunction,
        groups: Sequence[ChannelGroup],
        curves: Mapping[str, Curve],
        wish: Wish,
        branches: Sequence[Branch] = (),
        *,
        valued: CostFunction | None = None,
        worth: float = 0.0,
    ) -> None:
        self._costs = costs
        self._valued, self._worth = valued if worth else None, worth
        self._branches = {branch.end: branch for branch in branches}
        self._widths = uniform(groups, 1.0, wish)
        free = [group for group in groups if matching(group, wish) is None]
        self._choices = {group.name: np.array(choices(group, wish)) for group in free}
        self._curves = curves
        self._error = {
            name: dict(zip(curve.widths.tolist(), curve.error.tolist(), strict=True)) for name, curve in curves.items()
        }
        self._whole = np.array(costs({group.name: len(group.channels) for group in groups}))
        self._steps: dict[str, _Step] = {}  # of a group, or of a branch by its end: the best one
        self._counts = np.zeros(len(self._whole), dtype=bool)  # which savings those are about

    def reach(self, *most: float | None) -> Widths:
        """Widths within a budget; each budget has to be below those before it.

        The last step goes no further than needed. What is left of the budget then goes back to where it helps most.

        Args:
            most: in each unit of the cost; None, or left out, for no such budget.

        Raises:
            GateError: the budget cannot be reached with these groups.
        """
        limits = np.full(len(self._whole), np.inf)
        limits[: len(most)] = [np.inf if each is None else each for each in most]
        while (over := np.array(self._costs(self._widths)) - limits).max() > 0:
            step = self._next(over > 0)
            if (width := self._enough(step, over)) is not None:
                return self._fill({**self._widths, **dict.fromkeys(step.widths, width)}, limits)
            self._widths.update(step.widths)
            touched = {other for name in step.widths for other in self._costs.beside[name]}
            stale = {end for end, branch in self._branches.items() if touched.intersection(branch.groups)}
            for each in touched | stale:
                self._steps.pop(each, None)
        return self._fill(dict(self._widths), limits)

    def _enough(self, step: _Step, over: NDArray[np.float64]) -> int | None:
        """The widest width on the way of one group's step that saves what is missing."""
        if 0 in step.widths.values():
            return None
        ((name, width),) = step.widths.items()
        between = self._choices[name]
        between = between[(between >= width) & (between < self._widths[name])]
        enough = between[(self._costs.saved(self._widths, name, between) >= over[:, None]).all(0)]
        return int(enough.max()) if len(enough) else None

    def _next(self, counts: NDArray[np.bool_]) -> _Step:
        """The best step of all; only savings of what is over its budget count, as shares of the whole network."""
        if (counts != self._counts).any():
            self._steps, self._counts = {}, counts
        for name in self._choices.keys() - self._steps.keys():
            self._steps[name] = self._step(name)
        for end in self._branches.keys() - self._steps.keys():
            self._steps[end] = self._vanishing(self._branches[end])
        best = min(self._steps.values(), key=lambda step: (step.ratio, *step.widths.items()), default=_Step(np.inf, {}))
        if best.ratio == np.inf:
            raise self._costs.unreachable(self._costs(self._widths), self._whole.tolist())
        return best

    def _vanishing(self, branch: Branch) -> _Step:
        """All groups of a branch at once; what its inner layers lose counts no more."""
        now, gone = self._widths, dict.fromkeys(branch.groups, 0)
        if now[branch.groups[-1]] == 0:
            return _Step(np.inf, {})
        share = (np.array(self._costs(now)) - np.array(self._costs({**now, **gone}))) / self._whole
        lost = sum(self._curves[name].at(0) - self._curves[name].at(now[name]) for name in branch.groups)
        if self._valued:
            lost += self._worth * (self._valued(now)[0] - self._valued({**now, **gone})[0])
        saved = float(share[self._counts].sum())
        return _Step(lost / saved if saved > 0 else np.inf, gone)

    def _step(self, name: str) -> _Step:
        narrower = self._choices[name][self._choices[name] < self._widths[name]]
        share = self._costs.saved(self._widths, name, narrower) / self._whole[:, None]
        saved, error = share[self._counts].sum(0), self._error[name]
        lost = np.array([error[width] for width in narrower.tolist()]) - error.get(self._widths[name], 0.0)
        if self._valued:
            lost = lost + self._worth * self._valued.saved(self._widths, name, narrower)[0]
        ratio = np.divide(lost, saved, out=np.full(len(narrower), np.inf), where=saved > 0)
        if not len(ratio) or ratio.min() == np.inf:
            return _Step(np.inf, {})
        return _Step(float(ratio.min()), {name: int(narrower[ratio.argmin()])})

    def _fill(self, widths: Widths, most: NDArray[np.float64]) -> Widths:
        while True:
            left, wider = most - np.array(self._costs(widths)), []
            for name, mine in self._choices.items():
                if widths[name] == 0:
                    continue  # a branch comes back as a whole or not at all
                fits = mine[(self._costs.saved(widths, name, mine) >= -left[:, None]).all(0)]
                if len(fits) and (width := int(fits.max())) > widths[name]:
                    wider.append((self._error[name][widths[name]] - self._error[name][width], name, width))
            if not wider or max(wider)[0] <= 0:
                return widths
            _, name, width = max(wider)
            widths[name] = width
