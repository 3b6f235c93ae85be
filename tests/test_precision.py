"""Types in the ONNX graph: calibration, INT8, opset 17."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixed_onnx import SHAPE, Floats, bounds, distance
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.helper import make_node, make_opsetid
from small_onnx import small

from thinet_deploy.errors import DataError, GateError, MissingError, ModelError, UnknownNameError
from thinet_deploy.export import INPUT
from thinet_deploy.precision import calibration
from thinet_deploy.precision.accuracy_gate import Judge, outputs, quantise_within
from thinet_deploy.precision.calibration import BINS, METHODS, Values, limits, observe
from thinet_deploy.precision.downgrade import to_opset_17
from thinet_deploy.precision.graph import layers, opset_of, read_onnx
from thinet_deploy.precision.int8 import left_out, quantisable, quantise
from thinet_deploy.precision.weights import S8S8, U8S7, U8S8, Layout

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


# ---------------------------------------------------------------------------------------------- reading


def test_layers_have_the_modules_names_and_costs(mixed_model: ModelProto) -> None:
    found = {each.name: each.macs for each in layers(mixed_model)}
    pixels = 17 * 17
    assert found == {
        "stem": pixels * 13 * 3 * 9,
        "conv": pixels * 13 * 13 * 9,
        "left": pixels * 5 * 13,
        "right": pixels * 6 * 13 * 9,
        "depth": 8 * 8 * 11 * 9,
        "hidden": 11 * 9,
        "linear": 9 * 4,
    }


@pytest.mark.parametrize("damage", ["cut", "text", "absent"])
def test_a_damaged_onnx_is_one_message(damage: str, mixed_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    if damage != "absent":
        file.write_bytes(mixed_file.read_bytes()[:-300] if damage == "cut" else b"not a network")
    with pytest.raises(ModelError, match=r"net\.onnx (is no sound ONNX file|cannot be read)"):
        read_onnx(file)


def test_an_operator_nobody_knows_is_named(mixed_images: Floats) -> None:
    strange = make_node("Frobnicate", ["x"], ["y"], domain="elsewhere")
    odd = small([strange], {}, {"x": ["n", *SHAPE], "y": ["n", *SHAPE]})
    odd.opset_import.append(make_opsetid("elsewhere", 1))
    with pytest.raises(ModelError, match=r"ONNX Runtime refuses the network.*Frobnicate"):
        observe(odd, lambda: [mixed_images])


# ---------------------------------------------------------------------------------------------- calibration


def test_extremes_and_histograms_are_those_of_all_images(
    mixed_model: ModelProto, mixed_images: Floats, mixed_values: dict[str, Values]
) -> None:
    taken = mixed_values[INPUT]
    assert (taken.low, taken.high) == (mixed_images.min(), mixed_images.max())
    assert taken.counts.sum() == mixed_images.size
    expected, _ = np.histogram(mixed_images, BINS, (taken.low, taken.high))
    # A value on an edge may fall on either side of it in float32.
    assert np.abs(np.cumsum(expected) - np.cumsum(taken.counts)).max() <= 3
    assert {
        mixed_values[name].low for node in mixed_model.graph.node if node.op_type == "Relu" for name in node.output
    } == {0.0}


def test_too_few_images_are_refused(mixed_model: ModelProto, mixed_images: Floats) -> None:
    with pytest.raises(DataError, match="There are 15 calibration images, but at least 16"):
        observe(mixed_model, lambda: [mixed_images[:15]])


def test_outputs_that_are_not_finite_are_named(mixed_model: ModelProto, mixed_images: Floats) -> None:
    broken = mixed_images.copy()
    broken[3, 0, 0, 0] = np.nan
    for batches in ([broken], [mixed_images, broken], [broken, mixed_images]):
        with pytest.raises(ModelError, match="not finite on the calibration images"):
            observe(mixed_model, lambda batches=batches: batches)  # type: ignore[misc]


def histogram(data: NDArray[Any]) -> Values:
    counts, _ = np.histogram(data, BINS)
    return Values(float(data.min()), float(data.max()), counts.astype(np.float64))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from(METHODS), st.sampled_from(["normal", "relu", "constant", "shifted"]))
def test_limits_hold_zero_and_lie_within_the_values(seed: int, method: Any, kind: str) -> None:
    data = np.random.default_rng(seed).standard_normal(3000) ** 3
    data = {"normal": data, "relu": np.maximum(data, 0), "constant": data * 0 + 2, "shifted": data + 1e3}[kind]
    low, high = limits(histogram(data), method)
    assert low <= 0 <= high
    assert min(data.min(), 0) - 1e-6 <= low <= high <= max(data.max(), 0) * (1 + 1e-6) + 1e-6


def test_a_single_outlier_is_cut_off_by_percentile_and_entropy_only() -> None:
    data = np.random.default_rng(0).standard_normal(200_000)
    data[0] = 100.0
    high = {method: limits(histogram(data), method)[1] for method in METHODS}
    assert high["min-max"] == 100.0
    assert 2 < high["percentile"] < 10
    assert 2 < high["entropy"] < 10


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="calibration method called 'entropie'"):
        limits(histogram(np.arange(9.0)), "entropie")  # type: ignore[arg-type]  # on purpose


def test_without_onnxruntime_the_message_says_what_to_install(
    mixed_model: ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingError, match=r"thinet-deploy\[onnxruntime\]"):
        calibration.session(mixed_model)


# ---------------------------------------------------------------------------------------------- INT8


@pytest.mark.parametrize("layout", [U8S8, S8S8, U8S7], ids=lambda each: str(each.name))
def test_int8_is_near_and_has_its_layout(
    layout: Layout, mixed_model: ModelProto, mixed_images: Floats, mixed_values: dict[str, Values]
) -> None:
    before = mixed_model.SerializeToString()
    small_ints = quantise(mixed_model, bounds(mixed_values), layout)
    assert mixed_model.SerializeToString() == before, "what was given is left as it is"
    exact, got = outputs(mixed_model, mixed_images), outputs(small_ints, mixed_images)
    assert 0 < distance(exact, got) < 0.05
    stored = {each.name: numpy_helper.to_array(each) for each in small_ints.graph.initializer}
    activations = {stored[node.input[2]].dtype for node in small_ints.graph.node if node.op_type == "QuantizeLinear"}
    assert activations == {np.dtype(np.uint8 if layout.unsigned else np.int8)}
    biases = [each for each in stored.values() if each.dtype == np.int32 and each.any()]
    assert bool(biases) == layout.bias, "TensorRT's parser rejects a quantised bias"
    weights = [each for each in stored.values() if each.dtype == np.int8 and each.ndim > 1]
    assert len(weights) == 7
    assert {int(np.abs(each).max()) for each in weights} == {layout.weight_most}
    if not layout.unsigned:
        assert {int(stored[node.input[2]]) for node in small_ints.graph.node if node.op_type == "QuantizeLinear"} == {0}
        fed = {name for node in small_ints.graph.node if node.op_type == "QuantizeLinear" for name in node.input[:1]}
        convolved = {node.output[0] for node in small_ints.graph.node if node.op_type == "Conv"}
        read_by_relu = {node.input[0] for node in small_ints.graph.node if node.op_type == "Relu"}
        assert not fed & convolved & read_by_relu, "nothing stands between a convolution and its ReLU"


def test_every_filter_has_a_step_of_its_own(mixed_model: ModelProto, mixed_values: dict[str, Values]) -> None:
    uneven = ModelProto()
    uneven.CopyFrom(mixed_model)
    for each in uneven.graph.initializer:
        if each.name == "left.weight":
            weight = numpy_helper.to_array(each).copy()
            weight[0] *= 1000
            weight[1] = 0
            each.CopyFrom(numpy_helper.from_array(weight, each.name))
    made = quantise(uneven, bounds(mixed_values), S8S8)
    steps = next(
        numpy_helper.to_array(i)
        for i in made.graph.initializer
        if i.name.startswith("left.weight:") and i.name.endswith(":steps")
    )
    assert np.abs(steps).max((1, 2, 3)).tolist() == [127, 0, 127, 127, 127]


def test_nodes_that_are_to_stay_do(
    mixed_model: ModelProto, mixed_images: Floats, mixed_values: dict[str, Values]
) -> None:
    names = quantisable(mixed_model)
    untouched = quantise(mixed_model, bounds(mixed_values), U8S8, keep=names)
    assert not any("Quantize" in node.op_type for node in untouched.graph.node)
    assert np.array_equal(outputs(untouched, mixed_images), outputs(mixed_model, mixed_images))
    one = quantise(mixed_model, bounds(mixed_values), U8S8, keep=names[1:])
    assert sum(each.data_type == TensorProto.INT8 and len(each.dims) > 1 for each in one.graph.initializer) == 1


def test_the_worst_layer_goes_back_and_is_named(mixed_images: Floats) -> None:
    """A layer of one value a thousand times the others: with one step for all of them the others are lost."""
    mixed_images = mixed_images + 3 * np.random.default_rng(1).standard_normal((96, 3, 1, 1)).astype(np.float32)
    torch.manual_seed(0)
    weight = torch.randn(6, 3, 1, 1).numpy()
    weight[0] *= 3000
    readout = torch.randn(4, 6, 1, 1).numpy()
    readout[:, 0] /= 3000 * 1e6
    nodes = [
        make_node("Conv", ["x", "first.weight"], ["a"]),
        make_node("Relu", ["a"], ["b"]),
        make_node("Conv", ["b", "second.weight"], ["c"]),
        make_node("GlobalAveragePool", ["c"], ["d"]),
        make_node("Flatten", ["d"], ["y"]),
    ]
    stored = {"first.weight": weight.astype(np.float32), "second.weight": readout.astype(np.float32)}
    net = small(nodes, stored, {"x": ["n", *SHAPE], "y": ["n", 4]}, 17)
    seen, judge = observe(net, lambda: [mixed_images]), Judge(mixed_images)
    done = quantise_within(net, seen, S8S8, judge, 1, lambda: [mixed_images])
    assert list(done.kept.values()) == ["second"]
    assert done.before == 100, "without labels it is agreement with the float32 network"
    assert done.after >= 99
    everything = quantise(net, {name: limits(each, done.method) for name, each in seen.items()}, S8S8)
    assert (outputs(everything, mixed_images).argmax(1) == outputs(net, mixed_images).argmax(1)).mean() < 0.9
    with pytest.raises(GateError, match=r"costs more than --max-drop -1 allows.*worst: second, first") as failure:
        quantise_within(net, seen, S8S8, Judge(mixed_images, np.full(len(mixed_images), 9)), -1, lambda: [mixed_images])
    assert failure.value.exit_code == 1


def test_layers_whose_values_are_not_finite_stay_in_float32_and_are_named(mixed_images: Floats) -> None:
    rng = np.random.default_rng(0)
    nodes = [
        make_node("Conv", ["x", "first.weight"], ["a"]),
        make_node("Greater", ["a", "zero"], ["seen"]),
        make_node("Where", ["seen", "a", "never"], ["masked"]),
        make_node("Conv", ["masked", "second.weight"], ["b"]),
        make_node("Greater", ["b", "far"], ["there"]),
        make_node("Where", ["there", "b", "zero"], ["finite"]),
        make_node("GlobalAveragePool", ["finite"], ["c"]),
        make_node("Flatten", ["c"], ["y"]),
    ]
    stored = {
        "first.weight": rng.normal(size=(6, 3, 1, 1)).astype(np.float32),
        "second.weight": np.abs(rng.normal(size=(4, 6, 1, 1))).astype(np.float32),
        "zero": np.float32(0),
        "never": np.float32(-np.inf),
        "far": np.float32(-1e30),
    }
    net = small(nodes, stored, {"x": ["n", *SHAPE], "y": ["n", 4]}, 17)
    done = quantise_within(
        net, observe(net, lambda: [mixed_images]), S8S8, Judge(mixed_images), 100, lambda: [mixed_images]
    )
    assert list(done.unbounded.values()) == ["second"]
    kinds = {each.op_type for each in done.model.graph.node}
    assert "QuantizeLinear" in kinds, "the first one is in INT8"
    assert sum(each.data_type == TensorProto.INT8 and len(each.dims) > 1 for each in done.model.graph.initializer) == 1


def test_what_int8_leaves_out_is_named() -> None:
    nodes = [
        make_node("ConvTranspose", ["x", "up.weight"], ["a"], name="up"),
        make_node("MatMul", ["a", "a"], ["y"], name="square"),
    ]
    net = small(nodes, {"up.weight": np.ones((3, 2, 1, 1), np.float32)}, {"x": ["n", 3, 5, 5], "y": ["n", 2, 5, 5]})
    assert left_out(net) == {"up": "ConvTranspose without INT8 here", "square": "MatMul without INT8 here"}
    assert quantisable(net) == []


@pytest.mark.parametrize("shape", [(2, 5, 4), (5,)])
def test_a_stored_factor_that_is_no_matrix_stays_in_float32(shape: tuple[int, ...]) -> None:
    nodes = [make_node("MatMul", ["x", "factor"], ["y"], name="product")]
    shapes = {"x": ["n", 2, 3, 5], "y": ["n", 2, 3, 4] if len(shape) > 1 else ["n", 2, 3]}
    net = small(nodes, {"factor": np.ones(shape, np.float32)}, shapes)
    assert left_out(net) == {"product": "MatMul without INT8 here"}
    assert quantisable(net) == []


# ---------------------------------------------------------------------------------------------- opset 17


def test_a_network_with_a_mean_goes_down_to_17(mixed_model: ModelProto, mixed_images: Floats) -> None:
    assert "ReduceMean" in {node.op_type for node in mixed_model.graph.node}
    older = to_opset_17(mixed_model)
    assert opset_of(older) == 17
    assert "GlobalAveragePool" in {node.op_type for node in older.graph.node}
    assert distance(outputs(mixed_model, mixed_images), outputs(older, mixed_images)) < 1e-6
