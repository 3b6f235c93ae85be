"""Honest timing of engines, each in a process of its own; every raw sample is kept. torch_latency.py times models.

All are measured in turn (A B A B …), so that what disturbs the machine disturbs all of them alike, and compared round
by round: a speed-up comes with its interval. See samples.py for how one series is judged, runner.py for how it is made.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import GateError, InputError, MissingError, ThinetDeployError
from ..interfaces import Array, Precision, Progress, silent
from ..on_device import runner, samples
from ..on_device.engine import MissingRuntimeError, RunnerError, ThrottledError

BASELINE = "original"
VERSION = 2  # of latency.json
# What to do where a machine throttles; the measured layers are kept as staircases, see staircase.Points.
COOL_IT = (
    "Cool it, or lower its clock to one that it can hold, and run the same again: what is known of layers is kept."
)


@dataclass(frozen=True)
class EngineRef:
    """An engine to measure.

    Attributes:
        model: which model it is made from: "original" (the baseline of speed-ups), "thin" …
        runtime: "openvino", "onnxruntime" …
        path: its main file.
        precision: what it has to compute in.
        thing: the run, bundle or file that it is from, where several hold engines of one name; else "".
    """

    model: str
    runtime: str
    path: Path
    precision: Precision = "fp32"
    thing: str = ""


@dataclass(frozen=True)
class Samples:
    """One series in milliseconds: the raw samples of each round and what samples.py says of them."""

    rounds_ms: tuple[tuple[float, ...], ...]
    summary: dict[str, Any]

    @classmethod
    def of(cls, rounds_ms: Sequence[Sequence[float]]) -> Samples:
        """Keep the samples and summarize them."""
        return cls(tuple(map(tuple, rounds_ms)), samples.summarize_rounds(rounds_ms))

    @property
    def invalid(self) -> list[str]:
        """Why it does not hold; empty where it does."""
        return list(self.summary["invalid"])


@dataclass(frozen=True)
class Speedup:
    """How many times faster than the baseline on the same runtime.

    Attributes:
        ratio: baseline time / own time, the median over rounds.
        low, high: its 95 % interval; None with fewer than 6 rounds.
        baseline: what it is compared with, such as "original openvino fp32".
    """

    ratio: float
    low: float | None
    high: float | None
    baseline: str


@dataclass(frozen=True)
class EngineLatency:
    """The latency of one engine.

    Attributes:
        load_ms: from the file to a ready engine, the runtime's import left out.
        first_ms: the first inference.
        describe: what the runtime says of itself, such as the precision it really uses.
        speedup: against the baseline; None without one, for the baseline itself, and where either time is invalid.
        clocks_ms: medians of the parts that the runtime's own clocks tell apart, and "host" for what is left.
        memory: the highest of its process, and the part that the engine brought, in bytes; None where unknown.
        energy: joules per run by sensor, from a run of its own; None without a sensor.
        machine: clocks, temperatures, throttling and load while all engines of this runtime were timed.
        fps: runs a second; 0 for back to back.
        launch_ms: of the host, to hand the computing to a GPU; None without one.
        thing: as of `EngineRef`.
    """

    model: str
    runtime: str
    path: str
    precision: Precision
    batch: int
    threads: int
    load_ms: float
    first_ms: float
    describe: dict[str, Any]
    samples: Samples
    speedup: Speedup | None
    clocks_ms: dict[str, float]
    memory: dict[str, int | None]
    energy: dict[str, Any] | None
    machine: dict[str, Any]
    fps: float = 0.0
    launch_ms: float | None = None
    thing: str = ""

    @property
    def name(self) -> str:
        """For people: the model, of which run or file, and on what."""
        return f"{f'{self.thing}: ' if self.thing else ''}{self.model} {self.runtime} {self.precision}"

    @property
    def median_ms(self) -> float:
        """Of all runs."""
        return float(self.samples.summary["median_ms"])


@dataclass(frozen=True)
class TorchLatency:
    """Time of a model in training: forward alone and backward alone, per batch, as Caffe gives them.

    Attributes:
        speedup: of forward and backward together, against the baseline.
        peak_memory_bytes: the most that model and passes held: on a GPU by torch's own count, on a CPU what the model's
            process grew by; None where the system does not tell.
        launch_share: the part of forward and backward that launching the work on a GPU took; None on a CPU.
        machine: clocks, temperatures, throttling and load meanwhile.
        mode: how torch ran it: eager, channels-last, amp or cuda-graph.
    """

    model: str
    device: str
    batch: int
    threads: int
    forward: Samples
    backward: Samples
    speedup: Speedup | None
    peak_memory_bytes: int | None
    launch_share: float | None
    machine: dict[str, Any]
    mode: str = "eager"


@dataclass(frozen=True)
class LatencyReport:
    """All that was measured, and where. `environment` comes from `environment.fingerprint()`."""

    environment: dict[str, Any]
    engines: tuple[EngineLatency, ...] = ()
    models: tuple[TorchLatency, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict, raw samples included."""
        return {"schema": "thinet-deploy/latency", "version": VERSION, **asdict(self)}


def report(
    engines: Iterable[EngineLatency] = (),
    models: Iterable[TorchLatency] = (),
    environment: dict[str, Any] | None = None,
) -> LatencyReport:
    """Put measurements and their environment together; without one, this machine's is taken."""
    if environment is None:
        from ..environment import fingerprint

        environment = fingerprint()
    return LatencyReport(environment, tuple(engines), tuple(models))


