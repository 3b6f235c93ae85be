"""What the passes over an ONNX graph have in common: reading it, its layers, and what these cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from ..errors import ModelError, first_line

# Operators that multiply and accumulate; all others cost next to nothing.
COMPUTING = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# What runtimes fuse into the layer before it, if nothing else reads that one's output.
ACTIVATIONS = frozenset({"Relu", "Clip"})


@dataclass(frozen=True)
class Layer:
    """A node that multiplies and accumulates.

    Attributes:
        name: what people call it: the module's name where its weight tells, else the node's.
        node: the node's name in the ONNX file.
        op: its operator type.
        macs: multiply-accumulates for one image.
    """

    name: str
    node: str
    op: str
    macs: int


def read_onnx(path: Path) -> ModelProto:
    """Read an ONNX file whose nodes all have names.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    hint = "Build it again, or export it again: the file was cut off, or is something else."
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.", hint="Give the path of an ONNX file.") from error
    except Exception as error:  # protobuf and checker raise errors of many kinds
        raise ModelError(f"{path} is no sound ONNX file: {first_line(error)}", hint=hint) from error
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    return model


def put_nodes(model: ModelProto, nodes: Iterable[NodeProto]) -> None:
    """Give a graph other nodes, and drop the stored values that none of them reads."""
    graph = model.graph
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in graph.node for name in node.input}
    stored = [each for each in graph.initializer if each.name in read]
    del graph.initializer[:]
    graph.initializer.extend(stored)


def copy_of(model: ModelProto) -> ModelProto:
    """A copy that may be changed."""
    other = ModelProto()
    other.CopyFrom(model)
    return other


def constants(model: ModelProto) -> dict[str, NDArray[np.generic]]:
    """The values that are in the file, by name."""
    return {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}


def opset_of(model: ModelProto) -> int:
    """The opset of ONNX's own operators."""
    version: int = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    return version


def attribute(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node."""
    for each in node.attribute:
        if each.name == name:
            return int(each.i)
    return default


def readers(model: ModelProto) -> dict[str, list[NodeProto]]:
    """Tensor → the nodes that read it."""
    found: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


def element_types(model: ModelProto) -> dict[str, int]:
    """Tensor → its ONNX element type, for all whose type can be told."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = [*graph.input, *graph.output, *graph.value_info]
    return {
        **{value.name: value.type.tensor_type.elem_type for value in values},
        **{each.name: each.data_type for each in graph.initializer},
    }


def layers(model: ModelProto) -> Iterator[Layer]:
    """The layers of a network, in its order, with what each costs."""
    known = shapes(model)
    weights = {each.name for each in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in COMPUTING:
            yield Layer(layer_name(node, weights), node.name, node.op_type, _macs(node, known))


def layer_name(node: NodeProto, weights: Iterable[str]) -> str:
    """What people call a node: the module whose weight it reads, else its own name."""
    known = set(weights)
    return next((name.removesuffix(".weight") for name in node.input[1:2] if name in known), node.name)


def names_of(model: ModelProto) -> dict[str, str]:
    """What people call each node."""
    weights = {each.name for each in model.graph.initializer}
    return {node.name: layer_name(node, weights) for node in model.graph.node}


def shapes(model: ModelProto) -> dict[str, tuple[int, ...]]:
    """Tensor → its shape for one image: a size that is not known is the batch."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = [*graph.input, *graph.output, *graph.value_info]
    known = {each.name: tuple(each.dims) for each in graph.initializer}
    for value in values:
        known[value.name] = tuple(dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim)
    return known


def _macs(node: NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    data, weight = (shapes.get(name, ()) for name in node.input[:2])
    given = shapes.get(node.output[0], ())
    if node.op_type == "Conv":
        return math.prod(given) * math.prod(weight[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(data) * math.prod(weight[1:])
    inner = data[0] if node.op_type == "Gemm" and attribute(node, "transA", 0) else data[-1] if data else 0
    return math.prod(given) * inner
