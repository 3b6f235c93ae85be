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

from .errors import InputError, ModelError
from .export import INPUT, export_onnx
from .interfaces import Conversion, Progress
from .job import Job
from .latency import EngineRef, measure_engines
from .layer_networks import layers_of
from .models.loading import InputShape
from .pruning.allocation import Curve
from .pruning.budget import Widths, Wish, cost, softened, some
from .pruning.graph import ChannelGraph, ChannelGroup
from .pruning.latency_budget import Found, Goal, Measured, meet
from .pruning.milliseconds import Milliseconds, sized
from .pruning.plan import empty_plan
from .pruning.retrace import RetraceError, settled_plan
from .pruning.surgery import apply, gap_head
from .pruning.trace import example_inputs, named_tensors
from .registry import check, convert, host_runtimes, runs_here
from .staircase import RUNTIMES, Engine, Points, Stopwatch, survey
from .target import TargetProfile

# Points of one line of a surface: the grid leaves few widths, and the whole network has the last word.
POINTS = 12
ROUNDS, SECONDS = 11, 4.0  # of the original and of a thin network, in turn
Meter = Callable[[nn.Module], Measured]


def engine_for(target: TargetProfile, threads: int) -> Engine:
    """The first of a target's engines whose layers can be timed on this machine.

    Raises:
        InputError: there is none.
        MissingError: its runtime is not installed.
    """
    here = [runtime for runtime in host_runtimes(target) if runtime in RUNTIMES] if runs_here(target) else []
    if not here:
        raise InputError(
            f"Layers for {target.id} cannot be timed here: no engine of it runs on this machine.",
            hint=f"Choose a target that runs here with {' or '.join(RUNTIMES)}, such as cpu.",
        )
    check(here[0])
    return Engine(here[0], threads)


def identity(job: Job) -> dict[str, Any]:
    """What widths for a budget of time depend on besides; nothing for other budgets."""
    options = job.options
    if not options.timed:
        return {}
    engine = engine_for(job.target, options.threads)
    return {"timed": {"latency": options.latency, "speedup": options.speedup, **engine.identity}}


@dataclass(frozen=True)
class Bench:
    """Where a budget of time is met.

    Attributes:
        job: what is being pruned.
        engine: that it has to be fast on.
        progress: to report to.
    """

    job: Job
    engine: Engine
    progress: Progress

    def stopwatch(self) -> Stopwatch:
        """Measures layers."""
        return partial(self.engine.time, progress=self.progress)

    def meter(self, original: nn.Module, folder: Path) -> Meter:
        """Measures networks beside the original, as engines of the target.

        Args:
            original: made once.
            folder: takes the engines; it has to last as long as the meter.
        """
        base = self.made(original, "original", folder)
        image = self.job.data.test.inputs(np.arange(1))
        numbers = itertools.count(1)

        def measure(thin: nn.Module) -> Measured:
            refs = [base, self.made(thin, f"thin{next(numbers)}", folder)]
            first, second = measure_engines(
                refs,
                {INPUT: image},
                threads=self.engine.threads,
                rounds=ROUNDS,
                seconds=SECONDS,
                progress=self.progress,
            )
            before, after = (each.samples.summary["median_ms"] for each in (first, second))
            assert second.speedup is not None
            return Measured(after, before, second.speedup.ratio, second.speedup.low, second.speedup.high)

        return measure

    def made(self, model: nn.Module, name: str, folder: Path) -> EngineRef:
        """A network as an engine."""
        return as_engine(model, self.job.input_shape, name, self.engine, self.job.target, folder)


def as_engine(
    model: nn.Module, input_shape: InputShape, name: str, engine: Engine, target: TargetProfile, folder: Path
) -> EngineRef:
    """A network as an engine, made as `build` makes it."""
    source, place = folder / f"{name}.onnx", folder / name
    place.mkdir()
    export_onnx(model, input_shape, source, opset=target.opset, ir_version=target.ir_version)
    artifact = convert(engine.runtime, Conversion(source, place), folder)
    return EngineRef(name, engine.runtime, folder / artifact.path)


