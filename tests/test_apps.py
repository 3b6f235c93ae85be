"""Ready for apps: preprocessing in C++ as in training, and programs that are built from a bundle and run."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from app_builds import SOURCES, build, missing_for_ncnn, preprocessor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_onnx import scored_spec

from thinet_deploy import apps, bundle, registry
from thinet_deploy.apps import App, Ends
from thinet_deploy.bundle import BundleSpec, EngineFile, TypedFile, verify_bundle
from thinet_deploy.data.preprocess import Preprocess
from thinet_deploy.interfaces import Conversion

HOW = Preprocess(resize=14, crop=(12, 12), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
NONE = np.zeros((1, 1), np.float32)
SIDES = st.integers(1, 24)


@st.composite
def ways(draw: st.DrawFn) -> Preprocess:
    """Any preprocessing of small images."""
    colour = draw(st.sampled_from(["RGB", "BGR", "GRAY"]))
    size = 1 if colour == "GRAY" else 3
    canvas = (draw(SIDES), draw(SIDES))
    if draw(st.booleans()):
        resize, canvas = canvas[0], (canvas[0], canvas[0])
    else:
        resize = canvas  # type: ignore[assignment]  # both forms
    shares = st.floats(0.01, 1)
    return Preprocess.model_validate(
        {
            "colour": colour,
            "range": draw(st.sampled_from(["0..1", "0..255"])),
            "mean": draw(st.lists(shares, min_size=size, max_size=size)),
            "std": draw(st.lists(shares, min_size=size, max_size=size)),
            "resize": resize,
            "crop": (draw(st.integers(1, canvas[0])), draw(st.integers(1, canvas[1]))),
            "interpolation": draw(st.sampled_from(["bilinear", "bicubic"])),
        }
    )


@pytest.fixture(scope="module")
def in_cpp(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Preprocess, Image.Image], np.ndarray]:
    """Preprocessing by the C++ header."""
    folder = tmp_path_factory.mktemp("cpp")
    program = preprocessor(folder)
    apps.write_app(folder, App(HOW, np.zeros((8, 8, 3), np.uint8), ("openvino",), "linux"), _ends(), {})
    (folder / "labels.txt").write_text("")

    def preprocess(how: Preprocess, image: Image.Image) -> np.ndarray:
        (folder / "app" / "model.properties").write_text(apps._properties(App(how, NONE, (), "linux"), _ends(), {}))
        pixels = np.asarray(image)
        head = f"{image.width} {image.height} {pixels.size // (image.width * image.height)}\n"
        (folder / "image").write_bytes(head.encode() + pixels.tobytes())
        done = subprocess.run([str(program), str(folder), str(folder / "image")], capture_output=True, check=True)
        return np.frombuffer(done.stdout, np.float32)

    return preprocess


def _ends() -> Ends:
    return Ends("input", "logits", NONE, NONE)


def in_training(how: Preprocess, image: Image.Image) -> np.ndarray:
    return how.normalise(how.centre_crop(how.read(image)[None])).ravel()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    how=ways(),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    mode=st.sampled_from(["L", "RGB", "RGBA"]),
    seed=st.integers(0, 9),
)
def test_preprocessing_in_cpp_is_that_of_training_to_the_last_bit(
    in_cpp: Callable[..., np.ndarray], how: Preprocess, size: tuple[int, int], mode: str, seed: int
) -> None:
    shape = (size[1], size[0]) + ((len(mode),) if mode != "L" else ())
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8))
    assert np.array_equal(in_cpp(how, image), in_training(how, image))


@pytest.mark.parametrize("size", [(1, 400), (400, 3), (500, 333), (1024, 768)])
def test_photos_and_very_long_images_too(in_cpp: Callable[..., np.ndarray], size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8))
    how = Preprocess(resize=256, crop=(224, 224))
    assert np.array_equal(in_cpp(how, image), in_training(how, image))


# ------------------------------------------------------------------------------------------ whole programs


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> BundleSpec:
    """A tiny network with engines of OpenVINO, ONNX Runtime and, where it can be made, ncnn."""
    picture = np.random.default_rng(2).integers(0, 256, (25, 17, 3)).astype(np.uint8)
    found = scored_spec(tmp_path_factory.mktemp("engines"), 3)
    return replace(
        found,
        engines=(*found.engines, *ncnn_engines(found.onnx, tmp_path_factory.mktemp("ncnn"))),
        labels=tuple(f"class {number}" for number in range(5)),
        app=App(HOW, picture, ("openvino", "onnxruntime", "ncnn"), "linux"),
    )


def ncnn_engines(source: Path, folder: Path) -> tuple[EngineFile, ...]:
    """One in fp32; none where what makes it is not there."""
    if missing_for_ncnn():
        return ()
    artifact = registry.convert("ncnn", Conversion(source, folder), folder)
    return (EngineFile("ncnn", folder / artifact.path, "fp32", 1e-4),)


def written(folder: Path, spec: BundleSpec) -> Path:
    folder.mkdir()
    bundle.write_bundle(folder, spec)
    return folder


def said(program: Path, *words: object) -> tuple[int, str]:
    done = subprocess.run([str(program), *map(str, words)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module", params=["openvino", "onnxruntime", "ncnn"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of a runtime."""
    if request.param == "openvino":
        found: Path = request.getfixturevalue("openvino_program")
        return found
    if request.param == "ncnn" and (why := missing_for_ncnn()):
        pytest.skip(why)
    return build(request.param, SOURCES / "cpp", tmp_path_factory.mktemp(request.param))


