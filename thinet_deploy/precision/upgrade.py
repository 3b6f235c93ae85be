"""Opset 20 → 22, the first that has convolutions in BF16.

Between the two, what networks in float use has only learnt new types. Of the operators that changed otherwise none is
touched: they are refused by name. See ONNX's Changelog.md, versions 21 and 22.
"""

from __future__ import annotations

import onnx
from onnx import ModelProto

from ..errors import TargetError
from .graph import copy_of, opset_of

OLD, NEW = 20, 22
_IR_VERSION = 10  # the one that came with 22


def to_opset_22(model: ModelProto) -> ModelProto:
    """The same network in opset 22.

    Args:
        model: in opset 20; it is left as it is.

    Raises:
        TargetError: an operator means something else in opset 22; it is named.
    """
    if opset_of(model) != OLD:
        raise TargetError(f"The way to opset {NEW} starts at opset {OLD}, but the file has {opset_of(model)}.")
    for node in model.graph.node:
        if node.domain in ("", "ai.onnx") and _says(node.op_type, OLD) != _says(node.op_type, NEW):
            raise TargetError(
                f"{node.op_type} ({node.name}) does not mean in opset {NEW} what it means in opset {OLD}.",
                hint="Use --precision fp16, or another operation.",
            )
    newer = copy_of(model)
    for each in newer.opset_import:
        if each.domain in ("", "ai.onnx"):
            each.version = NEW
    newer.ir_version = max(newer.ir_version, _IR_VERSION)
    onnx.checker.check_model(newer, full_check=True)
    return newer


def _says(operator: str, opset: int) -> tuple[object, ...]:
    """What a node of an operator can say, but for the types that it takes."""
    schema = onnx.defs.get_schema(operator, opset, "")
    attributes = {(name, str(each.type), str(each.default_value)) for name, each in schema.attributes.items()}
    return attributes, [each.name for each in schema.inputs], [each.name for each in schema.outputs]
