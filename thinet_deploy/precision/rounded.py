"""A BF16 file as one in float32 that rounds every value to BF16: ONNX Runtime has no convolutions in BF16 on a CPU.

It is what the file says, as GPUs compute it: sums in float32, results in BF16.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.helper import make_node

from .graph import copy_of, element_types, put_nodes

_SHORT, _LONG = TensorProto.BFLOAT16, TensorProto.FLOAT


def in_float32(model: ModelProto) -> ModelProto:
    """The same network, computed in float32 and rounded to BF16 where its values are BF16.

    Args:
        model: with or without values in BF16; it is left as it is.
    """
    short = {name for name, kind in element_types(model).items() if kind == _SHORT}
    if not short:
        return model
    made = copy_of(model)
    for stored in made.graph.initializer:
        if stored.name in short:
            stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored).astype(np.float32), stored.name))
    for value in (*made.graph.input, *made.graph.output):
        if value.name in short:
            value.type.tensor_type.elem_type = _LONG
    del made.graph.value_info[:]
    put_nodes(made, [new for node in list(made.graph.node) for new in _rounding(node, short)])
    return made


def _rounding(node: NodeProto, short: set[str]) -> list[NodeProto]:
    """The node, and its results rounded."""
    after = list[NodeProto]()
    for place, name in enumerate(node.output):
        if name in short:
            node.output[place] = f"{name}:exact"
            after.append(make_node("Cast", [f"{name}:exact"], [f"{name}:rounded"], to=_SHORT))
            after.append(make_node("Cast", [f"{name}:rounded"], [name], to=_LONG))
    for each in node.attribute:
        if node.op_type == "Cast" and each.name == "to" and each.i == _SHORT:
            each.i = _LONG
    return [node, *after]
