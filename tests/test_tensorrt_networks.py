"""The papers' networks at their real sizes: typed for Jetsons, built by TensorRT-RTX, and what its engines compute in.

No GPU was at hand, so none of these engines ever ran. What an inspector would say of their layers needs none: the
builder tells its log.
"""

from __future__ import annotations

import json
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib import util
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from PIL import Image
from torch import nn

from thinet_deploy import registry
from thinet_deploy.data.preprocess import Preprocess
from thinet_deploy.export import export_onnx
from thinet_deploy.interfaces import Conversion, Precision
from thinet_deploy.models.alexnet import alexnet
from thinet_deploy.models.presets import build_preset
from thinet_deploy.models.squeezenet import squeezenet1_1
from thinet_deploy.on_device import tensorrt_builder
from thinet_deploy.precision.calibration import MIN_IMAGES, limits, observe
from thinet_deploy.precision.graph import layers, read_onnx
from thinet_deploy.precision.half import overflowing, to_half
from thinet_deploy.precision.inspected import proof_of
from thinet_deploy.precision.int8 import quantise
from thinet_deploy.precision.weights import S8S8
from thinet_deploy.target import load_profile

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos10.zip"
# Group convolutions with shuffles between them; the smallest, and not slow.
SMALLEST = "thinet-tiny with gcos"
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    SMALLEST: partial(build_preset, "thinet-tiny", gcos=True),
    "thinet-gap": partial(build_preset, "thinet-gap"),
    "thinet-50": partial(build_preset, "thinet-50"),
    "squeezenet1_1": partial(squeezenet1_1, input_shape=(3, 227, 227)),
    "alexnet": alexnet,  # groups, and local response normalisation, whose powers stay in float32
}
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8")
# A layer in the builder's words; its weights follow behind what it reads.
LAYER = re.compile(r"^Name: (.*), LayerType: (\w+), Inputs: \[(.*?)\], Constants: \[.*, Metadata: (.*)$", re.MULTILINE)


class Typed(NamedTuple):
    """A network with random weights as ONNX files for Jetsons.

    Attributes:
        source: in float32, as exported.
        files: in each precision.
        mixed: the same, with the first layer left in float32; None in fp32.
    """

    source: ModelProto
    files: dict[Precision, Path]
    mixed: dict[Precision, Path]


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name == SMALLEST else pytest.mark.slow) for name in NETWORKS]
)
def typed(request: pytest.FixtureRequest) -> Iterator[Typed]:
    """Each network, typed; the files are gone afterwards, for AlexNet's have hundreds of megabytes."""
    if util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed")
    with tempfile.TemporaryDirectory() as folder:
        yield write_typed(NETWORKS[request.param], Path(folder))


