"""Budgets in milliseconds: layers timed on the target's engine, widths chosen, and the thin network measured there."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..artifact import write_bytes
from ..devices.site import Machine, check_runtimes
from ..devices.timer import DeviceTimer
from ..environment import fingerprint
from ..errors import GateError, InputError
from ..export import INPUT, export_onnx
from ..interfaces import Array, Conversion, Precision, Progress, silent
from ..models.loading import InputShape
from ..on_device.turns import ATTEMPTS
from ..precision.graph import read_onnx
from ..precision.plan import plan_precision
from ..pruning.allocation import Costs, Curve
from ..pruning.budget import Widths, Wish, cost, softened, some
from ..pruning.graph import Branch, ChannelGraph, ChannelGroup
from ..pruning.plan import empty_plan, plan_channels
from ..pruning.surgery import apply, gap_head
from ..pruning.trace import named_tensors
from ..registry import check, convert, installed, runs_here
from ..target import TargetProfile
from ..timing.budget import Found, Goal, Measured, meet
from ..timing.latency import COOL_IT, EngineLatency, EngineRef, speedup
from ..timing.layer_networks import layers_of
from ..timing.milliseconds import Milliseconds, sized
from ..timing.staircase import RUNTIMES, Engine, Points, Stopwatch, survey
from ..timing.timers import HERE
from .job import Job

# Points of one line of a surface: the grid leaves few widths, and the whole network has the last word.
POINTS = 12
ROUNDS, SECONDS = 11, 4.0  # of the original and of a thin network, in turn
Meter = Callable[[nn.Module], Measured]


def engine_for(
    target: TargetProfile, threads: int, precision: Precision | None = None, machine: Machine | None = None
) -> Engine:
    """The first of a target's engines in a precision whose layers can be timed.

    Args:
        target: the target.
        threads: CPU threads.
        precision: that the engine is to compute in.
        machine: the device that they are to be timed on; None for this machine.

    Raises:
        InputError: there is none.
        TargetError: the target cannot compute in that precision.
        MissingError: none of its runtimes is installed.
    """
    flags = machine.cpu["flags"] if machine else fingerprint()["cpu"]["flags"]
    plan = plan_precision(target, precision, flags)
    able = [runtime for runtime in plan.runtimes if runtime in RUNTIMES]
    runtime = _there(target, able, machine) if machine else _here(target, able, precision)
    check(runtime)
    return Engine(runtime, threads, plan.engines, plan.layout, DeviceTimer(machine) if machine else HERE)


def _here(target: TargetProfile, able: Sequence[str], precision: Precision | None) -> str:
    """The first runtime that is installed, if the target's engines run on this machine; else the first of all."""
    if able and runs_here(target):
        return next(filter(installed, able), able[0])
    typed = f" in {precision}" if precision else ""
    there = "" if target.builds_on_device else "; or name the device that has one: --device ssh://user@host"
    raise InputError(
        f"Layers for {target.id} cannot be timed here: no engine of it{typed} runs on this machine.",
        hint=f"Choose a target that runs here with {' or '.join(RUNTIMES)}, such as cpu{there}.",
    )


def _there(target: TargetProfile, able: Sequence[str], machine: Machine) -> str:
    """The first runtime that the device has."""
    if target.builds_on_device:
        raise InputError(
            f"Layers for {target.id} cannot be timed on {machine.device.name}: TensorRT opens no ONNX files, and would "
            "have to build each of some hundred networks first.",
            hint="Give --macs 2x instead of a budget of time: `build --device` measures there what comes of it.",
        )
    if not able:
        raise InputError(
            f"Layers for {target.id} cannot be timed on {machine.device.name}: it has no engine for "
            f"{' or '.join(RUNTIMES)}, which open ONNX files.",
            hint="Give --macs 2x instead of a budget of time.",
        )
    check_runtimes(machine, able)
    return next(runtime for runtime in able if machine.has(runtime))


def identity(job: Job) -> dict[str, Any]:
    """What widths for a budget of time depend on besides; nothing for other budgets."""
    options = job.options
    if not options.timed:
        return {}
    engine = engine_of(job)
    return {"timed": {"latency": options.latency, "speedup": options.speedup, **engine.identity}}


