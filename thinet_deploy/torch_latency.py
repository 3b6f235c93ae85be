"""Time of torch models in training: forward alone and backward alone, the models in turn, on a CPU or a CUDA device."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from . import samples
from .errors import InputError, MissingError
from .interfaces import Progress, silent
from .latency import BASELINE, Samples, Speedup, TorchLatency, speedup
from .seeds import derive, generator
from .sensors import Watch

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .torch_modes import Mode

    Clock = Callable[[Callable[[], Any]], tuple[Any, float, float | None]]

MIN_ROUNDS = 7  # with 7 the 95 % interval of a median may leave out nothing but the extremes
WARM_UP_PASSES, WARM_UP_SECONDS = 2, 0.3
# Above this share a GPU waits for the work that Python launches: the time is the host's.
LAUNCH_BOUND = 0.8


@dataclass(frozen=True)
class _Pass:
    """Milliseconds of one forward and one backward pass, and of launching both; whether all outputs were finite."""

    forward_ms: float
    backward_ms: float
    launch_ms: float | None
    finite: bool


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

    The models are copied: neither their gradients nor their batch-norm statistics change.

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
        InputError: there are too few rounds.
        MissingError: there is no CUDA device.
    """
    import torch

    from .torch_modes import in_mode, laid_out

    where = _checked(device, rounds)
    noise = torch.Generator().manual_seed(derive("latency", "images"))
    images = laid_out(torch.randn(batch, *input_shape, generator=noise).to(where), mode)
    copies = {name: copy.deepcopy(model).requires_grad_(True).to(where).train() for name, model in models.items()}
    copies = {name: in_mode(model, images, mode) for name, model in copies.items()}
    peaks = {name: _peak_memory(model, images) for name, model in copies.items()}
    # Dropout draws from the global generators: leave them as they were.
    with torch.random.fork_rng([where] if where.type == "cuda" else []), _threads(threads) as used:
        passes, machine = _interleave(copies, images, rounds, progress)
    about: dict[str, Any] = {
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else device,
        "batch": batch,
        "mode": mode,
        "threads": used,
        "machine": machine,
    }
    found = [
        TorchLatency(
            model=name,
            forward=_judged([one.forward_ms for one in own], own, machine),
            backward=_judged([one.backward_ms for one in own], own, machine),
            speedup=None,
            peak_memory_bytes=peaks[name],
            launch_share=_launch_share(own),
            **about,
        )
        for name, own in passes.items()
    ]
    base = next((row for row in found if row.model == BASELINE), None)
    return [replace(row, speedup=torch_speedup(base, row) if base and row is not base else None) for row in found]


