"""What a group's consumers show of its channels: the parts that elimination works on, and ThiNet's Gram matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from .elimination import Part
from .graph import ChannelGroup, Consumer
from .moments import Moments
from .reconstruction import Ridge
from .wide import Wide


def parts(
    wide: Wide,
    group: ChannelGroup,
    beside: NDArray[np.int64],
    moments: Mapping[str, Moments],
    worth: Mapping[str, float],
    ridge: float,
) -> list[Part]:
    """The consumers of a group as its elimination starts, in units of what they say, which is to stay.

    Args:
        wide: the network, untouched so far.
        group: whose channels are to go.
        beside: channels of other groups that are to go too (`others`).
        moments: weight → of what the consumer reads.
        worth: weight → what a unit of its squared error counts for.
        ridge: share of the inputs' mean variance.
    """
    place = {channel: index for index, channel in enumerate(group.channels.tolist())}
    found = []
    for consumer in {each.weight: each for each in group.consumers}.values():
        reader, channels = wide.readers[consumer.weight], channels_read(wide, consumer)
        covariance = wide.centred(reader, moments[consumer.weight]).covariance
        weight = wide.coefficients(reader) * worth[consumer.weight] ** 0.5
        kernel = weight.shape[2] // channels.shape[1]
        for block in range(reader.blocks):
            mine = ~np.isin(channels[block], beside)
            stay = torch.from_numpy(np.flatnonzero(np.repeat(mine, kernel)))
            columns: dict[int, list[int]] = {}
            for index, channel in enumerate(channels[block][mine].tolist()):
                if channel in place:
                    columns.setdefault(place[channel], []).extend(range(index * kernel, (index + 1) * kernel))
            if columns:
                inverse = Ridge(covariance[block][stay][:, stay], ridge).inverse()
                found.append(_part(columns, weight[block][:, stay], inverse))
    return found


def others(groups: Sequence[ChannelGroup], group: ChannelGroup) -> NDArray[np.int64]:
    """Channels of the groups that are to go beside this one.

    Where they lie beside its own in a concatenation they cannot make up for what goes: each group would count on the
    other one, and both would go.
    """
    return np.concatenate([each.channels for each in groups if each is not group] or [group.channels[:0]])


def channels_read(wide: Wide, consumer: Consumer) -> NDArray[np.int64]:
    """Channels in the order of a consumer's coefficients, (G, …); each has the same number of these."""
    reader = wide.readers[consumer.weight]
    if span := wide.spans.get(consumer.weight):
        return consumer.channels.reshape(reader.inputs // span, -1)[:, 0][None]
    channels = consumer.channels.reshape(reader.blocks, -1)
    if reader.blocks > 1:
        return channels
    kernel = reader.inputs // channels.shape[1]
    return channels[:, (wide.reads(reader)[::kernel] // kernel).numpy()]


def _part(columns: Mapping[int, Sequence[int]], weight: torch.Tensor, inverse: torch.Tensor) -> Part:
    """A part of the columns of each channel; a channel with fewer gets some that count for nothing."""
    size = max(map(len, columns.values()))
    index = torch.tensor([[*each, *[-1] * (size - len(each))] for each in columns.values()])
    flat = index.flatten()
    mine, blank = inverse[flat][:, flat], flat < 0
    if bool(blank.any()):
        mine[blank] = 0
        mine[:, blank] = 0
        mine[blank, blank] = 1
    filters = weight[:, flat].masked_fill(blank, 0)
    return Part(torch.tensor(list(columns)), filters.reshape(len(weight), *index.shape), mine)


def exact_gram(wide: Wide, group: ChannelGroup, moments: Mapping[str, Moments]) -> NDArray[np.float64]:
    """ThiNet's Gram matrix without drawing filters: the sum over all of them, averaged over positions.

    G_cd = Σ_kl E[p_ck p_dl] (WᵀW)_ck,dl, summed over the consumers (one that runs twice counts twice); what the papers
    sample rows of.
    """
    gram = np.zeros((len(group.channels), len(group.channels)))
    where = {channel: index for index, channel in enumerate(group.channels.tolist())}
    runs = Counter(each.weight for each in group.consumers)
    for consumer in {each.weight: each for each in group.consumers}.values():
        reader, mine = wide.readers[consumer.weight], moments[consumer.weight]
        by_channel, channels = consumer.weight in wide.spans, channels_read(wide, consumer)
        weight = wide.coefficients(reader) if by_channel else wide.weight(reader)[:, :, wide.reads(reader)]
        kernel = weight.shape[2] // channels.shape[1]
        for block in range(reader.blocks):
            products = runs[consumer.weight] * mine.squares[block] / mine.count * (weight[block].T @ weight[block])
            inputs = channels.shape[1]
            sums = products.view(inputs, kernel, inputs, kernel).sum((1, 3)).numpy()
            place = np.array([where.get(channel, -1) for channel in channels[block].tolist()])
            mask = place >= 0  # others are of groups beside this one, in a concatenation, or stay whatever goes
            np.add.at(gram, np.ix_(place[mask], place[mask]), sums[np.ix_(mask, mask)])
    return gram
