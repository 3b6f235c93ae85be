"""Layer times measured on the engine itself over (inputs, outputs), and kept per device and runtime."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import ModelProto

from ..artifact import read_json, write_json
from ..environment import cache_folder
from ..errors import OutputError
from ..interfaces import Precision, Progress, silent
from ..on_device.turns import layer_time
from ..precision.timing import to_be_timed
from ..precision.weights import U8S8, Layout
from .layer_networks import LayerShape, frame, framed, image_of
from .surfaces import POINTS, Domain, Point, Surface, Timing, wanted
from .timers import HERE, Timer

# Runtimes that open ONNX files as they are.
RUNTIMES = ("openvino", "onnxruntime")
VERSION = 3  # of the file with the points
# Of every network: most turns, turns after which a layer that is known to within STEADY gets no more of them, and
# seconds in each, warm-up included.
ROUNDS, ROUNDS_AT_LEAST, SECONDS = 11, 5, 0.04
STEADY = 0.025
# Spread of one that something disturbed, whatever the sensors say: share of the layer's time, and of its network's.
UNSURE, AGREE = 0.2, 0.05

Task = tuple[LayerShape, int, int]  # with numbers of inputs and outputs
Network = tuple[LayerShape, int, int | None]  # the same; None for the frame alone
Stopwatch = Callable[[Sequence[Task]], list[Timing]]


@dataclass(frozen=True)
class Engine:
    """What layers are timed on.

    Attributes:
        runtime: one of RUNTIMES.
        threads: CPU threads.
        precision: that it computes in: fp32 or int8.
        layout: of the Q/DQ pairs in int8; the machine says which.
        timer: the machine.
    """

    runtime: str
    threads: int = 1
    precision: Precision = "fp32"
    layout: Layout = U8S8
    timer: Timer = HERE

    @property
    def identity(self) -> dict[str, Any]:
        """What a measured time belongs to: machine, runtime with its version, how it is used."""
        made = {"machine": self.timer.machine, "runtime": self.timer.version(self.runtime), "threads": self.threads}
        return {**made, "precision": self.precision, "version": VERSION}

    def time(self, tasks: Sequence[Task], progress: Progress = silent) -> list[Timing]:
        """Milliseconds of layers, without their frames; all networks in turn, see `turns.turns`."""
        tasks = [(shape, o if shape.kind == "depthwise" else i, o) for shape, i, o in tasks]
        networks = sorted({network for task in tasks for network in _networks(task)}, key=str)
        names = {network: str(number) for number, network in enumerate(networks)}
        pairs = [(names[task], None if task[0].reads_image else names[task[0], task[1], None]) for task in tasks]
        asked = {
            "engine": {"runtime": self.runtime, "threads": self.threads, "precision": self.precision},
            "networks": {names[network]: _asked(network, f"{names[network]}.onnx") for network in networks},
            "pairs": pairs,
            "rounds": ROUNDS,
            "at_least": ROUNDS_AT_LEAST,
            "seconds": SECONDS,
            "steady": STEADY,
        }
        with tempfile.TemporaryDirectory() as folder:
            for network, name in names.items():
                Path(folder, f"{name}.onnx").write_bytes(self.typed(_made(network)).SerializeToString())
            found = self.timer.layers(Path(folder), asked, progress)
        return [_timing(*layer_time(found["turns_ms"], pair), busy=bool(found["warnings"])) for pair in pairs]

    def typed(self, network: ModelProto) -> ModelProto:
        """A float32 network in the type that this engine computes in, to be timed."""
        return to_be_timed(network, self.layout) if self.precision == "int8" else network


def _timing(ms: float, spread_ms: float, network_ms: float, *, busy: bool) -> Timing:
    """A layer that is cheap beside its frame is never known to within a share of itself: that is no disturbance."""
    return Timing(ms, spread_ms, disturbed=busy or spread_ms > max(UNSURE * ms, AGREE * network_ms))


def _networks(task: Task) -> list[Network]:
    """What a layer's time is measured with: it in its frame, and the frame."""
    shape, ins, _ = task
    return [task] if shape.reads_image else [task, (shape, ins, None)]


def _made(network: Network) -> ModelProto:
    shape, ins, outs = network
    return frame(shape, ins) if outs is None else framed(shape, ins, outs)


