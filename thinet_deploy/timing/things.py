"""What `thinet-deploy latency` can time: an engine file, a bundle, a run, a model; found out by looking at it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from xml.etree import ElementTree as ET

import numpy as np

from ..artifact import read_json
from ..bundle import GOLDEN, MANIFEST, read_manifest
from ..errors import BundleError, InputError, UnknownNameError, first_line
from ..export import INPUT
from ..interfaces import Array, Precision
from ..models.loading import MODELS, InputShape, build_model, input_shape_of
from ..on_device import self_test
from ..precision.executed import types_in
from .latency import EngineRef

if TYPE_CHECKING:
    from torch import nn

# File → runtime; runtimes that this version cannot open are named in the error that the runner gives.
_SUFFIXES = {
    ".onnx": "onnxruntime",
    ".xml": "openvino",
    ".tflite": "litert",
    ".param": "ncnn",
    ".pte": "executorch",
    ".engine": "tensorrt",
}
# Times do not depend on the number of classes, but for the last layer's share in them.
_CLASSES = 1000


@dataclass(frozen=True)
class Engines:
    """Engines that take the same inputs, and are measured in turn.

    Attributes:
        refs: what to measure.
        inputs: arrays by input name, one image.
    """

    refs: tuple[EngineRef, ...]
    inputs: Mapping[str, Array]


@dataclass(frozen=True)
class Model:
    """A torch model and the shape of one image."""

    name: str
    module: nn.Module
    input_shape: InputShape


def is_engine(name: str) -> bool:
    """Whether it is the file of an engine."""
    return Path(name).is_file() and Path(name).suffix in _SUFFIXES


def find(
    name: str, input_shape: InputShape | None, precision: Precision, classes: int | None = None
) -> Engines | Model:
    """Say what a name or path is.

    Args:
        name: a path of an engine file, a bundle or a run; a model's name or file.py:factory.
        input_shape: for what does not say which images it takes.
        precision: that an engine file has to compute in.
        classes: number of outputs of the user's own network; None for as many as ImageNet's.

    Raises:
        InputError: it is none of these, damaged, or does not say which images it takes.
    """
    path = Path(name)
    if (path / MANIFEST).is_file():
        return _bundle(path)
    if (path / "run.json").is_file():
        return _run(path)
    if is_engine(name):
        return Engines((_engine(path, precision),), _noise(path, input_shape))
    if name in MODELS or ".py" in name:
        return _model(name, input_shape, classes)
    if path.exists():
        known = ", ".join(_SUFFIXES)
        raise InputError(
            f"{name} is neither an engine ({known}), nor a bundle, nor a run.",
            hint="Give RUN or RUN/bundle of a finished build, an engine's file, or a model.",
        )
    raise UnknownNameError("file or model", name, [*MODELS, "file.py:factory"])


def _engine(path: Path, precision: Precision) -> EngineRef:
    """An engine's file, which has to compute in what it is said to."""
    runtime = _SUFFIXES[path.suffix]
    found = types_in(runtime, path, precision)
    if found and (found != {"fp32"} if precision == "fp32" else precision not in found):
        listed = " and ".join(sorted(found))
        known = [each for each in get_args(Precision) if each in found and each != "fp32"]
        raise InputError(
            f"{path} computes in {listed} on {runtime} here, and --precision is {precision}.",
            hint=f"Give --precision {known[0] if known else 'fp32'}: the file decides that.",
        )
    return EngineRef(path.stem, runtime, path, precision)


def _model(name: str, input_shape: InputShape | None, classes: int | None) -> Model:
    outputs = None if name in MODELS else classes or _CLASSES  # our own know how many they have
    module = build_model(name, input_shape=input_shape, num_classes=outputs, seed=0)
    shape = input_shape or input_shape_of(module)
    if shape is None:
        raise InputError(f"{name} does not say which images it takes.", hint="Give --input-shape 3x224x224.")
    return Model(name, module, shape)