def write_typed(network: Callable[[], nn.Module], folder: Path) -> Typed:
    torch.manual_seed(0)
    model, jetson = network(), load_profile("jetson")
    shape: Any = model.input_shape
    export_onnx(model, shape, folder / "model.onnx", opset=jetson.opset, ir_version=jetson.ir_version)
    source = read_onnx(folder / "model.onnx")
    images = calibration_images(shape[1])
    values = observe(source, lambda: np.split(images, len(images) // 2))
    bounds = {tensor: limits(each, "percentile") for tensor, each in values.items()}
    single, first = list(overflowing(source, values)), next(iter(layers(source))).node
    made = {
        "fp32": source,
        "fp16": to_half(source, "fp16", keep=single),
        "bf16": to_half(source, "bf16"),
        "int8": quantise(source, bounds, S8S8),
        "mixed-fp16": to_half(source, "fp16", keep=[*single, first]),
        "mixed-bf16": to_half(source, "bf16", keep=[first]),
        "mixed-int8": quantise(source, bounds, S8S8, keep=[first]),
    }
    for name, each in made.items():
        onnx.save(each, folder / f"{name}.onnx")
    files = {each: folder / f"{each}.onnx" for each in PRECISIONS}
    return Typed(source, files, {each: folder / f"mixed-{each}.onnx" for each in PRECISIONS[1:]})


def calibration_images(size: int) -> NDArray[np.float32]:
    """Real photos, where those for development are at hand; else noise, which types do not depend on."""
    if not PHOTOS.exists():
        return np.random.default_rng(0).standard_normal((MIN_IMAGES, 3, size, size)).astype(np.float32)
    preprocess = Preprocess(resize=(size, size), crop=(size, size))
    with zipfile.ZipFile(PHOTOS) as archive:
        names = [name for name in archive.namelist() if "/train/" in name and name.endswith(".JPEG")]
        chosen = names[:: len(names) // MIN_IMAGES][:MIN_IMAGES]
        return preprocess.normalise(np.stack([preprocess.read(Image.open(archive.open(name))) for name in chosen]))


def layers_of(source: Path, precision: Precision, engine: Path) -> str:
    """Build an engine here, as the converter does; its layers in the inspector's JSON, by the builder's log."""
    import tensorrt_rtx

    class Listener(tensorrt_rtx.ILogger):  # type: ignore[misc]  # a library without types
        """Keeps everything that TensorRT-RTX says."""

        def __init__(self) -> None:
            tensorrt_rtx.ILogger.__init__(self)
            self.said: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            """Called by TensorRT-RTX."""
            self.said.append(message)

    listener = Listener()
    told = SimpleNamespace(**{**vars(tensorrt_rtx), "Builder": lambda logger: tensorrt_rtx.Builder(listener)})
    tensorrt_builder.build(told, source, engine, tensorrt_builder.Settings(precision), lambda *step: None)
    engine.unlink()
    found = [
        {"Name": name, "LayerType": kind, "Metadata": about, "Inputs": [{"Datatype": each} for each in types_in(taken)]}
        for name, kind, taken, about in LAYER.findall("\n".join(listener.said))
    ]
    return json.dumps({"Layers": found})


def types_in(tensors: str) -> list[str]:
    return re.findall(r"Datatype: (\w+)", tensors)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rtx_builds_the_papers_networks(typed: Typed, precision: Precision, tmp_path: Path) -> None:
    source = typed.files[precision]
    artifact = registry.convert("tensorrt-rtx", Conversion(source, tmp_path, precision), tmp_path)
    engine = tmp_path / artifact.path
    report = json.loads(engine.with_suffix(".build.json").read_text())
    assert (report["precision"], report["strongly_typed"]) == (precision, True)
    assert (report["flags"], report["warnings"]) == ([], [])
    weights = [onnx.numpy_helper.to_array(each) for each in onnx.load(source).graph.initializer]
    assert engine.stat().st_size > sum(each.nbytes for each in weights), "the weights are in it"
    engine.unlink()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_layer_of_them_computes_in_the_type_of_the_file(
    typed: Typed, precision: Precision, tmp_path: Path
) -> None:
    said = layers_of(typed.files[precision], precision, tmp_path / "net.engine")
    proof = proof_of(said, typed.source, read_onnx(typed.files[precision]))
    assert proof.wrong == ()
    assert proof.shares == {precision: pytest.approx(100)}


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_a_layer_that_stays_in_fp32_is_told_apart(typed: Typed, precision: Precision, tmp_path: Path) -> None:
    said = layers_of(typed.mixed[precision], precision, tmp_path / "net.engine")
    proof = proof_of(said, typed.source, read_onnx(typed.mixed[precision]))
    assert proof.wrong == ()
    assert [each.got for each in proof.layers] == ["fp32", *[precision] * (len(proof.layers) - 1)]
    (wrong,) = proof_of(said, typed.source, read_onnx(typed.files[precision])).wrong
    assert (wrong.layer, wrong.asked, wrong.got) == (proof.layers[0].layer, precision, "fp32")
