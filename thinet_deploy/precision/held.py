"""What the files of mobile engines hold: the type of every layer's tensors, in the order in which they are executed.

These runtimes do not tell what they compute in, and it is another machine that runs them. A file in fp16 has its
weights in it; whether the device computes in it too is the device's choice. One in int8 has weights and inputs in it.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..errors import ThinetDeployError

UNKNOWN = "unknown"
UNREAD = "not read back"  # the file holds what we cannot read, and may be right
_OF_XNNPACK = {"fp32": "fp32", "fp16": "fp16", "qint8": "int8", "qcint8": "int8"}
# What stands in front of a layer's weights in an ncnn .bin (ncnn's modelbin.cpp).
_OF_NCNN = {0: "fp32", 0x01306B47: "fp16", 0x000D4B38: "int8"}
_NCNN_LAYERS = {
    *("Convolution", "ConvolutionDepthWise", "Deconvolution", "DeconvolutionDepthWise", "InnerProduct"),
    *("Convolution1D", "ConvolutionDepthWise1D", "Deconvolution1D", "DeconvolutionDepthWise1D"),
}
_NCNN_WEIGHTLESS = {
    *("Input", "Split", "ReLU", "Pooling", "BinaryOp", "Reshape", "Permute", "Concat", "ShuffleChannel", "Flatten"),
    *("Reduction", "Clip", "Crop", "Padding", "Sigmoid", "HardSwish", "HardSigmoid", "Softmax", "Slice", "Interp"),
    *("UnaryOp", "Dropout", "Noop", "ExpandDims", "Squeeze", "Swish", "TanH", "ELU", "GELU", "LRN", "PixelShuffle"),
    *("Mish", "SELU", "CELU", "MatMul", "Tile", "Softplus", "SDPA"),
}
# Layers whose numbers stand in the .bin as float32, without a flag → how many.
_NCNN_PLAIN: dict[str, Callable[[Mapping[str, str]], int]] = {
    "BatchNorm": lambda values: 4 * int(values["0"]),
    "PReLU": lambda values: int(values["0"]),
    "GroupNorm": lambda values: 2 * int(values["1"]) * int(values.get("3", 1)),
    "LayerNorm": lambda values: 2 * int(values["0"]) * int(values.get("2", 1)),
    "InstanceNorm": lambda values: 2 * int(values["0"]) * int(values.get("2", 1)),
    "MemoryData": lambda values: prod(int(values[key]) for key in ("0", "1", "11", "2") if int(values.get(key, 0))),
}


# Operations of Core ML that turn steps of 8 bits back: of weights, of activations.
_FROM_STEPS = ("constexpr_affine_dequantize", "dequantize")


@dataclass(frozen=True)
class Kernel:
    """What an engine has for one or several layers: the names that it gives, and the type it computes in."""

    names: tuple[str, ...]
    kind: str


def held(runtime: str, path: Path, layers: list[str]) -> list[Kernel]:
    """Read the types of an engine's layers from its file.

    Args:
        runtime: one of `READERS`.
        path: the engine's main file or folder.
        layers: names of the network's layers, in its order.

    Returns:
        One for each layer; for all of them together where the file has another number of them. Behind an operator that
        is not known they are `UNREAD`.

    Raises:
        ThinetDeployError: the file is damaged.
    """
    try:
        kinds = list(READERS[runtime](path))
    except ThinetDeployError:
        raise
    except Exception as error:  # each format has errors of its own for damaged files
        hint = "Convert it again; the file may be damaged."
        raise ThinetDeployError(f"What {path} holds cannot be read back: {error}", hint=hint) from error
    if UNREAD in kinds:
        known = [*kinds[: kinds.index(UNREAD)], *[UNREAD] * len(layers)]
        return [Kernel((layer,), kind) for layer, kind in zip(layers, known, strict=False)]
    if len(kinds) == len(layers):
        return [Kernel((layer,), kind) for layer, kind in zip(layers, kinds, strict=True)]
    missing = [UNKNOWN] if len(kinds) < len(layers) else []
    return [Kernel((), kind) for kind in (*kinds, *missing)]


def _both(weight: str, taken: str) -> str:
    """The type of a layer: int8 only if its input is in it too."""
    return weight if weight != "int8" or taken == "int8" else f"{weight} weights, {taken} inputs"


def _ncnn(path: Path) -> Iterator[str]:
    """The flags in the .bin, found by walking along the layers of the .param."""
    data, at = path.with_suffix(".bin").read_bytes(), 0
    for line in path.read_text(encoding="utf-8").splitlines()[2:]:
        op, _, inputs, outputs, *rest = line.split()
        values = dict(each.split("=", 1) for each in rest[int(inputs) + int(outputs) :])
        if op in _NCNN_PLAIN:
            at += 4 * _NCNN_PLAIN[op](values)
            continue
        if op not in _NCNN_LAYERS:
            if op in _NCNN_WEIGHTLESS:
                continue
            yield UNREAD  # whether it has weights is not known, so where those of others begin is not
            return
        flag = struct.unpack_from("<I", data, at)[0]
        kind = _OF_NCNN.get(flag, f"{UNKNOWN} ({flag:#x})")
        linear = op == "InnerProduct"
        count, filters = int(values["2" if linear else "6"]), int(values["0"])
        size = count * {"fp16": 2, "int8": 1}.get(kind, 4)
        at += 4 + -(-size // 4) * 4 + 4 * filters * int(values.get("1" if linear else "5", 0))
        yield kind
    if at != len(data):
        raise ThinetDeployError(f"{path.with_suffix('.bin').name} has {len(data)} bytes, where its layers take {at}.")


def _litert(path: Path) -> Iterator[str]:
    """The tensors of the flatbuffer; weights in fp16 pass through a DEQUANTIZE on their way."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    graph, builtin = model.subgraphs[0], schema.BuiltinOperator
    layers = {builtin.CONV_2D, builtin.DEPTHWISE_CONV_2D, builtin.FULLY_CONNECTED, builtin.TRANSPOSE_CONV}
    types = {schema.TensorType.FLOAT32: "fp32", schema.TensorType.FLOAT16: "fp16", schema.TensorType.INT8: "int8"}
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    widened = {op.outputs[0]: op.inputs[0] for op in graph.operators if codes[op.opcodeIndex] == builtin.DEQUANTIZE}
    for op in graph.operators:
        if (code := codes[op.opcodeIndex]) in layers:
            weight, data = op.inputs[1], op.inputs[2 if code == builtin.TRANSPOSE_CONV else 0]
            kinds = [graph.tensors[each].type for each in (widened.get(weight, weight), data)]
            yield _both(*(types.get(kind, f"{UNKNOWN} ({kind})") for kind in kinds))


