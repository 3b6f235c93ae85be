"""What engines are found to execute, layer by layer: another type than was asked for shows."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from mixed_onnx import bounds
from onnx import ModelProto
from onnx.helper import make_node
from small_onnx import small

from thinet_deploy.interfaces import Conversion, Precision
from thinet_deploy.precision import executed
from thinet_deploy.precision.calibration import Values
from thinet_deploy.precision.executed import prove_precision
from thinet_deploy.precision.graph import layers
from thinet_deploy.precision.held import Kernel
from thinet_deploy.precision.int8 import quantise
from thinet_deploy.precision.weights import S8S8, U8S8
from thinet_deploy.registry import convert

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
RUNTIMES = ["openvino", "onnxruntime"]


def engine(runtime: str, file: Path, folder: Path, precision: Precision) -> Path:
    pytest.importorskip(runtime, reason=f"{runtime} is not installed")
    folder.mkdir()
    return folder / convert(runtime, Conversion(file, folder, precision), folder).path


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_all_layers_are_read_back_in_the_type_asked_for(
    runtime: str,
    precision: Precision,
    mixed_file: Path,
    mixed_model: ModelProto,
    mixed_values: dict[str, Values],
    tmp_path: Path,
) -> None:
    file = mixed_file
    if precision == "int8":
        onnx.save(quantise(mixed_model, bounds(mixed_values), U8S8), file := tmp_path / "q.onnx")
    proof = prove_precision(runtime, engine(runtime, file, tmp_path / "e", precision), mixed_model, precision)
    assert [each.layer for each in proof.layers] == [each.name for each in layers(mixed_model)]
    assert proof.wrong == ()
    assert proof.shares == {precision: 100.0}
    assert proof.describe() == f"{precision} 100.0 % of the MACs"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_layers_that_stay_in_float32_are_expected_there(
    runtime: str, mixed_model: ModelProto, mixed_values: dict[str, Values], tmp_path: Path
) -> None:
    stays = next(each for each in layers(mixed_model) if each.name == "right").node
    onnx.save(quantise(mixed_model, bounds(mixed_values), U8S8, keep=[stays]), file := tmp_path / "q.onnx")
    built = engine(runtime, file, tmp_path / "e", "int8")
    proof = prove_precision(runtime, built, mixed_model, "int8", keep=[stays])
    assert {each.layer: each.got for each in proof.layers}["right"] == "fp32"
    assert proof.wrong == ()
    assert [each.layer for each in prove_precision(runtime, built, mixed_model, "int8").wrong] == ["right"]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_fp32_in_place_of_int8_is_found(
    runtime: str, mixed_file: Path, mixed_model: ModelProto, tmp_path: Path
) -> None:
    proof = prove_precision(runtime, engine(runtime, mixed_file, tmp_path / "e", "fp32"), mixed_model, "int8")
    assert [each.layer for each in proof.wrong] == [each.name for each in layers(mixed_model)]
    assert "stem was to be int8 and is fp32" in proof.describe()


@pytest.mark.parametrize(
    ("kernels", "got"),
    [
        ([Kernel(("node_a",), "int8"), Kernel(("relu", "node_b"), "int8")], {"a": "int8", "b": "int8"}),
        ([Kernel(("node_a", "node_b"), "int8")], {"a": "int8", "b": "int8"}),  # one kernel for two layers
        ([Kernel(("node_a",), "int8"), Kernel(("who knows",), "fp32")], {"a": "int8", "b": "fp32"}),
        ([Kernel(("what",), "int8"), Kernel(("who knows",), "fp32")], {"a": "fp32 or int8", "b": "fp32 or int8"}),
        ([Kernel(("node_a",), "int8")], {"a": "int8", "b": "folded"}),
        ([Kernel(("sum",), "fp32"), Kernel(("node_a",), "int8")], {"a": "int8", "b": "fp32"}),
    ],
)
def test_no_executed_kernel_is_overlooked(kernels: list[Kernel], got: dict[str, str]) -> None:
    """Whatever names a runtime gives, a kernel in another type shows."""
    nodes = [
        make_node("Conv", ["x", "a.weight"], ["one"], name="node_a"),
        make_node("Conv", ["x", "b.weight"], ["two"], name="node_b"),
        make_node("Add", ["one", "two"], ["sum"]),
        make_node("Relu", ["sum"], ["y"]),
    ]
    weights = {name: np.ones((2, 3, 1, 1), np.float32) for name in ("a.weight", "b.weight")}
    net = small(nodes, weights, {"x": ["n", 3, 4, 4], "y": ["n", 2, 4, 4]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(executed._READERS, "openvino", lambda *_: kernels)
        proof = executed.prove_precision("openvino", Path("none"), net, "int8")
    assert {each.layer: each.got for each in proof.layers} == got
    wrong = {layer for layer, kind in got.items() if kind not in ("int8", "folded")}
    assert {each.layer for each in proof.wrong} == wrong


def test_onnxruntime_does_not_run_tensorrts_layout_in_int8(
    mixed_model: ModelProto, mixed_values: dict[str, Values], tmp_path: Path
) -> None:
    """Why there are two layouts."""
    onnx.save(quantise(mixed_model, bounds(mixed_values), S8S8), file := tmp_path / "q.onnx")
    proof = prove_precision("onnxruntime", engine("onnxruntime", file, tmp_path / "e", "int8"), mixed_model, "int8")
    assert "stem" in {each.layer for each in proof.wrong}


def test_bf16_in_place_of_fp32_is_found(mixed_file: Path, mixed_model: ModelProto, tmp_path: Path) -> None:
    from thinet_deploy.environment import cpu_precisions, fingerprint

    if "bf16" not in cpu_precisions(fingerprint()["cpu"]["flags"]):
        pytest.skip("this CPU has neither AVX512_BF16 nor AMX, so no runtime runs bf16 on it")
    built = engine("openvino", mixed_file, tmp_path / "e", "bf16")
    assert prove_precision("openvino", built, mixed_model, "bf16").shares == {"bf16": 100.0}
    # OpenVINO's own default on such a CPU: what happens to those who ask for nothing.
    with pytest.MonkeyPatch.context() as patch:
        from thinet_deploy.on_device import engines

        patch.setattr(engines._OpenVino, "hints", {"fp32": "bf16"})
        assert {each.got for each in prove_precision("openvino", built, mixed_model, "fp32").wrong} == {"bf16"}
