"""A layer's time as a function of its inputs and outputs from few points: which to measure, and what lies between.

The time of a layer climbs in stairs: kernels work on blocks of channels. It is known on a frame of lines (one number of
inputs or outputs held fixed) and interpolated between them by Coons patches, which keep every stair of the lines
(S. A. Coons, MIT MAC-TR-41, 1967). A line is measured at its ends and then, again and again, on both sides of the
roundest number of channels in its middle, until it is straight to within the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 0.05  # of a time: what may be off between points
NEGLIGIBLE = 0.01  # of the time with all channels: smaller deviations are not looked into
POINTS = 24  # of one line
Point = tuple[int, int]  # inputs, outputs
Times = NDArray[np.float64]


@dataclass(frozen=True)
class Timing:
    """A measured time.

    Attributes:
        ms: of undisturbed turns.
        spread_ms: how far these are apart.
        disturbed: whether the machine was busy with something else meanwhile, or turns do not agree.
    """

    ms: float
    spread_ms: float = 0.0
    disturbed: bool = False


@dataclass(frozen=True)
class Domain:
    """The widths that a layer can have.

    Attributes:
        ins: numbers of inputs, ascending; one only where they cannot change.
        outs: of outputs.
    """

    ins: tuple[int, ...]
    outs: tuple[int, ...]

    @property
    def whole(self) -> Point:
        """The widest layer."""
        return self.ins[-1], self.outs[-1]


Line = dict[int, Timing]  # number of channels → time; the number on the other side is fixed
Known = Mapping[Point, Timing]


def wanted(known: Known, domain: Domain, most: int = POINTS) -> set[Point]:
    """Points to measure next; empty when the surface is known well enough.

    It depends on what is known only, so that points from an earlier run are used as if they had just been measured.

    Args:
        known: points measured so far.
        domain: widths that matter.
        most: points of one line.
    """
    corners = {(i, o) for i in _edges(domain.ins) for o in _edges(domain.outs)}
    if missing := corners - known.keys():
        return missing
    peak = max(known[corner].ms for corner in corners)

    def missing_on(ins: Sequence[int], outs: Sequence[int]) -> set[Point]:
        found = {(i, o) for o in outs for i in _line_wants(_along_ins(known, o), domain.ins, peak, most)}
        return found | {(i, o) for i in ins for o in _line_wants(_along_outs(known, i), domain.outs, peak, most)}

    if missing := missing_on(_edges(domain.ins), _edges(domain.outs)):
        return missing  # only between lines that are well known can the patch be judged
    ins, outs = _frame(known, domain)
    return missing_on(ins, outs) or {point for point in _centres(domain, ins, outs) if point not in known}


def _edges(places: Sequence[int]) -> list[int]:
    """Where the outer lines of the frame are: the widest, and a narrow one that is no special case, such as 1 or 3."""
    return sorted({max(places[: max(1, len(places) // 4)], key=lambda place: (place & -place, place)), places[-1]})


def _along_ins(known: Known, outs: int) -> Line:
    return {i: timing for (i, o), timing in known.items() if o == outs}


def _along_outs(known: Known, ins: int) -> Line:
    return {o: timing for (i, o), timing in known.items() if i == ins}


def _line_wants(line: Line, places: Sequence[int], peak: float, most: int) -> set[int]:
    """Channels to measure next on one line, where it bends most first."""
    if missing := {places[0], places[-1]} - line.keys():
        return missing
    wants: list[tuple[float, set[int]]] = []
    stack = [(0, len(places) - 1, math.inf)]
    while stack:
        low, high, bend = stack.pop()
        if high - low < 2:
            continue
        middle = _roundest(places, low, high)
        probes = sorted({middle, min(middle + 1, high - 1)})
        if missing := {places[probe] for probe in probes} - line.keys():
            wants.append((bend, missing))
            continue
        bend = max(_excess(line, places[low], places[probe], places[high], peak) for probe in probes)
        if bend > 0:
            stack += [(low, middle, bend), (probes[-1], high, bend)]
    found: set[int] = set()
    for _, missing in sorted(wants, key=lambda want: -want[0]):
        if len(line) + len(found | missing) <= most:
            found |= missing
    return found


def _roundest(places: Sequence[int], low: int, high: int) -> int:
    """Index of the number in the middle half that is divisible by the highest power of two: stairs have edges there."""
    quarter = (high - low) // 4
    middle = (low + high) / 2
    inside = range(max(low + 1, low + quarter), min(high - 1, high - quarter) + 1)
    return max(inside, key=lambda index: (places[index] & -places[index], -abs(index - middle), -index))


def _excess(line: Line, low: int, at: int, high: int, peak: float) -> float:
    """By how much a point is further from the straight line between two others than noise or tolerance allow, ms."""
    share = (at - low) / (high - low)
    straight = (1 - share) * line[low].ms + share * line[high].ms
    noise = line[at].spread_ms + max(line[low].spread_ms, line[high].spread_ms)
    return abs(line[at].ms - straight) - max(TOLERANCE * straight, NEGLIGIBLE * peak, noise)


def _frame(known: Known, domain: Domain) -> tuple[list[int], list[int]]:
    """Inputs and outputs whose lines are measured: the ends, and the middle where the patch between them is off."""
    ins, outs = _edges(domain.ins), _edges(domain.outs)
    edges = Surface(known, domain, ins, outs)
    peak = edges.at(*domain.whole)
    for i, o in _centres(domain, ins, outs):
        if (timing := known.get((i, o))) is None:
            continue
        patch = edges.at(i, o)
        if abs(timing.ms - patch) > max(TOLERANCE * patch, NEGLIGIBLE * peak, timing.spread_ms):
            return sorted({*ins, i}), sorted({*outs, o})
    return ins, outs


def _centres(domain: Domain, ins: Sequence[int], outs: Sequence[int]) -> Iterator[Point]:
    """The middle of the whole, if there is a patch and not a line, and no middle line yet."""
    if len(domain.ins) > 2 and len(domain.outs) > 2 and len(ins) == len(outs) == 2:
        yield tuple(places[_roundest(places, 0, len(places) - 1)] for places in (domain.ins, domain.outs))  # type: ignore[misc]  # two


class Surface:
    """A layer's time at any widths within its domain, through all measured points of its frame.

    Args:
        known: measured points; those that `wanted` asked for at least.
        domain: widths.
        ins, outs: of the frame's lines; by default those that `wanted` chose.

    Attributes:
        domain: the widths.
        known: the measured points.
        least_ms: the shortest time of all points.
        lines: measured points with all outputs, and with all inputs.
        disturbed: whether a point is.
    """

    def __init__(
        self, known: Known, domain: Domain, ins: Sequence[int] | None = None, outs: Sequence[int] | None = None
    ) -> None:
        if ins is None or outs is None:
            ins, outs = _frame(known, domain)
        self.domain, self.known = domain, known
        self._ins, self._outs = np.array(ins, float), np.array(outs, float)
        self._by_outs = [_polyline(_along_ins(known, o)) for o in outs]
        self._by_ins = [_polyline(_along_outs(known, i)) for i in ins]
        self.least_ms = min(timing.ms for timing in known.values())
        self.disturbed = any(timing.disturbed for timing in known.values())
        i, o = domain.whole
        self.lines = (dict(sorted(_along_ins(known, o).items())), dict(sorted(_along_outs(known, i).items())))

    def at(self, ins: int, outs: int) -> float:
        """Milliseconds at one point."""
        return float(self(np.array([float(ins)]), np.array([float(outs)]))[0])

    def __call__(self, ins: Times, outs: Times) -> Times:
        """Milliseconds at n points; `ins` and `outs` are (n,)."""
        row, left, right = _between(self._ins, ins)
        column, low, high = _between(self._outs, outs)
        u, v = _share(ins, left, right), _share(outs, low, high)
        along_ins = [_value(self._by_outs, column + side, ins) for side in (0, 1)]
        along_outs = [_value(self._by_ins, row + side, outs) for side in (0, 1)]
        corners = [[_value(self._by_outs, column + c, edge) for c in (0, 1)] for edge in (left, right)]
        ruled = (1 - v) * along_ins[0] + v * along_ins[1] + (1 - u) * along_outs[0] + u * along_outs[1]
        bilinear = (1 - u) * ((1 - v) * corners[0][0] + v * corners[0][1])
        bilinear += u * ((1 - v) * corners[1][0] + v * corners[1][1])
        # Where stairs of both sides meet the patch may fall below anything that was measured.
        return np.maximum(ruled - bilinear, 0.5 * self.least_ms)


def _polyline(line: Line) -> tuple[Times, Times]:
    places = sorted(line)
    return np.array(places, dtype=np.float64), np.array([line[place].ms for place in places])


def _between(lines: Times, places: Times) -> tuple[NDArray[np.intp], Times, Times]:
    """For every place the number of the line before it, and where this line and the next are."""
    before = np.clip(np.searchsorted(lines, places, side="right") - 1, 0, max(len(lines) - 2, 0))
    return before, lines[before], lines[np.minimum(before + 1, len(lines) - 1)]


def _share(places: Times, low: Times, high: Times) -> Times:
    """What is narrower than the frame goes with its edge."""
    share: Times = np.clip((places - low) / np.maximum(high - low, 1), 0, 1)
    return share


def _value(lines: Sequence[tuple[Times, Times]], numbers: NDArray[np.intp], places: Times) -> Times:
    """On each place's own line; past the last line, its value there does not count."""
    values = np.stack([np.interp(places, *line) for line in lines])
    return values[np.minimum(numbers, len(lines) - 1), np.arange(len(numbers))]


def fast_widths(line: Line, places: Sequence[int], tolerance: float = TOLERANCE) -> list[int]:
    """Widths that use the engine well: one more than each would make a channel dearer, beyond noise and tolerance.

    Args:
        line: measured times.
        places: all widths that are possible; only neighbours that were both measured are compared.
        tolerance: relative.
    """
    return [
        low
        for low, high in pairwise(places)
        if low in line and high in line and _dearer(low, line[low], high, line[high], tolerance)
    ]


def _dearer(low: int, before: Timing, high: int, after: Timing, tolerance: float) -> bool:
    noise = (before.spread_ms + after.spread_ms) / high
    return after.ms / high - before.ms / low > max(tolerance * before.ms / low, noise)


def stair(widths: Sequence[int]) -> int | None:
    """What fast widths have in common: the number they are multiples of; None below two of them, or if it is 1."""
    common = math.gcd(*widths)
    return common if len(widths) > 1 and common > 1 else None
