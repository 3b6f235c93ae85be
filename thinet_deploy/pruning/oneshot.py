"""All layers at once: one pass for every layer's statistics, widths for the budget, then front to back, refitting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..interfaces import Progress, silent
from ..parallel import join
from .allocation import Curve
from .budget import Widths, possible
from .calibration import Original, Sample, Sampling, observe
from .elimination import Removal, eliminate
from .graph import ChannelGraph, ChannelGroup
from .moments import Moments
from .plan import empty_plan
from .readers import Reader
from .reconstruction import Solver, scale
from .repair import Front, Rows
from .scores import apoz, random_scores, taylor, weight_sum
from .selection import by_score, thinet, thinet_omp
from .weighing import exact_gram, parts
from .wide import Wide

Selection = Literal["elimination", "thinet", "thinet-omp", "weight-sum", "apoz", "taylor", "random"]
Reconstruction = Literal["full", "scale", "none"]
Targets = Literal["residual", "asymmetric", "symmetric"]


ROUNDS = 3  # of refitting to what counts behind a ReLU


@dataclass(frozen=True)
class Method:
    """How filters are chosen, and how their consumers make up for those that go.

    Attributes:
        selection: which criterion.
        reconstruction: full (weights and bias, ridge regression), scale (the papers' one scalar per channel), none.
        targets: of the full one: what the original's layer says on its own inputs (symmetric), the same while the
            layer reads the pruned network (asymmetric), and beyond that what it is added to put right (residual).
        ridge: of the regression, as a share of the inputs' mean variance.
    """

    selection: Selection = "elimination"
    reconstruction: Reconstruction = "full"
    targets: Targets = "residual"
    ridge: float = 1e-3


@dataclass(frozen=True)
class Weighed:
    """What the pass over the original tells.

    Attributes:
        wide: a copy of it, untouched so far.
        sampling: where its layers were looked at.
        moments: weight → second moments of what a consumer reads.
        said: what all layers say.
        curves: group's name → what narrower widths would cost; only of the elimination.
    """

    wide: Wide
    sampling: Sampling
    moments: dict[str, Moments]
    said: Original
    curves: dict[str, Curve]


@dataclass(frozen=True)
class Pruned:
    """What one shot leaves.

    Attributes:
        model: of full width, reconstructed; the plan of `kept` slices it.
        kept: per channel of the graph, whether it stays.
        widths: group's name → channels that stay.
        curves: group's name → what narrower widths would have cost; only of the elimination.
    """

    model: nn.Module
    kept: NDArray[np.bool_]
    widths: Widths
    curves: dict[str, Curve]


def prune_once(
    original: nn.Module,
    graph: ChannelGraph,
    groups: Sequence[ChannelGroup],
    widths: Callable[[Mapping[str, Curve]], Widths],
    sample: Sample,
    input_shape: tuple[int, ...],
    method: Method,
    progress: Progress = silent,
) -> Pruned:
    """Prune groups without any training.

    Args:
        original: the network; left untouched.
        graph: of it.
        groups: to prune; all of their consumers are `wide.within_reach`.
        widths: chooses them, given the error curves if the selection has any.
        sample: calibration images; labels are used by the selection "taylor" only.
        input_shape: of the network.
        method: how.
        progress: to report to.
    """
    seen = weigh(original, graph, groups, sample, input_shape, method, progress)
    if method.targets != "symmetric":
        seen.moments.clear()  # they are gathered anew, layer by layer
    chosen = join().once(lambda: widths(seen.curves))
    wide = seen.wide
    work = _Work(wide, graph, seen.sampling, seen.said, seen.moments, method, chosen, list(groups))
    for number, name in enumerate(wide.readers):
        progress("Pruning", number, len(wide.readers), name.removesuffix(".weight"))
        work.go_on(name)
    progress("Pruning", len(wide.readers), len(wide.readers))
    return Pruned(wide.model, work.kept, chosen, seen.curves)


def weigh(
    original: nn.Module,
    graph: ChannelGraph,
    groups: Sequence[ChannelGroup],
    sample: Sample,
    input_shape: tuple[int, ...],
    method: Method,
    progress: Progress = silent,
) -> Weighed:
    """Look at the original once; arguments as of `prune_once`.

    The errors of the curves are shares of what the consumers of all groups say: of its variance, weighed between layers
    as the errors are. So their sum over the groups is 0 for the original, and about 1 where nothing of it is left.
    """
    wide = Wide.of(original, graph, input_shape, sample.batch, residual=method.targets == "residual")
    sampling = Sampling.of(wide, sample.shuffled())
    consumers = {each.weight for group in groups for each in group.consumers}
    moments, said = observe(wide, sampling, consumers, progress)
    curves: dict[str, Curve] = {}
    worth, variance = said.worth(), said.variance()
    whole = sum(worth[name] * variance[name] for name in sorted(consumers))
    for number, group in enumerate(groups if method.selection == "elimination" else ()):
        progress("Weighing", number, len(groups), group.name)
        curves[group.name] = _curve(group, _elimination(wide, group, moments, worth, method.ridge, 0), whole)
    progress("Weighing", len(groups), len(groups))
    return Weighed(wide, sampling, moments, said, curves)


def _elimination(
    wide: Wide,
    group: ChannelGroup,
    moments: Mapping[str, Moments],
    worth: Mapping[str, float],
    ridge: float,
    keep: int,
) -> Removal:
    stats = {}
    for each in group.consumers:
        stats[each.weight] = wide.centred(wide.readers[each.weight], moments[each.weight])
    return eliminate(parts(wide, group, stats, worth, ridge), group.cells, group.steps, keep)


def _curve(group: ChannelGroup, removal: Removal, whole: float) -> Curve:
    widths = np.array(sorted(possible(group, 1), reverse=True))
    return Curve(widths, removal.error[len(group.channels) - widths] / whole)


class _Work:
    """The second pass, layer by layer."""

    def __init__(
        self,
        wide: Wide,
        graph: ChannelGraph,
        sampling: Sampling,
        said: Original,
        moments: Mapping[str, Moments],
        method: Method,
        widths: Widths,
        todo: list[ChannelGroup],
    ) -> None:
        self.wide, self.sampling, self.moments = wide, sampling, moments
        self.method, self.widths, self.todo = method, widths, todo
        self.kept = np.ones(graph.channels, dtype=bool)
        self.front, self.worth = Front(wide, sampling, said), said.worth()
        self.graph = graph

    def go_on(self, name: str) -> None:
        """Choose the filters that this layer is the first to read, and refit it."""
        mine = [group for group in self.todo if any(each.weight == name for each in group.consumers)]
        drifted = not self.kept.all()
        if not mine and not drifted:
            return
        full, fresh = self.method.reconstruction == "full", self.method.targets != "symmetric"
        others = {each.weight for group in mine for each in group.consumers} - {name}
        reader, found = self.wide.readers[name], self.moments
        again = full and fresh and reader.uses[0].rectified and name not in self.wide.spans
        rows: Rows | None = None
        if fresh and (mine or full):
            wanted = [reader, *(self.wide.readers[each] for each in sorted(others))]
            found, rows = self.front.collect(wanted, keep=again)
        for group in mine:
            self.todo.remove(group)
            self._prune(group, found)
        if full and name in found:
            self._refit(reader, found[name], rows if again else None)

    def _refit(self, reader: Reader, moments: Moments, rows: Rows | None) -> None:
        stats = self.wide.centred(reader, moments)
        solver = Solver(stats.covariance, self.wide.counting(reader), self.method.ridge)
        self.wide.refit(reader, stats, solver)
        # With fewer rows than inputs the layer already says what it should on all of them.
        if rows and moments.count >= reader.inputs:
            for _ in range(ROUNDS):
                self.wide.refit(reader, rows.rectified(stats), solver)

    def _prune(self, group: ChannelGroup, moments: Mapping[str, Moments]) -> None:
        stays = join().tell(self._select(group, moments))
        gone = np.setdiff1d(np.arange(len(group.channels)), stays)
        if self.method.reconstruction == "scale":
            factors = np.ones(len(group.channels))
            factors[stays] = scale(exact_gram(self.wide, group, moments), stays)
            self.wide.scale(group, factors)
        self.kept[group.channels[gone]] = False
        self.wide.remove(group, gone)

    def _select(self, group: ChannelGroup, moments: Mapping[str, Moments]) -> NDArray[np.int64]:
        """Indices into the group's channels."""
        width, cells, kind = self.widths[group.name], group.cells, self.method.selection
        if kind == "elimination":
            gone = _elimination(self.wide, group, moments, self.worth, self.method.ridge, width).order
            return np.setdiff1d(np.arange(len(cells)), gone)
        if kind in {"thinet", "thinet-omp"}:
            rule = thinet if kind == "thinet" else thinet_omp
            return rule(exact_gram(self.wide, group, moments), width, cells)
        model, sample = self.wide.model, self.sampling.sample
        plan = empty_plan(model)
        if kind == "weight-sum":
            scores = weight_sum(model, self.graph, group, plan)
        elif kind == "random":
            scores = random_scores(group, sample.seed)
        else:
            judge = apoz if kind == "apoz" else taylor
            scores = judge(model, group, plan, sample.images, sample.chosen)
        return by_score(scores, width, cells)
