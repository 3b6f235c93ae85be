"""What a network takes on an engine as a function of its groups' widths: the sum of its layers' surfaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import GateError
from ..pruning.allocation import Extent, extents
from ..pruning.budget import Widths, Wish, choices, matching, uniform
from ..pruning.graph import Branch, ChannelGraph, ChannelGroup
from .layer_networks import Layer
from .surfaces import Domain, Surface

Times = NDArray[np.float64]
# Narrowing a group has to save this share of the time of the layers that it touches, else it does not pay.
PAYS = 0.03
_MIXED = 64  # widths that are looked at where several groups meet in one dimension


@dataclass(frozen=True)
class Sized:
    """A layer whose widths depend on those of groups.

    Attributes:
        layer: of the network.
        ins, outs: its widths; inputs of a depthwise layer are counted as 1.
        domain: what they can be.
    """

    layer: Layer
    ins: Extent
    outs: Extent
    domain: Domain

    def touches(self, group: int) -> bool:
        """Whether its widths depend on the group of that number."""
        return bool(self.ins.share[group] or self.outs.share[group])


def sized(layers: Sequence[Layer], graph: ChannelGraph, groups: Sequence[ChannelGroup], wish: Wish) -> list[Sized]:
    """How wide layers can be.

    Args:
        layers: of the network.
        graph: its channels.
        groups: that may become narrower.
        wish: has the grid.
    """
    found, of = [], extents(graph, groups)
    for layer in layers:
        mine, many = of.get(f"{layer.name}.weight", {}), layer.shape.groups
        still = np.zeros(len(groups))
        ins = mine.get(1, Extent(layer.ins / many, still))
        ins = Extent(ins.fixed * many, ins.share * many)
        if layer.shape.kind == "depthwise":
            ins = Extent(1.0, still)
        outs = mine.get(0, Extent(layer.outs, still))
        found.append(Sized(layer, ins, outs, Domain(*(_places(each, groups, wish, many) for each in (ins, outs)))))
    return found


def _places(extent: Extent, groups: Sequence[ChannelGroup], wish: Wish, many: int) -> tuple[int, ...]:
    """The widths that a dimension can have; some of them where several groups meet, multiples of `many`."""
    mine = [(share, group) for share, group in zip(extent.share.tolist(), groups, strict=True) if share]
    if len(mine) == 1:
        ((share, group),) = mine
        return tuple(sorted({round(extent.fixed + share * width) for width in choices(group, wish)}))
    low = round(extent.fixed + sum(share * min(choices(group, wish)) for share, group in mine))
    high = round(extent.fixed + sum(share * len(group.channels) for share, group in mine))
    step = many * max(wish.grid // many, -(-(high - low) // (_MIXED * many)), 1)
    return (*range(low, high, step), high)


class Milliseconds:
    """A `CostFunction` of one unit: milliseconds of all layers together, by their surfaces.

    Attributes:
        beside: see `CostFunction`.
        doubts: why the times of layers may not hold, in words.

    Args:
        layers: of the network.
        surfaces: of each.
        groups: that may become narrower.
    """

    def __init__(self, layers: Sequence[Sized], surfaces: Sequence[Surface], groups: Sequence[ChannelGroup]) -> None:
        self._layers = list(zip(layers, surfaces, strict=True))
        self._place = {group.name: number for number, group in enumerate(groups)}
        self._touched = {
            name: [(layer, surface) for layer, surface in self._layers if layer.touches(at)]
            for name, at in self._place.items()
        }
        self.beside = {
            name: {other for other, at in self._place.items() if any(layer.touches(at) for layer, _ in mine)} | {name}
            for name, mine in self._touched.items()
        }
        disturbed = sum(surface.disturbed for surface in surfaces)
        self.doubts: tuple[str, ...] = (_busy(disturbed, len(surfaces)),) if disturbed else ()
        self._known: dict[tuple[float, ...], float] = {}  # number of a layer, inputs, outputs → ms

    def __call__(self, widths: Widths) -> tuple[float]:
        """Milliseconds, as (1,)."""
        column, total = self._column(widths), 0.0
        for number, layer in enumerate(self._layers):
            key = (number, float(layer[0].ins.at(column)[0]), float(layer[0].outs.at(column)[0]))
            if key not in self._known:  # between two networks of a descent few layers differ
                self._known[key] = float(_total([layer], column)[0])
            total += self._known[key]
        return (total,)

    def saved(self, widths: Widths, name: str, choices: NDArray[np.int64]) -> Times:
        """Milliseconds that other widths of one group would save, (1, choices); < 0 if they cost."""
        now = self._column(widths)
        there = np.repeat(now, len(choices), axis=1)
        there[self._place[name]] = choices
        mine = self._touched[name]
        return (_total(mine, now) - _total(mine, there))[None]

    def touched(self, widths: Widths, name: str) -> float:
        """Milliseconds of the layers whose time depends on a group."""
        return float(_total(self._touched[name], self._column(widths))[0])

    def unreachable(self, left: Sequence[float], whole: Sequence[float]) -> GateError:
        """The error for a budget below the narrowest widths."""
        return GateError(
            f"The budget cannot be reached: layers are predicted to take {left[0]:.3g} ms with the narrowest widths, "
            f"{whole[0] / left[0]:.2f}x less than now.",
            hint="Ask for less, lower --round-to, prune the shortcuts too (--prune-shortcuts), let branches vanish "
            "(--drop-branches), or ignore fewer layers.",
        )

    def _column(self, widths: Widths) -> Times:
        return np.array([[widths[name]] for name in self._place], dtype=np.float64)


def _busy(disturbed: int, layers: int) -> str:
    return (
        f"unstable because something disturbed the machine while {disturbed} of {layers} layers were timed; "
        "they are timed again when they are needed next"
    )


def _total(layers: Sequence[tuple[Sized, Surface]], widths_gm: Times) -> Times:
    """Milliseconds for m choices of widths, (m,)."""
    total = np.zeros(widths_gm.shape[1])
    for each, surface in layers:
        ins, outs = (np.broadcast_to(side.at(widths_gm), total.shape) for side in (each.ins, each.outs))
        there = (ins > 0) & (outs > 0)  # else the layer vanished with its branch
        total = total + np.where(there, each.layer.calls * surface(np.maximum(ins, 1), np.maximum(outs, 1)), 0.0)
    return total


def unpaid(costs: Milliseconds, groups: Sequence[ChannelGroup], wish: Wish) -> dict[str, str]:
    """Group's name → why narrowing it does not pay: it would save less than a share of what it touches."""
    found, whole = {}, {group.name: len(group.channels) for group in groups}
    for group in groups:
        narrower = np.array(choices(group, wish))
        if len(narrower) == 1:  # the grid's doing, not the engine's
            continue
        saved, now = costs.saved(whole, group.name, narrower)[0], costs.touched(whole, group.name)
        if saved.max() < PAYS * now:
            then = now - saved[narrower.argmin()]
            found[group.name] = (
                f"thinner it would hardly be faster here: the layers that it touches take {now:.3g} ms, and "
                f"{then:.3g} ms with {narrower.min()} filters"
            )
    return found


def fastest(costs: Milliseconds, groups: Sequence[ChannelGroup], wish: Wish, branches: Sequence[Branch] = ()) -> Widths:
    """The widths that take the least: the narrowest, or wider where that is faster; without what may vanish."""
    widths = uniform(groups, 0.0, wish)
    for group in groups:
        if matching(group, wish) is not None:
            continue
        there = np.array(choices(group, wish))
        saved = costs.saved(widths, group.name, there)[0]
        if saved.max() > 0:
            widths[group.name] = int(there[saved.argmax()])
    return {**widths, **{name: 0 for branch in branches for name in branch.groups}}