def bench_of(job: Job, progress: Progress) -> Bench:
    """The job's own: the target's engine on this machine."""
    return Bench(job, engine_for(job.target, job.options.threads), progress)


def fitting(
    bench: Bench,
    original: nn.Module,
    graph: ChannelGraph,
    groups: Sequence[ChannelGroup],
    wish: Wish,
    curves: Mapping[str, Curve],
) -> Found:
    """Widths within the budget of time that the job asks for.

    Raises:
        GateError: it cannot be reached.
        InputError: nothing has to be pruned for it, or the thin network is none.
    """
    job, goal = bench.job, Goal(bench.job.options.most_ms, bench.job.options.times_faster)
    wish = _with_room(original, graph, groups, wish, goal)
    costs = layer_costs(job, original, graph, groups, wish, Points.on(bench.engine), bench.stopwatch())
    with tempfile.TemporaryDirectory() as folder:
        measure = bench.meter(original, Path(folder))
        make = partial(shaped, job, original, graph, groups)
        return meet(costs, groups, curves, wish, goal, lambda widths: measure(make(widths)))


def _with_room(
    original: nn.Module, graph: ChannelGraph, groups: Sequence[ChannelGroup], wish: Wish, goal: Goal
) -> Wish:
    """A soft grid as fine as a budget of as many times fewer multiply-accumulates would make it."""
    tensors = dict(named_tensors(original))
    macs = cost(tensors, graph, np.ones(graph.channels, dtype=bool)).macs / (goal.speedup or 2.0)
    return replace(softened(tensors, graph, groups, replace(wish, macs=macs)), macs=None)


def layer_costs(
    job: Job,
    original: nn.Module,
    graph: ChannelGraph,
    groups: Sequence[ChannelGroup],
    wish: Wish,
    points: Points,
    stopwatch: Stopwatch,
) -> Milliseconds:
    """The network's time by its layers; a head that is going to be replaced is not counted."""
    layers = layers_of(original, job.input_shape)
    if job.replaces_head:
        layers = [layer for layer in layers if not layer.name.startswith("classifier.")]
    mine = sized(layers, graph, groups, wish)
    surfaces = survey([(each.layer.shape, each.domain) for each in mine], points, stopwatch, POINTS)
    return Milliseconds(mine, surfaces, groups)


def shaped(
    job: Job, original: nn.Module, graph: ChannelGraph, groups: Sequence[ChannelGroup], widths: Widths
) -> nn.Module:
    """The network with these widths, whichever filters stay: times depend on numbers only."""
    kept = some(graph, groups, widths)
    try:
        plan = settled_plan(original, graph, kept, example_inputs(original, job.input_shape))
    except RetraceError as error:
        raise ModelError(
            f"A network of these widths cannot be made: {error.what} ({error.modules[0] or 'the network'}).",
            hint=f'Leave this part whole: --ignore "{error.modules[0] or "*"}*".',
        ) from error
    thin = apply(plan, original)
    head = gap_head(thin) if job.replaces_head else None
    return apply(empty_plan(thin).model_copy(update={"head": head}), thin).eval() if head else thin


def told(found: Found, job: Job) -> dict[str, Any]:
    """For the report: what was asked, predicted and measured."""
    options, engine = job.options, engine_for(job.target, job.options.threads)
    trials = [
        {"predicted_ms": found.factor * each.layers_ms, **asdict(each.measured), "widths": each.widths}
        for each in found.trials
    ]
    best = trials[found.trials.index(found.best)]
    asked = {"runtime": engine.runtime, "threads": engine.threads, "latency": options.latency}
    return {**asked, "speedup": options.speedup, "factor": found.factor, "trials": trials, "best": best}
