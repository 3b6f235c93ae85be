"""INT8 networks to be timed: nothing is run for their limits, whose size no millisecond depends on.

Their sign it does depend on: what is never negative has its zero point at 0, and kernels have less to correct then.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto

from .graph import constants
from .int8 import quantise
from .weights import Layout

_MOST = 4.0  # any magnitude does
_NEVER_NEGATIVE = frozenset({"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs"})
# What they give is never negative where all that they read is not.
_KEEP_SIGNS = frozenset(
    {
        *("Add", "Mul", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "Identity"),
        *("Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Pad", "Resize"),
    }
)


def to_be_timed(model: ModelProto, layout: Layout) -> ModelProto:
    """A float32 network, whose nodes have names, in INT8: as fast as after calibration, its outputs mean nothing."""
    return quantise(model, _limits(model), layout)


def _limits(model: ModelProto) -> dict[str, tuple[float, float]]:
    """Tensor → (lowest, highest) by what makes it; inputs are signed."""
    stored = constants(model)
    positive = {name for name, value in stored.items() if value.size and value.min() >= 0}
    names = [each.name for each in model.graph.input]
    for node in model.graph.node:
        names += node.output
        if _is_positive(node, positive):
            positive.update(node.output)
    return {name: (0.0 if name in positive else -_MOST, _MOST) for name in names}


def _is_positive(node: NodeProto, positive: set[str]) -> bool:
    if node.op_type == "Clip":
        return len(node.input) > 1 and node.input[1] in positive
    if node.op_type in {"Add", "Mul", "Concat"}:
        return positive.issuperset(node.input)
    # Of the others the first input has the values, what follows are sizes and axes.
    return node.op_type in _NEVER_NEGATIVE or (node.op_type in _KEEP_SIGNS and node.input[0] in positive)
