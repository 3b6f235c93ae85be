"""FP32 → INT8 in the ONNX graph: Q/DQ pairs around what is to be computed in eight bits.

Two layouts, for no file suits both (design.md, D4): TensorRT's parser wants symmetric activations and rejects a
quantised bias; x86 multiplies unsigned by signed bytes, and ONNX Runtime fuses a layer only if its output is quantised.
Own code in place of ONNX Runtime's quantiser: the limits come from `calibration`, the rounding of weights may be given,
and in TensorRT's layout nothing stands between a convolution and its ReLU, which would part them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper
from onnx.helper import make_node

from .graph import ACTIVATIONS, constants, copy_of, layers, put_nodes, readers
from .weights import Consumer, Layout, Rounded, activation_scale, rounded

QUANTISED = ("Conv", "Gemm", "MatMul", "Add")


def quantisable(model: ModelProto) -> list[str]:
    """Names of the nodes that INT8 takes, in the network's order: all of `QUANTISED` that work on activations."""
    ranks = {each.name: len(each.dims) for each in model.graph.initializer}
    made = {name for node in model.graph.node for name in node.output} | {each.name for each in model.graph.input}

    def fits(node: NodeProto) -> bool:
        if node.op_type == "Add":
            return all(name in made for name in node.input)
        rank = ranks.get(node.input[1], 0)  # 0: runtimes fuse attention's products, in fp32
        return node.input[0] in made and (rank == 2 or (node.op_type == "Conv" and rank > 2))

    return [node.name for node in model.graph.node if node.op_type in QUANTISED and fits(node)]


def unbounded(model: ModelProto, bounded: Collection[str]) -> list[str]:
    """Of `quantisable` those that read or give a tensor which is not among the `bounded`: values there are infinite."""
    chosen, stored, users, within = set(quantisable(model)), constants(model), readers(model), set(bounded)

    def tensors(node: NodeProto) -> Iterator[str]:
        yield from (name for name in node.input[:2] if name not in stored)
        yield from node.output
        yield from (user.output[0] for user in users.get(node.output[0], []) if user.op_type in ACTIVATIONS)

    return [each.name for each in model.graph.node if each.name in chosen and not within.issuperset(tensors(each))]


def left_out(model: ModelProto) -> dict[str, str]:
    """Nodes that multiply and accumulate and are not brought to INT8 → why."""
    taken = set(quantisable(model))
    return {each.node: f"{each.op} without INT8 here" for each in layers(model) if each.node not in taken}


def quantise(
    model: ModelProto,
    limits: Mapping[str, tuple[float, float]],
    layout: Layout,
    *,
    keep: Collection[str] = (),
    weights: Mapping[str, Rounded] = MappingProxyType({}),
) -> ModelProto:
    """Put Q/DQ pairs into a float32 network.

    Args:
        model: with named nodes; it is left as it is.
        limits: tensor → its smallest and largest value, 0 between them.
        layout: of the pairs.
        keep: names of nodes that stay in float32.
        weights: node → its weights as they are to be rounded; all others go to the nearest step.

    Returns:
        The network in INT8.
    """
    chosen = set(quantisable(model)) - set(keep)
    work = _Work(copy_of(model), limits, layout, chosen, weights)
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
    weights: Mapping[str, Rounded]
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
        scale, zero = activation_scale(self.limits[name], self.layout)
        self._store(f"{name}:scale", np.float32(scale))
        self._store(f"{name}:zero", zero)
        steps, back = f"{name}:steps", f"{name}:back"
        parameters = [f"{name}:scale", f"{name}:zero"]
        self.nodes.append(make_node("QuantizeLinear", [name, *parameters], [steps], name=f"quantise {name}"))
        self.nodes.append(make_node("DequantizeLinear", [steps, *parameters], [back], name=f"dequantise {name}"))
        self.pairs[name] = back

    def _quantise_weights(self, node: NodeProto, before: list[str]) -> None:
        consumer = Consumer.of(node, before, self.stored)
        taken = activation_scale(self.limits[before[0]], self.layout)[0]
        ready = self.weights.get(node.name)
        done = ready or rounded(consumer, consumer.weight_god, consumer.shift_go, taken, self.layout)
        node.input[1] = self._constant(node, before[1], done.steps, done.scale, consumer.axis)
        if done.bias is None:
            return
        name = before[2] if len(before) > 2 else f"{before[1]}:bias"
        del node.input[2:]
        if self.layout.bias:
            fine = done.scale * np.float32(taken)
            node.input.append(self._constant(node, name, np.rint(done.bias / fine).astype(np.int32), fine, 0))
        else:
            node.input.append(f"{name}:{node.name}")
            self._store(node.input[2], done.bias)

    def _constant(
        self, node: NodeProto, name: str, steps: NDArray[np.generic], scale: NDArray[np.float32], axis: int
    ) -> str:
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