def _asked(network: Network, path: str) -> dict[str, Any]:
    """What `turns.turns` has to know of a network."""
    image, batch = image_of(*network[:2])
    return {"path": path, "batch": batch, "shapes": {"x": list(image)}, "what": str(network[0])}


class Points:
    """Measured points of all layer shapes, kept in a file of the user's cache; one for each machine and runtime.

    Args:
        path: of the file; None to keep nothing.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self.of: dict[LayerShape, dict[Point, Timing]] = defaultdict(dict)
        self._read()

    @classmethod
    def on(cls, engine: Engine) -> Points:
        """Those of an engine on its machine."""
        told = engine.identity
        parts = (told["machine"], *told["runtime"].split(), f"{told['threads']}t", told["precision"], f"v{VERSION}")
        return cls(cache_folder() / "staircase" / f"{'-'.join(map(str, parts))}.json")

    def _read(self) -> None:
        """What the file has; damaged ones are measured anew."""
        if self._path is None or not self._path.is_file():
            return
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            for key, points in read_json(self._path).items():
                told: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(key).items()}
                for i, o, ms, near, disturbed in points:
                    self.add((LayerShape(**told), int(i), int(o)), Timing(float(ms), float(near), bool(disturbed)))

    def add(self, task: Task, timing: Timing) -> None:
        """Keep a point. One of a busy machine gives way to one of a quiet machine, or to one that is known better.

        Not to a faster one: a layer's time is a difference, and small where it was the frame that was disturbed.
        """

        def rank(each: Timing) -> tuple[float, ...]:
            return (1, each.spread_ms, each.ms) if each.disturbed else (0,)

        shape, ins, outs = task
        known, point = self.of[shape], (ins, outs)
        known[point] = min(known.get(point, timing), timing, key=rank)

    def save(self) -> None:
        """Write all points, with those that another process has written meanwhile."""
        if self._path is None:
            return
        self._read()
        shapes = {
            json.dumps(vars(shape)): [[i, o, t.ms, t.spread_ms, t.disturbed] for (i, o), t in sorted(points.items())]
            for shape, points in self.of.items()
        }
        with suppress(OutputError):  # a cache that cannot be written costs time, and nothing else
            write_json(self._path, shapes)


def survey(
    domains: Sequence[tuple[LayerShape, Domain]], points: Points, stopwatch: Stopwatch, most: int = POINTS
) -> list[Surface]:
    """Measure what is missing until all surfaces are known; the points of all layers in turn.

    What was measured while the machine was busy with something else is measured once more at the end.

    Args:
        domains: layer shapes, and the widths that matter of each.
        points: known ones; gets more.
        stopwatch: measures layers.
        most: points of one line of a surface.
    """

    def measure(tasks: Sequence[Task]) -> None:
        for task, timing in zip(tasks, stopwatch(tasks), strict=True):
            points.add(task, timing)
        points.save()

    def complete() -> None:
        while tasks := _missing(domains, points.of, most):
            measure(tasks)

    complete()
    if tasks := _disturbed(domains, points.of):
        measure(tasks)
        complete()
    return [Surface(_within(points.of[shape], domain), domain) for shape, domain in domains]


def _missing(
    domains: Sequence[tuple[LayerShape, Domain]], known: Mapping[LayerShape, Mapping[Point, Timing]], most: int
) -> list[Task]:
    found = {
        (shape, *point)
        for shape, domain in dict.fromkeys(domains)
        for point in wanted(_within(known.get(shape, {}), domain), domain, most)
    }
    return sorted(found, key=str)


def _disturbed(
    domains: Sequence[tuple[LayerShape, Domain]], known: Mapping[LayerShape, Mapping[Point, Timing]]
) -> list[Task]:
    found = {
        (shape, *point)
        for shape, domain in dict.fromkeys(domains)
        for point, timing in _within(known[shape], domain).items()
        if timing.disturbed
    }
    return sorted(found, key=str)


def _within(known: Mapping[Point, Timing], domain: Domain) -> dict[Point, Timing]:
    """Points of a domain: others may have been measured for another layer."""
    ins, outs = set(domain.ins), set(domain.outs)
    return {(i, o): timing for (i, o), timing in known.items() if i in ins and o in outs}