def test_a_program_passes_its_bundles_own_check(program: Path, spec: BundleSpec, tmp_path: Path) -> None:
    code, words = said(program, "check", written(tmp_path / "a bundle", spec))
    assert code == 0, words
    assert "passed  preprocessing: 0 of 432 values differ" in words
    assert words.count("passed") == 2


@pytest.mark.parametrize(
    ("file", "change", "line"),
    [
        ("app/model.properties", lambda text: text.replace(b"0.485", b"0.495"), "FAILED  preprocessing"),
        ("app/model.properties", lambda text: text.replace(b"bilinear", b"bicubic"), "FAILED  preprocessing"),
        ("app/golden/output.f32", lambda values: values[:-4] + b"\0\0\0\0", "error"),
        ("app/golden/output.f32", lambda values: values[:-4], "error"),
    ],
)
def test_the_check_finds_what_is_wrong(
    program: Path, spec: BundleSpec, tmp_path: Path, file: str, change: Callable[[bytes], bytes], line: str
) -> None:
    folder = written(tmp_path / "bundle", spec)
    (folder / file).write_bytes(change((folder / file).read_bytes()))
    code, words = said(program, "check", folder)
    assert code == 1
    (failed,) = [each for each in words.splitlines() if each.startswith("FAILED")]
    assert line in failed


def test_it_names_the_class_that_python_finds(program: Path, spec: BundleSpec, tmp_path: Path) -> None:
    folder = written(tmp_path / "bundle", spec)
    code, words = said(program, "classify", folder, folder / "app" / "golden" / "picture.ppm")
    assert code == 0
    with Image.open(folder / "app" / "golden" / "picture.ppm") as image:
        x = HOW.normalise(HOW.centre_crop(HOW.read(image)[None]))
    from onnx.reference import ReferenceEvaluator

    (scores,) = ReferenceEvaluator(str(spec.onnx)).run(None, {"x": x})
    share = np.exp(scores[0]) / np.exp(scores[0]).sum()
    best = np.argsort(-share)[:3]
    assert [line.split("  ")[-1] for line in words.splitlines()] == [f"class {number}" for number in best]
    assert [float(line.split()[0]) for line in words.splitlines()] == pytest.approx(100 * share[best], abs=0.01)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ((), "usage: thinet-"),
        (("check", "nowhere"), "error: nowhere/app/model.properties cannot be read: copy the whole bundle"),
        (("outputs", "{bundle}", "int8", 1, "out"), "error: the bundle has no engine for"),
        (("outputs", "{bundle}", "fp32", 1, "/nowhere/out"), "cannot be written: is the storage full?"),
        (("classify", "{bundle}", "{bundle}/labels.txt"), "is no binary .ppm or .pgm"),
    ],
)
def test_mistakes_are_said_in_words(
    program: Path, spec: BundleSpec, tmp_path: Path, words: tuple[Any, ...], answer: str
) -> None:
    folder = written(tmp_path / "bundle", spec)
    code, heard = said(program, *(str(word).format(bundle=folder) for word in words))
    assert code == 2
    assert answer in heard