def _executorch(path: Path) -> Iterator[str]:
    """The graphs of XNNPACK inside the program; layers outside of it are not seen."""
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader

    data = path.read_bytes()
    magic = XNNHeader.MAGIC_OFFSET.start
    for found in re.finditer(re.escape(XNNHeader.EXPECTED_MAGIC), data):
        start = found.start() - magic
        header = XNNHeader.from_bytes(data[start : start + XNNHeader.EXPECTED_LENGTH])
        begin = start + header.flatbuffer_offset
        yield from _of_xnnpack(_decompiled(data[begin : begin + header.flatbuffer_size]))


def _decompiled(flatbuffer: bytes) -> dict[str, Any]:
    """A graph of XNNPACK as JSON, by the compiler and the schema that ExecuTorch brings."""
    from executorch.backends.xnnpack import serialization
    from executorch.data import bin as binaries

    schema, tool = Path(serialization.__path__[0], "schema.fbs"), Path(binaries.__path__[0], "flatc")
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "graph.bin")
        file.write_bytes(flatbuffer)
        options = ["--json", "--strict-json", "--defaults-json", "--raw-binary", "-o", place]
        subprocess.run([str(tool), *options, str(schema), "--", str(file)], check=True, capture_output=True)
        text = file.with_suffix(".json").read_text(encoding="utf-8")
    graph: dict[str, Any] = json.loads(re.sub(r":\s*[+-]?inf\b", ": null", text))  # bounds of activations
    return graph


def _of_xnnpack(graph: dict[str, Any]) -> Iterator[str]:
    types = {}
    for value in graph["xvalues"]:
        tensor = value["xvalue_union"].get("tensor_value", value["xvalue_union"])
        kind = tensor["datatype"].removeprefix("xnn_datatype_")
        types[tensor["id_out"]] = _OF_XNNPACK.get(kind, f"{UNKNOWN} ({kind})")
    for node in graph["xnodes"]:
        given = node["xnode_union"]
        if "filter_id" in given:
            yield _both(types[given["filter_id"]], types[given["input1_id"]])


def _coreml(path: Path) -> Iterator[str]:
    """The types of what the operations give, or of what was turned back from steps for them."""
    import coremltools

    spec = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec()
    types = coremltools.proto.MIL_pb2.DataType
    known = {types.FLOAT32: "fp32", types.FLOAT16: "fp16"}
    for block in spec.mlProgram.functions["main"].block_specializations.values():
        makers = {each.name: operation.type for operation in block.operations for each in operation.outputs}
        for operation in block.operations:
            if operation.type in ("conv", "conv_transpose", "linear", "matmul"):
                kind = operation.outputs[0].type.tensorType.dataType
                own = known.get(kind, f"{UNKNOWN} ({kind})")
                ends = ("y" if operation.type == "matmul" else "weight", "x")
                taken = (makers.get(operation.inputs[end].arguments[0].name) for end in ends)
                yield _both(*("int8" if maker in _FROM_STEPS else own for maker in taken))


READERS = {"ncnn": _ncnn, "litert": _litert, "executorch": _executorch, "coreml": _coreml}
