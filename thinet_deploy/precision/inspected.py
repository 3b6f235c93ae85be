"""What a TensorRT engine computes in, by its inspector's word, beside what the ONNX file says that it was built from.

The engine was built on a device, which left the inspector's JSON there. TensorRT up to 8.6 names a layer after the
nodes that are in it ("Conv_0 + Relu_1"), later ones in its metadata too. Layers that name no node prove nothing, and
kernels that only cast or pad for a layer are left out, though they name it (tests/test_tensorrt_networks.py).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from onnx import ModelProto, NodeProto, TensorProto

from ..artifact import read_json
from ..interfaces import Precision
from ..on_device.tensorrt_engine import inspected_layers
from .executed import Executed, Proof
from .graph import COMPUTING, element_types, layers, read_onnx
from .held import UNKNOWN

_OF_ONNX: dict[int, Precision] = {TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
# A strongly typed network has to compute a layer in these; Q/DQ pairs around one only allow that it runs in INT8.
BINDING = ("fp32", "fp16", "bf16")


def inspect_built(engine: Path, source: Path, typed: Path) -> dict[str, Any]:
    """Look into an engine that a device built; {} where it could not be inspected there.

    Args:
        engine: its file, with what the builder wrote beside it: see `tensorrt_builder.build`.
        source: the float32 ONNX file of the network.
        typed: the ONNX file that it was built from.

    Returns:
        JSON-ready: what `Proof.to_json` gives, text in one line, and broken: the layers, in words, that run in another
        type than the file binds TensorRT to.
    """
    said = engine.with_suffix(".layers.json")
    if not said.exists():
        return {}
    proof = proof_of(said.read_text(encoding="utf-8"), read_onnx(source), read_onnx(typed))
    binding = BINDING if read_json(engine.with_suffix(".build.json"))["strongly_typed"] else ()
    broken = [f"{each.layer} was to be {each.asked} and is {each.got}" for each in _broken(proof, binding)]
    return {**proof.to_json(), "text": proof.describe(), "broken": broken}


def proof_of(said: str, source: ModelProto, typed: ModelProto) -> Proof:
    """Every layer of a network, in what it was to be computed, and in what the engine does.

    Args:
        said: the inspector's JSON, of DETAILED verbosity.
        source: the network in float32, whose layers have names for people.
        typed: the same in the types that it was built from.
    """
    asked, found = types_of(typed), dict[str, set[str]]()
    for names, kind in inspected_layers(json.loads(said)):
        for name in names:
            found.setdefault(name, set()).add(kind)
    return Proof(
        "tensorrt",
        tuple(
            Executed(each.name, each.macs, asked.get(each.node, "fp32"), _only(found.get(each.node, ())))
            for each in layers(source)
        ),
    )


def _only(kinds: Collection[str]) -> str:
    """The type, if there is one: a node whose parts went different ways proves nothing."""
    return next(iter(kinds)) if len(kinds) == 1 else UNKNOWN


def _broken(proof: Proof, binding: Collection[str]) -> list[Executed]:
    known = {*BINDING, "int8"}
    return [each for each in proof.wrong if each.asked in binding and each.got in known]


def types_of(model: ModelProto) -> dict[str, Precision]:
    """Node → what the file says that it computes in: INT8 between Q/DQ pairs, else the type of what it reads."""
    types = element_types(model)
    makers = {name: node for node in model.graph.node for name in node.output}
    return {node.name: _type_of(node, types, makers) for node in model.graph.node if node.op_type in COMPUTING}


def _type_of(node: NodeProto, types: Mapping[str, int], makers: Mapping[str, NodeProto]) -> Precision:
    taken = [makers.get(name) for name in node.input[:2]]
    if all(maker is not None and maker.op_type == "DequantizeLinear" for maker in taken):
        return "int8"
    return _OF_ONNX.get(types.get(node.input[0], TensorProto.FLOAT), "fp32")
