"""BF16 files: opset 22 where nothing but types has changed, and what they mean, computed without BF16 kernels."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from mixed_onnx import SHAPE, Floats, Mixed, distance
from onnx import ModelProto, TensorProto
from onnx.helper import make_node
from small_onnx import small

from thinet_deploy.errors import TargetError
from thinet_deploy.export import export_onnx
from thinet_deploy.precision.accuracy_gate import outputs, speaking
from thinet_deploy.precision.graph import opset_of, read_onnx
from thinet_deploy.precision.half import to_half
from thinet_deploy.precision.plan import plan_precision
from thinet_deploy.precision.rounded import in_float32
from thinet_deploy.precision.upgrade import to_opset_22
from thinet_deploy.target import load_profile

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> ModelProto:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    export_onnx(Mixed(), SHAPE, path, opset=20, ir_version=9)
    return read_onnx(path)


def test_opset_22_says_the_same(net: ModelProto, mixed_images: Floats) -> None:
    newer = to_opset_22(net)
    assert (opset_of(net), opset_of(newer), newer.ir_version) == (20, 22, 10)
    assert np.array_equal(outputs(net, mixed_images), outputs(newer, mixed_images))


@pytest.mark.parametrize("operator", ["GroupNormalization", "QuantizeLinear", "DequantizeLinear"])
def test_operators_that_learnt_more_than_types_are_refused(operator: str) -> None:
    changed = small([make_node(operator, ["x", "s", "b"], ["y"], name="it")], {}, {"x": ["n"], "y": ["n"]}, opset=20)
    with pytest.raises(TargetError, match=rf"{operator} \(it\) does not mean in opset 22 what it means in opset 20"):
        to_opset_22(changed)


def test_every_other_opset_is_refused(mixed_model: ModelProto) -> None:
    with pytest.raises(TargetError, match="starts at opset 20, but the file has 18"):
        to_opset_22(mixed_model)


@pytest.mark.parametrize("literal", [False, True])
def test_every_value_is_rounded(net: ModelProto, mixed_images: Floats, literal: bool) -> None:
    half = to_half(net, "bf16")
    got = speaking(half, literal=literal)(mixed_images)
    assert np.array_equal(got, got.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert 0.001 < distance(outputs(net, mixed_images), got) < 0.03
    assert {each.data_type for each in half.graph.initializer} <= {TensorProto.BFLOAT16, TensorProto.INT64}


def test_one_product_is_that_of_rounded_numbers(mixed_images: Floats) -> None:
    """By hand: both factors rounded, summed in float32, the sum rounded."""
    x = mixed_images[:5, 0, 0]
    weight = np.random.default_rng(3).standard_normal((x.shape[1], 4)).astype(np.float32)
    shapes = {"x": ["n", x.shape[1]], "y": ["n", 4]}
    half = to_half(small([make_node("MatMul", ["x", "w"], ["y"])], {"w": weight}, shapes, opset=20), "bf16")
    short = [each.astype(ml_dtypes.bfloat16).astype(np.float64) for each in (x, weight)]
    expected = (short[0] @ short[1]).astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(outputs(half, x), expected)


def test_a_file_without_bf16_stays_as_it_is(net: ModelProto) -> None:
    assert in_float32(net) is net


def test_openvino_says_what_onnx_runtime_says(net: ModelProto, mixed_images: Floats, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed, and nothing else here runs bf16 ONNX")
    half = to_half(net, "bf16")
    onnx.save(half, tmp_path / "half.onnx")
    compiled = openvino.Core().compile_model(str(tmp_path / "half.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert distance(outputs(half, mixed_images[:4]), compiled(mixed_images[:4])[0]) < 0.03


def test_stacks_that_do_not_read_it_are_refused_and_later_ones_named() -> None:
    with pytest.raises(TargetError, match=r"takes opset 22, .* of jetpack-6\.2 is known to read opset 20") as why:
        plan_precision(load_profile("jetson-agx-orin"), "bf16", [])
    assert "--target jetson-agx-orin@jetpack-7.2 or --target jetson-agx-orin@jetpack-7.2.2" in why.value.hint
    assert "--precision fp16" in why.value.hint


@pytest.mark.parametrize("target", ["jetson-thor", "nvidia-gpu", "jetson-agx-orin@jetpack-7.2"])
def test_it_is_written_where_it_is_asked_for(target: str) -> None:
    assert plan_precision(load_profile(target), "bf16", []).files == ("bf16",)
    assert plan_precision(load_profile(target), None, []).files == ("fp16", "int8")
