"""A process that holds one engine and answers JSON lines: `run.py serve`, which `run.py latency` starts.

Python 3.8 and numpy only: a copy lies beside run.py in every bundle.
"""

from __future__ import annotations

import functools
import json
import math
import os
import queue
import statistics
import sys
import threading
import time
from types import MappingProxyType
from typing import IO, Any, Callable, Iterator, Mapping, Sequence

import numpy as np

from . import sensors
from .engine import MissingRuntimeError, reason, to_batch
from .engines import import_runtime, open_engine
from .self_test import load_arrays


def time_run(fn: Callable[[], object], count: int, fps: float = 0.0) -> list[float]:
    """Milliseconds of each of `count` calls, none left out: back to back, or `fps` a second with pauses between.

    In a pause the processor is left alone, as in an app that waits for its camera: clocks fall, caches go cold.
    """
    samples_ms, due = [], time.perf_counter() + (1 / fps if fps else 0.0)
    for _ in range(count):
        if fps:  # before the first one too, which follows a warm-up or another engine's runs
            time.sleep(max(0.0, due - time.perf_counter()))
            due = max(due, time.perf_counter() - 1 / fps) + 1 / fps  # late frames are not made up for
        start = time.perf_counter_ns()
        fn()
        samples_ms.append((time.perf_counter_ns() - start) / 1e6)
    return samples_ms


def warm_up(fn: Callable[[], object], seconds: float) -> int:
    """Call `fn` for `seconds`, at least once; how often it was called."""
    end, calls = time.perf_counter() + seconds, 0
    while calls == 0 or time.perf_counter() < end:
        fn()
        calls += 1
    return calls


def clean_stdout() -> IO[str]:
    """The real stdout, for our own words alone: what a runtime prints goes to stderr from now on."""
    sys.stdout.flush()
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


class _Server:
    """The child's side: holds one engine and answers requests."""

    def open(
        self,
        runtime: str,
        path: str,
        threads: int,
        precision: str,
        batch: int,
        inputs: str = "",
        shapes: Mapping[str, Sequence[int]] = MappingProxyType({}),
        seed: int = 0,
    ) -> dict[str, Any]:
        """Load, then run once on `inputs` (an .npz with input:NAME) or on noise of `shapes` (without batch)."""
        import_runtime(runtime)  # is not loading the engine
        noise = np.random.default_rng(seed)
        given = {name: noise.standard_normal([1, *shape]).astype("float32") for name, shape in shapes.items()}
        arrays = {name: to_batch(array, batch) for name, array in (given or load_arrays(inputs, "input:")).items()}
        self.memory_before = sensors.memory_bytes()["now"]
        start = time.perf_counter_ns()
        engine = open_engine(runtime, path, threads, precision)
        load_ms = (time.perf_counter_ns() - start) / 1e6
        self.engine, self.fn = engine, functools.partial(engine.run, arrays)
        reply = {"ok": True, "load_ms": load_ms, "first_ms": time_run(self.fn, 1)[0]}
        finite = all(bool(np.isfinite(array).all()) for array in self.fn().values())
        return {**reply, "finite": finite, "describe": engine.describe()}  # some know only now how they run

    def warm(self, seconds: float) -> dict[str, Any]:
        start = time.perf_counter()
        calls = warm_up(self.fn, seconds)
        return {"ok": True, "calls": calls, "seconds": time.perf_counter() - start}

    def time(self, count: int, fps: float = 0.0) -> dict[str, Any]:
        return {"ok": True, "samples_ms": time_run(self.fn, count, fps)}

    def clocks(self, count: int, fps: float = 0.0) -> dict[str, Any]:
        """Medians of what the runtime's own clocks say, and of what is left of the whole run: the host's share.

        Launching is told apart from them: it goes on beside the computing.
        """
        parts: list[dict[str, float]] = []
        launches: list[float | None] = []
        for _ in range(count):
            (total,) = time_run(self.fn, 1, fps)
            own = self.engine.clocks_ms()
            parts.append({**own, "host": max(0.0, total - math.fsum(own.values()))} if own else {})
            launches.append(self.engine.launch_ms())
        clocks_ms = {name: statistics.median(p[name] for p in parts) for name in parts[0]}
        launch_ms = statistics.median(known) if (known := [each for each in launches if each is not None]) else None
        return {"ok": True, "clocks_ms": clocks_ms, "launch_ms": launch_ms}

    def memory(self) -> dict[str, Any]:
        """The highest memory of this process, and of the engine: what came on top of Python and the runtime."""
        peak, before = sensors.memory_bytes()["peak"], self.memory_before
        grown = None if peak is None or before is None else peak - before
        return {"ok": True, "memory": {"process_peak_bytes": peak, "engine_bytes": grown}}

    def close(self) -> dict[str, Any]:
        self.engine.close()
        return {"ok": True}


def _requests() -> Iterator[str]:
    """The lines of stdin; when the parent is gone, this process ends in the midst of whatever it does."""
    lines: queue.Queue[str] = queue.Queue()
    parent = os.getppid()

    def listen() -> None:
        for line in sys.stdin:
            lines.put(line)
        lines.put("")
        while os.getppid() == parent:  # the pipe is closed, but the answers may still be read
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    return iter(lines.get, "")


def serve() -> int:
    """Answer JSON lines from stdin until "close" or the end of stdin, so that no child outlives its parent."""
    replies, server, op = clean_stdout(), _Server(), ""
    operations: dict[str, Callable[..., dict[str, Any]]]
    names = ("open", "warm", "time", "clocks", "memory", "close")
    operations = {name: getattr(server, name) for name in names}
    for line in _requests():
        try:
            request = json.loads(line)
            op = request.pop("op")
            reply = operations[op](**request)
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent has to hear of it
            reply = {"error": reason(error), "missing": isinstance(error, MissingRuntimeError)}
        print(json.dumps(reply), file=replies, flush=True)
        if op == "close":
            break
    return 0
