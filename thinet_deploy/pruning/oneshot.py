"""All layers at once: one pass for every layer's statistics, widths for the budget, then front to back, refitting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..interfaces import Progress, Reconstruction, Selection, silent
from ..parallel import join
from .allocation import Curve
from .budget import Widths, kept_note, possible
from .calibration import Original, Sample, Sampling, observe
from .elimination import Removal, eliminate
from .graph import ChannelGraph, ChannelGroup
from .impact import impacts
from .moments import Centred, Moments
from .plan import empty_plan
from .readers import Reader
from .reconstruction import Solver, scale
from .repair import Front, repair
from .scores import apoz, random_scores, taylor, weight_sum
from .selection import by_score, thinet, thinet_omp
from .weighing import exact_gram, others, parts
from .wide import Wide

Targets = Literal["residual", "asymmetric", "symmetric"]


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
        removals: group's name → the order in which its channels would go; only of the elimination.
        curves: group's name → what narrower widths would cost; as well.
    """

    wide: Wide
    sampling: Sampling
    moments: dict[str, Moments]
    said: Original
    removals: dict[str, Removal]
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
    wide, moments = seen.wide, seen.moments
    if method.targets == "symmetric":
        moments = {name: wide.own(wide.readers[name], each) for name, each in moments.items()}
    else:
        moments.clear()  # they are gathered anew, layer by layer
    chosen = join().once(lambda: widths(seen.curves))
    work = _Work(wide, graph, Front(wide, seen.sampling, seen.said), moments, method, chosen, seen.removals)
    unread = _unread(graph, chosen)
    todo = list(groups)
    for number, name in enumerate(wide.readers):
        progress("Pruning", number, len(wide.readers), name.removesuffix(".weight"))
        mine = [group for group in todo if any(each.weight == name for each in group.consumers)]
        work.prune(mine)
        todo = [group for group in todo if group not in mine]
        if not work.kept.all() and method.reconstruction == "full" and name not in unread:
            work.refit(wide.readers[name])
    progress("Pruning", len(wide.readers), len(wide.readers), kept_note(groups, chosen))
    return Pruned(wide.model, work.kept, chosen, seen.curves)


def _unread(graph: ChannelGraph, widths: Widths) -> set[str]:
    """Weights of layers inside branches that vanish."""
    gone = (branch for branch in graph.branches if all(widths.get(name) == 0 for name in branch.groups))
    return {f"{module}.weight" for branch in gone for module in branch.inside}


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

    The errors of the curves are shares of the variance of the network's outputs. Their sum over the groups is 0 for the
    original, and predicts what a network loses before it is fine-tuned.
    """
    wide = Wide.of(original, graph, input_shape, sample.batch, residual=method.targets == "residual")
    sampling = Sampling.of(wide, sample.shuffled())
    consumers = {each.weight for group in groups for each in group.consumers}
    moments, said = observe(wide, sampling, consumers, progress)
    removals: dict[str, Removal] = {}
    worth = said.worth()
    for number, group in enumerate(groups if method.selection == "elimination" else ()):
        progress("Ordering filters", number, len(groups), group.name)
        seen = parts(wide, group, others(groups, group), moments, worth, method.ridge)
        removals[group.name] = eliminate(seen, group.cells, group.steps)
    curves = {}
    if removals:
        progress("Ordering filters", len(groups), len(groups), f"by elimination, in {len(groups)} groups")
        costs = impacts(wide, sampling.sample, groups, moments, removals, method.ridge, progress)
        ends = {branch.groups[-1] for branch in graph.branches}
        for group in groups:
            curve = _curve(group, removals[group.name], costs.get(group.name, 0.0), vanishes=group.name in ends)
            curves[group.name] = curve
    return Weighed(wide, sampling, moments, said, removals, curves)


def _curve(group: ChannelGroup, removal: Removal, cost: float, *, vanishes: bool) -> Curve:
    """With no channels left where a branch can vanish: its last layer says its mean then."""
    widths = np.array([*sorted(possible(group, 1), reverse=True), *[0] * vanishes])
    return Curve(widths, removal.error[len(group.channels) - widths] * cost)


class _Work:
    """The second pass: filters go, and layers are refitted, from front to back."""

    def __init__(
        self,
        wide: Wide,
        graph: ChannelGraph,
        front: Front,
        moments: Mapping[str, Moments],
        method: Method,
        widths: Widths,
        removals: Mapping[str, Removal],
    ) -> None:
        self.wide, self.graph, self.front, self.moments = wide, graph, front, moments
        self.method, self.widths, self.removals = method, widths, removals
        self.kept = np.ones(graph.channels, dtype=bool)

    def prune(self, groups: Sequence[ChannelGroup]) -> None:
        """Choose the filters of some groups, which have the next layer as their first reader, and let the others go."""
        moments: Mapping[str, Moments] = {}
        if groups and (self.method.selection in {"thinet", "thinet-omp"} or self.method.reconstruction == "scale"):
            names = {each.weight for group in groups for each in group.consumers}
            moments = self._moments([reader for name, reader in self.wide.readers.items() if name in names])
        stays = [join().tell(self._select(group, moments)) for group in groups]
        for group, mine in zip(groups, stays, strict=True):
            if self.method.reconstruction == "scale" and len(mine):
                factors = np.ones(len(group.channels))
                factors[mine] = scale(exact_gram(self.wide, group, moments), mine)
                self.wide.scale(group, factors)
        for group, mine in zip(groups, stays, strict=True):
            gone = np.setdiff1d(np.arange(len(group.channels)), mine)
            self.kept[group.channels[gone]] = False
            self.wide.remove(group, gone)

    def refit(self, reader: Reader) -> None:
        """Let a layer say again what the original says; with symmetric targets, if filters that it reads went."""
        counting = self.wide.counting(reader)

        def solver(stats: Centred) -> Solver:
            return Solver(stats.covariance, counting, self.method.ridge)

        if self.method.targets != "symmetric":
            repair(self.front, reader, solver)
        elif reader.weight in self.moments:
            stats = self.wide.centred(reader, self._moments([reader])[reader.weight])
            self.wide.refit(reader, stats, solver(stats))

    def _moments(self, readers: Sequence[Reader]) -> Mapping[str, Moments]:
        if self.method.targets != "symmetric":
            return self.front.collect(readers)[0]
        return {each.weight: self.wide.among(each, self.moments[each.weight]) for each in readers}

    def _select(self, group: ChannelGroup, moments: Mapping[str, Moments]) -> NDArray[np.int64]:
        """Indices into the group's channels."""
        width, cells, kind = self.widths[group.name], group.cells, self.method.selection
        if kind == "elimination":
            return np.sort(self.removals[group.name].order[len(cells) - width :])
        if kind in {"thinet", "thinet-omp"}:
            rule = thinet if kind == "thinet" else thinet_omp
            return rule(exact_gram(self.wide, group, moments), width, cells)
        model, sample = self.wide.model, self.front.sampling.sample
        plan = empty_plan(model)
        if kind == "weight-sum":
            scores = weight_sum(model, self.graph, group, plan)
        elif kind == "random":
            scores = random_scores(group, sample.seed)
        else:
            judge = apoz if kind == "apoz" else taylor
            scores = judge(model, group, plan, sample.images, sample.chosen)
        return by_score(scores, width, cells)
