"""Types in the ONNX graph: calibration, INT8, half precision, opset 17, and what engines are found to execute."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.helper import make_graph, make_node, make_opsetid, make_tensor_value_info
from small_onnx import small
from torch import nn
from torch.nn import functional as F

from thinet_deploy.errors import DataError, GateError, ModelError, TargetError, UnknownNameError
from thinet_deploy.export import INPUT, export_onnx, run_onnx
from thinet_deploy.interfaces import Conversion, Precision
from thinet_deploy.precision import calibration, executed
from thinet_deploy.precision.accuracy_gate import Judge, outputs, quantise_within
from thinet_deploy.precision.calibration import BINS, METHODS, Values, limits, observe
from thinet_deploy.precision.downgrade import to_opset_17
from thinet_deploy.precision.executed import prove_precision
from thinet_deploy.precision.graph import layers, opset_of, read_onnx
from thinet_deploy.precision.half import kept_names, overflowing, to_half
from thinet_deploy.precision.held import Kernel
from thinet_deploy.precision.int8 import left_out, quantisable, quantise
from thinet_deploy.precision.weights import S8S8, U8S7, U8S8, Layout
from thinet_deploy.registry import convert

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
Floats = NDArray[np.float32]
SHAPE = (3, 17, 17)


class Mixed(nn.Module):
    """Odd widths, shortcut, concatenation, depthwise, ceil-mode pool, ReLU6, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 13, 3, padding=1, bias=False), nn.BatchNorm2d(13)
        self.conv = nn.Conv2d(13, 13, 3, padding=1)
        self.left, self.right = nn.Conv2d(13, 5, 1), nn.Conv2d(13, 6, 3, padding=1)
        self.depth = nn.Conv2d(11, 11, 3, padding=1, groups=11)
        self.hidden, self.linear = nn.Linear(11, 9), nn.Linear(9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(x + self.conv(x))
        x = F.max_pool2d(torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1), 3, 2, ceil_mode=True)
        x = F.relu6(self.depth(x)).mean((2, 3))
        scores: torch.Tensor = self.linear(torch.relu(self.hidden(x)))
        return scores


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net, file = Mixed(), tmp_path_factory.mktemp("mixed") / "mixed.onnx"
    nn.init.normal_(net.bn.bias)
    assert net.bn.running_var is not None
    nn.init.uniform_(net.bn.running_var, 0.5, 2)
    export_onnx(net, SHAPE, file, opset=18, ir_version=8)
    return file


@pytest.fixture(scope="module")
def model(path: Path) -> ModelProto:
    return read_onnx(path)


