"""Networks of any widths as engines, and how fast they are: what the benchmarks of budgets of time share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from thinet_deploy.data.dataset import ImageSet
from thinet_deploy.interfaces import Precision, Progress, silent
from thinet_deploy.pruning.allocation import Costs, Curve
from thinet_deploy.pruning.budget import Widths, Wish, choices, cost, may_vanish, some, uniform
from thinet_deploy.pruning.calibration import Sample
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.graph import Branch, ChannelGraph, ChannelGroup
from thinet_deploy.pruning.oneshot import Method, prune_once, weigh
from thinet_deploy.pruning.retrace import settled_plan
from thinet_deploy.pruning.surgery import apply
from thinet_deploy.pruning.trace import example_inputs, named_tensors
from thinet_deploy.stages.latency import Bench, engine_for, layer_costs, shaped, with_room
from thinet_deploy.target import load_profile
from thinet_deploy.timing.budget import CORRECTIONS, NEAR, Goal, Measured, Trial
from thinet_deploy.timing.latency import EngineLatency, EngineRef
from thinet_deploy.timing.milliseconds import Milliseconds


@dataclass
class Subject:
    """A network to prune.

    Attributes:
        model: of full width.
        images: to calibrate on; the first one is what engines are timed with.
        calibration: how many of them.
        batch: of them that run together.
        streams: whether residual streams may become narrower too.
        vanishing: whether residual branches may vanish.
    """

    model: nn.Module
    images: ImageSet
    calibration: int
    batch: int
    streams: bool = False
    vanishing: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an input."""
        return self.images.preprocess.input_shape

    @cached_property
    def graph(self) -> ChannelGraph:
        """Its channels."""
        return channel_graph(self.model, example_inputs(self.model, self.shape))

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """Those that may become narrower."""
        return tuple(group for group in self.graph.groups if self.streams or not group.shortcut)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Those that may vanish."""
        return may_vanish(self.graph, self.groups, Wish()) if self.vanishing else ()

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Its parameters and buffers."""
        return dict(named_tensors(self.model))

    @property
    def sample(self) -> Sample:
        """The calibration images."""
        chosen = self.images.sample(self.calibration, seed=0, stage="calibration")
        return Sample(self.images, np.asarray(chosen), self.batch, 0)

    def curves(self, progress: Progress = silent) -> dict[str, Curve]:
        """What narrower widths would cost."""
        return weigh(self.model, self.graph, self.groups, self.sample, self.shape, Method(), progress).curves

    def pruned(self, widths: Widths) -> nn.Module:
        """The network with some widths, its filters chosen and refitted without training."""
        done = prune_once(self.model, self.graph, self.groups, lambda _: widths, self.sample, self.shape, Method())
        plan = settled_plan(self.model, self.graph, done.kept, example_inputs(self.model, self.shape))
        return apply(plan, done.model).eval()

    def macs(self, widths: Widths) -> int:
        """Multiply-accumulates with some widths."""
        return cost(self.tensors, self.graph, some(self.graph, self.groups, widths)).macs

    @property
    def whole(self) -> Widths:
        """All filters."""
        return {group.name: len(group.channels) for group in self.groups}

    def even(self, costs: Milliseconds, most_ms: float, wish: Wish) -> Widths:
        """The widest uniform widths whose layers are predicted to take so long at most; else the narrowest."""
        tried = (uniform(self.groups, step / 400, wish) for step in range(400, -1, -1))
        narrowest = uniform(self.groups, 0.0, wish)
        return next((widths for widths in tried if costs(widths)[0] <= most_ms), narrowest)

    def most(self, costs: Milliseconds, most_ms: float, wish: Wish) -> Widths:
        """Widths of that time that keep as many multiply-accumulates as they can, whatever is lost by them.

        Again and again the group narrows that loses fewest multiply-accumulates per millisecond saved.
        """
        macs = Costs(self.tensors, self.graph, self.groups)
        widths, open_to = dict(self.whole), {each.name: np.array(choices(each, wish)) for each in self.groups}
        while (over := costs(widths)[0] - most_ms) > 0:
            best = (np.inf, "", 0)
            for name, every in open_to.items():
                narrower = every[every < widths[name]]
                saved, lost = costs.saved(widths, name, narrower)[0], macs.saved(widths, name, narrower)[0]
                enough = saved >= over
                pays = (saved > 0) & ~(enough & (narrower < narrower[enough].max(initial=0)))
                for width, ratio in zip(narrower[pays].tolist(), (lost[pays] / saved[pays]).tolist(), strict=True):
                    best = min(best, (ratio, name, width))
            if not best[1]:
                break
            widths[best[1]] = best[2]
        return widths


