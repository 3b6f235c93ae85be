"""INT8 weights refitted front to back on a network's own moments: walks, what it gains, what it leaves alone."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from torch import nn

from thinet_deploy.export import export_onnx
from thinet_deploy.precision import refit as refitting
from thinet_deploy.precision.accuracy_gate import Judge, outputs, quantise_within
from thinet_deploy.precision.calibration import limits, observe, session
from thinet_deploy.precision.graph import layers, read_onnx
from thinet_deploy.precision.int8 import quantise
from thinet_deploy.precision.refit import refit
from thinet_deploy.precision.walk import Walk
from thinet_deploy.precision.weights import S8S8, U8S8, Consumer, Layout, rounded

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
Floats = NDArray[np.float32]
SHAPE = (3, 12, 12)
COARSE = Layout("U8S4", unsigned=True, bias=True, outputs=True, weight_most=7)
Batches = Callable[[], Iterator[Floats]]


class Branches(nn.Module):
    """A shortcut, a concatenation, groups, a stride with uneven borders, a convolution without bias, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.left, self.right = nn.Conv2d(12, 8, 1, bias=False), nn.Conv2d(12, 8, (3, 1), (2, 2), (1, 0), groups=2)
        self.depth, self.linear = nn.Conv2d(16, 16, 3, groups=16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.conv(x))
        x = torch.cat([torch.relu(self.left(x)[:, :, ::2, ::2]), torch.relu(self.right(x))], 1)
        scores: torch.Tensor = self.linear(torch.relu(self.depth(x)).mean((2, 3)))
        return scores


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelProto:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    export_onnx(Branches(), SHAPE, path, opset=18, ir_version=8)
    return read_onnx(path)


@pytest.fixture(scope="module")
def images() -> Floats:
    rng = np.random.default_rng(0)
    rough = rng.standard_normal((240, 3, 4, 4)).repeat(3, 2).repeat(3, 3)  # neighbours depend on each other
    return (rough + 0.1 * rng.standard_normal((240, *SHAPE))).astype(np.float32)


@pytest.fixture(scope="module")
def batches(images: Floats) -> Batches:
    return lambda: iter([images[:64], images[64:128], images[128:160]])


def bounds(model: ModelProto, batches: Batches) -> dict[str, tuple[float, float]]:
    return {name: limits(each, "percentile") for name, each in observe(model, batches).items()}


def squared(exact: Floats, got: Floats) -> float:
    return float(np.square(exact.astype(np.float64) - got).mean())


def test_a_walk_with_stops_says_what_one_run_says(model: ModelProto, images: Floats) -> None:
    parts = [images[:5], images[5:8]]
    walk, (result,) = Walk(model, parts), [each.name for each in model.graph.output]
    whole = ModelProto()
    whole.CopyFrom(model)
    stops = [next(node for node in model.graph.node if node.name == each.node).output[0] for each in layers(model)]
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in stops if name != result)
    for stop in stops:
        for part, got in zip(parts, walk.to(model, stop), strict=True):
            (want,) = session(whole, literal=True).run([stop], {"input": part})
            np.testing.assert_array_equal(got, want)
    assert set(walk._values) == {result}, "what no later node reads is not kept"


@pytest.mark.parametrize("layout", [U8S8, S8S8, COARSE], ids=lambda each: str(each.name))
def test_a_refitted_network_is_nearer_on_other_images(
    layout: Layout, model: ModelProto, images: Floats, batches: Batches
) -> None:
    found, held = bounds(model, batches), images[160:]
    done = refit(model, found, layout, batches)
    exact = outputs(model, held)
    nearest = squared(exact, outputs(quantise(model, found, layout), held))
    refitted = squared(exact, outputs(quantise(model, found, layout, weights=done.weights), held))
    assert refitted < (0.5 if layout.weight_most == 7 else 0.97) * nearest
    assert set(done.weights) <= set(done.error)
    assert all((share < 1) == (node in done.weights) for node, share in done.error.items())
    whole = [each.steps for each in done.weights.values()]
    assert max(int(np.abs(each).max()) for each in whole) <= layout.weight_most


def test_room_is_taken_by_maps_and_not_by_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, values = tmp_path / "wide.onnx", int(np.prod(SHAPE))
    layered = nn.Sequential(nn.Flatten(), nn.Linear(values, 400), nn.ReLU(), nn.Linear(400, 5))
    export_onnx(layered, SHAPE, path, opset=18, ir_version=8)
    wide, taken, singles = read_onnx(path), list[int](), np.random.default_rng(0).standard_normal((60, 1, *SHAPE), "f4")
    monkeypatch.setattr(refitting, "_BETWEEN", 50 * 4 * 4 * values)  # four tensors in float32, of 50 images

    def one_by_one() -> Iterator[Floats]:
        for number, each in enumerate(singles):
            taken.append(number)
            yield each

    refit(wide, bounds(wide, lambda: iter(singles)), U8S8, one_by_one)
    assert len(taken) == 50


