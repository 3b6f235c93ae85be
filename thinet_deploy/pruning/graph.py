"""Channel groups: which filters go together, what goes with them, and why others stay.

The answer comes from labels that run through the network's ATen graph (`labels`, `rules`): channels whose labels
were united go together; channels of one producer, or tied by a cardinality constraint, form a group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .labels import Draft, Site
from .trace import Trace

# In index arrays: an index that stays whatever is chosen.
STAYS = -1
Channels = NDArray[np.int64]


@dataclass(frozen=True)
class Axis:
    """A dimension of a parameter or buffer whose indices go with channels.

    Attributes:
        site: parameter and dimension.
        channels: per index, the channel it goes with, or STAYS.
        groups: of a grouped convolution, whose inputs are counted over all groups; else 1.
        producer: whether the indices are filters.
    """

    site: Site
    channels: Channels
    groups: int
    producer: bool


@dataclass(frozen=True)
class Attribute:
    """A number in a module that counts channels.

    Attributes:
        module: its name.
        name: of the attribute.
        index: in a list or tuple; None for a plain number.
        channels: that it counts.
    """

    module: str
    name: str
    index: int | None
    channels: Channels


@dataclass(frozen=True)
class Consumer:
    """A call of a convolution or linear layer that reads channels.

    Attributes:
        weight: name of its weight.
        dim: of the weight that counts inputs.
        call: 0 for the first time that this weight is used, 1 for the second …
        channels: per input of the weight (over all groups), the channel, or STAYS.
    """

    weight: str
    dim: int
    call: int
    channels: Channels

    @property
    def spread(self) -> int:
        """Inputs per channel: 1 for most, 49 for a linear layer after a flattened 7×7 map."""
        free = self.channels[self.channels != STAYS]
        return len(free) // len(np.unique(free)) if len(free) else 1


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are chosen together, because they share producers or a cardinality constraint.

    Attributes:
        producers: weights' owners, in the order of execution; the first one names the group.
        channels: their numbers.
        cells: per channel, the cell it is in: every cell keeps the same share.
        consumers: who reads them.
        shortcut: whether an addition joins several producers (a residual stream).
        map_size: height and width of the first producer's output, in pixels; None for a linear layer.
    """

    producers: tuple[str, ...]
    channels: Channels
    cells: Channels
    consumers: tuple[Consumer, ...]
    shortcut: bool
    map_size: tuple[int, int] | None

    @property
    def name(self) -> str:
        """Of the first producer."""
        return self.producers[0]

    @property
    def steps(self) -> int:
        """How many different widths above zero are possible: the greatest common divisor of the cells' sizes."""
        return math.gcd(*np.bincount(self.cells).tolist())

    def width(self, step: int) -> int:
        """Channels kept at `step` of `steps`."""
        return len(self.channels) * step // self.steps


@dataclass(frozen=True)
class Branch:
    """A residual branch that can vanish: what it adds becomes a constant, its mean.

    Attributes:
        end: module of its last convolution, which says the constant then.
        norm: of the BatchNorm behind that; "" without one.
        inside: of the layers before it, which nothing else needs.
        groups: names of the channel groups inside; the last one is what the last convolution reads.
    """

    end: str
    norm: str
    inside: tuple[str, ...]
    groups: tuple[str, ...]


@dataclass(frozen=True)
class ChannelGraph:
    """All channel groups of a network, in the order of execution, and what stays whole.

    Attributes:
        groups: front to back.
        branches: residual branches that can vanish.
        axes: what goes with the channels.
        attributes: numbers that count channels.
        whole: module name of a producer, or of the module that runs it → why its filters stay.
        channels: how many channels there are in all groups; they are numbered from 0.
        joins: whether branches meet anywhere (residual, concatenation): such a network is not plain.
        work: name of a convolution's or linear layer's weight → output positions of all its calls for one input.
        draft: the labels behind all this.
        trace: of the network.
    """

    groups: tuple[ChannelGroup, ...]
    branches: tuple[Branch, ...]
    axes: tuple[Axis, ...]
    attributes: tuple[Attribute, ...]
    whole: dict[str, str]
    channels: int
    joins: bool
    work: dict[str, int]
    draft: Draft
    trace: Trace

    def group(self, producer: str) -> ChannelGroup:
        """The group of a producer, by module name."""
        return next(group for group in self.groups if producer in group.producers)

    def vanished(self, kept: NDArray[np.bool_]) -> tuple[Branch, ...]:
        """The branches of which nothing stays."""
        left = {group.name for group in self.groups if kept[group.channels].any()}
        return tuple(branch for branch in self.branches if left.isdisjoint(branch.groups))

    def leaves_filters(self, kept: NDArray[np.bool_]) -> bool:
        """Whether every layer still has filters and inputs, but for branches that vanish as a whole."""
        stays, gone = np.append(kept, True), self.vanished(kept)
        inside = {module for branch in gone for module in branch.inside}
        ends = {Site(f"{branch.end}.weight", 1) for branch in gone}
        axes = (axis for axis in self.axes if axis.site not in ends and axis.site.module not in inside)
        return all(bool(stays[axis.channels].any()) for axis in axes)
