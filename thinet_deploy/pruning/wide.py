"""A network of full width in which consumers ignore what goes, and whose layers are repaired one by one.

Nothing is sliced before the end: shapes stay, so one trace serves for the whole work.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from .elimination import Part
from .geometry import Geometry, as_convolution, layer_weight, plain_weight
from .graph import ChannelGraph, ChannelGroup
from .moments import Centred, Moments, centred
from .readers import Reader, Use, readers
from .reconstruction import inverted, refit
from .replay import Replay, Values
from .trace import named_tensors

# Wider layers (a linear layer behind a large flattened map) are left as they are: their moments would take gigabytes.
MOST_INPUTS = 8192


@dataclass
class Wide:
    """The network, and what of its layers' inputs counts.

    Attributes:
        model: a copy of the original; its tensors are changed in place.
        replay: of it.
        readers: weight → layer, in the order of execution; those with too many inputs are left out.
        tensors: of the model, by name.
        kept: weight → which inputs count, (G, D); the others' weights are zero.
    """

    model: nn.Module
    replay: Replay
    readers: dict[str, Reader]
    tensors: dict[str, torch.Tensor]
    kept: dict[str, torch.Tensor]

    @staticmethod
    def of(original: nn.Module, input_shape: tuple[int, ...], batch: int, *, residual: bool = True) -> Wide:
        """A copy of a network for batches of one size; `residual` as for `readers`."""
        model = copy.deepcopy(original).eval()
        replay = Replay(model, input_shape, batch)
        found = {each.weight: each for each in readers(replay.trace, residual=residual) if each.inputs <= MOST_INPUTS}
        kept = {name: torch.ones(each.blocks, each.inputs, dtype=torch.bool) for name, each in found.items()}
        return Wide(model, replay, found, dict(named_tensors(model)), kept)

    def layer(self, use: Use, values: Values) -> tuple[Geometry, torch.Tensor]:
        """A call as a plain convolution, and its padded inputs."""
        given = {
            name: self.replay.value(each, values) if isinstance(each, fx.Node) else each
            for name, each in use.given.items()
        }
        return as_convolution(given)

    def weight(self, reader: Reader) -> torch.Tensor:
        """As of a plain convolution, (G, O, D), in float64."""
        plain = plain_weight(self.tensors[reader.weight], transposed=reader.transposed, groups=reader.blocks)
        return plain.reshape(reader.blocks, -1, reader.inputs)

    def unit(self, reader: Reader) -> torch.Tensor:
        """What a filter's output counts for behind its BatchNorm, (G, O, 1): γ/√(var + ε); 1 without one."""
        if not reader.norm:
            return torch.ones(reader.blocks, reader.filters // reader.blocks, 1, dtype=torch.float64)
        gamma, var = (self.tensors[name].detach().double() for name in (reader.norm.weight, reader.norm.var))
        return (gamma / (var + reader.norm.eps).sqrt()).reshape(reader.blocks, -1, 1)

    def shift(self, reader: Reader) -> torch.Tensor:
        """What a filter says to inputs that are all zero, in the same unit, (G · O,): with β and its bias."""
        bias = self.tensors[reader.bias].detach().double() if reader.bias else torch.zeros(reader.filters).double()
        if not reader.norm:
            return bias
        mean, beta = (self.tensors[name].detach().double() for name in (reader.norm.mean, reader.norm.bias))
        return beta + self.unit(reader).flatten() * (bias - mean)

    def say(self, reader: Reader, patches_ngd: torch.Tensor) -> torch.Tensor:
        """A layer's outputs for patches, (n, filters), behind its BatchNorm."""
        weight = self.weight(reader) * self.unit(reader)
        return torch.einsum("ngd,god->ngo", patches_ngd, weight).flatten(1) + self.shift(reader)

    def remove(self, group: ChannelGroup, gone: NDArray[np.int64]) -> None:
        """Let all consumers of a group ignore some of its channels (indices into the group's)."""
        for consumer in group.consumers:
            reader = self.readers[consumer.weight]
            ignored = torch.from_numpy(np.isin(consumer.channels, group.channels[gone])).reshape(reader.blocks, -1)
            kept = self.kept[consumer.weight]
            kept &= ~ignored.repeat_interleave(reader.inputs // ignored.shape[1], 1)
            self._set_weight(reader, self.weight(reader) * kept[:, None])

    def refit(self, reader: Reader, moments: Moments, ridge: float) -> None:
        """Least squares for a layer together with the BatchNorm behind it, or its bias.

        The BatchNorm is left trainable, with the statistics that its inputs now have and filters of their old norm
        (folded to mean 0 and variance 1 it would be the same function, and fine-tune worse).
        """
        norm, stats = reader.norm, centred(moments, intercept=bool(reader.norm or reader.bias))
        before, kept = self.weight(reader), self.kept[reader.weight]
        new = refit(stats, before * self.unit(reader), kept, ridge)
        if not norm:
            self._set_weight(reader, new)
            if reader.bias:
                self._set(reader.bias, stats.target - (new @ stats.mean[..., None])[..., 0])
            return
        sizes, old = new.norm(dim=2, keepdim=True), before.norm(dim=2, keepdim=True)
        dead = (sizes < torch.finfo(torch.float32).tiny) | (old == 0)  # such a filter says nothing but its mean
        scale = torch.where(dead, 1.0, old / sizes)
        weight = torch.where(dead, before * kept[:, None], new * scale)
        self._set_weight(reader, weight)
        mean = (weight @ stats.mean[..., None])[..., 0]
        if reader.bias:
            mean = mean + self.tensors[reader.bias].detach().double().reshape(mean.shape)
        var = torch.einsum("god,gde,goe->go", weight, stats.covariance, weight).clamp_min(0)
        gamma = torch.where(dead[..., 0], 0.0, (var + norm.eps).sqrt() / scale[..., 0])
        for name, value in {norm.mean: mean, norm.var: var, norm.weight: gamma, norm.bias: stats.target}.items():
            self._set(name, value)

    def scale(self, group: ChannelGroup, factors: NDArray[np.float64]) -> None:
        """Multiply the consumers' weights by one scalar per channel of a group (the papers' ŵ)."""
        table = np.ones(int(group.channels.max()) + 2)
        table[group.channels] = factors
        for consumer in {each.weight: each for each in group.consumers}.values():
            reader = self.readers[consumer.weight]
            mine = np.where(np.isin(consumer.channels, group.channels), table[consumer.channels], 1.0)
            shaped = torch.from_numpy(mine).reshape(reader.blocks, -1)
            by_input = shaped.repeat_interleave(reader.inputs // shaped.shape[1], 1)
            self._set_weight(reader, self.weight(reader) * by_input[:, None])

    def _set_weight(self, reader: Reader, weight: torch.Tensor) -> None:
        matrix, like = weight.reshape(reader.filters, reader.inputs), self.tensors[reader.weight].shape
        self._set(reader.weight, layer_weight(matrix, like, transposed=reader.transposed, groups=reader.blocks))

    def _set(self, name: str, value: torch.Tensor) -> None:
        with torch.no_grad():
            self.tensors[name].copy_(value.reshape(self.tensors[name].shape))


def within_reach(graph: ChannelGraph) -> frozenset[str]:
    """Weights of the layers that can be judged and refitted; a 3-D convolution is none."""
    return frozenset(each.weight for each in readers(graph.trace) if each.inputs <= MOST_INPUTS)


def parts(
    wide: Wide, group: ChannelGroup, stats: Mapping[str, Centred], worth: Mapping[str, float], ridge: float
) -> list[Part]:
    """The consumers of a group as its elimination starts: refitted for the targets in use, in units of these.

    Args:
        wide: the network.
        group: whose channels are to go.
        stats: weight → statistics of the consumer.
        worth: weight → what a unit of its squared error counts for.
        ridge: see `reconstruction.refit`.
    """
    place = {channel: index for index, channel in enumerate(group.channels.tolist())}
    found = []
    for consumer in {each.weight: each for each in group.consumers}.values():
        reader, mine = wide.readers[consumer.weight], stats[consumer.weight]
        prior = wide.weight(reader) * wide.unit(reader)
        channels = consumer.channels.reshape(reader.blocks, -1)
        kernel = reader.inputs // channels.shape[1]
        for block in range(reader.blocks):
            kept = torch.nonzero(wide.kept[consumer.weight][block])[:, 0]
            inverse = inverted(mine.covariance[block][kept][:, kept], ridge)
            weight = (mine.cross[block][:, kept] + inverse.penalty * prior[block][:, kept]) @ inverse.matrix
            where = {column: index for index, column in enumerate(kept.tolist())}
            columns: dict[int, list[int]] = {}
            for index, channel in enumerate(channels[block].tolist()):
                if channel in place and index * kernel in where:
                    span = range(index * kernel, (index + 1) * kernel)
                    columns.setdefault(place[channel], []).extend(where[column] for column in span)
            if columns:
                found.append(_part(columns, weight * worth[consumer.weight] ** 0.5, inverse.matrix))
    return found


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

    G_cd = Σ_kl E[p_ck p_dl] (WᵀW)_ck,dl, summed over the consumers; what the papers sample rows of.
    """
    gram = np.zeros((len(group.channels), len(group.channels)))
    where = np.full(int(group.channels.max()) + 2, -1)
    where[group.channels] = np.arange(len(group.channels))
    for consumer in {each.weight: each for each in group.consumers}.values():
        reader, mine = wide.readers[consumer.weight], moments[consumer.weight]
        weight, channels = wide.weight(reader), consumer.channels.reshape(reader.blocks, -1)
        kernel = reader.inputs // channels.shape[1]
        for block in range(reader.blocks):
            products = mine.squares[block] / mine.count * (weight[block].T @ weight[block])
            inputs = channels.shape[1]
            sums = products.view(inputs, kernel, inputs, kernel).sum((1, 3)).numpy()
            place = np.where(np.isin(channels[block], group.channels), where[channels[block]], -1)
            mask = place >= 0
            np.add.at(gram, np.ix_(place[mask], place[mask]), sums[np.ix_(mask, mask)])
    return gram
