"""gcos, group convolution with shuffling, in a trained network: groups by the next layers' errors, refitted, reordered.

The papers (TPAMI 2019) name it and give its size; what is here is this project's own design (docs/adr/0011-gcos.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..errors import ModelError
from ..interfaces import Progress, silent
from ..parallel import join
from .calibration import Sample, Sampling, observe
from .graph import ChannelGraph, ChannelGroup
from .moments import Centred
from .partition import MOST_GROUPS, Assignment, Layer, Partition, choose, explained
from .plan import Plan, Shuffled, empty_plan
from .readers import Reader
from .reconstruction import Solve, Solver
from .repair import Front, repair
from .wide import Wide

RIDGE = 1e-3
Choose = Callable[[Layer, int], Partition]


@dataclass(frozen=True)
class Grouped:
    """What is left.

    Attributes:
        model: of the same shape as before; in grouped convolutions all weights between different groups are zero.
        plan: that reorders its channels and makes the convolutions grouped.
        explained: convolution → share of the variance of what it should say that it still says.
    """

    model: nn.Module
    plan: Plan
    explained: dict[str, float]


def default_groups(model: nn.Module, graph: ChannelGraph) -> dict[str, int]:
    """The layout of the papers' ThiNet-Tiny of 2.66 MB, on any network: 4 groups on the smallest maps, 2 on the next.

    Convolution → groups; fewer where channels do not divide; those that cannot be grouped are left out. In VGG-16 they
    are conv5_x and conv4_x (thinet.md, section 2).
    """
    sizes = {producer: group.map_size for group in graph.groups for producer in group.producers if group.map_size}
    maps = sorted({height * width for height, width in sizes.values()})
    wanted = {name: 4 if np.prod(size) == maps[0] else 2 for name, size in sizes.items() if np.prod(size) in maps[:2]}
    return {name: groups for name, groups in possible(model, graph, wanted).items() if groups > 1}


def possible(model: nn.Module, graph: ChannelGraph, wanted: Mapping[str, int]) -> dict[str, int]:
    """Convolution → as many groups as wanted, or the most below that its channels can be dealt out to; 1 for none."""
    found: dict[str, int] = {}
    modules = dict(model.named_modules())  # a weight that a function reads belongs to none
    for name, most in wanted.items():
        conv, before = modules.get(name), _read_by(graph, name)
        free = isinstance(conv, nn.Conv2d) and conv.groups == 1 and before is not None and _made_by(graph, name)
        found[name] = 1
        if isinstance(conv, nn.Conv2d) and before is not None and free:
            alone = all(each == name or found[each] == 1 or _read_by(graph, each) is not before for each in found)
            share = found.get(before.name, 1)  # groups that deal their channels out to the new ones
            sizes = range(min(most, MOST_GROUPS) if alone else 1, 0, -1)
            fits = (each for each in sizes if not (conv.out_channels % each or conv.in_channels % (each * share)))
            found[name] = next(fits, 1)
    return found


def _read_by(graph: ChannelGraph, name: str) -> ChannelGroup | None:
    """The group of channels that a convolution reads, if they can be put in another order for its sake."""
    groups = [group for group in graph.groups if any(each.weight == f"{name}.weight" for each in group.consumers)]
    mine = [each for group in groups for each in group.consumers if each.weight == f"{name}.weight"]
    free = len(mine) == 1 and _free(groups[0]) and np.array_equal(mine[0].channels, groups[0].channels)
    return groups[0] if free else None


def _made_by(graph: ChannelGraph, name: str) -> ChannelGroup | None:
    """The group of channels that a convolution makes, if they can be put in another order for its sake."""
    made = [group for group in graph.groups if name in group.producers and _free(group)]
    axes = [axis for axis in graph.axes if axis.producer and axis.site.parameter == f"{name}.weight"]
    return made[0] if made and np.array_equal(axes[0].channels, made[0].channels) else None


def _free(group: ChannelGroup) -> bool:
    """Whether the channels come from one layer and none is bound to a place (by groups of a later convolution …)."""
    return len(group.producers) == 1 and not group.shortcut and not group.cells.any()


def check(model: nn.Module, graph: ChannelGraph, wanted: Mapping[str, int]) -> None:
    """Raise ModelError for a convolution that cannot be grouped as the user asks."""
    for name, groups in possible(model, graph, wanted).items():
        if groups != wanted[name]:
            raise ModelError(
                f"{name} cannot have {wanted[name]} groups{f', only {groups}' if groups > 1 else ''}: it has to be a "
                "convolution without groups, between channels that are no residual stream and are read nowhere else in "
                f"another order, and each group (at most {MOST_GROUPS}) gets an equal share of them.",
                hint="Ask for another number of groups, or for widths that divide: --round-to 8.",
            )


def group_convolutions(
    thin: nn.Module,
    graph: ChannelGraph,
    wanted: Mapping[str, int],
    sample: Sample,
    input_shape: tuple[int, ...],
    *,
    choose_by: Choose | None = None,
    progress: Progress = silent,
) -> Grouped:
    """Group convolutions of a network from front to back, refitting all layers behind the first.

    Args:
        thin: the network, usually a pruned one; left untouched.
        graph: of it.
        wanted: convolution → groups, each `possible`.
        sample: calibration images; labels are not used.
        input_shape: of the network.
        choose_by: another way to partition, to compare with.
        progress: to report to.
    """
    check(thin, graph, wanted)
    pick = choose_by or (lambda layer, groups: choose(layer, groups, sample.seed))
    wide = Wide.of(thin, graph, input_shape, sample.batch)
    sampling = Sampling.of(wide, sample.shuffled())
    front = Front(wide, sampling, observe(wide, sampling, (), progress)[1])
    work = _Work(wide, front, graph, wanted, pick)
    for number, reader in enumerate(wide.readers.values()):
        progress("Grouping", number, len(wide.readers), reader.name)
        work.do(reader)
    progress("Grouping", len(wide.readers), len(wide.readers), f"{len(wanted)} convolutions")
    plan = _plan(thin, graph, work.partitions)
    return Grouped(wide.model, plan, work.explained)


@dataclass
class _Work:
    """Front to back: the convolutions that are to be grouped are, and every layer behind the first is refitted."""

    wide: Wide
    front: Front
    graph: ChannelGraph
    wanted: Mapping[str, int]
    pick: Choose
    partitions: dict[str, Partition] = field(default_factory=dict)
    explained: dict[str, float] = field(default_factory=dict)

    def do(self, reader: Reader) -> None:
        if reader.name in self.wanted:
            repair(self.front, reader, lambda stats: self._group(reader, stats))
        elif self.partitions:
            counting = self.wide.counting(reader)
            repair(self.front, reader, lambda stats: Solver(stats.covariance, counting, RIDGE))

    def _group(self, reader: Reader, stats: Centred) -> Solve:
        layer = Layer(stats.covariance[0], stats.cross[0], self._sources(reader), RIDGE)
        part = join().once(lambda: self.pick(layer, self.wanted[reader.name]))
        self.partitions[reader.name], self.explained[reader.name] = part, explained(layer, part)
        return _Blocks(stats, part)

    def _sources(self, reader: Reader) -> Assignment:
        """The group of the convolution that makes each input."""
        before = _read_by(self.graph, reader.name)
        assert before is not None, "`possible` leaves it out"
        maker = self.partitions.get(before.name)
        return maker.filters if maker else np.zeros(len(before.channels), np.int64)


class _Blocks:
    """Ridge regressions in which a filter sees the inputs of its own group only."""

    def __init__(self, stats: Centred, part: Partition) -> None:
        where = np.repeat(part.inputs, stats.covariance.shape[1] // len(part.inputs))
        self._filters = [torch.from_numpy(np.flatnonzero(part.filters == group)) for group in range(part.groups)]
        self._solvers = [
            Solver(stats.covariance, torch.from_numpy(where == group)[None], RIDGE) for group in range(part.groups)
        ]

    def __call__(self, cross_god: torch.Tensor, weight_god: torch.Tensor) -> torch.Tensor:
        new = torch.zeros_like(weight_god)
        for filters, solver in zip(self._filters, self._solvers, strict=True):
            new[:, filters] = solver(cross_god[:, filters], weight_god[:, filters])
        return new


def _plan(model: nn.Module, graph: ChannelGraph, partitions: Mapping[str, Partition]) -> Plan:
    """Channels in the order of the groups that make them and, among these, of those that read them."""
    keep: dict[str, dict[int, tuple[int, ...]]] = {}
    shuffled = {}
    for group in graph.groups:
        maker = partitions.get(group.name)
        readers = [name for name in partitions if _read_by(graph, name) is group]
        keys = [partitions[name].inputs for name in readers] + ([maker.filters] if maker else [])
        for name in readers:
            shuffle = maker.groups if maker and _dealt(maker.filters, partitions[name].inputs) else 1
            shuffled[name] = Shuffled(groups=partitions[name].groups, shuffle=shuffle)
        if keys:
            order = np.lexsort((np.arange(len(group.channels)), *keys))
            for axis in graph.axes:
                if np.isin(axis.channels, group.channels).any():
                    indices = _reordered(axis.channels, group.channels, order)
                    keep.setdefault(axis.site.parameter, {})[axis.site.dim] = indices
    grouped = {
        axis.site.parameter: axis.groups for axis in graph.axes if axis.groups > 1 and axis.site.parameter in keep
    }
    return empty_plan(model).model_copy(update={"keep": keep, "grouped": grouped, "shuffled": shuffled})


def _dealt(sources: Assignment, inputs: Assignment) -> bool:
    """Whether every group gets as many channels of each source; else (in what is compared with) each has its own."""
    counts = np.unique(np.stack([sources, inputs]), axis=1, return_counts=True)[1]
    pairs = (int(sources.max()) + 1) * (int(inputs.max()) + 1)
    return len(counts) == pairs and len(set(counts.tolist())) == 1


def _reordered(axis: NDArray[np.int64], channels: NDArray[np.int64], order: NDArray[np.int64]) -> tuple[int, ...]:
    """Indices of a dimension with the places of some channels exchanged; a channel may have several places."""
    places = [np.flatnonzero(axis == channel) for channel in channels]
    indices = np.arange(len(axis))
    for here, there in enumerate(order):
        indices[places[here]] = places[there]
    return tuple(indices.tolist())