def test_the_file_holds_the_refitted_weights(model: ModelProto, batches: Batches) -> None:
    found = bounds(model, batches)
    done = refit(model, found, U8S8, batches)
    stored = {
        each.name: numpy_helper.to_array(each)
        for each in quantise(model, found, U8S8, weights=done.weights).graph.initializer
    }
    by_node = {node.name: node for node in model.graph.node}
    for node, weights in done.weights.items():
        own = f"{by_node[node].input[1]}:{node}"
        np.testing.assert_array_equal(stored[f"{own}:steps"], weights.steps)
        np.testing.assert_array_equal(stored[f"{own}:scale"], weights.scale)
    without = next(node for node in model.graph.node if node.op_type == "Conv" and len(node.input) == 2)
    assert f"{without.input[1]}:bias:{without.name}:steps" in stored, "what is left of the mean needs a bias"


def test_layers_that_stay_in_float32_are_left_alone(model: ModelProto, batches: Batches) -> None:
    found, stays = bounds(model, batches), next(each.node for each in layers(model) if each.name == "conv")
    assert stays not in refit(model, found, U8S8, batches, keep=[stays]).error


def test_a_layer_with_too_many_inputs_goes_to_the_nearest(
    model: ModelProto, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refitting, "_MOST_INPUTS", 30)
    names = {each.node: each.name for each in layers(model)}
    assert {names[node] for node in refit(model, bounds(model, batches), U8S8, batches).error} == {
        *("stem", "left", "right", "depth", "linear"),
    }


def test_weights_that_say_less_on_other_images_are_not_taken(model: ModelProto, images: Floats) -> None:
    """Two images are no basis for anything: most layers stay as they were."""
    few: Batches = lambda: iter([images[:2]])  # noqa: E731 - a stand-in for the fixture
    found = {name: limits(each, "min-max") for name, each in observe(model, lambda: [images]).items()}
    done = refit(model, found, U8S8, few)
    names = {each.node: each.name for each in layers(model)}
    assert "linear" not in {names[node] for node in done.weights}, "it has one row to go by"


def test_a_matrix_product_without_a_place_for_a_bias() -> None:
    rng = np.random.default_rng(1)
    stored = {"w": rng.standard_normal((6, 4)).astype(np.float32)}
    nodes = [make_node("MatMul", ["input", "w"], ["y"], name="product")]
    ports = [make_tensor_value_info(name, TensorProto.FLOAT, ["n", 7, size]) for name, size in (("input", 6), ("y", 4))]
    graph = make_graph(nodes, "g", ports[:1], ports[1:], [numpy_helper.from_array(stored["w"], "w")])
    net = make_model(graph, opset_imports=[make_opsetid("", 18)], ir_version=8)
    data = [(rng.standard_normal((64, 7, 2)) @ rng.standard_normal((2, 6))).astype(np.float32) for _ in range(3)]
    found = {name: limits(each, "min-max") for name, each in observe(net, lambda: data).items()}
    done = refit(net, found, S8S8, lambda: data)
    assert done.weights["product"].bias is None
    exact = session(net).run(None, {"input": data[2]})[0]
    errors = [
        squared(
            exact, session(quantise(net, found, S8S8, weights=weights), literal=True).run(None, {"input": data[2]})[0]
        )
        for weights in ({}, done.weights)
    ]
    assert errors[1] < errors[0]


def test_blocks_and_the_file_hold_the_same_numbers() -> None:
    rng = np.random.default_rng(2)
    for node, weight in (
        (make_node("Conv", ["x", "w"], ["y"], group=2), rng.standard_normal((6, 2, 3, 3))),
        (make_node("Gemm", ["x", "w"], ["y"], transB=1), rng.standard_normal((6, 5))),
        (make_node("MatMul", ["x", "w"], ["y"]), rng.standard_normal((5, 6))),
    ):
        layer = Consumer.of(node, node.input, {"w": weight.astype(np.float32)})
        np.testing.assert_array_equal(layer.stored(layer.weight_god), weight.astype(np.float32))
        done = rounded(layer, layer.weight_god, None, 1.0, S8S8)
        meant, _ = layer.blocks(done)
        assert float((meant - layer.weight_god).abs().max()) <= 0.5001 * float(done.scale.max())


def test_the_gate_takes_the_refitted_weights_and_tells_it(model: ModelProto, images: Floats, batches: Batches) -> None:
    done = quantise_within(model, observe(model, batches), COARSE, Judge(images[160:]), 100, batches)
    assert done.refitted
    assert set(done.refitted) <= {each.name for each in layers(model)}
    assert all(share < 1 for share in done.refitted.values())


def test_it_says_how_far_it_has_got(model: ModelProto, batches: Batches) -> None:
    told: list[tuple[int, int]] = []
    refit(
        model,
        bounds(model, batches),
        U8S8,
        batches,
        progress=lambda _, done, total, note="": told.append((done, total)),
    )
    assert told == [(step, 6) for step in range(7)]
