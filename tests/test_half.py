"""Half precision in the ONNX graph: near, half as large, and float32 where values would overflow."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from mixed_onnx import Floats, distance
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.helper import make_graph, make_node, make_tensor_value_info
from small_onnx import small

from thinet_deploy.errors import ModelError
from thinet_deploy.export import run_onnx
from thinet_deploy.precision.accuracy_gate import outputs
from thinet_deploy.precision.calibration import Values, observe
from thinet_deploy.precision.half import kept_names, overflowing, to_half

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.mark.parametrize("keep_io", [True, False])
def test_fp16_is_near_and_half_as_large(keep_io: bool, mixed_model: ModelProto, mixed_images: Floats) -> None:
    half = to_half(mixed_model, "fp16", keep_io=keep_io)
    border = TensorProto.FLOAT if keep_io else TensorProto.FLOAT16
    assert {each.type.tensor_type.elem_type for each in (*half.graph.input, *half.graph.output)} == {border}
    assert [each.name for each in half.graph.output] == [each.name for each in mixed_model.graph.output]
    assert 0 < distance(outputs(mixed_model, mixed_images), outputs(half, mixed_images)) < 0.005
    stored = {each.data_type for each in half.graph.initializer}
    assert TensorProto.FLOAT not in stored
    assert sum(node.op_type == "Cast" for node in half.graph.node) == (2 if keep_io else 0)


def test_the_reference_evaluator_agrees_on_fp16(mixed_model: ModelProto, mixed_images: Floats, tmp_path: Path) -> None:
    onnx.save(to_half(mixed_model, "fp16"), tmp_path / "half.onnx")
    assert (
        distance(outputs(mixed_model, mixed_images[:2]), run_onnx(tmp_path / "half.onnx", mixed_images[:2])["logits"])
        < 0.005
    )


def test_what_would_overflow_stays_in_float32_and_is_named(
    mixed_model: ModelProto, mixed_images: Floats, mixed_values: dict[str, Values]
) -> None:
    assert overflowing(mixed_model, mixed_values) == {}
    large = ModelProto()
    large.CopyFrom(mixed_model)
    for each in large.graph.initializer:
        if each.name == "right.weight":
            each.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(each) * np.float32(1e5), each.name))
    why = overflowing(large, observe(large, lambda: [mixed_images]))
    assert "right" in kept_names(large, why)
    assert "stem" not in kept_names(large, why)
    assert "65504" in kept_names(large, why)["right"]
    exact = outputs(large, mixed_images)
    assert distance(exact, outputs(to_half(large, "fp16", keep=why), mixed_images)) < 0.01
    assert not distance(exact, outputs(to_half(large, "fp16"), mixed_images)) < 0.01, "it would overflow"


def test_operators_that_lose_too_much_stay(mixed_values: dict[str, Values]) -> None:
    net = small([make_node("Softmax", ["x"], ["y"], name="soft")], {}, {"x": ["n", 3], "y": ["n", 3]})
    assert overflowing(net, {}) == {"soft": "Softmax loses too much in FP16"}
    half = to_half(net, "fp16", keep=["soft"], keep_io=False)
    assert [node.op_type for node in half.graph.node] == ["Cast", "Softmax", "Cast", "Identity"]


def test_small_numbers_that_guard_a_division_stay_with_what_leads_there() -> None:
    """In FP16 they are zero, and 0 / 0 is what a dark image gives."""
    nodes: list[Any] = [
        make_node("Add", ["x", "small"], ["sum"], name="add"),
        make_node("Sqrt", ["sum"], ["root"], name="root"),
        make_node("Div", ["x", "root"], ["share"], name="divide"),
        make_node("Mul", ["share", "half"], ["y"], name="after"),
    ]
    for step in range(40):  # two ways each: as many ways through them as there are numbers of 40 bits
        nodes += [make_node("Identity", [f"way{step}" if step else "root"], [f"{side}{step}"]) for side in ("a", "b")]
        nodes.append(make_node("Mul", [f"a{step}", f"b{step}"], [f"way{step + 1}"]))
    stored = {"small": np.float32(1e-8), "half": np.float32(0.5)}
    net = small(nodes, stored, {"x": ["n", 3], "y": ["n", 3]})
    why = overflowing(net, {})
    assert [name for name in why if not name.startswith("n")] == ["add", "root", "divide"]
    assert len(why) == 3 + 3, "no further than the first product"
    assert "smaller than those of FP16" in why["add"]
    zeros = np.zeros((2, 3), np.float32)
    assert np.isfinite(outputs(to_half(net, "fp16", keep=why), zeros)).all()
    assert not np.isfinite(outputs(to_half(net, "fp16"), zeros)).all()
    stored["small"] = np.float32(0.01)
    assert overflowing(small(nodes, stored, {"x": ["n", 3], "y": ["n", 3]}), {}) == {}


def test_what_is_masked_with_minus_infinity_stays(mixed_values: dict[str, Values]) -> None:
    nodes = [
        make_node("Where", ["seen", "x", "never"], ["masked"], name="mask"),
        make_node("ReduceMax", ["masked", "axes"], ["y"], name="most", keepdims=1),
    ]
    stored = {"seen": np.array([True, False, True]), "never": np.float32(-np.inf), "axes": np.array([1])}
    net = small(nodes, stored, {"x": ["n", 3], "y": ["n", 1]})
    images = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    values = observe(net, lambda: [images])
    assert not values["masked"].finite
    assert values["y"].finite
    assert list(overflowing(net, values)) == ["mask", "most"]


def test_control_flow_is_refused() -> None:
    body = make_graph(
        [make_node("Identity", ["x"], ["z"])], "b", [], [make_tensor_value_info("z", TensorProto.FLOAT, None)]
    )
    nodes = [make_node("If", ["yes"], ["y"], name="branch", then_branch=body, else_branch=body)]
    net = small(nodes, {"yes": np.array(True)}, {"x": ["n", 3], "y": ["n", 3]})
    with pytest.raises(ModelError, match=r"branch \(If\) holds a graph of its own"):
        to_half(net, "fp16")
