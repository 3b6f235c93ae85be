"""Time of torch models in training: forward alone and backward alone, the models in turn, on a CPU or a CUDA device."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, MissingError
from ..interfaces import Progress, silent
from ..on_device import samples
from ..on_device.cuda import bus_id
from ..on_device.sensors import Nvml, Watch
from ..seeds import derive, generator
from .latency import BASELINE, Samples, Speedup, TorchLatency, speedup
from .torch_worker import Pass, TorchWorker, write_model

if TYPE_CHECKING:
    from torch import nn

    from .torch_modes import Mode

MIN_ROUNDS = 7  # with 7 the 95 % interval of a median may leave out nothing but the extremes
WARM_UP_PASSES, WARM_UP_SECONDS = 2, 0.3
# Above this share a GPU waits for the work that Python launches: the time is the host's.
LAUNCH_BOUND = 0.8
# Before a pass: the threads of the process before wait for more work for some milliseconds, without giving way.
SETTLE_S = 0.01


def measure_torch(
    models: Mapping[str, nn.Module],
    input_shape: Sequence[int],
    *,
    batch: int = 32,
    rounds: int = MIN_ROUNDS,
    progress: Progress = silent,
    device: str = "cpu",
    mode: Mode = "eager",
    threads: int | None = None,
) -> list[TorchLatency]:
    """Time forward and backward in training mode, the models in turn, one pass per round.

    Each runs in a process of its own, on a copy: neither its gradients nor its batch-norm statistics change.
    Global settings of torch (TF32, cudnn.benchmark …) are those of a new process.

    Args:
        models: by label; "original" is the baseline.
        input_shape: of one image, such as (3, 224, 224).
        batch: images per pass.
        rounds: passes of every model that count, at least 7; before them all are warmed up, two passes each at least.
        progress: told about each round.
        device: "cpu", "cuda" or "cuda:1".
        mode: how torch runs them: eager, channels-last, amp or cuda-graph (`torch_modes`).
        threads: of the CPU; None for as many as torch would take.

    Raises:
        InputError: there are too few rounds, or a model cannot be run or not be sent to a process.
        MissingError: there is no CUDA device.
    """
    import torch

    _check(device, mode, rounds)
    threads = threads or torch.get_num_threads()
    asked = {"shape": [batch, *input_shape], "device": device, "mode": mode, "threads": threads}
    asked["seed"] = derive("latency", "images")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as processes:
        workers = dict[str, TorchWorker]()
        for number, (name, model) in enumerate(models.items()):
            path = Path(folder, f"{number}.pt")
            write_model(model, name, path)
            workers[name] = processes.enter_context(TorchWorker(name, path, asked))
        where = [worker.ready() for worker in workers.values()]
        on = torch.device(device)
        gpus = Nvml(bus_id(on.index or 0)) if on.type == "cuda" else None
        passes, machine = _interleave(workers, rounds, Watch(gpus=gpus), progress)
        peaks = {name: worker.memory() for name, worker in workers.items()}
    found = [
        TorchLatency(
            model=name,
            device=place,
            batch=batch,
            threads=threads,
            forward=_judged([one.forward_ms for one in own], own, machine),
            backward=_judged([one.backward_ms for one in own], own, machine),
            speedup=None,
            peak_memory_bytes=peaks[name],
            launch_share=_launch_share(own),
            machine=machine,
            mode=mode,
        )
        for place, (name, own) in zip(where, passes.items(), strict=True)
    ]
    base = next((row for row in found if row.model == BASELINE), None)
    return [replace(row, speedup=torch_speedup(base, row) if base and row is not base else None) for row in found]


def _check(device: str, mode: Mode, rounds: int) -> None:
    """Whether the device is there, can run so, and is to be measured for long enough."""
    import torch

    from .torch_modes import check_mode

    if rounds < MIN_ROUNDS:
        raise InputError(f"{rounds} rounds are too few for an interval.", hint=f"Give at least {MIN_ROUNDS}.")
    cuda = torch.device(device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        raise MissingError("There is no CUDA device here.", hint="Measure with device cpu, or on a machine with a GPU.")
    check_mode(mode, cuda=cuda)


def torch_speedup(base: TorchLatency, own: TorchLatency) -> Speedup | None:
    """Of forward and backward together of two models that were measured in turn; None where a time is invalid."""
    if any(part.invalid for row in (base, own) for part in (row.forward, row.backward)):
        return None
    return speedup(_passes_ms(base), _passes_ms(own), f"{base.model} torch forward and backward")


def _passes_ms(row: TorchLatency) -> list[list[float]]:
    both = zip(row.forward.rounds_ms, row.backward.rounds_ms, strict=True)
    return [[forward_ms + backward_ms] for (forward_ms,), (backward_ms,) in both]


def _judged(times_ms: Sequence[float], passes: Sequence[Pass], machine: Mapping[str, Any]) -> Samples:
    """One series with what outputs, sensors and launches say about it."""
    found = Samples.of([[time_ms] for time_ms in times_ms])
    summary = samples.judged(found.summary, machine, finite=all(one.finite for one in passes))
    share = _launch_share(passes)
    if share is not None and share > LAUNCH_BOUND:
        words = f"launching the work took {share:.0%} of the time: the GPU waits for the host, give a larger batch"
        summary["warnings"] = [*summary["warnings"], words]
    return replace(found, summary=summary)


def _launch_share(passes: Sequence[Pass]) -> float | None:
    launches = [one.launch_ms for one in passes if one.launch_ms is not None]
    total = math.fsum(one.forward_ms + one.backward_ms for one in passes)
    return math.fsum(launches) / total if launches and total else None


def _interleave(
    workers: Mapping[str, TorchWorker], rounds: int, watch: Watch, progress: Progress
) -> tuple[dict[str, list[Pass]], dict[str, Any]]:
    """The passes of every model, round by round after the warm-up, and what the machine's sensors saw meanwhile."""
    end, warm = time.perf_counter() + WARM_UP_SECONDS * len(workers), 0
    while workers and (warm < WARM_UP_PASSES or time.perf_counter() < end):
        for worker in workers.values():
            worker.run()
        warm += 1
    passes: dict[str, list[Pass]] = {name: [] for name in workers}
    names = sorted(workers)
    for number in range(rounds):
        for index in generator("latency", number).permutation(len(names)):
            time.sleep(SETTLE_S)
            passes[names[index]].append(workers[names[index]].run())
        watch.look()
        progress("Measuring forward and backward", number + 1, rounds, f"{len(workers)} models, {rounds} rounds")
    return passes, watch.summary()
