"""Tasks other than classification: their figures, their networks, and parity of several and of dense outputs."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from voc_shapes import NETWORKS

from thinet_deploy.export import export_onnx, export_program
from thinet_deploy.interfaces import INPUT, Conversion
from thinet_deploy.intervals import accuracy_interval
from thinet_deploy.models.fcn import FCN8s
from thinet_deploy.models.loading import MODELS, build_model, input_shape_of
from thinet_deploy.on_device import detections
from thinet_deploy.on_device.detections import Found
from thinet_deploy.program import load_program, output_names
from thinet_deploy.pruning.budget import Wish, some, uniform
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.proof import prove
from thinet_deploy.pruning.retrace import settled_plan
from thinet_deploy.pruning.surgery import apply
from thinet_deploy.pruning.trace import example_inputs
from thinet_deploy.registry import convert
from thinet_deploy.tasks.base import named, said
from thinet_deploy.tasks.classification import CLASSIFICATION
from thinet_deploy.tasks.coco import average_precisions
from thinet_deploy.tasks.detection import Detection
from thinet_deploy.tasks.distillation import Mix
from thinet_deploy.tasks.groups import GROUPS, grouped, jackknife
from thinet_deploy.tasks.segmentation import Segmentation
from thinet_deploy.verify import Hop, engine_hop, onnx_hop, rounding_noise, tolerance

SHAPE = (3, 32, 32)
NAMES = {"narrow_detector": ("logits", "boxes"), "narrow_segmenter": ("logits",)}


# ---------------------------------------------------------------------------------------------- figures


@pytest.mark.skipif(importlib.util.find_spec("torchmetrics") is None, reason="torchmetrics is not installed")
@pytest.mark.usefixtures("torchvision_or_none")
def test_mean_iou_is_counted_over_all_pixels_that_count() -> None:
    random = np.random.default_rng(0)
    known, outputs = random.integers(-1, 3, (25, 6, 7)), random.standard_normal((25, 3, 6, 7)).astype(np.float32)
    meter = Segmentation().meter()
    for part in np.array_split(np.arange(25), 4):
        meter.add([outputs[part]], known[part])
    judged = meter.judge()

    def figures(rows: Any) -> list[float]:
        found, counts = outputs[rows].argmax(1), known[rows] >= 0
        pairs = [((found == c) & counts, (known[rows] == c) & counts) for c in range(3)]
        return [
            100 * float(np.mean([(one & other).sum() / (one | other).sum() for one, other in pairs])),
            100 * float((found == known[rows])[counts].mean()),
        ]

    got = [figure.value for figure in judged.accuracy.figures.values()]
    assert got == pytest.approx(figures(np.arange(25)), abs=1e-3)
    left = [figures(np.flatnonzero(np.arange(25) % GROUPS != group))[0] for group in range(GROUPS)]
    assert judged.without == pytest.approx(left, abs=1e-3)
    same = judged.behind(judged)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def found(*rows: tuple[int, float, list[float]]) -> Found:
    classes, scores, boxes = zip(*rows, strict=True) if rows else ((), (), ())
    return Found(np.array(boxes).reshape(-1, 4), np.array(classes), np.array(scores))


def test_average_precision_is_what_it_should_be_by_hand() -> None:
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    box, other = [0.1, 0.1, 0.4, 0.4], [0.6, 0.6, 0.9, 0.9]
    there = [np.array([[1, *box, 0]], np.float32), np.array([[1, *box, 0], [2, *other, 0]], np.float32)]
    group = np.arange(2)
    right = [found((1, 0.9, box)), found((1, 0.8, box), (2, 0.7, other))]
    whole, without = average_precisions(right, there, group)
    assert whole == pytest.approx([100, 100])
    assert without.shape == (2, 2)
    # A surer false alarm: precision is 1/2 at every recall of class 1, and class 2 is perfect.
    alarm = [found((1, 0.95, other), (1, 0.9, box)), right[1]]
    assert average_precisions(alarm, there, group)[0][0] == pytest.approx((66.67 + 100) / 2, abs=0.01)
    # Half of the objects of class 1 missed: 51 of the 101 recalls are reached.
    assert average_precisions([found(), right[1]], there, group)[0][0] == pytest.approx((100 * 51 / 101 + 100) / 2)
    nothing, _ = average_precisions([found(), found()], there, group)
    assert nothing == pytest.approx([0, 0])
    difficult = [each.copy() for each in there]
    difficult[0][0, 5] = 1
    assert average_precisions([found(), right[1]], difficult, group)[0] == pytest.approx([100, 100])


def test_what_lies_inside_a_difficult_object_is_no_less_wrong_for_it() -> None:
    """VOC leaves out what overlaps a difficult object by half, not what is somewhere in it."""
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    box, whole = [0.6, 0.6, 0.9, 0.9], [0.0, 0.0, 0.5, 0.5]
    there = [np.array([[1, *box, 0], [1, *whole, 1]], np.float32)]
    inside = [(1, 0.9 - n / 10, [0.1 + n / 10, 0.1, 0.18 + n / 10, 0.2]) for n in range(3)]
    group = np.zeros(1, np.int64)
    assert average_precisions([found((1, 0.5, box), *inside)], there, group)[0][0] == pytest.approx(25)
    nearly = [0.0, 0.0, 0.5, 0.45]
    assert average_precisions([found((1, 0.5, box), (1, 0.9, nearly))], there, group)[0][0] == pytest.approx(100)


def test_the_jackknife_of_a_mean_is_students_interval() -> None:
    values = np.random.default_rng(0).normal(70, 5, 10)
    without = (values.sum() - values) / 9
    interval = jackknife(float(values.mean()), without)
    half = 2.262 * values.std(ddof=1) / np.sqrt(10)
    assert (interval.low, interval.high) == pytest.approx((values.mean() - half, values.mean() + half))
    assert jackknife(50.0, np.array([50.0])).high == 150, "one group says nothing"


def test_figures_stay_within_a_hundred_percent_and_pairs_are_narrower() -> None:
    values = np.random.default_rng(1).normal(0, 40, 10)
    one, other = (
        grouped(("mIoU",), np.array([mean]), (mean + values + shift)[:, None], 30)
        for mean, shift in ((95.0, 0), (96.0, 0.005 * values))
    )
    figure = one.accuracy.figures["mIoU"]
    assert (figure.low, figure.high) == (0, 100)
    paired = one.behind(other)
    assert paired.value == 1
    assert paired.high - paired.low < 10


def test_classification_is_one_of_the_tasks() -> None:
    meter = CLASSIFICATION.meter()
    meter.add([np.array([[1, 2, 3], [3, 2, 1]], np.float32)], np.array([2, 1]))
    judged = meter.judge()
    assert judged.accuracy.figures == {"top-1": accuracy_interval(1, 2), "top-5": accuracy_interval(2, 2)}
    assert judged.accuracy.main == 50


def test_pixels_that_do_not_count_cost_nothing() -> None:
    random = torch.Generator().manual_seed(0)
    outputs, known = torch.randn(2, 3, 4, 4, generator=random), torch.zeros(2, 4, 4, dtype=torch.int64)
    known[0, 0], known[1] = -1, -1
    other = outputs.clone()
    other[0, :, 0] += torch.randn(3, 4, generator=random)
    task = Segmentation()
    losses = task.losses((outputs,), known)
    torch.testing.assert_close(task.losses((other,), known), losses)
    assert losses[1] == 0
    expected = nn.functional.cross_entropy(outputs[:1, :, 1:], known[:1, 1:])
    assert float(losses[0]) == pytest.approx(float(expected))
    alone = task.losses((outputs,), known, (outputs,), Mix(1))
    assert alone.abs().max() < 1e-6, "a teacher who knows no more"


# ---------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith(("ssd300-", "fcn8s-"))])
def test_any_number_of_classes_any_size_and_gray(name: str) -> None:
    for shape in ((1, 32, 32), (3, 69, 37)):
        with torch.device("meta"):
            model = build_model(name, input_shape=shape, num_classes=4, seed=0).eval()
        assert input_shape_of(model) == shape
        outputs = said(model, torch.zeros(2, *shape, device="meta"))
        if name.startswith("fcn8s-"):
            assert [tuple(each.shape) for each in outputs] == [(2, 4, *shape[1:])]
        else:
            count = len(model.default_boxes)  # type: ignore[arg-type]
            assert [tuple(each.shape) for each in outputs] == [(2, 4, count), (2, 4, count)]


def test_the_backbone_is_called_as_a_vgg_and_takes_its_weights() -> None:
    with torch.device("meta"):
        vgg = build_model("vgg16_bn", input_shape=(3, 224, 224), num_classes=10, seed=0).state_dict()
        for name in ("ssd300-vgg16_bn", "fcn8s-vgg16_bn"):
            mine = build_model(name, input_shape=(3, 320, 320), num_classes=21, seed=0).state_dict()
            shapes = {key: each.shape for key, each in vgg.items() if key.startswith("features.")}
            assert shapes == {key: each.shape for key, each in mine.items() if key.startswith("features.")}


def test_a_fresh_segmenter_takes_all_classes_for_equal() -> None:
    net = FCN8s(((4,), (4,), (4,), (4,), (8,)), (), input_shape=SHAPE, num_classes=3).eval()
    with torch.inference_mode():
        assert not net(torch.randn(1, *SHAPE)).any()


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, nn.Module]:
    """A detector and a segmenter, each pruned to 0.7 and proved."""
    file, made = tmp_path_factory.mktemp("nets") / "net.py", {}
    file.write_text(NETWORKS)
    images = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    for name in NAMES:
        model = build_model(f"{file}:{name}", input_shape=SHAPE, num_classes=3, seed=0).eval()
        with torch.no_grad():  # a fresh segmenter says nothing but zeros
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        inputs = example_inputs(model, SHAPE)
        graph = channel_graph(model, inputs)
        plan = settled_plan(model, graph, some(graph, graph.groups, uniform(graph.groups, 0.7, Wish())), inputs)
        assert prove(model, graph, plan, (images,), seed=0).passed
        assert {name for name in plan.widths if name.startswith("features")} >= {"features.0", "features.40"}
        made[name] = apply(plan, model).eval()
    return made


@pytest.fixture(scope="module")
def files(networks: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same as ONNX files."""
    made = {}
    for name, model in networks.items():
        made[name] = tmp_path_factory.mktemp("onnx") / f"{name}.onnx"
        exported = export_onnx(model, SHAPE, made[name], opset=17, ir_version=8)
        assert tuple(each.name for each in exported.outputs) == NAMES[name]
        assert not {"NonMaxSuppression", "TopK"} & exported.operators.keys()
    return made


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("runtime", ["reference", "openvino", "onnxruntime"])
def test_every_output_is_compared(
    name: str, runtime: str, networks: dict[str, nn.Module], files: dict[str, Path], tmp_path: Path
) -> None:
    model, images = networks[name], np.random.default_rng(0).standard_normal((5, *SHAPE)).astype(np.float32)
    allowed, path = tolerance(rounding_noise(model, images), "fp32"), files[name]
    if runtime != "reference":
        pytest.importorskip(runtime, reason=f"{runtime} is not installed")
        path = tmp_path / convert(runtime, Conversion(path, tmp_path), tmp_path).path

    def verdict(expected: dict[str, NDArray[np.float32]]) -> Hop:
        if runtime == "reference":
            return onnx_hop("net", path, images, expected, allowed)
        return engine_hop("net", runtime, path, images, expected, allowed, precision="fp32")

    with torch.inference_mode():
        expected = named(said(model, torch.from_numpy(images)))
    good = verdict(expected)
    assert good.passed, good
    assert good.agreement is None, "an image has no one class"
    for output in NAMES[name]:
        assert not verdict({**expected, output: expected[output] * np.float32(1.01)}).passed


