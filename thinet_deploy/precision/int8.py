"""FP32 → INT8 in the ONNX graph: Q/DQ pairs around what is to be computed in eight bits.

Two layouts, for no file suits both (design.md, D4): TensorRT's parser wants symmetric activations and rejects a
quantised bias; x86 multiplies unsigned by signed bytes, and ONNX Runtime fuses a layer only if its output is quantised.
Own code in place of ONNX Runtime's quantiser: the limits come from `calibration`, the rounding of weights may be given,
and in TensorRT's layout nothing stands between a convolution and its ReLU, which would part them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper
from onnx.helper import make_node

from .graph import ACTIVATIONS, attribute, constants, copy_of, layers, put_nodes, readers

Floats = NDArray[np.float32]
QUANTISED = ("Conv", "Gemm", "MatMul", "Add")
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


def quantisable(model: ModelProto) -> list[str]:
    """Names of the nodes that INT8 takes, in the network's order: all of `QUANTISED` that work on activations."""
    stored = {each.name for each in model.graph.initializer}
    made = {name for node in model.graph.node for name in node.output} | {each.name for each in model.graph.input}

    def fits(node: NodeProto) -> bool:
        if node.op_type == "Add":
            return all(name in made for name in node.input)
        return node.input[0] in made and node.input[1] in stored  # runtimes fuse attention's products, in fp32

    return [node.name for node in model.graph.node if node.op_type in QUANTISED and fits(node)]


def left_out(model: ModelProto) -> dict[str, str]:
    """Nodes that multiply and accumulate and are not brought to INT8 → why."""
    taken = set(quantisable(model))
    return {each.node: f"{each.op} without INT8 here" for each in layers(model) if each.node not in taken}


def quantise(
    model: ModelProto, limits: Mapping[str, tuple[float, float]], layout: Layout, *, keep: Collection[str] = ()
) -> ModelProto:
    """Put Q/DQ pairs into a float32 network.

    Args:
        model: with named nodes; it is left as it is.
        limits: tensor → its smallest and largest value, 0 between them.
        layout: of the pairs.
        keep: names of nodes that stay in float32.

    Returns:
        The network in INT8.
    """
    chosen = set(quantisable(model)) - set(keep)
    work = _Work(copy_of(model), limits, layout, chosen)
    return work.done()