def _bundle(folder: Path) -> Engines:
    """Only engines that the manifest vouches for: loading one runs native code."""
    manifest = read_manifest(folder)
    files = self_test.check_files(str(folder), manifest.files)
    if damaged := files["missing"] + files["changed"]:
        raise BundleError(
            f"{folder} is damaged: {', '.join(damaged[:3])} is not as the manifest says.",
            hint="Copy the bundle again from where it was built; `thinet-deploy verify` shows everything.",
        )
    refs = [EngineRef(manifest.model, e.runtime, folder / e.path, e.precision) for e in manifest.engines]
    if not refs:
        raise InputError(f"{folder} holds no engine.", hint="Build it for a target whose engines this version makes.")
    return Engines(tuple(refs), self_test.load_arrays(str(folder / GOLDEN), "input:"))


def _run(folder: Path) -> Engines:
    """The engines of all networks of a run, on the first of its golden images."""
    try:
        made: dict[str, dict[str, Any]] = read_json(folder / "engines" / "engines.json")
        with np.load(folder / "parity" / "original.npz", allow_pickle=False) as golden:
            image = golden["input"][:1]
        precision: Precision = read_json(folder / "report" / "table.json")["precision"]
        refs = []
        for key, entry in made.items():
            model, runtime = key.split("/")
            refs.append(EngineRef(model, runtime, folder / "engines" / entry["path"], precision))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder} has no engines to time: {first_line(error)}.",
            hint="Run the same `thinet-deploy build` again to finish it.",
        ) from error
    return Engines(tuple(refs), {INPUT: image})


def _noise(path: Path, input_shape: InputShape | None) -> dict[str, Array]:
    """Seeded noise of the shapes that the engine says it takes."""
    shapes: Mapping[str, Sequence[int]] = {INPUT: input_shape} if input_shape else {}
    try:
        shapes = {".onnx": _onnx_shapes, ".xml": _openvino_shapes}.get(path.suffix, lambda _: shapes)(path)
    except Exception as error:  # onnx and ElementTree raise types of their own
        raise InputError(f"{path} cannot be read: {first_line(error)}.", hint="Convert it again.") from error
    if input_shape and len(shapes) == 1:
        shapes = {name: _filled(path, shape, input_shape) for name, shape in shapes.items()}
    if not shapes or any(size < 1 for shape in shapes.values() for size in shape):
        raise InputError(f"{path} does not say which images it takes.", hint="Give --input-shape 3x224x224.")
    noise = np.random.default_rng(0)
    return {name: noise.standard_normal((1, *shape)).astype(np.float32) for name, shape in shapes.items()}


def _filled(path: Path, shape: Sequence[int], given: InputShape) -> Sequence[int]:
    """A shape with what it leaves open as the user gives it."""
    if len(shape) != len(given) or any(0 < mine != theirs for mine, theirs in zip(shape, given, strict=False)):
        mine, theirs = ("x".join(str(size or "?") for size in each) for each in (shape, given))
        raise InputError(
            f"{path} takes images of {mine}, but --input-shape is {theirs}.",
            hint="Give what stands for each ?, and what the file says for the rest.",
        )
    return given


def _onnx_shapes(path: Path) -> dict[str, list[int]]:
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    if not graph.node:
        raise ValueError("it is empty")
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    return {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim[1:]] for value in inputs}


def _openvino_shapes(path: Path) -> dict[str, list[int]]:
    found = {}
    for layer in ET.parse(path).getroot().iterfind("./layers/layer[@type='Parameter']"):  # noqa: S314 - loaded as an engine
        port, data = layer.find("./output/port"), layer.find("data")
        if port is not None and data is not None:
            sizes = data.get("shape", "").split(",")[1:]
            found[port.get("names", "").split(",")[0]] = [int(size) if size.isdigit() else 0 for size in sizes]
    return found
