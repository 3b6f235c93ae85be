"""FP32 → FP16 or BF16 in the ONNX graph: casts at the borders, weights stored in half precision.

Own code in place of onnxconverter-common's: that one knows no BF16, and blocks operators by a fixed list. Here the
calibration images decide which nodes would overflow; they stay in float32 and are named.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.helper import make_node

from ..errors import ModelError
from .calibration import Values
from .graph import constants, copy_of, element_types, names_of, opset_of, put_nodes, readers
from .upgrade import NEW as BF16_OPSET
from .upgrade import to_opset_22

Half = Literal["fp16", "bf16"]
_ELEMENT: dict[Half, int] = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_LARGEST_FP16 = 65504.0
_LEAST_FP16 = 2.0**-14  # below it FP16 has ever fewer digits, and below 6e-8 zero
# Other images than those of the calibration go further.
_MARGIN = 4.0
# Sums over many elements, powers and exponentials: they overflow, or lose what is small, between input and output.
PRONE = frozenset(
    {
        *("CumSum", "Exp", "InstanceNormalization", "LayerNormalization", "Log", "LogSoftmax", "LpNormalization"),
        *(
            "Pow",
            "ReduceL2",
            "ReduceLogSum",
            "ReduceLogSumExp",
            "ReduceProd",
            "ReduceSum",
            "ReduceSumSquare",
            "Softmax",
        ),
    }
)
# What reads a small number to keep a division finite, and how its result gets there: an empty image shows it first.
_GUARDS = frozenset({"Add", "Clip", "Div", "Max", "Mul", "Sub", "Where"})
_TOWARDS = frozenset({"Cast", "Expand", "Identity", "Log", "Reciprocal", "Reshape", "Sqrt", "Squeeze", "Unsqueeze"})
_DIVIDES = frozenset({"Div", "Mul", "Pow"})
# Inputs that are float32 whatever the data is: Resize's regions and scales.
_ALWAYS_SINGLE = {"Resize": (1, 2)}


def overflowing(model: ModelProto, values: Mapping[str, Values]) -> dict[str, str]:
    """Nodes that have to stay in float32 if the rest goes to FP16.

    Args:
        model: in float32, with named nodes.
        values: of all its tensors on the calibration images.

    Returns:
        Node → why: values too large for FP16, or so small that a division by them would be one by zero, or an operator
        of `PRONE`.
    """
    stored, most = constants(model), _LARGEST_FP16 / _MARGIN
    reasons = {}
    for node in model.graph.node:
        tensors = [name for name in (*node.input, *node.output) if name]
        seen = [max(-values[name].low, values[name].high) for name in tensors if name in values]
        inside = [stored[name] for name in tensors if name in stored and stored[name].dtype == np.float32]
        largest = float(np.max([0.0, *seen, *(float(np.abs(each).max(initial=0)) for each in inside)]))
        if not largest <= most:  # NaN neither
            reasons[node.name] = f"values up to {largest:.3g}, where FP16 ends at {_LARGEST_FP16:.0f}"
        elif node.op_type in PRONE:
            reasons[node.name] = f"{node.op_type} loses too much in FP16"
    return dict.fromkeys(_guarded(model, stored), "a number there is smaller than those of FP16") | reasons


def _guarded(model: ModelProto, stored: Mapping[str, NDArray[Any]]) -> Iterator[str]:
    """Nodes that read a stored number too small for FP16, and those behind them up to the division that it guards."""
    users = readers(model)

    def small(name: str) -> bool:
        sizes = np.abs(stored[name]) if name in stored and stored[name].dtype == np.float32 else np.zeros(0)
        return bool(sizes.any() and sizes.max() < _LEAST_FP16)

    ahead = [node for node in model.graph.node if node.op_type in _GUARDS and any(map(small, node.input))]
    seen = {node.name for node in ahead}
    for node in ahead:  # grows as it goes
        yield node.name
        behind = users.get(node.output[0], []) if node.op_type not in _DIVIDES else []
        new = [user for user in behind if user.op_type in _TOWARDS | _DIVIDES and user.name not in seen]
        seen |= {user.name for user in new}
        ahead += new


def to_half(model: ModelProto, kind: Half, *, keep: Collection[str] = (), keep_io: bool = True) -> ModelProto:
    """Bring a float32 network to half precision.

    Args:
        model: with named nodes; it is left as it is.
        kind: "fp16" or "bf16", which brings the network to opset 22.
        keep: names of nodes that stay in float32.
        keep_io: whether inputs and outputs stay float32, with casts inside.

    Raises:
        ModelError: the network has control flow.
        TargetError: an operator means something else in opset 22.
    """
    for node in model.graph.node:
        if any(each.HasField("g") for each in node.attribute):
            raise ModelError(
                f"{node.name} ({node.op_type}) holds a graph of its own, which is not brought to {kind}.",
                hint="Use --precision fp32, or export the network without control flow.",
            )
    own = to_opset_22(model) if kind == "bf16" and opset_of(model) < BF16_OPSET else copy_of(model)
    return _Work(own, _ELEMENT[kind], set(keep), keep_io).done()


def kept_names(model: ModelProto, reasons: Mapping[str, str]) -> dict[str, str]:
    """The same reasons under the names that people know."""
    names = names_of(model)
    return {names[node]: why for node, why in reasons.items()}


@dataclass
class _Work:
    """One network on its way to half precision.

    Attributes:
        versions: (tensor, element type) → its name in that type.
        casts: nodes so far.
    """

    model: ModelProto
    half: int
    keep: set[str]
    keep_io: bool
    versions: dict[tuple[str, int], str] = field(default_factory=dict)
    nodes: list[NodeProto] = field(default_factory=list)

    def done(self) -> ModelProto:
        graph = self.model.graph
        types = element_types(self.model)
        self.floats = {name for name, kind in types.items() if kind == TensorProto.FLOAT}
        self.stored = constants(self.model)
        self.given = {each.name for each in graph.output}
        border = TensorProto.FLOAT if self.keep_io else self.half
        for name in self.stored:
            self.versions[name, TensorProto.FLOAT] = name
        for value in graph.input:
            self._border(value, border)
        for node in list(graph.node):
            self._convert(node)
        for value in graph.output:
            self._give(value, border)
        return self._finished()

    def _border(self, value: onnx.ValueInfoProto, border: int) -> None:
        if value.name in self.floats:
            value.type.tensor_type.elem_type = border
            self.versions[value.name, border] = value.name

    def _convert(self, node: NodeProto) -> None:
        """Give a node its inputs in the type that it computes in."""
        single = node.name in self.keep or not any(name in self.floats for name in node.input)
        own = TensorProto.FLOAT if single else self.half
        always = _ALWAYS_SINGLE.get(node.op_type, ())
        for place, name in enumerate(node.input):
            if name in self.floats:
                node.input[place] = self._as(name, TensorProto.FLOAT if place in always else own)
        if node.op_type == "Cast" and own == self.half:
            self._retarget(node)
        for place, name in enumerate(node.output):
            if name in self.floats:
                # An output of the network gets its own name back at the very end.
                node.output[place] = inner = f"{name}:inner" if name in self.given else name
                self.versions[name, own] = inner
        self.nodes.append(node)

    def _retarget(self, node: NodeProto) -> None:
        for each in node.attribute:
            if each.name == "to" and each.i == TensorProto.FLOAT:
                each.i = self.half

    def _as(self, name: str, kind: int) -> str:
        """A tensor in a type; a stored one is stored in it, others pass through a cast."""
        if (name, kind) in self.versions:
            return self.versions[name, kind]
        suffix = "half" if kind == self.half else "single"
        new = f"{name}:{suffix}"
        if name in self.stored:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
            self.model.graph.initializer.append(numpy_helper.from_array(self.stored[name].astype(dtype), new))
        else:
            source = next(own for (tensor, _), own in self.versions.items() if tensor == name)
            self.nodes.append(make_node("Cast", [source], [new], name=f"to {suffix} {name}", to=kind))
        self.versions[name, kind] = new
        return new

    def _give(self, value: onnx.ValueInfoProto, border: int) -> None:
        if value.name not in self.floats:
            return
        value.type.tensor_type.elem_type = border
        source = self._as(value.name, border)
        if source != value.name:
            self.nodes.append(make_node("Identity", [source], [value.name], name=f"give {value.name}"))

    def _finished(self) -> ModelProto:
        put_nodes(self.model, self.nodes)
        del self.model.graph.value_info[:]
        self.model.CopyFrom(onnx.shape_inference.infer_shapes(self.model))
        onnx.checker.check_model(self.model, full_check=True)
        return self.model
