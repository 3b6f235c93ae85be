"""From labels to channel groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from .attributes import Count, counts
from .branches import branches
from .calls import CONVOLUTIONS, LayerCall, joined, joins, layer_calls, map_sizes, module_name
from .graph import STAYS, Attribute, Axis, ChannelGraph, ChannelGroup, Channels, Consumer
from .label_pass import Labels
from .labels import FIXED, Draft, distinct
from .shares import Cell, removable
from .trace import Trace, arguments, operation, owner


def group_channels(
    model: nn.Module, trace: Trace, values: dict[str, Labels], draft: Draft, literals: Sequence[Count]
) -> ChannelGraph:
    """Number the channels that may go, and gather what belongs to them.

    Args:
        model: the network.
        trace: of it.
        values: the labels of all nodes.
        draft: what the operations demanded; channels that cannot keep their cardinality constraints are frozen in it.
        literals: numbers in the user's modules that were found to count channels.
    """
    calls = list(layer_calls(trace, values))
    numbers, read = _Numbers(draft), _read(draft, calls)
    if idle := [part for part in numbers.parts if read.isdisjoint(part)]:
        for part in idle:
            draft.freeze(torch.tensor(part), "no output comes from it")
        numbers = _Numbers(draft)
    work = Counter[str]()
    for call in calls:
        work[call.weight] += call.positions
    streams = {root for labels in joined(trace, values) for root in distinct(draft.roots(labels))}
    groups = _groups(numbers, calls, streams, map_sizes(trace))
    return ChannelGraph(
        groups=tuple(groups),
        branches=branches(model, trace, groups),
        axes=tuple(numbers.axes()),
        attributes=tuple(numbers.attributes([*counts(model, trace, values, draft, calls), *literals])),
        whole=_whole(trace, draft, work),
        channels=numbers.count,
        joins=joins(trace),
        work=dict(work),
        draft=draft,
        trace=trace,
    )


def _read(draft: Draft, calls: Iterable[LayerCall]) -> set[int]:
    """Roots of the channels that a layer reads which an output comes from; not those that are for training alone."""
    layers = [call for call in calls if call.needed and not call.depthwise]
    return {root for call in layers for root in draft.roots(call.inputs).tolist()}


class _Numbers:
    """The channels that may go, numbered.

    Attributes:
        draft: what the operations demanded; channels that cannot keep their cardinality constraints are frozen in it.
        parts: roots that go together into a group, for each group.
        count: of the channels.
    """

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.parts, self._cells = removable(draft)
        self._numbers = {root: number for number, root in enumerate(root for part in self.parts for root in part)}
        self.count = len(self._numbers)

    def of(self, labels: torch.Tensor) -> Channels:
        """The channels that some labels mean; STAYS where they mean none that may go."""
        found = self.draft.roots(labels).flatten().tolist()
        return np.array([self._numbers.get(root, STAYS) for root in found], dtype=np.int64)

    def cells(self, part: Sequence[int]) -> Channels:
        """Per root of a group, the number of its cell."""
        mine: list[Cell] = [self._cells.get(root, ()) for root in part]
        numbers = {cell: number for number, cell in enumerate(dict.fromkeys(mine))}
        return np.array([numbers[cell] for cell in mine], dtype=np.int64)

    def axes(self) -> Iterator[Axis]:
        """The dimensions of parameters that hold channels."""
        for site, use in self.draft.sites.items():
            if bool(self.draft.roots(use.labels).any()):
                yield Axis(site, self.of(use.labels), use.groups, site in self.draft.producers)

    def attributes(self, found: Iterable[Count]) -> Iterator[Attribute]:
        """Those of some numbers in modules that count channels which may go."""
        for each in found:
            channels = self.of(each.labels)
            if (channels != STAYS).any():
                yield Attribute(each.module, each.name, each.index, channels)


def _groups(
    numbers: _Numbers, calls: Iterable[LayerCall], streams: set[int], sizes: Mapping[str, tuple[int, int]]
) -> list[ChannelGroup]:
    """The groups, in the order of execution.

    Args:
        numbers: of the channels.
        calls: of the layers.
        streams: roots of channels that an addition joins.
        sizes: module name of a producer → of its map.
    """
    consumers = [
        Consumer(call.weight, call.dim, call.number, numbers.of(call.inputs)) for call in calls if not call.depthwise
    ]
    draft, groups = numbers.draft, list[ChannelGroup]()
    made = [(module_name(site.parameter), draft.roots(draft.sites[site].labels).numpy()) for site in draft.producers]
    for part in numbers.parts:
        channels = numbers.of(torch.tensor(part))
        producers = tuple(name for name, roots in made if np.isin(roots, part).any())
        groups.append(
            ChannelGroup(
                producers=producers,
                channels=channels,
                cells=numbers.cells(part),
                consumers=tuple(each for each in consumers if np.isin(each.channels, channels).any()),
                shortcut=not streams.isdisjoint(part),
                map_size=sizes.get(producers[0]),
            )
        )
    return [replace(group, shortcut=True) if _is_trunk(group, groups) else group for group in groups]


def _is_trunk(group: ChannelGroup, groups: Sequence[ChannelGroup]) -> bool:
    """Whether a residual block begins here: two of the readers lead to one addition, one of them directly.

    So the stem of a ResNet-50 belongs to its residual streams, though no addition stands behind it.
    """
    home = {producer: each for each in groups for producer in each.producers}
    readers = _readers(group, home)
    return any(home[direct].shortcut and _leads_to(home[direct], readers - {direct}, group, home) for direct in readers)


def _leads_to(aim: ChannelGroup, readers: set[str], start: ChannelGroup, home: Mapping[str, ChannelGroup]) -> bool:
    """Whether the filters of some layers reach a group, other than through where they started."""
    todo, seen = [home[name] for name in readers], {start.name}
    while todo:
        each = todo.pop()
        if each is aim:
            return True
        if each.name not in seen:
            seen.add(each.name)
            todo += [home[name] for name in _readers(each, home)]
    return False


def _readers(group: ChannelGroup, home: Mapping[str, ChannelGroup]) -> set[str]:
    """The layers that read a group and have a group of their own: names of their modules."""
    return {name for consumer in group.consumers if (name := module_name(consumer.weight)) in home}


def _whole(trace: Trace, draft: Draft, work: Mapping[str, int]) -> dict[str, str]:
    """Layer that ran → why all of its filters, or some, stay."""
    whole = {}
    for site in draft.producers:
        labels = draft.sites[site].labels
        if FIXED in draft.roots(labels) and site.parameter in work:
            whole[module_name(site.parameter)] = _why_whole(draft, labels)
    for node in trace.nodes:
        if operation(node) in CONVOLUTIONS and not trace.parameter(arguments(node)["weight"]):
            whole[owner(node)] = "its weight is computed from other parameters"
    return whole


def _why_whole(draft: Draft, labels: torch.Tensor) -> str:
    reasons = Counter(reason for label in labels.tolist() if (reason := draft.reason(label)))
    reason, count = reasons.most_common(1)[0]
    return reason if count == len(labels) else f"{sum(reasons.values())} of its {len(labels)} filters: {reason}"
