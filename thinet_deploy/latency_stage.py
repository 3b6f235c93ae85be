"""Budgets in milliseconds: layers timed on the target's engine, widths chosen, and the thin network measured there."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from .artifact import write_bytes
from .environment import fingerprint
from .errors import InputError
from .export import INPUT, export_onnx
from .interfaces import Array, Conversion, Precision, Progress, silent
from .job import Job
from .latency import EngineLatency, EngineRef, measure_engines
from .layer_networks import layers_of
from .models.loading import InputShape
from .precision.graph import read_onnx
from .precision.plan import plan_precision
from .pruning.allocation import Curve
from .pruning.budget import Widths, Wish, cost, softened, some
from .pruning.graph import Branch, ChannelGraph, ChannelGroup
from .pruning.latency_budget import Found, Goal, Measured, meet
from .pruning.milliseconds import Milliseconds, sized
from .pruning.plan import empty_plan, plan_channels
from .pruning.surgery import apply, gap_head
from .pruning.trace import named_tensors
from .registry import check, convert, runs_here
from .staircase import RUNTIMES, Engine, Points, Stopwatch, survey
from .target import TargetProfile

# Points of one line of a surface: the grid leaves few widths, and the whole network has the last word.
POINTS = 12
ROUNDS, SECONDS = 11, 4.0  # of the original and of a thin network, in turn
Meter = Callable[[nn.Module], Measured]


def engine_for(target: TargetProfile, threads: int, precision: Precision | None = None) -> Engine:
    """The first of a target's engines in a precision whose layers can be timed on this machine.

    Raises:
        InputError: there is none.
        TargetError: the target cannot compute in that precision.
        MissingError: its runtime is not installed.
    """
    plan = plan_precision(target, precision, fingerprint()["cpu"]["flags"])
    here = [runtime for runtime in plan.runtimes if runtime in RUNTIMES] if runs_here(target) else []
    if not here:
        typed = f" in {precision}" if precision else ""
        raise InputError(
            f"Layers for {target.id} cannot be timed here: no engine of it{typed} runs on this machine.",
            hint=f"Choose a target that runs here with {' or '.join(RUNTIMES)}, such as cpu.",
        )
    check(here[0])
    return Engine(here[0], threads, plan.engines, plan.layout)


def identity(job: Job) -> dict[str, Any]:
    """What widths for a budget of time depend on besides; nothing for other budgets."""
    options = job.options
    if not options.timed:
        return {}
    engine = _engine_of(job)
    return {"timed": {"latency": options.latency, "speedup": options.speedup, **engine.identity}}


def _engine_of(job: Job) -> Engine:
    return engine_for(job.target, job.options.threads, job.options.precision)


@dataclass(frozen=True)
class Bench:
    """Where a budget of time is met.

    Attributes:
        engine: that a network has to be fast on.
        target: whose engine it is.
        image: that networks are timed with, (1, channels, height, width).
        progress: to report to.
        rounds, seconds: of each measurement; see `measure_engines`.
    """

    engine: Engine
    target: TargetProfile
    image: Array
    progress: Progress = silent
    rounds: int = ROUNDS
    seconds: float = SECONDS

    @property
    def input_shape(self) -> InputShape:
        """Of one image."""
        channels, height, width = self.image.shape[1:]
        return channels, height, width

    def stopwatch(self) -> Stopwatch:
        """Measures layers."""
        return partial(self.engine.time, progress=self.progress)

    def meter(self, original: nn.Module, folder: Path) -> Meter:
        """Measures networks beside the original, as engines of the target.

        Args:
            original: made once.
            folder: takes the engines; it has to last as long as the meter.
        """
        base, numbers = self.made(original, "original", folder), itertools.count(1)

        def measure(thin: nn.Module) -> Measured:
            return self.compared(base, base if thin is original else self.made(thin, f"thin{next(numbers)}", folder))

        return measure

    def compared(self, base: EngineRef, thin: EngineRef) -> Measured:
        """The original's engine and another one in turn; the original's alone, if that is the other one."""
        if thin is base:
            (alone,) = self.timed([base])
            return Measured(alone.median_ms, alone.median_ms, 1.0)
        before, after = self.timed([base, thin])
        faster = after.speedup
        assert faster is not None
        return Measured(after.median_ms, before.median_ms, faster.ratio, faster.low, faster.high)

    def timed(self, refs: Sequence[EngineRef]) -> list[EngineLatency]:
        """Engines in turn."""
        how = {"threads": self.engine.threads, "rounds": self.rounds, "seconds": self.seconds}
        return measure_engines(refs, {INPUT: self.image}, **how, progress=self.progress)  # type: ignore[arg-type]  # as named

    def made(self, model: nn.Module, name: str, folder: Path) -> EngineRef:
        """A network as an engine."""
        return as_engine(model, self.input_shape, name, self.engine, self.target, folder)


def as_engine(
    model: nn.Module, input_shape: InputShape, name: str, engine: Engine, target: TargetProfile, folder: Path
) -> EngineRef:
    """A network as an engine, made as `build` makes it; in INT8 without calibration, for it is only to be timed."""
    source, place = folder / f"{name}.onnx", folder / name
    place.mkdir()
    export_onnx(model, input_shape, source, opset=target.opset, ir_version=target.ir_version)
    if engine.precision == "int8":
        write_bytes(source, engine.typed(read_onnx(source)).SerializeToString())
    artifact = convert(engine.runtime, Conversion(source, place, engine.precision), folder)
    return EngineRef(name, engine.runtime, folder / artifact.path, engine.precision)


def bench_of(job: Job, progress: Progress) -> Bench:
    """The job's own: the target's engine on this machine."""
    return Bench(_engine_of(job), job.target, job.data.test.inputs(np.arange(1)), progress)


def fitting(
    bench: Bench,
    job: Job,
    original: nn.Module,
    graph: ChannelGraph,
    groups: Sequence[ChannelGroup],
    wish: Wish,
    curves: Mapping[str, Curve],
    branches: Sequence[Branch] = (),
) -> Found:
    """Widths within the budget of time that the job asks for.

    Raises:
        GateError: it cannot be reached.
        InputError: nothing has to be pruned for it, or the thin network is none.
    """
    goal, head = Goal(job.options.most_ms, job.options.times_faster), job.replaces_head
    wish = with_room(original, graph, groups, wish, goal)
    costs = layer_costs(bench, original, graph, groups, wish, ignore="classifier." if head else None)
    with tempfile.TemporaryDirectory() as folder:
        measure = bench.meter(original, Path(folder))
        make = partial(shaped, original, graph, groups, new_head=head)
        return meet(costs, groups, curves, wish, goal, lambda widths: measure(make(widths)), branches)


def with_room(original: nn.Module, graph: ChannelGraph, groups: Sequence[ChannelGroup], wish: Wish, goal: Goal) -> Wish:
    """A soft grid as fine as a budget of as many times fewer multiply-accumulates would make it."""
    tensors = dict(named_tensors(original))
    macs = cost(tensors, graph, np.ones(graph.channels, dtype=bool)).macs / (goal.speedup or 2.0)
    return replace(softened(tensors, graph, groups, replace(wish, macs=macs)), macs=None)


def layer_costs(
    bench: Bench,
    original: nn.Module,
    graph: ChannelGraph,
    groups: Sequence[ChannelGroup],
    wish: Wish,
    *,
    ignore: str | None = None,
) -> Milliseconds:
    """The network's time by its layers, measured where it is not known yet.

    Args:
        bench: where.
        original: the network.
        graph: of it.
        groups: to prune.
        wish: has the grid.
        ignore: what the names of layers begin with that are not counted: of a head that is going to be replaced.
    """
    layers = [each for each in layers_of(original, bench.input_shape) if not (ignore and each.name.startswith(ignore))]
    mine = sized(layers, graph, groups, wish)
    domains = [(each.layer.shape, each.domain) for each in mine]
    return Milliseconds(mine, survey(domains, Points.on(bench.engine), bench.stopwatch(), POINTS), groups)


def shaped(
    original: nn.Module,
    graph: ChannelGraph,
    groups: Sequence[ChannelGroup],
    widths: Widths,
    *,
    new_head: bool = False,
) -> nn.Module:
    """The network with these widths, itself if it has them; times depend on numbers only, so any filters stay.

    Whether it is still the same network is not looked into: that takes another trace, which is due once the filters
    are chosen.
    """
    kept = some(graph, groups, widths)
    thin = original if kept.all() else apply(plan_channels(original, graph, kept), original)
    head = gap_head(thin) if new_head else None
    return apply(empty_plan(thin).model_copy(update={"head": head}), thin).eval() if head else thin


def told(found: Found, job: Job) -> dict[str, Any]:
    """For the report: what was asked, predicted and measured."""
    options, engine = job.options, _engine_of(job)
    trials = [
        {"predicted_ms": found.factor * each.layers_ms, **asdict(each.measured), "widths": each.widths}
        for each in found.trials
    ]
    best = trials[found.trials.index(found.best)]
    asked = {"latency": options.latency, "speedup": options.speedup}
    where = {"runtime": engine.runtime, "threads": engine.threads, "precision": engine.precision}
    return {**asked, **where, "factor": found.factor, "trials": trials, "best": best}
