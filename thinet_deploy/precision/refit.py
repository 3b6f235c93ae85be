"""The reconstruction once more, in INT8: every layer's weights are refitted while they are rounded, front to back.

A layer's targets are what it says in the float32 network; its inputs are what the layers before it say in INT8, already
refitted. So each layer makes up for its own rounding and for all that went wrong before it: see pruning/rounding.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto
from torch import Tensor
from torch.nn import functional as F

from ..interfaces import Progress, silent
from ..pruning import rounding
from ..pruning.geometry import Geometry, as_convolution, map_size
from ..pruning.moments import Centred, at_positions, centred, patches, positions
from ..pruning.sums import Sums
from .calibration import Batches, Floats
from .graph import constants, layer_name, shapes
from .int8 import quantisable, quantise
from .walk import Array, Walk
from .weights import Consumer, Layout, Rounded, activation_scale, rounded

Limits = Mapping[str, tuple[float, float]]
# Matrices of more inputs take gigabytes: such layers, those behind a flattened map, are rounded to the nearest.
_MOST_INPUTS = 8192
# Positions that are sampled in each image: at least so many, and one for so many inputs of the layer.
_POSITIONS, _INPUTS_PER_POSITION = 64, 16
# One image in so many tells only whether the refitted weights are better than the nearest ones.
_CHECKED = 4
# Bytes that both networks may keep between two layers, and about how many tensors these are.
_BETWEEN, _TENSORS, _FEWEST_IMAGES = 1 << 30, 4, 32


@dataclass(frozen=True)
class Refit:
    """Weights on the grid, for `quantise`.

    Attributes:
        weights: node → its refitted weights; without those that say no more than the nearest ones.
        error: node → share that is left of the error of its outputs, against rounding to the nearest.
    """

    weights: Mapping[str, Rounded]
    error: Mapping[str, float]


def refit(
    model: ModelProto,
    limits: Limits,
    layout: Layout,
    batches: Batches,
    *,
    keep: Collection[str] = (),
    progress: Progress = silent,
) -> Refit:
    """Refit the weights of a network to what they read in INT8.

    Args:
        model: in float32, with named nodes.
        limits: of its tensors.
        layout: of the Q/DQ pairs.
        batches: calibration images.
        keep: nodes that stay in float32.
        progress: to report to.
    """
    stored, weights, error = constants(model), dict[str, Rounded](), dict[str, float]()
    chosen = set(quantisable(model)) - set(keep)
    nodes = [node for node in model.graph.node if node.name in chosen and _fits(node, stored)]
    images = _enough(model, batches)
    exact, short = Walk(model, images), Walk(model, images)
    for index, node in enumerate(nodes):
        progress("Refitting to INT8", index, len(nodes), layer_name(node, stored))
        said = exact.to(model, node.output[0])
        read = short.to(quantise(model, limits, layout, keep=keep, weights=weights), f"{node.input[0]}:back")
        taken = activation_scale(limits[node.input[0]], layout)[0]
        layer = _Layer(node, Consumer.of(node, node.input, stored), taken, layout)
        found, error[node.name] = layer.refitted(*layer.moments(read, said))
        if error[node.name] < 1:
            weights[node.name] = found
    progress("Refitting to INT8", len(nodes), len(nodes))
    return Refit(weights, error)


def _enough(model: ModelProto, batches: Batches) -> list[Floats]:
    """As many images as there is room for between two layers, but `_FEWEST_IMAGES`."""
    stored = {each.name for each in model.graph.initializer}
    largest = 4 * max(prod(shape) for name, shape in shapes(model).items() if name not in stored)
    most, taken = max(_FEWEST_IMAGES, _BETWEEN // (_TENSORS * largest)), list[Floats]()
    for batch in batches():
        taken.append(batch)
        if sum(map(len, taken)) >= most:
            break
    return taken


def _fits(node: NodeProto, stored: Mapping[str, NDArray[np.generic]]) -> bool:
    """Whether a node is a layer whose moments can be had: a convolution of maps, or a linear layer."""
    if node.op_type == "Add" or (len(node.input) > 2 and node.input[2] not in stored):
        return False
    weight = stored[node.input[1]]
    if node.op_type == "Conv":
        return weight.ndim == 4 and weight[0].size <= _MOST_INPUTS
    plain = all(each.name == "transB" or each.f == 1 for each in node.attribute if each.name != "transA" or each.i)
    return weight.ndim == 2 and plain and min(weight.size // each for each in weight.shape) <= _MOST_INPUTS


@dataclass(frozen=True)
class _Layer:
    """A layer on its way to INT8, and the step of its input."""

    node: NodeProto
    consumer: Consumer
    taken: float
    layout: Layout

    def moments(self, read: Sequence[Array], said: Sequence[Array]) -> tuple[_Found, _Found]:
        """Of what it reads in INT8, with what it says in float32 as targets: on most images, and on the others."""
        blocks, filters, inputs = self.consumer.weight_god.shape
        seen = [_Seen(Sums(blocks, inputs, filters), torch.zeros(blocks * filters).double()) for _ in range(2)]
        most = max(_POSITIONS, inputs // _INPUTS_PER_POSITION)
        for number, batch in enumerate(zip(read, said, strict=True)):
            maps, outputs = (torch.from_numpy(each) for each in batch)
            geometry, maps = self._as_convolution(maps)
            places = [positions(map_size(geometry, maps), most, self.node.name, number, i) for i in range(len(maps))]
            rows, targets = patches(geometry, maps, places), at_positions(outputs, places, linear=self._linear)
            checks = (torch.arange(len(places)) % _CHECKED == 0).repeat_interleave(len(places[0]))
            for each, part in zip(seen, (~checks, checks), strict=True):
                each.add(rows[part], targets[part])
        fit, check = (each.done(intercept=self._shifts) for each in seen)
        return fit, check

    @property
    def _linear(self) -> bool:
        return self.node.op_type != "Conv"

    @property
    def _shifts(self) -> bool:
        """Whether it has a place for a bias."""
        return self.node.op_type != "MatMul"

    def _as_convolution(self, maps: Tensor) -> tuple[Geometry, Tensor]:
        weight = self.consumer.plain_weight
        if self._linear:
            return as_convolution({"input": maps, "weight": weight.flatten(1)})
        top, left, bottom, right = _numbers(self.node, "pads", (0, 0, 0, 0))
        stride, dilation = (_numbers(self.node, name, (1, 1)) for name in ("strides", "dilations"))
        geometry = Geometry(weight, (stride[0], stride[1]), (dilation[0], dilation[1]), len(self.consumer.weight_god))
        return geometry, F.pad(maps, (left, right, top, bottom))

    def refitted(self, fit: _Found, check: _Found) -> tuple[Rounded, float]:
        """Its weights, and what they leave of the error that the nearest ones make on the images of `check`."""
        weight, shift = self.consumer.weight_god, self.consumer.shift_go
        nearest = rounded(self.consumer, weight, shift, self.taken, self.layout)
        new = rounding.refitted(weight, fit.moments)
        first = rounded(self.consumer, new, shift, self.taken, self.layout, fit.moments.covariance)
        bias = rounding.corrected_shift(self.consumer.blocks(first)[0], fit.moments).flatten().float().numpy()
        own = replace(first, bias=bias if self._shifts else None)
        before, after = (
            rounding.output_error(*self.consumer.blocks(each), check.moments, check.variance) for each in (nearest, own)
        )
        return own, after / before if before > 0 else 1.0


@dataclass(frozen=True)
class _Found:
    """Moments of what a layer reads and should say, and the variance of the latter, (G, O)."""

    moments: Centred
    variance: Tensor


@dataclass
class _Seen:
    """Sums over rows of what a layer reads and should say, and over the squares of the latter."""

    sums: Sums
    squares: Tensor

    def add(self, rows: Tensor, targets: Tensor) -> None:
        self.sums.add(rows, targets)
        self.squares += targets.double().square().sum(0)

    def done(self, *, intercept: bool) -> _Found:
        moments = self.sums.moments()
        found = centred(moments, intercept=intercept)
        return _Found(found, self.squares.view_as(found.target) / max(moments.count, 1) - found.target.square())


def _numbers(node: NodeProto, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    return next((tuple(each.ints) for each in node.attribute if each.name == name), default)
