"""The weights of a layer in whole steps, and the steps of activations: what a Q/DQ layout asks of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import NodeProto
from torch import Tensor

from ..pruning import rounding
from .graph import attribute

Floats = NDArray[np.float32]
# A bias is an int32 in steps of input scale × weight scale; this keeps it far from the end of the range.
_BIAS_MOST = 2.0**30


@dataclass(frozen=True)
class Layout:
    """How a runtime wants its Q/DQ pairs.

    Attributes:
        name: activations first: U8S8 has unsigned activations and signed weights.
        unsigned: whether activations are unsigned, with a zero point; else symmetric around 0.
        bias: whether biases are quantised too.
        outputs: whether the outputs of layers are quantised, not only what layers read.
        weight_most: largest magnitude of a weight.
    """

    name: str
    unsigned: bool
    bias: bool
    outputs: bool
    weight_most: int = 127


S8S8 = Layout("S8S8", unsigned=False, bias=False, outputs=False)
U8S8 = Layout("U8S8", unsigned=True, bias=True, outputs=True)
# Without VNNI, pairs of products are added up in 16 bits, which saturates: weights of 7 bits do not.
U8S7 = Layout("U8S7", unsigned=True, bias=True, outputs=True, weight_most=63)


@dataclass(frozen=True)
class Rounded:
    """A layer's weights as a file in INT8 has them.

    Attributes:
        steps: whole numbers, in the shape that the float32 file has.
        scale: the step of every filter, (filters,).
        bias: in float32, (filters,); None where the layer has none.
    """

    steps: NDArray[np.int8]
    scale: Floats
    bias: Floats | None


@dataclass(frozen=True)
class Consumer:
    """A layer with stored weights, as blocks of matrices: see `pruning.moments`.

    Attributes:
        op: its operator type.
        axis: of the stored weight, the one that runs over filters.
        shape: of the stored weight.
        weight_god: float64; G blocks of O filters with D inputs (channels × kernel) each.
        shift_go: its bias, (G, O); None where it has none.
    """

    op: str
    axis: int
    shape: tuple[int, ...]
    weight_god: Tensor
    shift_go: Tensor | None

    @staticmethod
    def of(node: NodeProto, inputs: Sequence[str], stored: Mapping[str, NDArray[np.generic]]) -> Consumer:
        """Read a node; `inputs` are the names that its float32 file gives them."""
        weight = torch.from_numpy(stored[inputs[1]].astype(np.float64))
        axis = 0 if node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0)) else 1
        blocks = attribute(node, "group", 1)
        flat = weight if axis == 0 else weight.T
        shift = None
        if len(inputs) > 2 and inputs[2] in stored:
            shift = torch.from_numpy(stored[inputs[2]].astype(np.float64)).reshape(blocks, -1)
        god = flat.reshape(blocks, len(flat) // blocks, -1)
        return Consumer(node.op_type, axis, tuple(weight.shape), god, shift)

    @property
    def plain_weight(self) -> Tensor:
        """As a convolution has it, in float32: (filters, inputs per group, kernel …)."""
        kernel = self.shape[2:] or (1, 1)
        return self.weight_god.flatten(0, 1).float().reshape(-1, self.weight_god.shape[2] // prod(kernel), *kernel)

    def blocks(self, done: Rounded) -> tuple[Tensor, Tensor]:
        """What rounded weights mean, and their bias, as blocks: (G, O, D) and (G, O)."""
        whole = torch.from_numpy(done.steps.astype(np.float64))
        whole = (whole if self.axis == 0 else whole.T).reshape(self.weight_god.shape)
        step = torch.from_numpy(done.scale.astype(np.float64)).reshape(whole.shape[:2])
        bias = np.zeros(step.numel()) if done.bias is None else done.bias.astype(np.float64)
        return whole * step[..., None], torch.from_numpy(bias).reshape(whole.shape[:2])

    def stored(self, weight_god: Tensor) -> NDArray[np.float64]:
        """Blocks in the shape that the file has."""
        flat = weight_god.flatten(0, 1)
        array: NDArray[np.float64] = (flat if self.axis == 0 else flat.T).reshape(self.shape).numpy()
        return array


def rounded(
    consumer: Consumer,
    weight_god: Tensor,
    shift_go: Tensor | None,
    taken: float,
    layout: Layout,
    covariance_gdd: Tensor | None = None,
) -> Rounded:
    """Weights and bias on the grid of a layout.

    Args:
        consumer: the layer.
        weight_god: what is to be rounded.
        shift_go: its bias.
        taken: the step of its input.
        layout: of the Q/DQ pairs.
        covariance_gdd: of what it reads: weights not rounded yet make up for each error; None to round to the nearest.
    """
    step = rounding.steps_of(weight_god, layout.weight_most)
    if shift_go is not None and layout.bias:
        step = torch.maximum(step, shift_go.abs() / (taken * _BIAS_MOST))
    step = step.float().double()
    if covariance_gdd is None:
        whole = rounding.nearest(weight_god, step, layout.weight_most)
    else:
        whole = rounding.with_feedback(weight_god, covariance_gdd, step, layout.weight_most)
    bias = None if shift_go is None else shift_go.flatten().float().numpy()
    return Rounded(consumer.stored(whole).astype(np.int8), step.flatten().float().numpy(), bias)


def activation_scale(limits: tuple[float, float], layout: Layout) -> tuple[float, NDArray[np.generic]]:
    """Step and zero point of an activation; a tensor that is always 0 has any step."""
    low, high = limits
    if layout.unsigned:
        step = (high - low) / 255 or 1.0
        return step, np.array(np.clip(np.rint(-low / step), 0, 255), np.uint8)
    return max(-low, high) / 127 or 1.0, np.array(0, np.int8)