@contextmanager
def _threads(number: int | None) -> Iterator[int]:
    """So many threads for torch on the CPU, afterwards as many as before; gives the number."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield number or before
    finally:
        torch.set_num_threads(before)


def torch_speedup(base: TorchLatency, own: TorchLatency) -> Speedup | None:
    """Of forward and backward together of two models that were measured in turn; None where a time is invalid."""
    if any(part.invalid for row in (base, own) for part in (row.forward, row.backward)):
        return None
    return speedup(_passes_ms(base), _passes_ms(own), f"{base.model} torch forward and backward")


def _passes_ms(row: TorchLatency) -> list[list[float]]:
    both = zip(row.forward.rounds_ms, row.backward.rounds_ms, strict=True)
    return [[forward_ms + backward_ms] for (forward_ms,), (backward_ms,) in both]


def _checked(device: str, rounds: int) -> torch.device:
    """The device, if it is there and is to be measured for long enough."""
    import torch

    if rounds < MIN_ROUNDS:
        raise InputError(f"{rounds} rounds are too few for an interval.", hint=f"Give at least {MIN_ROUNDS}.")
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise MissingError("There is no CUDA device here.", hint="Measure with device cpu, or on a machine with a GPU.")
    return where


def _judged(times_ms: Sequence[float], passes: Sequence[_Pass], machine: Mapping[str, Any]) -> Samples:
    """One series with what outputs, sensors and launches say about it."""
    found = Samples.of([[time_ms] for time_ms in times_ms])
    summary = samples.judged(found.summary, machine, finite=all(one.finite for one in passes))
    share = _launch_share(passes)
    if share is not None and share > LAUNCH_BOUND:
        words = f"launching the work took {share:.0%} of the time: the GPU waits for the host, give a larger batch"
        summary["warnings"] = [*summary["warnings"], words]
    return replace(found, summary=summary)


def _launch_share(passes: Sequence[_Pass]) -> float | None:
    launches = [one.launch_ms for one in passes if one.launch_ms is not None]
    total = math.fsum(one.forward_ms + one.backward_ms for one in passes)
    return math.fsum(launches) / total if launches and total else None


def _interleave(
    models: Mapping[str, nn.Module], images: Tensor, rounds: int, progress: Progress
) -> tuple[dict[str, list[_Pass]], dict[str, Any]]:
    """The passes of every model, round by round after the warm-up, and what the machine's sensors saw meanwhile."""
    clock = _cuda_clock(images.device) if images.device.type == "cuda" else _wall_clock
    end, warm = time.perf_counter() + WARM_UP_SECONDS * len(models), 0
    while models and (warm < WARM_UP_PASSES or time.perf_counter() < end):
        for model in models.values():
            _forward_backward(model, images, clock)
        warm += 1
    passes: dict[str, list[_Pass]] = {name: [] for name in models}
    names, watch = sorted(models), Watch()
    for number in range(rounds):
        for index in generator("latency", number).permutation(len(names)):
            passes[names[index]].append(_forward_backward(models[names[index]], images, clock))
        watch.look()
        progress("Measuring forward and backward", number + 1, rounds, f"{len(models)} models, {rounds} rounds")
    return passes, watch.summary()


def _forward_backward(model: nn.Module, images: Tensor, clock: Clock) -> _Pass:
    """One forward and one backward pass; the loss between them is not timed."""
    model.zero_grad(set_to_none=True)
    output, forward_ms, launch_ms = clock(lambda: model(images))
    tensors = _tensors(output)
    finite = all(bool(tensor.isfinite().all()) for tensor in tensors)
    loss = sum(tensor.float().square().mean() for tensor in tensors)
    _, backward_ms, more_ms = clock(loss.backward)  # type: ignore[union-attr]  # sum() may give 0: a model without outputs
    launched = None if launch_ms is None or more_ms is None else launch_ms + more_ms
    return _Pass(forward_ms, backward_ms, launched, finite)


def _peak_memory(model: nn.Module, images: Tensor) -> int | None:
    """The most memory a forward and backward pass holds on the device, weights of the other models left out."""
    import torch

    if images.device.type != "cuda":
        return None
    others = torch.cuda.memory_allocated(images.device) - sum(
        tensor.nbytes for tensor in (*model.parameters(), *model.buffers())
    )
    torch.cuda.reset_peak_memory_stats(images.device)
    _forward_backward(model, images, _cuda_clock(images.device))
    model.zero_grad(set_to_none=True)
    return int(torch.cuda.max_memory_allocated(images.device) - others)


def _tensors(output: Any) -> list[Tensor]:
    """All tensors of a model's output, which may be nested (auxiliary classifiers)."""
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [tensor for part in output for tensor in _tensors(part)]
    return [] if output is None else [output]


def _wall_clock(fn: Callable[[], Any]) -> tuple[Any, float, None]:
    start = time.perf_counter_ns()
    result = fn()
    return result, (time.perf_counter_ns() - start) / 1e6, None


def _cuda_clock(device: torch.device) -> Clock:
    """Times by events on the device, where launching work returns before it is done."""
    import torch

    def clock(fn: Callable[[], Any]) -> tuple[Any, float, float]:
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            start.record()
            result, launch_ms, _ = _wall_clock(fn)
            end.record()
            end.synchronize()
            return result, start.elapsed_time(end), launch_ms

    return clock
