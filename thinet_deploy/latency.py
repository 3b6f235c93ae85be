"""Honest timing: engines each in a process of its own, models forward and backward; every raw sample is kept.

All models are measured in turn (A B A B …), so that what disturbs the machine disturbs all of them alike, and
compared round by round: a speed-up comes with its interval. See runner.py for how one series is judged.
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import runner
from .errors import InputError, MissingError, ThinetDeployError
from .interfaces import Array, Precision, Progress, silent
from .seeds import derive, generator

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Clock = Callable[[Callable[[], Any]], tuple[Any, float]]

BASELINE = "original"
MIN_ROUNDS = 7  # with 7 the 95 % interval of a median may leave out nothing but the extremes
WARM_UP_PASSES = 2


@dataclass(frozen=True)
class EngineRef:
    """An engine to measure.

    Attributes:
        model: which model it is made from: "original" (the baseline of speed-ups), "thin" …
        runtime: "openvino", "onnxruntime" …
        path: its main file.
        precision: what it has to compute in.
    """

    model: str
    runtime: str
    path: Path
    precision: Precision = "fp32"


@dataclass(frozen=True)
class Samples:
    """One series in milliseconds: the raw samples of each round and what `runner.summarize_rounds` says of them."""

    rounds_ms: tuple[tuple[float, ...], ...]
    summary: dict[str, Any]

    @classmethod
    def of(cls, rounds_ms: Sequence[Sequence[float]]) -> Samples:
        """Keep the samples and summarize them."""
        return cls(tuple(map(tuple, rounds_ms)), runner.summarize_rounds(rounds_ms))


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
        speedup: against the baseline; None without one, and for the baseline itself.
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


@dataclass(frozen=True)
class TorchLatency:
    """Time of a model in training: forward alone and backward alone, per batch, as Caffe gives them.

    Attributes:
        speedup: of forward and backward together, against the baseline.
    """

    model: str
    device: str
    batch: int
    threads: int
    forward: Samples
    backward: Samples
    speedup: Speedup | None


@dataclass(frozen=True)
class LatencyReport:
    """All that was measured, and where. `environment` comes from `environment.fingerprint()`."""

    environment: dict[str, Any]
    engines: tuple[EngineLatency, ...] = ()
    models: tuple[TorchLatency, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict, raw samples included."""
        return {"schema": "thinet-deploy/latency", "version": 1, **asdict(self)}


def report(
    engines: Iterable[EngineLatency] = (),
    models: Iterable[TorchLatency] = (),
    environment: dict[str, Any] | None = None,
) -> LatencyReport:
    """Put measurements and their environment together; without one, this machine's is taken."""
    if environment is None:
        from .environment import fingerprint

        environment = fingerprint()
    return LatencyReport(environment, tuple(engines), tuple(models))


def measure_engines(
    engines: Sequence[EngineRef],
    inputs: Mapping[str, Array],
    *,
    threads: int,
    rounds: int = 9,
    seconds: float = 5.0,
    progress: Progress = silent,
) -> list[EngineLatency]:
    """Time engines, those of one runtime in turn, each in a process of its own.

    Args:
        engines: what to measure.
        inputs: arrays by input name, batch first.
        threads: CPU threads that one inference may use.
        rounds: turns of every engine; an interval needs 6.
        seconds: per engine, warm-up included.
        progress: told about each round.

    Raises:
        MissingError: a runtime is not installed.
        ThinetDeployError: an engine cannot be loaded or run, or its process died or hangs.
    """
    if rounds < 1 or seconds <= 0 or threads < 1:
        raise InputError(f"rounds, seconds and threads have to be positive, not {rounds}, {seconds} and {threads}.")
    groups = [[e for e in engines if e.runtime == runtime] for runtime in dict.fromkeys(e.runtime for e in engines)]
    found: list[EngineLatency] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "inputs.npz")
        arrays: dict[str, Any] = {f"input:{name}": array for name, array in inputs.items()}
        np.savez(file, **arrays)
        ask = {"inputs": str(file), "batch": len(next(iter(inputs.values()))), "threads": threads}
        for number, group in enumerate(groups):

            def on_round(done: int, before: int = number * rounds, runtime: str = group[0].runtime) -> None:
                progress("Measuring engines", before + done, len(groups) * rounds, runtime)

            found += _measure_group(group, ask, rounds, seconds, on_round)
    return found


def _measure_group(
    group: Sequence[EngineRef], ask: dict[str, Any], rounds: int, seconds: float, on_round: Callable[[int], None]
) -> list[EngineLatency]:
    """Measure the engines of one runtime; no child outlives this call."""
    with ExitStack() as children:
        workers, opened = {}, []
        for index, ref in enumerate(group):
            workers[f"{index:03}"] = worker = children.enter_context(runner.Worker())
            with _explained(f"{ref.model} ({ref.path})"):
                what = {"runtime": ref.runtime, "path": str(ref.path), "precision": ref.precision}
                opened.append(worker.ask("open", **what, **ask))
        with _explained(f"Measuring {group[0].runtime}"):
            series = list(runner.interleave(workers, rounds, seconds, on_round).values())
    return [
        EngineLatency(
            model=ref.model,
            runtime=ref.runtime,
            path=str(ref.path),
            precision=ref.precision,
            batch=ask["batch"],
            threads=ask["threads"],
            load_ms=reply["load_ms"],
            first_ms=reply["first_ms"],
            describe=reply["describe"],
            samples=Samples.of(rounds_ms),
            speedup=_engine_speedup(ref, rounds_ms, group, series),
        )
        for ref, reply, rounds_ms in zip(group, opened, series, strict=True)
    ]


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn the runner's errors, which know nothing of this package, into ours."""
    try:
        yield
    except runner.MissingRuntimeError as error:
        raise MissingError(
            f"{what} cannot be measured. {error}", hint="`thinet-deploy doctor` shows the rest."
        ) from error
    except runner.RunnerError as error:
        hint = "`thinet-deploy verify` checks whether the engine is whole; convert it again if it is not."
        raise ThinetDeployError(f"{what} failed. {error}", hint=hint) from error