@dataclass
class _Work:
    """One network on its way to INT8.

    Attributes:
        pairs: tensor → its dequantised twin, which is what everything reads from then on.
    """

    model: ModelProto
    limits: Mapping[str, tuple[float, float]]
    layout: Layout
    chosen: set[str]
    pairs: dict[str, str] = field(default_factory=dict)
    nodes: list[NodeProto] = field(default_factory=list)

    def done(self) -> ModelProto:
        self.stored = constants(self.model)
        self.read_by = readers(self.model)
        self.given = {each.name for each in self.model.graph.output}
        wanted = set(self._wanted())
        if (taken := self.model.graph.input[0].name) in wanted:
            self._pair(taken)
        for node in list(self.model.graph.node):
            before = list(node.input)
            node.input[:] = [self.pairs.get(name, name) for name in node.input]
            if node.name in self.chosen and node.op_type != "Add":
                self._quantise_weights(node, before)
            self.nodes.append(node)
            for name in node.output:
                if name in wanted:
                    self._pair(name)
        return self._finished()

    def _wanted(self) -> Iterator[str]:
        """Activations to quantise: what chosen nodes read and, in some layouts, what they give."""
        for node in self.model.graph.node:
            if node.name in self.chosen:
                yield from (name for name in node.input[:2] if name not in self.stored)
                if self.layout.outputs and (last := self._behind_activation(node.output[0])) not in self.given:
                    yield last

    def _behind_activation(self, name: str) -> str:
        """The tensor behind the ReLU that a runtime fuses into a layer, if there is one."""
        users = self.read_by.get(name, [])
        fused = len(users) == 1 and users[0].op_type in ACTIVATIONS and name not in self.given
        return users[0].output[0] if fused else name

    def _pair(self, name: str) -> None:
        scale, zero = _activation_scale(self.limits[name], self.layout)
        self._store(f"{name}:scale", np.float32(scale))
        self._store(f"{name}:zero", zero)
        steps, back = f"{name}:steps", f"{name}:back"
        parameters = [f"{name}:scale", f"{name}:zero"]
        self.nodes.append(make_node("QuantizeLinear", [name, *parameters], [steps], name=f"quantise {name}"))
        self.nodes.append(make_node("DequantizeLinear", [steps, *parameters], [back], name=f"dequantise {name}"))
        self.pairs[name] = back

    def _quantise_weights(self, node: NodeProto, before: list[str]) -> None:
        axis = _channel_axis(node)
        weight = self.stored[before[1]].astype(np.float32)
        taken = _activation_scale(self.limits[before[0]], self.layout)[0]
        bias = self.stored[before[2]].astype(np.float32) if len(before) > 2 and before[2] in self.stored else None
        rounds_bias = bias is not None and self.layout.bias
        scale = weight_scale(weight, axis, self.layout.weight_most)
        if bias is not None and rounds_bias:
            scale = np.maximum(scale, (np.abs(bias) / (taken * _BIAS_MOST)).astype(np.float32))
        steps = np.clip(np.rint(weight / _along(scale, axis, weight.ndim)), -self.layout.weight_most, None)
        node.input[1] = self._constant(node, before[1], steps.astype(np.int8), scale, axis)
        if bias is not None and rounds_bias:
            fine = scale * np.float32(taken)
            node.input[2] = self._constant(node, before[2], np.rint(bias / fine).astype(np.int32), fine, 0)

    def _constant(self, node: NodeProto, name: str, steps: NDArray[np.generic], scale: Floats, axis: int) -> str:
        """A stored tensor in steps, and the node that turns it back; named after its reader, whose scales it has."""
        own = f"{name}:{node.name}"
        self._store(f"{own}:steps", steps)
        self._store(f"{own}:scale", scale)
        self._store(f"{own}:zero", np.zeros(scale.shape, steps.dtype))
        parts = [f"{own}:{part}" for part in ("steps", "scale", "zero")]
        self.nodes.append(make_node("DequantizeLinear", parts, [own], name=f"dequantise {own}", axis=axis))
        return own

    def _store(self, name: str, value: NDArray[np.generic] | np.generic) -> None:
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))

    def _finished(self) -> ModelProto:
        put_nodes(self.model, self.nodes)
        onnx.checker.check_model(self.model)
        return self.model


def weight_scale(weight: Floats, axis: int, most: int) -> Floats:
    """Symmetric step per output channel, such that the largest weight is `most` steps; of an empty channel, tiny."""
    others = tuple(each for each in range(weight.ndim) if each != axis)
    largest = np.abs(weight).max(axis=others)
    floor = max(float(largest.max()), 1e-6) * 1e-6
    scale: Floats = (np.maximum(largest, floor) / most).astype(np.float32)
    return scale


def _activation_scale(limits: tuple[float, float], layout: Layout) -> tuple[float, NDArray[np.generic]]:
    """Step and zero point of an activation; a tensor that is always 0 has any step."""
    low, high = limits
    if layout.unsigned:
        step = (high - low) / 255 or 1.0
        return step, np.array(np.clip(np.rint(-low / step), 0, 255), np.uint8)
    return max(-low, high) / 127 or 1.0, np.array(0, np.int8)


def _channel_axis(node: NodeProto) -> int:
    """The axis of a weight that runs over output channels."""
    if node.op_type == "Conv":
        return 0
    return 0 if node.op_type == "Gemm" and attribute(node, "transB", 0) else 1


def _along(scale: Floats, axis: int, rank: int) -> Floats:
    return scale.reshape([-1 if each == axis else 1 for each in range(rank)])
