"""Opset 18 → 17, which is what TensorRT 8 reads (JetPack 5 and 6.0).

torch's exporter writes 18 or later, and onnx's version converter has no way down for a mean or an Identity. Only what
changed between the two opsets is touched; what 17 cannot say is refused by name. See ONNX's Changelog.md, version 18.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from ..errors import TargetError
from .graph import attribute, constants, copy_of, opset_of

OLD, NEW = 17, 18
_IR_VERSION = 8
_REDUCTIONS = (
    *("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2"),
    *("ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare"),
)
# Attributes that 18 added, with the value that says what 17 does anyway.
_ADDED = {
    "Resize": {"antialias": 0, "keep_aspect_ratio_policy": b"stretch"},
    "LpPool": {"ceil_mode": 0, "dilations": [1, 1]},
}


def to_opset_17(model: ModelProto) -> ModelProto:
    """The same network in opset 17.

    Args:
        model: in opset 18; it is left as it is.

    Raises:
        TargetError: an operator cannot be expressed; it is named.
    """
    if opset_of(model) != NEW:
        raise TargetError(f"The way to opset {OLD} starts at opset {NEW}, but the file has {opset_of(model)}.")
    older = copy_of(model)
    work = _Work(older)
    nodes = [new for node in list(older.graph.node) for new in work.rewritten(node)]
    del older.graph.node[:]
    older.graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    stored = [each for each in older.graph.initializer if each.name in read]
    del older.graph.initializer[:]
    older.graph.initializer.extend(stored)
    for each in older.opset_import:
        if each.domain in ("", "ai.onnx"):
            each.version = OLD
    older.ir_version = min(older.ir_version, _IR_VERSION)
    onnx.checker.check_model(older, full_check=True)
    return older


@dataclass
class _Work:
    model: ModelProto

    def __post_init__(self) -> None:
        graph = onnx.shape_inference.infer_shapes(self.model, data_prop=True).graph
        values = [*graph.input, *graph.output, *graph.value_info]
        self.sizes = {
            value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in values
            if value.type.tensor_type.HasField("shape")
        }
        self.stored = constants(self.model)

    def rewritten(self, node: NodeProto) -> list[NodeProto]:
        """What becomes of one node."""
        ways: dict[str, Callable[[NodeProto], list[NodeProto]]] = {"Split": self._split, "Pad": self._pad}
        ways |= dict.fromkeys(_REDUCTIONS, self._reduction)
        if node.op_type in ways:
            return ways[node.op_type](node)
        if node.op_type in _ADDED:
            return self._without_new_attributes(node)
        if node.op_type in ("ScatterElements", "ScatterND"):
            way = next((each.s for each in node.attribute if each.name == "reduction"), b"none")
            if way in (b"min", b"max"):
                raise _refused(node, f"reduction {way.decode()}")
            return [node]
        if node.domain in ("", "ai.onnx"):
            _check_known(node)
        return [node]

    def _reduction(self, node: NodeProto) -> list[NodeProto]:
        """Axes as an attribute; the mean over a map as global average pooling, which DLAs and TensorRT know."""
        given = len(node.input) > 1 and bool(node.input[1])
        if given and node.input[1] not in self.stored:
            raise _refused(node, "axes that the network computes")
        axes = [int(each) for each in self.stored[node.input[1]]] if given else []
        if not axes and attribute(node, "noop_with_empty_axes", 0):
            return [helper.make_node("Identity", [node.input[0]], list(node.output), name=node.name)]
        keeps = attribute(node, "keepdims", 1)
        if node.op_type == "ReduceMean" and self._over_map(node.input[0], axes):
            return _pooled(node, bool(keeps))
        reduction = helper.make_node(node.op_type, node.input[:1], list(node.output), name=node.name, keepdims=keeps)
        if axes:
            reduction.attribute.append(helper.make_attribute("axes", axes))
        return [reduction]

    def _over_map(self, name: str, axes: list[int]) -> bool:
        rank = len(self.sizes.get(name, ()))
        return rank == 4 and sorted(axis % rank for axis in axes) == [2, 3]

    def _split(self, node: NodeProto) -> list[NodeProto]:
        """17 splits into equal parts, or as an input says: parts that are not equal are spelled out."""
        parts = attribute(node, "num_outputs", 0)
        kept = [each for each in node.attribute if each.name != "num_outputs"]
        del node.attribute[:]
        node.attribute.extend(kept)
        if parts:
            sizes = self.sizes.get(node.input[0], ())
            axis = attribute(node, "axis", 0)
            length = sizes[axis] if sizes else 0
            if not length:
                raise _refused(node, "an axis whose length is not known")
            part = -(-length // parts)
            lengths = [min(part, length - part * index) for index in range(parts)]
            node.input[:] = [node.input[0], self._store(f"{node.name}:lengths", lengths)]
        return [node]

    def _pad(self, node: NodeProto) -> list[NodeProto]:
        """17 has no axes: every axis gets its padding."""
        if len(node.input) < 4 or not node.input[3]:
            return [node]
        pads, axes = (self.stored.get(node.input[place]) for place in (1, 3))
        rank = len(self.sizes.get(node.input[0], ()))
        if pads is None or axes is None or not rank:
            raise _refused(node, "padding that the network computes")
        full = np.zeros((2, rank), np.int64)
        full[:, [int(axis) % rank for axis in axes]] = np.asarray(pads).reshape(2, -1)
        del node.input[3]
        node.input[1] = self._store(f"{node.name}:pads", [int(each) for each in full.flatten()])
        if not node.input[2]:
            del node.input[2]
        return [node]

    def _without_new_attributes(self, node: NodeProto) -> list[NodeProto]:
        usual, kept = _ADDED[node.op_type], []
        for each in node.attribute:
            if each.name == "axes":
                raise _refused(node, "axes")
            if each.name not in usual:
                kept.append(each)
            elif helper.get_attribute_value(each) != usual[each.name]:
                raise _refused(node, each.name)
        del node.attribute[:]
        node.attribute.extend(kept)
        return [node]

    def _store(self, name: str, values: list[int]) -> str:
        self.model.graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name


def _pooled(node: NodeProto, keeps: bool) -> list[NodeProto]:
    data, given = node.input[0], node.output[0]
    if keeps:
        return [helper.make_node("GlobalAveragePool", [data], [given], name=node.name)]
    map_name = f"{given}:map"
    return [
        helper.make_node("GlobalAveragePool", [data], [map_name], name=node.name),
        helper.make_node("Flatten", [map_name], [given], name=f"{node.name}:flat", axis=1),
    ]


def _check_known(node: NodeProto) -> None:
    """Raise TargetError for an operator that is new in 18, or changed in a way that is not handled above."""
    try:
        version = onnx.defs.get_schema(node.op_type, NEW, "").since_version
    except onnx.defs.SchemaError:
        return  # the checker knows what to say
    if version > OLD:
        raise _refused(node, "it as such")


def _refused(node: NodeProto, what: str) -> TargetError:
    return TargetError(
        f"{node.op_type} ({node.name}) cannot be written in opset {OLD}: there it does not know {what}.",
        hint="Choose a target with a newer stack (JetPack 6.1 or later for Jetsons), or another operation.",
    )
