"""A network of full width in which consumers ignore what goes, and whose layers are repaired one by one.

Nothing is sliced before the end: shapes stay, so one trace serves for the whole work.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from .by_channel import ChannelSums, centred_by_channel, saying_by_channel
from .geometry import Geometry, as_convolution, layer_weight, plain_weight
from .graph import ChannelGraph, ChannelGroup
from .moments import Centred, Moments, centred
from .readers import Norm, Reader, Use, readers
from .reconstruction import Solve
from .replay import Replay, Values
from .sums import Gathering, Sums, product
from .trace import named_tensors, shape

# Wider layers (a linear layer behind a large flattened map) get one factor per channel: see `by_channel`.
MOST_INPUTS = 8192


@dataclass
class Wide:
    """The network, and what of its layers' inputs counts.

    Attributes:
        model: a copy of the original; its tensors are changed in place.
        replay: of it.
        readers: weight → layer, in the order of execution; those that cannot be refitted are left out.
        spans: weight of a layer that is refitted by channel → inputs that one channel has.
        tensors: of the model, by name.
        kept: weight → which inputs count, (G, D); the others' weights are zero.
        silent: weights of layers of whose inputs none counts any more: they say their mean.
    """

    model: nn.Module
    replay: Replay
    readers: dict[str, Reader]
    spans: dict[str, int]
    tensors: dict[str, torch.Tensor]
    kept: dict[str, torch.Tensor]
    silent: set[str] = field(default_factory=set)

    @staticmethod
    def of(
        original: nn.Module,
        graph: ChannelGraph,
        input_shape: tuple[int, ...],
        batch: int,
        *,
        residual: bool = True,
    ) -> Wide:
        """A copy of a network for batches of one size; `residual` as for `readers`."""
        model = copy.deepcopy(original).eval()
        replay = Replay(model, input_shape, batch)
        spans, reach = _spans(graph), within_reach(graph)
        found = {each.weight: each for each in readers(replay.trace, residual=residual) if each.weight in reach}
        kept = {name: torch.ones(each.blocks, each.inputs, dtype=torch.bool) for name, each in found.items()}
        return Wide(model, replay, found, spans, dict(named_tensors(model)), kept)

    def layer(self, reader: Reader, use: Use, values: Values) -> tuple[Geometry, torch.Tensor]:
        """A call as a plain convolution, and its padded inputs; without those that do not count, of a plain layer."""
        given = {
            name: self.replay.value(each, values) if isinstance(each, fx.Node) else each
            for name, each in use.given.items()
        }
        layer, inputs = as_convolution(given)
        if reader.blocks == 1 and reader.weight not in self.spans:
            counting = self.kept[reader.weight].view(inputs.shape[1], -1)[:, 0]
            inputs = inputs if bool(counting.all()) else inputs[:, counting]
        return layer, inputs

    def weight(self, reader: Reader) -> torch.Tensor:
        """As of a plain convolution, (G, O, D), in float64."""
        return self._plain(reader).double()

    def _plain(self, reader: Reader) -> torch.Tensor:
        plain = plain_weight(self.tensors[reader.weight], transposed=reader.transposed, groups=reader.blocks)
        return plain.reshape(reader.blocks, -1, reader.inputs)

    def _by_channel(self, reader: Reader) -> torch.Tensor:
        """The weight of a layer that is refitted by channel, (C, s, O), in units of `unit`, in float32."""
        plain = self._plain(reader)[0]
        if reader.norm:
            plain = plain * self.unit(reader)[0].float()
        return plain.view(len(plain), -1, self.spans[reader.weight]).permute(1, 2, 0)

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
        """A layer's outputs for patches of what it `reads`, (n, filters), behind its BatchNorm, in float32."""
        weight = self.coefficients(reader).float()
        said = [product(patches_ngd[:, block], each) for block, each in enumerate(weight)]
        return torch.cat(said, 1) + self.shift(reader).float()

    def gathering(self, reader: Reader, *, targets: bool = True, keep: bool = False) -> Gathering:
        """What takes the rows of a layer; see `Sums`."""
        if reader.weight in self.spans:
            return ChannelSums(self._by_channel(reader))
        return Sums(reader.blocks, len(self.reads(reader)), reader.filters // reader.blocks * targets, keep=keep)

    def own(self, reader: Reader, moments: Moments) -> Moments:
        """The same rows with what the layer says itself as targets."""
        shift = self.shift(reader).reshape(reader.blocks, -1)
        if reader.weight in self.spans:
            return saying_by_channel(moments, self._by_channel(reader), shift)
        return moments.saying(self.weight(reader) * self.unit(reader), shift)

    def among(self, reader: Reader, moments: Moments) -> Moments:
        """Moments of the inputs that it `reads`, from those of all."""
        return moments if reader.weight in self.spans else moments.among(self.reads(reader))

    def centred(self, reader: Reader, moments: Moments) -> Centred:
        """Statistics of its regression, with an intercept if it has a bias or BatchNorm to put it in."""
        intercept = bool(reader.norm or reader.bias)
        if reader.weight in self.spans:
            return centred_by_channel(moments, self._by_channel(reader), intercept=intercept)
        return centred(moments, intercept=intercept)

    def reads(self, reader: Reader) -> torch.Tensor:
        """Indices of the inputs that its moments are of: of a plain layer, those that count."""
        if reader.blocks > 1 or reader.weight in self.spans:
            return torch.arange(reader.inputs)
        return torch.nonzero(self.kept[reader.weight][0])[:, 0]

    def coefficients(self, reader: Reader) -> torch.Tensor:
        """What its regression finds, as it stands, (G, O, I): weights in units of `unit`, or a factor per channel."""
        if span := self.spans.get(reader.weight):
            return torch.ones(1, 1, reader.inputs // span, dtype=torch.float64)
        return self.weight(reader)[:, :, self.reads(reader)] * self.unit(reader)

    def counting(self, reader: Reader) -> torch.Tensor:
        """Which coefficients count, (G, I)."""
        span = self.spans.get(reader.weight)
        return self.kept[reader.weight][:, ::span] if span else self.kept[reader.weight][:, self.reads(reader)]

    def remove(self, group: ChannelGroup, gone: NDArray[np.int64]) -> None:
        """Let all consumers of a group ignore some of its channels (indices into the group's)."""
        for consumer in group.consumers:
            reader = self.readers[consumer.weight]
            ignored = torch.from_numpy(np.isin(consumer.channels, group.channels[gone])).reshape(reader.blocks, -1)
            kept = self.kept[consumer.weight]
            kept &= ~ignored.repeat_interleave(reader.inputs // ignored.shape[1], 1)
            self._multiply(reader, kept)
            if not kept.any():
                self.silent.add(reader.weight)
                kept[:] = True  # so that statistics have a shape; a weight of zero makes nothing of them
                continue
            if reader.blocks == 1 and not reader.linear and not reader.transposed:
                channels = torch.nonzero(kept.view(ignored.shape[1], -1).any(1))[:, 0]
                self.replay.read.update({self.replay.trace.nodes[use.at]: channels for use in reader.uses})

    @contextmanager
    def restoring(self, changed: Sequence[Reader]) -> Iterator[None]:
        """Whatever is removed from these layers, and refitted in them, is put back afterwards."""
        names = {name for each in changed for name in (each.weight, each.bias, *_names(each.norm)) if name}
        tensors = {name: self.tensors[name].detach().clone() for name in names}
        kept = {each.weight: self.kept[each.weight].clone() for each in changed}
        read, quiet = dict(self.replay.read), set(self.silent)
        try:
            yield
        finally:
            for name, tensor in tensors.items():
                self._set(name, tensor)
            self.kept.update(kept)
            self.replay.read, self.silent = read, quiet

    def refit(self, reader: Reader, stats: Centred, solver: Solve) -> None:
        """Least squares for a layer together with the BatchNorm behind it, or its bias.

        The BatchNorm is left trainable, with the statistics that its inputs now have and filters of their old norm
        (folded to mean 0 and variance 1 it would be the same function, and fine-tune worse).
        """
        if reader.weight in self.silent:
            self._recentre(reader, stats)
            return
        found = solver(stats.cross, self.coefficients(reader))
        if span := self.spans.get(reader.weight):
            self._multiply(reader, found[0].repeat_interleave(span, 1))
        elif reader.norm:
            self._set_with_norm(reader, reader.norm, stats, found)
        else:
            self._set_weight(reader, found)
        self._recentre(reader, stats)

    def _recentre(self, reader: Reader, stats: Centred) -> None:
        """Let a layer say the mean of its targets to the mean of its inputs."""
        plain = self._plain(reader)[:, :, self.reads(reader)]
        said = (plain @ stats.mean[..., None].to(plain.dtype))[..., 0].double()
        if reader.norm:
            bias = self.tensors[reader.bias].detach().double().reshape(said.shape) if reader.bias else 0.0
            self._set(reader.norm.mean, said + bias)
            self._set(reader.norm.bias, stats.target)
        elif reader.bias:
            self._set(reader.bias, stats.target - said)

    def _set_with_norm(self, reader: Reader, norm: Norm, stats: Centred, new: torch.Tensor) -> None:
        before, kept = self.weight(reader)[:, :, self.reads(reader)], self.counting(reader)
        sizes, old = new.norm(dim=2, keepdim=True), before.norm(dim=2, keepdim=True)
        dead = (sizes < torch.finfo(torch.float32).tiny) | (old == 0)  # such a filter says nothing but its mean
        scale = torch.where(dead, 1.0, old / sizes)
        weight = torch.where(dead, before * kept[:, None], new * scale)
        var = ((weight @ stats.covariance) * weight).sum(2).clamp_min(0)
        gamma = torch.where(dead[..., 0], 0.0, (var + norm.eps).sqrt() / scale[..., 0])
        self._set_weight(reader, weight)
        self._set(norm.var, var)
        self._set(norm.weight, gamma)

    def scale(self, group: ChannelGroup, factors: NDArray[np.float64]) -> None:
        """Multiply the consumers' weights by one scalar per channel of a group (the papers' ŵ)."""
        by_channel = dict(zip(group.channels.tolist(), factors.tolist(), strict=True))
        for consumer in {each.weight: each for each in group.consumers}.values():
            reader = self.readers[consumer.weight]
            mine = [by_channel.get(channel, 1.0) for channel in consumer.channels.tolist()]
            shaped = torch.tensor(mine, dtype=torch.float64).reshape(reader.blocks, -1)
            self._multiply(reader, shaped.repeat_interleave(reader.inputs // shaped.shape[1], 1))

    def _multiply(self, reader: Reader, by_input_gd: torch.Tensor) -> None:
        """In the weight's own type: in float64 the largest would take a gigabyte."""
        plain = self._plain(reader)
        self._set_weight(reader, plain * by_input_gd[:, None].to(plain.dtype))

    def _set_weight(self, reader: Reader, weight: torch.Tensor) -> None:
        """Of all inputs or of those that it `reads`; the others' become zero."""
        if weight.shape[2] < reader.inputs:
            index = self.reads(reader)
            weight = weight.new_zeros(*weight.shape[:2], reader.inputs).index_copy(2, index, weight)
        matrix, like = weight.reshape(reader.filters, reader.inputs), self.tensors[reader.weight].shape
        self._set(reader.weight, layer_weight(matrix, like, transposed=reader.transposed, groups=reader.blocks))

    def _set(self, name: str, value: torch.Tensor) -> None:
        with torch.no_grad():
            self.tensors[name].copy_(value.reshape(self.tensors[name].shape))


def _names(norm: Norm | None) -> tuple[str, ...]:
    return (norm.weight, norm.bias, norm.mean, norm.var) if norm else ()


def within_reach(graph: ChannelGraph) -> frozenset[str]:
    """Weights of the layers that can be judged and refitted.

    Neither 3-D convolutions nor what has something else than images in its first dimension, as attention or windows of
    a map may have.
    """
    found, batch = readers(graph.trace), {shape(node)[0] for node in graph.trace.images}
    narrow = {each.weight for each in found if each.inputs <= MOST_INPUTS}
    astray = {each.weight for each in found if not {shape(use.inputs)[0] for use in each.uses} <= batch}
    return frozenset((narrow | _spans(graph).keys()) - astray)


def _spans(graph: ChannelGraph) -> dict[str, int]:
    """Of the layers that are refitted by channel: their inputs lie channel by channel, and are as many of each."""
    wide = {each.weight: each for each in readers(graph.trace) if each.inputs > MOST_INPUTS and each.blocks == 1}
    spans = {}
    for consumer in (each for group in graph.groups for each in group.consumers if each.weight in wide):
        channels, inputs = len(consumer.channels) // consumer.spread, wide[consumer.weight].inputs
        together = len(consumer.channels) % consumer.spread == 0 and np.all(
            consumer.channels.reshape(channels, -1) == consumer.channels[:: consumer.spread, None]
        )
        if together and channels <= MOST_INPUTS:
            spans[consumer.weight] = inputs // channels
    return spans
