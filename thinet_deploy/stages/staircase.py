"""Does pruning pay here? Every layer of a network on the target's engine, at the widths that it could have."""

from __future__ import annotations

from collections.abc import Sequence
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
from ..timing.stairs import Stairs, stairs_of
from ..timing.surfaces import Surface
from .latency import Bench

SECONDS = 3.0  # of the whole network


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
    rows = sorted((stairs_of(same, total) for same in alike.values()), key=lambda row: -row.share)
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