# ------------------------------------------------------------------------------------------ what lies in a bundle


def test_a_bundle_with_an_app_verifies_itself_and_vouches_for_every_file(spec: BundleSpec, tmp_path: Path) -> None:
    folder = written(tmp_path / "bundle", spec)
    assert verify_bundle(folder)["exit_code"] == 0
    listed = set(bundle.read_manifest(folder).files)
    assert {"app/README.md", "app/model.properties", "app/cpp/openvino.cpp", "app/python/classify.py"} <= listed


@pytest.mark.parametrize(
    ("runtimes", "system", "there", "not_there"),
    [
        (("openvino", "onnxruntime"), "linux", ["cpp/openvino.cpp", "python/classify.py"], ["cpp/ncnn.cpp", "kotlin"]),
        (("litert", "ncnn"), "android", ["cpp/ncnn.cpp", "kotlin/Classifier.kt"], ["cpp/tensorrt.cpp", "python"]),
        (("coreml",), "ios", ["swift/Classifier.swift"], ["cpp", "kotlin", "python"]),
        (("tensorrt", "onnxruntime"), "linux", ["cpp/tensorrt.cpp", "python/classify.py"], ["swift", "cpp/ncnn.cpp"]),
    ],
)
def test_each_target_gets_the_sources_of_its_runtimes(
    tmp_path: Path, runtimes: tuple[str, ...], system: str, there: list[str], not_there: list[str]
) -> None:
    apps.write_app(tmp_path, App(HOW, np.zeros((8, 8, 3), np.uint8), runtimes, system), _ends(), {})
    assert all((tmp_path / "app" / name).is_file() for name in [*there, "README.md", "golden/picture.ppm"])
    assert not any((tmp_path / "app" / name).exists() for name in not_there)


def test_engines_that_the_device_builds_are_known_to_the_app(spec: BundleSpec, tmp_path: Path) -> None:
    typed = (TypedFile(spec.onnx, "fp16", "", 1e-2),)
    folder = written(tmp_path / "bundle", replace(spec, target="jetson", typed=typed, has_builder=True))
    text = (folder / "app" / "model.properties").read_text()
    assert "engine.tensorrt.fp16 = engines/tensorrt-fp16/model.engine\ntolerance.tensorrt.fp16 = 0.01\n" in text


@pytest.mark.parametrize("colour", ["RGB", "BGR", "GRAY"])
def test_the_golden_picture_shows_the_image_at_other_sides(colour: str) -> None:
    grey = {"mean": (0.5,), "std": (0.5,)} if colour == "GRAY" else {}
    how = Preprocess.model_validate({"resize": 32, "crop": (28, 28), "colour": colour, **grey})
    column = np.linspace(0, 255, 32)
    rgb = np.stack(np.broadcast_arrays(column[:, None], column[None], 128), -1).astype(np.uint8)
    picture = apps.picture_of(how.read(Image.fromarray(rgb)), how)
    assert picture.shape == (42, 49, how.channels)
    again = how.read(Image.fromarray(picture.squeeze()))
    top, bottom = again[2:-2, 8:-8].astype(int).mean((0, 1)), how.read(Image.fromarray(rgb))[4:-4, 4:-4].mean((0, 1))
    assert np.abs(top - bottom).max() < 12, "colours are where they were"


def test_every_source_is_there_and_has_no_tabs() -> None:
    for name in apps._all():
        text = (SOURCES / name).read_text(encoding="utf-8")
        assert "\t" not in text, name
        assert max(map(len, text.splitlines())) <= 130, name
        assert len(text.splitlines()) <= 400, name