def measure_engines(
    engines: Sequence[EngineRef],
    inputs: Mapping[str, Array],
    *,
    threads: int,
    rounds: int = runner.ROUNDS,
    seconds: float = 5.0,
    fps: float = 0.0,
    progress: Progress = silent,
) -> list[EngineLatency]:
    """Time engines, those of one runtime in turn, each in a process of its own.

    Args:
        engines: what to measure.
        inputs: arrays by input name, batch first.
        threads: CPU threads that one inference may use.
        rounds: turns of every engine; an interval needs 6.
        seconds: per engine, warm-up included.
        fps: runs a second, with pauses between as in an app that waits for its camera; 0 for back to back.
        progress: told about each round.

    Raises:
        MissingError: a runtime is not installed.
        ThinetDeployError: an engine cannot be loaded or run, or its process died or hangs.
    """
    if rounds < 1 or seconds <= 0 or threads < 1 or fps < 0:
        given = f"{rounds}, {seconds}, {threads} and {fps}"
        raise InputError(f"rounds, seconds, threads and fps have to be positive, not {given}.")
    groups = [[e for e in engines if e.runtime == runtime] for runtime in dict.fromkeys(e.runtime for e in engines)]
    found: list[EngineLatency] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "inputs.npz")
        arrays: dict[str, Any] = {f"input:{name}": array for name, array in inputs.items()}
        np.savez(file, **arrays)
        ask = {"inputs": str(file), "batch": len(next(iter(inputs.values()))), "threads": threads}
        for number, group in enumerate(groups):

            def on_round(done: int, before: int = number * rounds, runtime: str = group[0].runtime) -> None:
                last = before + done == len(groups) * rounds
                note = f"{len(engines)} engines, {rounds} rounds" if last else runtime
                progress("Measuring engines", before + done, len(groups) * rounds, note)

            found += _measure_group(group, ask, (rounds, seconds, fps), on_round)
    return found


def _measure_group(
    group: Sequence[EngineRef],
    ask: dict[str, Any],
    pace: tuple[int, float, float],
    on_round: Callable[[int], None],
) -> list[EngineLatency]:
    """Measure the engines of one runtime; no child outlives this call."""
    rounds, seconds, fps = pace
    with ExitStack() as children:
        opened = {}
        for index, ref in enumerate(group):
            worker = children.enter_context(runner.Worker())
            with explained(f"{ref.model} ({ref.path})"):
                what = {"runtime": ref.runtime, "path": str(ref.path), "precision": ref.precision}
                opened[f"{index:03}"] = worker, worker.ask("open", **what, **ask)
        with explained(f"Measuring {group[0].runtime}"):
            rows = list(runner.measure(opened, rounds, seconds, on_round, fps).values())
    return latencies(group, rows, ask["batch"], ask["threads"])


def latencies(
    group: Sequence[EngineRef], rows: Sequence[dict[str, Any]], batch: int, threads: int
) -> list[EngineLatency]:
    """What `runner.measure` found of engines that were measured in turn, the speed-ups with it.

    Args:
        group: the engines, of one runtime.
        rows: a row for each.
        batch: images per run.
        threads: CPU threads that one inference could use.
    """
    found = [
        EngineLatency(
            model=ref.model,
            runtime=ref.runtime,
            path=str(ref.path),
            precision=ref.precision,
            batch=batch,
            threads=threads,
            samples=Samples(tuple(map(tuple, row.pop("rounds_ms"))), row.pop("summary")),
            speedup=None,
            thing=ref.thing,
            **row,
        )
        for ref, row in zip(group, rows, strict=True)
    ]
    return [replace(row, speedup=_engine_speedup(row, found)) for row in found]


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn the runner's errors, which know nothing of this package, into ours.

    Args:
        what: is being measured, for the message.
    """
    try:
        yield
    except MissingRuntimeError as error:
        raise MissingError(
            f"{what} cannot be measured. {error}", hint="`thinet-deploy doctor` shows the rest."
        ) from error
    except ThrottledError as error:
        raise GateError(f"{what} failed. {error}", hint=COOL_IT) from error
    except RunnerError as error:
        hint = "`thinet-deploy verify` checks whether the engine is whole; convert it again if it is not."
        raise ThinetDeployError(f"{what} failed. {error}", hint=hint) from error


def _engine_speedup(own: EngineLatency, rows: Sequence[EngineLatency]) -> Speedup | None:
    """Against the baseline in the same precision where there is one, else in the first that was measured."""
    baselines = [row for row in rows if row.model == BASELINE and row.thing == own.thing]
    if not baselines or own.model == BASELINE:
        return None
    return engine_speedup(next((row for row in baselines if row.precision == own.precision), baselines[0]), own)


def engine_speedup(base: EngineLatency, own: EngineLatency) -> Speedup | None:
    """Of two engines that were measured in turn; None where a time is invalid."""
    if base.samples.invalid or own.samples.invalid:
        return None
    return speedup(base.samples.rounds_ms, own.samples.rounds_ms, base.name)


def speedup(base_ms: Sequence[Sequence[float]], own_ms: Sequence[Sequence[float]], baseline: str) -> Speedup:
    """Of two series that were measured in turn."""
    return Speedup(*samples.ratio_interval(base_ms, own_ms), baseline)
