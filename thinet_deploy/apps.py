"""Ready for apps: what a bundle has beside its engines, so that an app can run them.

    app/model.properties      the one file that is generated: names, preprocessing, engines; every language reads it
    app/golden/…              a picture and what preprocessing makes of it, inputs and outputs, as raw float32
    app/README.md  app/cpp/…  app/kotlin/…  app/swift/…  app/python/…    source code, as it lies in integrations/

The source code is the same in every bundle: what differs is read at run time.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .artifact import hash_json, sha256_of, write_bytes
from .data.preprocess import Preprocess
from .interfaces import Array

SOURCES = Path(__file__).with_name("integrations")
FOLDER = "app"
IMAGES = 2
"""Golden inputs and outputs that an app is checked with."""
_ALWAYS = ("README.md",)
# A file for a runtime; the others of its folder belong to all of them.
_OF_RUNTIME = {
    "cpp/openvino.cpp": "openvino",
    "cpp/onnxruntime.cpp": "onnxruntime",
    "cpp/ncnn.cpp": "ncnn",
    "cpp/tensorrt.cpp": "tensorrt",
}
_LANGUAGES = {"cpp": set(_OF_RUNTIME.values()), "kotlin": {"litert"}, "swift": {"coreml"}}
_ONLY_ON = {"kotlin": "android", "python": "linux"}


@dataclass(frozen=True)
class App:
    """What an app needs to know that is not in the engines.

    Attributes:
        preprocess: how an image becomes an input.
        picture: a decoded image, uint8 (height, width, channels), RGB or grey.
        runtimes: of the target.
        system: its operating system.
        dla: which of its DLAs its TensorRT engines are for; None for none.
    """

    preprocess: Preprocess
    picture: Array
    runtimes: tuple[str, ...]
    system: str
    dla: int | None = None


@dataclass(frozen=True)
class Ends:
    """A network's one input and one output: names, and golden values with the batch first."""

    input_name: str
    output_name: str
    inputs: Array
    outputs: Array


def write_app(folder: Path, app: App, ends: Ends, engines: Mapping[str, tuple[str, float]]) -> None:
    """Write app/ into a bundle's folder.

    Args:
        folder: of the bundle.
        app: see `App`.
        ends: see `Ends`.
        engines: path in the bundle and tolerance by "RUNTIME.PRECISION".
    """
    for source in _sources(app):
        target = folder / FOLDER / source
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(SOURCES / source, target)
    write_bytes(folder / FOLDER / "model.properties", _properties(app, ends, engines).encode())
    golden = folder / FOLDER / "golden"
    write_bytes(golden / "picture.ppm", _ppm(app.picture))
    write_bytes(golden / "picture.f32", _raw(_input_of(app.picture, app.preprocess)))
    write_bytes(golden / "input.f32", _raw(ends.inputs[:IMAGES]))
    write_bytes(golden / "output.f32", _raw(ends.outputs[:IMAGES]))


def picture_of(canvas: Array, preprocess: Preprocess) -> Array:
    """A picture whose sides are not those of the canvas, so that resizing and cropping are checked with it as well.

    Args:
        canvas: an image as `Preprocess.read` gives it, uint8 (height, width, channels).
        preprocess: that made it.
    """
    pixels = canvas[..., ::-1] if preprocess.colour == "BGR" else canvas
    height, width, channels = pixels.shape
    image = Image.fromarray(np.ascontiguousarray(pixels.squeeze(-1) if channels == 1 else pixels))
    return np.asarray(image.resize((width * 3 // 2 + 1, height * 4 // 3))).reshape(height * 4 // 3, -1, channels)


def digest() -> str:
    """Changes when what is written does, for stages that are kept."""
    return hash_json({name: sha256_of(SOURCES / name) for name in sorted(_all())} | {"apps": sha256_of(Path(__file__))})


def _all() -> Iterator[str]:
    """Every source, by its path in integrations/; what Python keeps beside them is none."""
    for path in SOURCES.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            yield path.relative_to(SOURCES).as_posix()


def _sources(app: App) -> Iterator[str]:
    """The sources for a target's runtimes."""
    languages = {name for name, runtimes in _LANGUAGES.items() if runtimes & set(app.runtimes)} | {"python"}
    languages = {name for name in languages if _ONLY_ON.get(name, app.system) == app.system}
    for name in _all():
        wanted = name in _ALWAYS or name.partition("/")[0] in languages
        if wanted and (name not in _OF_RUNTIME or _OF_RUNTIME[name] in app.runtimes):
            yield name


def _properties(app: App, ends: Ends, engines: Mapping[str, tuple[str, float]]) -> str:
    """Lines `name = value`: what C++, Kotlin, Swift and Python read alike without a library."""
    how = app.preprocess
    values = {
        "input": ends.input_name,
        "output": ends.output_name,
        "colour": how.colour,
        "divide": "255" if how.range == "0..1" else "1",
        "mean": _numbers(how.mean),
        "std": _numbers(how.std),
        "resize": "shorter side" if isinstance(how.resize, int) else "both sides",
        "canvas": _numbers(how.canvas),
        "crop": _numbers(how.crop),
        "interpolation": how.interpolation,
    }
    if app.dla is not None:
        values["dla"] = str(app.dla)
    for name, (path, tolerance) in engines.items():
        values |= {f"engine.{name}": path, f"tolerance.{name}": repr(tolerance)}
    head = "# Written by thinet-deploy. Sizes are height and width; app/README.md says more.\n"
    return head + "".join(f"{name} = {value}\n" for name, value in values.items())


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(map(repr, values))


def _input_of(picture: Array, preprocess: Preprocess) -> Array:
    image = Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture)
    return preprocess.normalise(preprocess.centre_crop(preprocess.read(image)[None]))


def _ppm(picture: Array) -> bytes:
    height, width, channels = picture.shape
    return f"{'P5' if channels == 1 else 'P6'}\n{width} {height}\n255\n".encode() + picture.tobytes()


def _raw(values: Array) -> bytes:
    return np.ascontiguousarray(values, "<f4").tobytes()
