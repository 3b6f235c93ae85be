"""Layers of one shape for people and pictures: their times along both sides, and over both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .milliseconds import Sized
from .surfaces import Line, Surface, fast_widths, stair

PLACES = 17  # of a surface, on either side, beside those that were measured


@dataclass(frozen=True)
class Side:
    """A layer's time along its inputs or its outputs, the other side whole.

    Attributes:
        widths: measured ones, ascending.
        ms: their times.
        spread_ms: how far the true ones may be from them.
        fast: widths after which a channel more is dearer.
        multiple: what these are multiples of; None without a pattern.
    """

    widths: tuple[int, ...]
    ms: tuple[float, ...]
    spread_ms: tuple[float, ...]
    fast: tuple[int, ...]
    multiple: int | None


@dataclass(frozen=True)
class Spot:
    """A measured point of a layer's surface.

    Attributes:
        ins, outs: channels.
        ms: of one call.
        spread_ms: how far the true time may be from it.
        disturbed: whether the machine was busy with something else meanwhile, or turns do not agree.
    """

    ins: int
    outs: int
    ms: float
    spread_ms: float
    disturbed: bool


@dataclass(frozen=True)
class Grid:
    """A layer's time at any of its widths, as budgets take it: through the measured points, read off at some places.

    Attributes:
        ins, outs: the places, ascending.
        ms: [outs][ins].
    """

    ins: tuple[int, ...]
    outs: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Stairs:
    """Layers of one shape and the same widths.

    Attributes:
        names: of the layers.
        shape: for people.
        ins, outs: channels now; inputs of a depthwise layer are 1.
        calls: of all of them together, for one input of the network.
        ms: of one call.
        share: of all layers' time.
        half: (inputs, outputs) at about half of what can become narrower.
        half_faster: how many times faster the layer is then.
        half_fewer: how many times fewer multiply-accumulates it does then.
        along_ins, along_outs: the stairs, where the other side is whole.
        measured: all points that were, by inputs and outputs.
        surface: what follows from them.
    """

    names: tuple[str, ...]
    shape: str
    ins: int
    outs: int
    calls: int
    ms: float
    share: float
    half: tuple[int, int]
    half_faster: float
    half_fewer: float
    along_ins: Side
    along_outs: Side
    measured: tuple[Spot, ...]
    surface: Grid


def stairs_of(same: Sequence[tuple[Sized, Surface]], total_ms: float) -> Stairs:
    """Of layers with one shape and the same widths, whose network's layers take so long together."""
    first, surface = same[0]
    calls, (ins, outs) = sum(each.layer.calls for each, _ in same), first.domain.whole
    ms, half = surface.at(ins, outs), (_half(first.domain.ins), _half(first.domain.outs))
    along = [_side(line, each) for line, each in zip(surface.lines, (first.domain.ins, first.domain.outs), strict=True)]
    return Stairs(
        names=tuple(each.layer.name for each, _ in same),
        shape=str(first.layer.shape),
        ins=ins,
        outs=outs,
        calls=calls,
        ms=ms,
        share=calls * ms / total_ms,
        half=half,
        half_faster=ms / surface.at(*half),
        half_fewer=ins * outs / (half[0] * half[1]),
        along_ins=along[0],
        along_outs=along[1],
        measured=tuple(
            Spot(*point, timing.ms, timing.spread_ms, timing.disturbed)
            for point, timing in sorted(surface.known.items())
        ),
        surface=_grid(surface),
    )


def _grid(surface: Surface) -> Grid:
    (ins, outs), domain = zip(*surface.known, strict=True), surface.domain
    columns, rows = _spread(domain.ins, ins), _spread(domain.outs, outs)
    ms = surface(*(side.ravel().astype(float) for side in np.meshgrid(columns, rows))).reshape(len(rows), len(columns))
    return Grid(columns, rows, tuple(tuple(row) for row in ms.tolist()))


def _spread(places: Sequence[int], measured: Iterable[int]) -> tuple[int, ...]:
    """The measured ones, for stairs have their edges there, and some between the first and the last."""
    chosen = np.linspace(0, len(places) - 1, PLACES).round().astype(int)
    return tuple(sorted({*measured, *(places[index] for index in chosen)}))


def _half(places: Sequence[int]) -> int:
    """The width nearest to half of the widest."""
    return min(places, key=lambda place: (abs(place - places[-1] / 2), place)) if len(places) > 1 else places[0]


def _side(line: Line, places: Sequence[int]) -> Side:
    fast = fast_widths(line, places)
    ms, spread = ([getattr(timing, name) for timing in line.values()] for name in ("ms", "spread_ms"))
    return Side(tuple(line), tuple(ms), tuple(spread), tuple(fast), stair(fast))
