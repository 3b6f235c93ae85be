"""Does pruning pay here? Every layer of a network on the target's engine, at the widths that it could have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import nn

from ..errors import InputError
from ..interfaces import Precision, Progress, silent
from ..models.loading import InputShape
from ..on_device.runner import ROUNDS
from ..pruning.budget import Wish
from ..pruning.discovery import channel_graph
from ..pruning.graph import ChannelGroup
from ..pruning.trace import example_inputs
from ..target import TargetProfile
from ..timing.budget import Measured
from ..timing.layer_networks import layers_of
from ..timing.milliseconds import Milliseconds, Sized, sized, unpaid
from ..timing.staircase import Engine, Points, survey
from ..timing.surfaces import Line, Surface, fast_widths, stair
from .latency import Bench

SECONDS = 3.0  # of the whole network
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


@dataclass(frozen=True)
class Staircase:
    """What a network's layers take on an engine.

    Attributes:
        model: its name.
        target: profile's id.
        engine: runtime with its version.
        threads: CPU threads.
        precision: that it computes in.
        layers_ms: sum over all layers.
        whole_ms: the whole network, measured.
        factor: the second over the first: what layer times are multiplied by.
        layers: the dearest first.
        unpaid: group's name → why narrowing it would not pay.
        device: board or processor of the one that was measured on; None for this machine.
        warnings: why times may not hold, such as a busy machine.
    """

    model: str
    target: str
    engine: str
    threads: int
    precision: Precision
    layers_ms: float
    whole_ms: float
    factor: float
    layers: tuple[Stairs, ...]
    unpaid: dict[str, str]
    device: str | None = None
    warnings: tuple[str, ...] = ()


def climb(
    model: nn.Module,
    name: str,
    input_shape: InputShape,
    target: TargetProfile,
    engine: Engine,
    *,
    grid: int = 1,
    progress: Progress = silent,
) -> Staircase:
    """Measure the layers of a network, as far as they are not known from an earlier call, and the whole of it.

    Args:
        model: its weights do not matter.
        name: for people.
        input_shape: channels, height, width.
        target: whose engine it is.
        engine: that is timed, see `latency_stage.engine_for`.
        grid: widths are multiples of this number.
        progress: to report to.

    Raises:
        InputError: the network has no layer to measure.
        GateError: the machine throttled whenever the whole network was timed; layer times are kept.
        DeviceError: the device cannot be reached any more; what was measured is kept.
    """
    graph = channel_graph(model, example_inputs(model, input_shape))
    groups = [group for group in graph.groups if not group.shortcut]
    wish = Wish(grid=grid)
    mine = sized(layers_of(model, input_shape), graph, groups, wish)
    if not mine:
        raise InputError(
            f"{name} has no two-dimensional convolution and no linear layer.", hint="Only these can be timed."
        )
    domains = [(each.layer.shape, each.domain) for each in mine]
    surfaces = survey(domains, Points.on(engine), partial(engine.time, progress=progress))
    image = np.random.default_rng(0).standard_normal((1, *input_shape)).astype(np.float32)
    bench = Bench(engine, target, image, progress, ROUNDS, SECONDS)
    with bench.meter(model) as measure:
        whole = measure(model)
    return _summary(name, target.id, engine, mine, surfaces, groups, wish, whole)


def _summary(
    name: str,
    target: str,
    engine: Engine,
    mine: Sequence[Sized],
    surfaces: Sequence[Surface],
    groups: Sequence[ChannelGroup],
    wish: Wish,
    whole: Measured,
) -> Staircase:
    costs = Milliseconds(mine, surfaces, groups)
    (total,) = costs({group.name: len(group.channels) for group in groups})
    alike: dict[object, list[tuple[Sized, Surface]]] = {}
    for each, surface in zip(mine, surfaces, strict=True):
        alike.setdefault((each.layer.shape, each.domain), []).append((each, surface))
    rows = sorted((_stairs(same, total) for same in alike.values()), key=lambda row: -row.share)
    runtime = engine.identity["runtime"]
    idle = unpaid(costs, groups, wish)
    return Staircase(
        name,
        target,
        runtime,
        engine.threads,
        engine.precision,
        layers_ms=total,
        whole_ms=whole.ms,
        factor=whole.ms / total,
        layers=tuple(rows),
        unpaid=idle,
        device=engine.timer.device,
        warnings=(*costs.doubts, *whole.warnings),
    )


def _stairs(same: Sequence[tuple[Sized, Surface]], total: float) -> Stairs:
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
        share=calls * ms / total,
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