def written(curves: dict[str, Curve]) -> dict[str, Any]:
    """As JSON."""
    return {name: {"widths": each.widths.tolist(), "error": each.error.tolist()} for name, each in curves.items()}


def read(curves: dict[str, Any]) -> dict[str, Curve]:
    """From JSON."""
    return {name: Curve(np.array(each["widths"]), np.array(each["error"])) for name, each in curves.items()}


@dataclass
class Shop:
    """Makes engines of a network, each once, and measures them.

    Attributes:
        subject: the network.
        bench: where.
        folder: of the engines.
        spent: seconds by what they went into.
    """

    subject: Subject
    bench: Bench
    folder: Path
    spent: dict[str, float] = field(default_factory=dict)
    _made: dict[tuple[tuple[str, int], ...], EngineRef] = field(default_factory=dict)

    @contextmanager
    def clock(self, what: str) -> Iterator[None]:
        """Add up the seconds that something takes."""
        start = time.perf_counter()
        yield
        self.spent[what] = self.spent.get(what, 0.0) + time.perf_counter() - start

    def engine(self, widths: Widths) -> EngineRef:
        """Of a network with some widths."""
        key = tuple(sorted(widths.items()))
        if key not in self._made:
            with self.clock("making engines"):
                subject, whole = self.subject, widths == self.subject.whole
                thin = shaped(subject.model, subject.graph, subject.groups, widths)
                name = "original" if whole else f"thin{len(self._made)}"
                self._made[key] = self.bench.made(thin, name, self.folder)
        return self._made[key]

    def wish(self, goal: Goal) -> Wish:
        """The target's grid, or a finer one where the budget needs it."""
        usual = Wish(grid=self.bench.target.channel_grid, soft=True)
        return with_room(self.subject.model, self.subject.graph, self.subject.groups, usual, goal)

    def costs(self, wish: Wish) -> Milliseconds:
        """The layers' times, measured where the user's cache has none."""
        with self.clock("timing layers"):
            return layer_costs(self.bench, self.subject.model, self.subject.graph, self.subject.groups, wish)

    def measure(self, widths: Widths) -> Measured:
        """A network beside the original."""
        base, thin = self.engine(self.subject.whole), self.engine(widths)
        with self.clock("measuring"):
            return self.bench.compared(base, thin)

    def as_fast(
        self, make: Callable[[Milliseconds, float, Wish], Widths], costs: Milliseconds, wanted: Trial, wish: Wish
    ) -> Widths:
        """Widths of a kind (`Subject.even`, `Subject.most`) that take as long as others, found as a budget is met."""
        tried: list[tuple[float, Widths]] = []
        budget = wanted.layers_ms
        for _ in range(1 + CORRECTIONS):
            widths = make(costs, budget, wish)
            if any(widths == each for _, each in tried):
                break
            ratio = self.measure(widths).speedup / wanted.measured.speedup
            tried.append((abs(ratio - 1), widths))
            if abs(ratio - 1) <= NEAR:
                break
            budget *= ratio
        return min(tried, key=lambda each: each[0])[1]

    def in_turn(self, all_widths: dict[str, Widths]) -> dict[str, EngineLatency]:
        """Several networks in one measurement."""
        refs = [self.engine(widths) for widths in all_widths.values()]
        with self.clock("measuring"):
            return dict(zip(all_widths, self.bench.timed(refs), strict=True))


def bench(
    runtime: str,
    precision: Precision,
    images: ImageSet,
    folder: Path,
    *,
    rounds: int,
    seconds: float,
    progress: Progress = silent,
) -> Bench:
    """One engine of the profile `cpu` on this machine, with one thread."""
    text = (Path(__file__).resolve().parents[1] / "profiles" / "cpu.toml").read_text("utf-8")
    path = folder / f"{runtime}.toml"
    path.write_text(text.replace('runtimes = ["openvino", "onnxruntime"]', f'runtimes = ["{runtime}"]'), "utf-8")
    target = load_profile(str(path))
    image = images.inputs(np.arange(1))
    return Bench(engine_for(target, 1, precision), target, image, progress, rounds, seconds)
