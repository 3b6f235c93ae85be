"""TensorRT's inspector, in the forms of 8, 10 and 11, beside the types of the ONNX file. No GPU was at hand.

The first two are those of inspector outputs that NVIDIA published (TensorRT's trt-engine-explorer, examples), the third
is that of what TensorRT-RTX says of its engines (test_tensorrt_networks.py has its own words).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from onnx import ModelProto

from thinet_deploy.artifact import write_json
from thinet_deploy.precision.calibration import Values, limits
from thinet_deploy.precision.graph import layers
from thinet_deploy.precision.half import to_half
from thinet_deploy.precision.inspected import inspect_built, proof_of, types_of
from thinet_deploy.precision.int8 import quantisable, quantise
from thinet_deploy.precision.weights import S8S8, U8S8

FP16 = "Channel major FP16 format where channel % 8 == 0"
FP32 = "Row major linear FP32"


SPLIT = {FP16: ("Half", "(NHWC) Channel major format"), FP32: ("Float", "(Linear) Row major linear format")}


def tensor(text: str, form: int) -> dict[str, str]:
    """What it says of a tensor: TensorRT 11 has the type and the layout apart."""
    return {"Format/Datatype": text} if form < 11 else dict(zip(("Datatype", "Format"), SPLIT[text], strict=True))


def said(kinds: dict[str, str], *, form: int) -> str:
    """What the inspector says of an engine with a layer for each node, and kernels around it that only move data."""
    found: list[Any] = ["a layer whose details were not kept"]
    for number, (node, text) in enumerate(kinds.items()):
        names = [f"{node}.weight", f"quantise {node}", node, f"relu {number}"]
        name = " + ".join(names) if form == 8 else f"__myl_{number}"
        layer = {"Name": name, "LayerType": "CaskConvolution", "Inputs": [tensor(text, form)]}
        layer |= {} if form == 8 else {"Metadata": "\x1e".join(f"[ONNX Layer: {each}]" for each in names)}
        moved = {"Name": f"Reformatting CopyNode for Input Tensor 0 to {name}", "LayerType": "Reformat"}
        found += [{**layer, **moved, "Inputs": [tensor(FP32, form)]}, layer]
    pool = {"Name": "pool", "LayerType": "CudaPooling", "Inputs": [tensor(FP32, form)]}
    return json.dumps({"Layers": [*found, pool]})


@pytest.mark.parametrize("form", [8, 10, 11])
def test_shares_are_those_of_the_layers_macs(form: int, mixed_model: ModelProto) -> None:
    every = list(layers(mixed_model))
    total = sum(each.macs for each in every)
    half = to_half(mixed_model, "fp16", keep=[every[0].node])
    kinds = {each.node: FP32 if place == 0 else FP16 for place, each in enumerate(every)}
    proof = proof_of(said(kinds, form=form), mixed_model, half)
    assert proof.wrong == ()
    assert proof.shares["fp32"] == pytest.approx(100 * every[0].macs / total)
    assert sum(proof.shares.values()) == pytest.approx(100)
    wrong = proof_of(said({**kinds, every[1].node: FP32}, form=form), mixed_model, half)
    assert [(each.layer, each.asked, each.got) for each in wrong.wrong] == [(every[1].name, "fp16", "fp32")]


def test_what_names_no_layer_or_two_types_proves_nothing(mixed_model: ModelProto) -> None:
    nodes = [each.node for each in layers(mixed_model)]
    half = to_half(mixed_model, "fp16")
    foreign = said({f"{{ForeignNode[{nodes[0]}...{nodes[-1]}]}}": FP32}, form=8)
    assert {each.got for each in proof_of(foreign, mixed_model, half).layers} == {"unknown"}
    both = json.loads(said(dict.fromkeys(nodes, FP16), form=10))
    both["Layers"] += json.loads(said({nodes[0]: FP32}, form=10))["Layers"]
    first, *rest = proof_of(json.dumps(both), mixed_model, half).layers
    assert (first.got, {each.got for each in rest}) == ("unknown", {"fp16"})


def test_a_kernel_that_casts_for_a_layer_is_not_taken_for_it(mixed_model: ModelProto) -> None:
    """It names the layer too: seen of TensorRT-RTX, in front of the first convolution and behind those in INT8."""
    first, *rest = (each.node for each in layers(mixed_model))
    every = json.loads(said(dict.fromkeys([first, *rest], FP16), form=11))
    cast = {"Name": "__myl_CastReplConc_myl0_1", "LayerType": "kgen", "Inputs": [tensor(FP32, 11)]}
    cast["Metadata"] = f"[ONNX Layer: to half input][ONNX Layer: {first}]"
    every["Layers"].insert(0, cast)
    half = to_half(mixed_model, "fp16")
    assert proof_of(json.dumps(every), mixed_model, half).wrong == ()
    alone = {"Layers": [cast, *json.loads(said(dict.fromkeys(rest, FP16), form=11))["Layers"]]}
    (wrong,) = proof_of(json.dumps(alone), mixed_model, half).wrong
    assert (wrong.asked, wrong.got) == ("fp16", "fp32"), "where nothing else has the layer, it is in there"


@pytest.mark.parametrize("layout", [S8S8, U8S8], ids=lambda layout: layout.name)
def test_the_types_of_a_file_are_those_that_it_was_given(
    layout: Any, mixed_model: ModelProto, mixed_values: dict[str, Values]
) -> None:
    known = {name: limits(each, "min-max") for name, each in mixed_values.items()}
    every, chosen = [each.node for each in layers(mixed_model)], quantisable(mixed_model)
    computing = [node for node in chosen if node in every]
    assert types_of(mixed_model) == dict.fromkeys(every, "fp32")
    made = types_of(quantise(mixed_model, known, layout, keep=[computing[0]]))
    assert {node for node, kind in made.items() if kind == "int8"} == {*computing[1:]}
    assert set(types_of(to_half(mixed_model, "fp16")).values()) == {"fp16"}


@pytest.mark.parametrize(("typed", "broken"), [(True, 1), (False, 0)], ids=["10", "8"])
def test_only_what_binds_tensorrt_can_be_broken(
    typed: bool, broken: int, mixed_model: ModelProto, mixed_values: dict[str, Values], tmp_path: Path
) -> None:
    source, half, engine = (tmp_path / name for name in ("model.onnx", "half.onnx", "model.engine"))
    source.write_bytes(mixed_model.SerializeToString())
    half.write_bytes(to_half(mixed_model, "fp16").SerializeToString())
    assert inspect_built(engine, source, half) == {}, "the device could not tell"
    first, *rest = (each.node for each in layers(mixed_model))
    write_json(engine.with_suffix(".build.json"), {"strongly_typed": typed})
    text = said({first: FP32, **dict.fromkeys(rest, FP16)}, form=10)
    engine.with_suffix(".layers.json").write_text(text)
    found = inspect_built(engine, source, half)
    assert found
    assert len(found["broken"]) == broken
    assert "was to be fp16 and is fp32" in found["text"]
    known = {name: limits(each, "min-max") for name, each in mixed_values.items()}
    half.write_bytes(quantise(mixed_model, known, S8S8).SerializeToString())
    eight = inspect_built(engine, source, half)
    assert eight
    assert eight["broken"] == [], "Q/DQ pairs allow INT8"