@pytest.fixture(scope="module")
def images() -> Floats:
    return np.random.default_rng(0).standard_normal((96, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def values(model: ModelProto, images: Floats) -> dict[str, Values]:
    return observe(model, lambda: [images[:50], images[50:]])


def bounds(values: dict[str, Values]) -> dict[str, tuple[float, float]]:
    return {name: limits(each, "min-max") for name, each in values.items()}


def distance(exact: Floats, got: Floats) -> float:
    return float(np.abs(exact - got).max() / np.abs(exact).max())


# ---------------------------------------------------------------------------------------------- reading


def test_layers_have_the_modules_names_and_costs(model: ModelProto) -> None:
    found = {each.name: each.macs for each in layers(model)}
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
def test_a_damaged_onnx_is_one_message(damage: str, path: Path, tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    if damage != "absent":
        file.write_bytes(path.read_bytes()[:-300] if damage == "cut" else b"not a network")
    with pytest.raises(ModelError, match=r"net\.onnx (is no sound ONNX file|cannot be read)"):
        read_onnx(file)


def test_an_operator_nobody_knows_is_named(images: Floats) -> None:
    strange = make_node("Frobnicate", ["x"], ["y"], domain="elsewhere")
    odd = small([strange], {}, {"x": ["n", *SHAPE], "y": ["n", *SHAPE]})
    odd.opset_import.append(make_opsetid("elsewhere", 1))
    with pytest.raises(ModelError, match=r"ONNX Runtime refuses the network.*Frobnicate"):
        observe(odd, lambda: [images])


# ---------------------------------------------------------------------------------------------- calibration


def test_extremes_and_histograms_are_those_of_all_images(
    model: ModelProto, images: Floats, values: dict[str, Values]
) -> None:
    taken = values[INPUT]
    assert (taken.low, taken.high) == (images.min(), images.max())
    assert taken.counts.sum() == images.size
    expected, _ = np.histogram(images, BINS, (taken.low, taken.high))
    # A value on an edge may fall on either side of it in float32.
    assert np.abs(np.cumsum(expected) - np.cumsum(taken.counts)).max() <= 3
    assert {values[name].low for node in model.graph.node if node.op_type == "Relu" for name in node.output} == {0.0}


def test_too_few_images_are_refused(model: ModelProto, images: Floats) -> None:
    with pytest.raises(DataError, match="There are 15 calibration images, but at least 16"):
        observe(model, lambda: [images[:15]])


def test_outputs_that_are_not_finite_are_named(model: ModelProto, images: Floats) -> None:
    broken = images.copy()
    broken[3, 0, 0, 0] = np.nan
    with pytest.raises(ModelError, match="not finite on the calibration images"):
        observe(model, lambda: [broken])


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


# ---------------------------------------------------------------------------------------------- INT8


@pytest.mark.parametrize("layout", [U8S8, S8S8, U8S7], ids=lambda each: str(each.name))
def test_int8_is_near_and_has_its_layout(
    layout: Layout, model: ModelProto, images: Floats, values: dict[str, Values]
) -> None:
    before = model.SerializeToString()
    small_ints = quantise(model, bounds(values), layout)
    assert model.SerializeToString() == before, "what was given is left as it is"
    exact, got = outputs(model, images), outputs(small_ints, images)
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


def test_every_filter_has_a_step_of_its_own(model: ModelProto, values: dict[str, Values]) -> None:
    uneven = ModelProto()
    uneven.CopyFrom(model)
    for each in uneven.graph.initializer:
        if each.name == "left.weight":
            weight = numpy_helper.to_array(each).copy()
            weight[0] *= 1000
            weight[1] = 0
            each.CopyFrom(numpy_helper.from_array(weight, each.name))
    made = quantise(uneven, bounds(values), S8S8)
    steps = next(
        numpy_helper.to_array(i)
        for i in made.graph.initializer
        if i.name.startswith("left.weight:") and i.name.endswith(":steps")
    )
    assert np.abs(steps).max((1, 2, 3)).tolist() == [127, 0, 127, 127, 127]


def test_nodes_that_are_to_stay_do(model: ModelProto, images: Floats, values: dict[str, Values]) -> None:
    names = quantisable(model)
    untouched = quantise(model, bounds(values), U8S8, keep=names)
    assert not any("Quantize" in node.op_type for node in untouched.graph.node)
    assert np.array_equal(outputs(untouched, images), outputs(model, images))
    one = quantise(model, bounds(values), U8S8, keep=names[1:])
    assert sum(each.data_type == TensorProto.INT8 and len(each.dims) > 1 for each in one.graph.initializer) == 1


def test_the_worst_layer_goes_back_and_is_named(images: Floats) -> None:
    """A layer of one value a thousand times the others: with one step for all of them the others are lost."""
    images = images + 3 * np.random.default_rng(1).standard_normal((96, 3, 1, 1)).astype(np.float32)
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
    seen, judge = observe(net, lambda: [images]), Judge(images)
    done = quantise_within(net, seen, S8S8, judge, 1, lambda: [images])
    assert list(done.kept.values()) == ["second"]
    assert done.before == 100, "without labels it is agreement with the float32 network"
    assert done.after >= 99
    everything = quantise(net, {name: limits(each, done.method) for name, each in seen.items()}, S8S8)
    assert (outputs(everything, images).argmax(1) == outputs(net, images).argmax(1)).mean() < 0.9
    with pytest.raises(GateError, match=r"costs more than --max-drop -1 allows.*worst: second, first") as failure:
        quantise_within(net, seen, S8S8, Judge(images, np.full(len(images), 9)), -1, lambda: [images])
    assert failure.value.exit_code == 1


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


# ---------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("keep_io", [True, False])
def test_fp16_is_near_and_half_as_large(keep_io: bool, model: ModelProto, images: Floats) -> None:
    half = to_half(model, "fp16", keep_io=keep_io)
    border = TensorProto.FLOAT if keep_io else TensorProto.FLOAT16
    assert {each.type.tensor_type.elem_type for each in (*half.graph.input, *half.graph.output)} == {border}
    assert [each.name for each in half.graph.output] == [each.name for each in model.graph.output]
    assert 0 < distance(outputs(model, images), outputs(half, images)) < 0.005
    stored = {each.data_type for each in half.graph.initializer}
    assert TensorProto.FLOAT not in stored
    assert sum(node.op_type == "Cast" for node in half.graph.node) == (2 if keep_io else 0)


def test_the_reference_evaluator_agrees_on_fp16(model: ModelProto, images: Floats, tmp_path: Path) -> None:
    onnx.save(to_half(model, "fp16"), tmp_path / "half.onnx")
    assert distance(outputs(model, images[:2]), run_onnx(tmp_path / "half.onnx", images[:2])["logits"]) < 0.005


def test_what_would_overflow_stays_in_float32_and_is_named(
    model: ModelProto, images: Floats, values: dict[str, Values]
) -> None:
    assert overflowing(model, values) == {}
    large = ModelProto()
    large.CopyFrom(model)
    for each in large.graph.initializer:
        if each.name == "right.weight":
            each.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(each) * np.float32(1e5), each.name))
    why = overflowing(large, observe(large, lambda: [images]))
    assert "right" in kept_names(large, why)
    assert "stem" not in kept_names(large, why)
    assert "65504" in kept_names(large, why)["right"]
    exact = outputs(large, images)
    assert distance(exact, outputs(to_half(large, "fp16", keep=why), images)) < 0.01
    assert not distance(exact, outputs(to_half(large, "fp16"), images)) < 0.01, "it would overflow"


def test_operators_that_lose_too_much_stay(values: dict[str, Values]) -> None:
    net = small([make_node("Softmax", ["x"], ["y"], name="soft")], {}, {"x": ["n", 3], "y": ["n", 3]})
    assert overflowing(net, {}) == {"soft": "Softmax loses too much in FP16"}
    half = to_half(net, "fp16", keep=["soft"], keep_io=False)
    assert [node.op_type for node in half.graph.node] == ["Cast", "Softmax", "Cast", "Identity"]


def test_bf16_needs_the_opset_that_has_it(model: ModelProto) -> None:
    with pytest.raises(TargetError, match="bf16 from opset 22 on, but this file has opset 18"):
        to_half(model, "bf16")


def test_bf16_is_written(images: Floats, tmp_path: Path) -> None:
    torch.manual_seed(0)
    export_onnx(Mixed(), SHAPE, tmp_path / "n.onnx", opset=22, ir_version=10)
    net = read_onnx(tmp_path / "n.onnx")
    half = to_half(net, "bf16")
    assert {each.data_type for each in half.graph.initializer} <= {TensorProto.BFLOAT16, TensorProto.INT64}
    openvino = pytest.importorskip("openvino", reason="openvino is not installed, and nothing else here runs bf16 ONNX")
    onnx.save(half, tmp_path / "h.onnx")
    compiled = openvino.Core().compile_model(str(tmp_path / "h.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    got = compiled(images[:4])[0]
    assert 0 < distance(outputs(net, images[:4]), got) < 0.03


def test_control_flow_is_refused() -> None:
    body = make_graph(
        [make_node("Identity", ["x"], ["z"])], "b", [], [make_tensor_value_info("z", TensorProto.FLOAT, None)]
    )
    nodes = [make_node("If", ["yes"], ["y"], name="branch", then_branch=body, else_branch=body)]
    net = small(nodes, {"yes": np.array(True)}, {"x": ["n", 3], "y": ["n", 3]})
    with pytest.raises(ModelError, match=r"branch \(If\) holds a graph of its own"):
        to_half(net, "fp16")


# ---------------------------------------------------------------------------------------------- opset 17


def test_a_network_with_a_mean_goes_down_to_17(model: ModelProto, images: Floats) -> None:
    assert "ReduceMean" in {node.op_type for node in model.graph.node}
    older = to_opset_17(model)
    assert opset_of(older) == 17
    assert "GlobalAveragePool" in {node.op_type for node in older.graph.node}
    assert distance(outputs(model, images), outputs(older, images)) < 1e-6


# ---------------------------------------------------------------------------------------------- what is executed

RUNTIMES = ["openvino", "onnxruntime"]


def engine(runtime: str, file: Path, folder: Path, precision: Precision) -> Path:
    pytest.importorskip(runtime, reason=f"{runtime} is not installed")
    folder.mkdir()
    return folder / convert(runtime, Conversion(file, folder, precision), folder).path


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_all_layers_are_read_back_in_the_type_asked_for(
    runtime: str, precision: Precision, path: Path, model: ModelProto, values: dict[str, Values], tmp_path: Path
) -> None:
    file = path
    if precision == "int8":
        onnx.save(quantise(model, bounds(values), U8S8), file := tmp_path / "q.onnx")
    proof = prove_precision(runtime, engine(runtime, file, tmp_path / "e", precision), model, precision)
    assert [each.layer for each in proof.layers] == [each.name for each in layers(model)]
    assert proof.wrong == ()
    assert proof.shares == {precision: 100.0}
    assert proof.describe() == f"{precision} 100.0 % of the MACs"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_layers_that_stay_in_float32_are_expected_there(
    runtime: str, model: ModelProto, values: dict[str, Values], tmp_path: Path
) -> None:
    stays = next(each for each in layers(model) if each.name == "right").node
    onnx.save(quantise(model, bounds(values), U8S8, keep=[stays]), file := tmp_path / "q.onnx")
    built = engine(runtime, file, tmp_path / "e", "int8")
    proof = prove_precision(runtime, built, model, "int8", keep=[stays])
    assert {each.layer: each.got for each in proof.layers}["right"] == "fp32"
    assert proof.wrong == ()
    assert [each.layer for each in prove_precision(runtime, built, model, "int8").wrong] == ["right"]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_fp32_in_place_of_int8_is_found(runtime: str, path: Path, model: ModelProto, tmp_path: Path) -> None:
    proof = prove_precision(runtime, engine(runtime, path, tmp_path / "e", "fp32"), model, "int8")
    assert [each.layer for each in proof.wrong] == [each.name for each in layers(model)]
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
    model: ModelProto, values: dict[str, Values], tmp_path: Path
) -> None:
    """Why there are two layouts."""
    onnx.save(quantise(model, bounds(values), S8S8), file := tmp_path / "q.onnx")
    proof = prove_precision("onnxruntime", engine("onnxruntime", file, tmp_path / "e", "int8"), model, "int8")
    assert "stem" in {each.layer for each in proof.wrong}


def test_bf16_in_place_of_fp32_is_found(path: Path, model: ModelProto, tmp_path: Path) -> None:
    from thinet_deploy.environment import cpu_precisions, fingerprint

    if "bf16" not in cpu_precisions(fingerprint()["cpu"]["flags"]):
        pytest.skip("this CPU has neither AVX512_BF16 nor AMX, so no runtime runs bf16 on it")
    built = engine("openvino", path, tmp_path / "e", "bf16")
    assert prove_precision("openvino", built, model, "bf16").shares == {"bf16": 100.0}
    # OpenVINO's own default on such a CPU: what happens to those who ask for nothing.
    with pytest.MonkeyPatch.context() as patch:
        from thinet_deploy import engines

        patch.setattr(engines._OpenVino, "hints", {"fp32": "bf16"})
        assert {each.got for each in prove_precision("openvino", built, model, "fp32").wrong} == {"bf16"}


def test_without_onnxruntime_the_message_says_what_to_install(
    model: ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from thinet_deploy.errors import MissingError

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingError, match=r"thinet-deploy\[onnxruntime\]"):
        calibration.session(model)