def _engine_speedup(
    ref: EngineRef, rounds_ms: list[list[float]], group: Sequence[EngineRef], series: Sequence[list[list[float]]]
) -> Speedup | None:
    """Against the baseline in the same precision where there is one, else in the first that was measured."""
    baselines = [(b, times) for b, times in zip(group, series, strict=True) if b.model == BASELINE]
    if not baselines or ref.model == BASELINE:
        return None
    base, base_ms = next((pair for pair in baselines if pair[0].precision == ref.precision), baselines[0])
    return _speedup(base_ms, rounds_ms, f"{base.model} {base.runtime} {base.precision}")


def _speedup(base_ms: Sequence[Sequence[float]], own_ms: Sequence[Sequence[float]], baseline: str) -> Speedup:
    return Speedup(*runner.ratio_interval(base_ms, own_ms), baseline)


def measure_torch(
    models: Mapping[str, nn.Module],
    input_shape: Sequence[int],
    *,
    batch: int = 32,
    rounds: int = MIN_ROUNDS,
    progress: Progress = silent,
    device: str = "cpu",
) -> list[TorchLatency]:
    """Time forward and backward in training mode, the models in turn, one pass per round.

    The models are copied: neither their gradients nor their batch-norm statistics change.

    Args:
        models: by label; "original" is the baseline.
        input_shape: of one image, such as (3, 224, 224).
        batch: images per pass.
        rounds: passes of every model that count, at least 7; two more warm it up.
        progress: told about each round.
        device: "cpu", "cuda" or "cuda:1".
    """
    import torch

    if rounds < MIN_ROUNDS:
        raise InputError(f"{rounds} rounds are too few for an interval.", hint=f"Give at least {MIN_ROUNDS}.")
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise MissingError("There is no CUDA device here.", hint="Measure with device cpu, or on a machine with a GPU.")
    noise = torch.Generator().manual_seed(derive("latency", "images"))
    images = torch.randn(batch, *input_shape, generator=noise).to(where)
    copies = {name: copy.deepcopy(model).requires_grad_(True).to(where).train() for name, model in models.items()}
    # Dropout draws from the global generators: leave them as they were.
    with torch.random.fork_rng([where] if where.type == "cuda" else []):
        times_ms = _interleave_torch(copies, images, rounds, progress)
    return [
        TorchLatency(
            model=name,
            device=torch.cuda.get_device_name(where) if where.type == "cuda" else device,
            batch=batch,
            threads=torch.get_num_threads(),
            forward=Samples.of([[forward] for forward, _ in passes]),
            backward=Samples.of([[backward] for _, backward in passes]),
            speedup=_torch_speedup(name, times_ms),
        )
        for name, passes in times_ms.items()
    ]


def _interleave_torch(
    models: Mapping[str, nn.Module], images: Tensor, rounds: int, progress: Progress
) -> dict[str, list[tuple[float, float]]]:
    """Per model the (forward, backward) milliseconds of every round, warm-up left out."""
    clock = _cuda_clock(images.device) if images.device.type == "cuda" else _wall_clock
    times_ms: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for number in range(-WARM_UP_PASSES, rounds):
        names = sorted(models)
        for index in generator("latency", number).permutation(len(names)):
            passed = _forward_backward(models[names[index]], images, clock)
            if number >= 0:
                times_ms[names[index]].append(passed)
        if number >= 0:
            progress("Measuring forward and backward", number + 1, rounds)
    return times_ms


def _forward_backward(model: nn.Module, images: Tensor, clock: Clock) -> tuple[float, float]:
    """Milliseconds of one forward and one backward pass; the loss between them is not timed."""
    model.zero_grad(set_to_none=True)
    output, forward_ms = clock(lambda: model(images))
    loss = sum(tensor.float().square().mean() for tensor in _tensors(output))
    _, backward_ms = clock(loss.backward)  # type: ignore[union-attr]  # sum() may give 0, for a model without outputs
    return forward_ms, backward_ms


def _tensors(output: Any) -> list[Tensor]:
    """All tensors of a model's output, which may be nested (auxiliary classifiers)."""
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [tensor for part in output for tensor in _tensors(part)]
    return [] if output is None else [output]


def _wall_clock(fn: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter_ns()
    result = fn()
    return result, (time.perf_counter_ns() - start) / 1e6


def _cuda_clock(device: torch.device) -> Clock:
    """Times by events on the device, where launching work returns before it is done."""
    import torch

    def clock(fn: Callable[[], Any]) -> tuple[Any, float]:
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            start.record()
            result = fn()
            end.record()
            end.synchronize()
            return result, start.elapsed_time(end)

    return clock


def _torch_speedup(name: str, times_ms: Mapping[str, list[tuple[float, float]]]) -> Speedup | None:
    if name == BASELINE or BASELINE not in times_ms:
        return None
    base_ms, own_ms = ([[math.fsum(passed)] for passed in times_ms[key]] for key in (BASELINE, name))
    return _speedup(base_ms, own_ms, f"{BASELINE} torch forward and backward")
