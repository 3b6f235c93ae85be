"""ONNX networks of a few nodes, for tests of passes over the graph."""

from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.helper import make_graph, make_model, make_opsetid, make_tensor_value_info


def small(nodes: list[Any], stored: dict[str, Any], shapes: dict[str, list[Any]], opset: int = 18) -> ModelProto:
    """A network of a few nodes from "x" to "y"."""
    ports = {name: make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    graph = make_graph(
        nodes,
        "small",
        [ports["x"]],
        [ports["y"]],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in stored.items()],
    )
    made = make_model(graph, opset_imports=[make_opsetid("", opset)], ir_version=8)
    for number, node in enumerate(made.graph.node):
        node.name = node.name or f"n{number}"
    return made