def engine_of(job: Job) -> Engine:
    """What a job's budget of time is met on; see `engine_for` for errors."""
    return engine_for(job.target, job.options.threads, job.options.precision, job.machine)


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

    @contextmanager
    def meter(self, original: nn.Module) -> Iterator[Meter]:
        """Measures networks beside the original, as engines of the target."""
        with tempfile.TemporaryDirectory() as name:
            folder, numbers = Path(name), itertools.count(1)
            base = self.made(original, "original", folder)

            def measure(thin: nn.Module) -> Measured:
                other = base if thin is original else self.made(thin, f"thin{next(numbers)}", folder)
                return self.compared(base, other)

            try:
                yield measure
            except (GateError, InputError):  # after others, such as a cut connection, the same is asked for again
                self.engine.timer.forget(base)
                raise
            self.engine.timer.forget(base)

    def compared(self, base: EngineRef, thin: EngineRef) -> Measured:
        """The original's engine and another one in turn; the original's alone, if that is the other one."""
        if thin is base:
            (alone,) = self.timed([base])
            doubts = _once(alone.samples.summary["warnings"])
            return Measured(alone.median_ms, alone.median_ms, 1.0, warnings=doubts)
        before, after = self.timed([base, thin])
        faster = speedup(before.samples.rounds_ms, after.samples.rounds_ms, base.model)
        doubts = (*before.samples.summary["warnings"], *after.samples.summary["warnings"])
        return Measured(after.median_ms, before.median_ms, faster.ratio, faster.low, faster.high, _once(doubts))

    def timed(self, refs: Sequence[EngineRef]) -> list[EngineLatency]:
        """Engines in turn, once more where a time is invalid, as of a machine that throttled: these decide nothing.

        Raises:
            GateError: one was invalid every time.
        """
        how = {"threads": self.engine.threads, "rounds": self.rounds, "seconds": self.seconds}
        invalid: tuple[str, ...] = ()
        hot = False
        for _ in range(ATTEMPTS):
            found = self.engine.timer.engines(refs, {INPUT: self.image}, how, self.progress)
            invalid = _once([why for row in found for why in row.samples.summary["invalid"]])
            hot = bool(found[0].machine["throttled"])
            if not invalid:
                return found
        raise GateError(
            f"The network's time cannot be measured: {'; '.join(invalid)}, in each of {ATTEMPTS} attempts.",
            hint=COOL_IT if hot else "Look at the original's weights: what is timed has these.",
        )

    def made(self, model: nn.Module, name: str, folder: Path) -> EngineRef:
        """A network as an engine."""
        return as_engine(model, self.input_shape, name, self.engine, self.target, folder)


def _once(words: Sequence[str]) -> tuple[str, ...]:
    """Each of them once, in order."""
    return tuple(dict.fromkeys(words))


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
    """The job's own: the target's engine, on this machine or on the device."""
    return Bench(engine_of(job), job.target, job.data.test.inputs(np.arange(1)), progress)


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
    with bench.meter(original) as measure:
        make = partial(shaped, original, graph, groups, new_head=bench.input_shape if head else None)
        macs = Costs(dict(named_tensors(original)), graph, groups)
        return meet(costs, groups, curves, wish, goal, lambda widths: measure(make(widths)), branches, macs=macs)


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
    new_head: tuple[int, ...] | None = None,
) -> nn.Module:
    """The network with these widths, itself if it has them; times depend on numbers only, so any filters stay.

    Whether it is still the same network is not looked into: that takes another trace, which is due once the filters
    are chosen.
    """
    kept = some(graph, groups, widths)
    thin = original if kept.all() else apply(plan_channels(original, graph, kept), original)
    head = gap_head(thin, new_head) if new_head else None
    return apply(empty_plan(thin).model_copy(update={"head": head}), thin).eval() if head else thin


def told(found: Found, job: Job) -> dict[str, Any]:
    """For the report: what was asked, predicted and measured."""
    options, engine = job.options, engine_of(job)
    trials = [
        {"predicted_ms": found.factor * each.layers_ms, **asdict(each.measured), "widths": each.widths}
        for each in found.trials
    ]
    best = trials[found.trials.index(found.best)]
    asked = {"latency": options.latency, "speedup": options.speedup}
    where: dict[str, Any] = {"runtime": engine.runtime, "threads": engine.threads, "precision": engine.precision}
    if job.machine:
        where["device"] = job.machine.fingerprint
    return {**asked, **where, "factor": found.factor, "doubts": found.doubts, "trials": trials, "best": best}
