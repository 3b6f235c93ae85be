"""Layer times measured on the engine itself over (inputs, outputs), and kept per device and runtime."""

from __future__ import annotations

import json
import math
import random
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import ModelProto

from . import runner
from .artifact import read_json, write_json
from .environment import cache_folder, fingerprint, machine_id
from .errors import OutputError
from .interfaces import Precision, Progress, silent
from .latency import explained
from .layer_networks import LayerShape, frame, framed, image_of
from .precision.timing import to_be_timed
from .precision.weights import U8S8, Layout
from .registry import made_by
from .surfaces import POINTS, Domain, Point, Surface, Timing, wanted

# Runtimes that open ONNX files as they are, on this machine.
RUNTIMES = ("openvino", "onnxruntime")
VERSION = 1  # of the file with the points
# Of every network: most turns, turns after which a layer that is known to within STEADY gets no more of them, and
# seconds in each, warm-up included.
ROUNDS, ROUNDS_AT_LEAST, SECONDS = 7, 3, 0.04
STEADY = 0.025
_LEAST_SHARE = 0.05  # of a network's time that is its layer's at least, where the frame's noise says otherwise

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
    """

    runtime: str
    threads: int = 1
    precision: Precision = "fp32"
    layout: Layout = U8S8

    @property
    def identity(self) -> dict[str, Any]:
        """What a measured time belongs to: machine, runtime with its version, how it is used."""
        machine = machine_id(fingerprint())
        made = {"machine": machine, "runtime": made_by(self.runtime), "threads": self.threads}
        return {**made, "precision": self.precision, "version": VERSION}

    def time(self, tasks: Sequence[Task], progress: Progress = silent) -> list[Timing]:
        """Milliseconds of layers, without their frames; all networks in turn, in each round in another order.

        One process has them all, one after the other, so that opening them costs little. A layer that is known well
        enough has no further turns.
        """
        tasks = [(shape, o if shape.kind == "depthwise" else i, o) for shape, i, o in tasks]
        rounds: dict[Network, list[float]] = defaultdict(list)
        what = explained(f"Timing a layer on {self.runtime}")
        with tempfile.TemporaryDirectory() as folder, runner.Worker() as worker, what:
            paths = self._written({network for task in tasks for network in _networks(task)}, Path(folder))
            for number in range(ROUNDS):
                unsure = [task for task in tasks if number < ROUNDS_AT_LEAST or not _known(_timing(rounds, task))]
                order = list(dict.fromkeys(network for task in unsure for network in _networks(task)))
                random.Random(f"staircase:{number}").shuffle(order)
                for done, network in enumerate(order):
                    progress("Measuring layers", number * len(paths) + done, ROUNDS * len(paths), str(network[0]))
                    rounds[network].append(self._turn(worker, paths[network], network))
        progress("Measuring layers", ROUNDS * len(paths), ROUNDS * len(paths))
        return [_timing(rounds, task) for task in tasks]

    def _written(self, networks: Iterable[Network], folder: Path) -> dict[Network, Path]:
        """Their files."""
        paths = {network: folder / f"{number}.onnx" for number, network in enumerate(sorted(networks, key=str))}
        for (shape, ins, outs), path in paths.items():
            made = frame(shape, ins) if outs is None else framed(shape, ins, outs)
            path.write_bytes(self.typed(made).SerializeToString())
        return paths

    def typed(self, network: ModelProto) -> ModelProto:
        """A float32 network in the type that this engine computes in, to be timed."""
        return to_be_timed(network, self.layout) if self.precision == "int8" else network

    def _turn(self, worker: runner.Worker, path: Path, network: Network) -> float:
        """The median of some runs."""
        image, batch = image_of(*network[:2])
        ask = {"runtime": self.runtime, "path": str(path), "threads": self.threads, "precision": self.precision}
        worker.ask("open", **ask, batch=batch, shapes={"x": image})
        warm = worker.ask("warm", seconds=SECONDS / 4)
        count = max(3, math.ceil(SECONDS * 3 / 4 * warm["calls"] / warm["seconds"]))
        return float(statistics.median(worker.ask("time", count=count)["samples_ms"]))


def _networks(task: Task) -> list[Network]:
    """What a layer's time is measured with: it in its frame, and the frame."""
    shape, ins, _ = task
    return [task] if shape.reads_image else [task, (shape, ins, None)]


def _timing(rounds: Mapping[Network, Sequence[float]], task: Task) -> Timing:
    """A layer's time, from its network's and the frame's in the same rounds.

    A frame that several layers have goes on having turns when one of them has no more.
    """
    both = rounds[task]
    around = rounds[task[0], task[1], None][: len(both)] if not task[0].reads_image else [0.0] * len(both)
    own = [max(one - other, _LEAST_SHARE * one) for one, other in zip(both, around, strict=True)]
    middle = statistics.median(own)
    # Two standard errors of a median, from the median deviation: a round that was disturbed does not count.
    deviation = statistics.median(abs(each - middle) for each in own)
    return Timing(middle, 2 * 1.253 * 1.483 * deviation / math.sqrt(len(own)))


def _known(timing: Timing) -> bool:
    return timing.spread_ms <= STEADY * timing.ms


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
        """Those of an engine on this machine."""
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
                shape = LayerShape(**told)
                mine = {(int(i), int(o)): Timing(float(ms), float(spread)) for i, o, ms, spread in points}
                self.of[shape] = {**mine, **self.of[shape]}

    def save(self) -> None:
        """Write all points, with those that another process has written meanwhile."""
        if self._path is None:
            return
        self._read()
        shapes = {
            json.dumps(vars(shape)): [[i, o, t.ms, t.spread_ms] for (i, o), t in sorted(points.items())]
            for shape, points in self.of.items()
        }
        with suppress(OutputError):  # a cache that cannot be written costs time, and nothing else
            write_json(self._path, shapes)


def survey(
    domains: Sequence[tuple[LayerShape, Domain]], points: Points, stopwatch: Stopwatch, most: int = POINTS
) -> list[Surface]:
    """Measure what is missing until all surfaces are known; the points of all layers in turn.

    Args:
        domains: layer shapes, and the widths that matter of each.
        points: known ones; gets more.
        stopwatch: measures layers.
        most: points of one line of a surface.
    """
    while tasks := _missing(domains, points.of, most):
        for (shape, i, o), timing in zip(tasks, stopwatch(tasks), strict=True):
            points.of[shape][i, o] = timing
        points.save()
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


def _within(known: Mapping[Point, Timing], domain: Domain) -> dict[Point, Timing]:
    """Points of a domain: others may have been measured for another layer."""
    ins, outs = set(domain.ins), set(domain.outs)
    return {(i, o): timing for (i, o), timing in known.items() if i in ins and o in outs}
