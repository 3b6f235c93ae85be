"""A network over calibration images, some nodes at a time: between two stops only what later nodes read is kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto
from onnx.helper import make_tensor_value_info, np_dtype_to_tensor_dtype

from .calibration import Floats, session
from .graph import copy_of, put_nodes

Array = NDArray[np.generic]


class Walk:
    """Where a network has got to. Weights of nodes that lie ahead may change between two stops."""

    def __init__(self, model: ModelProto, batches: Sequence[Floats]) -> None:
        """Stand at the input; the batches are what it takes."""
        self._values: dict[str, list[Array]] = {model.graph.input[0].name: list(batches)}
        self._done = set[str]()

    def to(self, model: ModelProto, tensor: str) -> list[Array]:
        """Run all nodes up to the one that makes a tensor, which a node ahead has to read: its values, batch by batch.

        Args:
            model: the network, with the names that it had at the last stop.
            tensor: to stop at.
        """
        nodes = list(model.graph.node)
        last = next((place for place, node in enumerate(nodes) if tensor in node.output), -1)
        new = [node for node in nodes[: last + 1] if node.name not in self._done]
        self._done |= {node.name for node in new}
        ahead = {tensor, *(name for node in nodes if node.name not in self._done for name in node.input)}
        self._run(model, new, ahead)
        self._values = {name: values for name, values in self._values.items() if name in ahead}
        return self._values[tensor]

    def _run(self, model: ModelProto, nodes: list[NodeProto], ahead: set[str]) -> None:
        wanted = [name for node in nodes for name in node.output if name in ahead]
        if not wanted:
            return
        read = {name for node in nodes for name in node.input}
        given = {name: values for name, values in self._values.items() if name in read}
        running = session(_part(model, nodes, given, wanted), literal=True)
        batches = [dict(zip(given, parts, strict=True)) for parts in zip(*given.values(), strict=True)]
        made = [running.run(wanted, batch) for batch in batches]
        self._values |= {name: list(values) for name, values in zip(wanted, zip(*made, strict=True), strict=True)}


def _part(model: ModelProto, nodes: list[NodeProto], given: dict[str, list[Array]], wanted: list[str]) -> ModelProto:
    """Some nodes as a network of their own."""
    part = copy_of(model)
    put_nodes(part, nodes)
    for ports in (part.graph.input, part.graph.output, part.graph.value_info):
        del ports[:]
    for name, values in given.items():
        kind, sizes = np_dtype_to_tensor_dtype(values[0].dtype), [None, *values[0].shape[1:]]
        part.graph.input.append(make_tensor_value_info(name, kind, sizes if values[0].ndim else []))
    for name in wanted:
        part.graph.output.add(name=name)
    return part