def test_an_engine_in_the_bundle_finds_what_the_network_finds(
    networks: dict[str, nn.Module], files: dict[str, Path], tmp_path: Path
) -> None:
    """The files that a detector's bundle carries, used as an app does: without this package."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = networks["narrow_detector"]
    boxes: Any = model.default_boxes
    for name, content in Detection(boxes).bundled().items():
        (tmp_path / name).write_bytes(content)
    shutil.copyfile(files["narrow_detector"], tmp_path / "net.onnx")
    images = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    code = """
import numpy as np, onnxruntime, detections
session = onnxruntime.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
outputs = session.run(["logits", "boxes"], {"input": np.load("images.npy")})
found = detections.find(*outputs, np.load("default_boxes.npy"))
np.savez("found.npz", boxes=found[0].boxes, classes=found[0].classes, scores=found[0].scores)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    outputs = session.run(["logits", "boxes"], {INPUT: images})
    mine, theirs = detections.find(outputs[0], outputs[1], boxes)[0], np.load(tmp_path / "found.npz")
    assert len(mine.boxes) > 0
    for field in mine._fields:
        np.testing.assert_array_equal(getattr(mine, field), theirs[field])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_core_ml_names_every_output(name: str, networks: dict[str, nn.Module], tmp_path: Path) -> None:
    """It runs on Macs and phones only; what it would compute is not compared here."""
    coremltools = pytest.importorskip("coremltools", reason="coremltools is not installed")
    export_program(networks[name], SHAPE, tmp_path / "net.pt2")
    place = tmp_path / "engine"
    place.mkdir()
    artifact = convert("coreml", Conversion(tmp_path / "net.pt2", place), place)
    spec = coremltools.models.MLModel(str(place / artifact.path), skip_model_load=True).get_spec()
    assert tuple(each.name for each in spec.description.output) == NAMES[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_program_says_what_its_outputs_are_called(name: str, networks: dict[str, nn.Module], tmp_path: Path) -> None:
    export_program(networks[name], SHAPE, tmp_path / "net.pt2")
    assert output_names(load_program(tmp_path / "net.pt2", 1)) == NAMES[name]
