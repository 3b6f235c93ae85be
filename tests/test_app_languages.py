"""Apps in other languages and for other machines, each with its own compiler, or skipped with the reason."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path

import numpy as np
import pytest
from app_builds import PREPROCESSOR, SOURCES, build, compiler, missing_for_ncnn
from PIL import Image
from tiny_onnx import scored_onnx

from thinet_deploy import apps, bundle, registry
from thinet_deploy.apps import App, Ends
from thinet_deploy.bundle import BundleSpec, EngineFile
from thinet_deploy.data.preprocess import Preprocess
from thinet_deploy.interfaces import Conversion, Precision, TensorSpec
from thinet_deploy.on_device.engines import open_engine

STAND_INS = Path(__file__).with_name("app_stand_ins")
HOW = Preprocess(resize=14, crop=(12, 12))
WAYS = (
    Preprocess(resize=20, crop=(16, 12)),
    Preprocess(resize=(9, 31), crop=(9, 16), interpolation="bicubic", colour="BGR", range="0..255"),
    Preprocess(resize=30, crop=(30, 30), colour="GRAY", mean=(0.3,), std=(0.36,)),
    Preprocess(resize=8, crop=(8, 8), interpolation="bicubic"),
)
SIZES = ((41, 23), (23, 90), (5, 7), (3, 60), (60, 3), (8, 8))


def folders(root: Path) -> list[Path]:
    """A folder with app/ for each way and each size of picture."""
    made = []
    for number, (how, size) in enumerate((how, size) for how in WAYS for size in SIZES):
        picture = np.random.default_rng(number).integers(0, 256, (*size, how.channels)).astype(np.uint8)
        folder = root / str(number)
        ends = Ends("x", "y", np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32))
        engines = {"litert.fp32": ("labels.txt", 1e-4)}
        apps.write_app(folder, App(how, picture, ("litert", "coreml"), "android"), ends, engines)
        (folder / "labels.txt").write_text("a\nb\nc\n")
        made.append(folder)
    return made


def said(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ------------------------------------------------------------------------------------------ Python


@pytest.fixture(scope="module")
def classify() -> Callable[..., np.ndarray]:
    spec = util.spec_from_file_location("classify", SOURCES / "python" / "classify.py")
    assert spec
    assert spec.loader
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.preprocess  # type: ignore[no-any-return]  # as it is there


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("size", [*SIZES, (3, 200)])
def test_preprocessing_in_python_is_that_of_training(
    classify: Callable[..., np.ndarray], how: Preprocess, size: tuple[int, int]
) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8))
    expected = how.normalise(how.centre_crop(how.read(image)[None]))[0]
    assert np.array_equal(classify(image, how.model_dump(mode="json")), expected)


@pytest.mark.parametrize("bits", ["uint16", "int32"])
def test_sixteen_bits_in_python_are_those_of_training(classify: Callable[..., np.ndarray], bits: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (30, 20)).astype(bits))
    assert image.mode in {"I", "I;16"}
    grey = Preprocess(colour="GRAY", resize=20, crop=(12, 16), mean=(0.5,), std=(0.5,))
    for how in (Preprocess(resize=20, crop=(12, 16)), grey):
        expected = how.normalise(how.centre_crop(how.read(image)[None]))[0]
        assert np.array_equal(classify(image, how.model_dump(mode="json")), expected)


@pytest.mark.parametrize("pixels", [np.full((20, 20), 0.5, "float32"), np.full((20, 20), 70_000, "int32")])
def test_deeper_pixels_are_refused_in_python_too(classify: Callable[..., np.ndarray], pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="nothing says which value is white"):
        classify(Image.fromarray(pixels), Preprocess(resize=20, crop=(12, 16)).model_dump(mode="json"))


def test_a_bundle_classifies_in_python(tmp_path: Path, written: Callable[[Path], Path]) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    folder = written(tmp_path / "bundle")
    script = folder / "app" / "python" / "classify.py"
    assert said(sys.executable, script, "check") == "passed  preprocessing: 0 of 432 values differ\n"
    lines = said(sys.executable, script, folder / "app" / "golden" / "picture.ppm").splitlines()
    assert len(lines) == 3
    assert all(line.split("  ")[-1].startswith("class ") for line in lines)
    absent = subprocess.run([sys.executable, script, "no.jpg"], capture_output=True, text=True, check=False)
    assert absent.returncode == 1
    assert absent.stderr.startswith("no.jpg cannot be read as an image: ")


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Path], Path]:
    """Writes a bundle of a tiny network, with engines that are given."""

    def write(folder: Path, engines: tuple[EngineFile, ...] = ()) -> Path:
        from onnx.reference import ReferenceEvaluator

        source = scored_onnx(tmp_path / "tiny.onnx")
        x = np.random.default_rng(1).standard_normal((3, 3, 12, 12)).astype("float32")
        y = np.asarray(next(iter(ReferenceEvaluator(str(source)).run(None, {"x": x}))))
        made = engines or (EngineFile("onnxruntime", source, "fp32", 1e-4),)
        picture = np.random.default_rng(2).integers(0, 256, (25, 17, 3)).astype(np.uint8)
        folder.mkdir()
        bundle.write_bundle(
            folder,
            BundleSpec(
                model="tiny",
                target="cpu",
                onnx=source,
                engines=made,
                inputs=(TensorSpec("x", ("batch", 3, 12, 12), "float32"),),
                outputs=(TensorSpec("y", ("batch", 5), "float32"),),
                golden_inputs={"x": x},
                golden_outputs={"y": y},
                tolerance=1e-4,
                labels=tuple(f"class {number}" for number in range(5)),
                preprocess=HOW.model_dump(mode="json"),
                app=App(HOW, picture, ("onnxruntime", "ncnn"), "linux"),
            ),
        )
        return folder

    return write


# ------------------------------------------------------------------------------------------ other runtimes in C++


@pytest.mark.parametrize(("precision", "least", "most"), [("fp32", 0, 1e-5), ("fp16", 1e-5, 1e-2)])
def test_a_bundles_own_sources_run_ncnn_as_python_does(
    precision: Precision, least: float, most: float, tmp_path: Path, written: Callable[..., Path]
) -> None:
    if why := missing_for_ncnn():
        pytest.skip(why)
    (tmp_path / "made").mkdir()
    job = Conversion(scored_onnx(tmp_path / "source.onnx"), tmp_path / "made", precision)
    path = tmp_path / "made" / registry.convert("ncnn", job, tmp_path / "made").path
    folder = written(tmp_path / "bundle", (EngineFile("ncnn", path, precision, most),))
    program = build("ncnn", folder / "app" / "cpp", tmp_path / "build")
    assert said(program, "check", folder).count("passed") == 2
    assert '"same_preprocessing": true' in said(program, "outputs", folder, precision, 1, tmp_path / "out")
    got, golden = np.fromfile(tmp_path / "out", np.float32).reshape(-1, 5), np.load(folder / "golden.npz")
    inputs, exact = golden["input:x"][: len(got)], golden["output:y"][: len(got)]
    engine = open_engine("ncnn", str(path), 1, precision)
    np.testing.assert_allclose(got, engine.run({"x": inputs})["y"], atol=1e-5)
    assert least <= np.abs(got - exact).max() / np.abs(exact).max() <= most


@pytest.mark.parametrize("asks", ["yes", ""])
def test_a_package_of_ncnn_that_wants_no_exceptions(asks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for Android ask their users for it, and our sources throw; what else one asks for stays."""
    monkeypatch.setenv("ncnn_DIR", str(STAND_INS / "ncnn"))
    monkeypatch.setenv("NCNN_ASKS", asks)
    program = build("ncnn", SOURCES / "cpp", tmp_path)
    done = subprocess.run([program, "check", tmp_path], capture_output=True, text=True, check=False)
    assert (done.returncode, "model.properties cannot be read" in done.stderr) == (2, True)
    assert (b"asks for nothing" in program.read_bytes()) == (not asks)


@pytest.mark.parametrize(
    ("engine", "memory", "code", "words"),
    [
        ("sums", True, 0, "passed  tensorrt fp16"),
        ("sums in half", True, 2, "inputs and outputs have to be float32"),
        ("other", True, 2, "runs on the device and version it was built with only"),
        ("", True, 2, "build the engine on this device first"),
        ("sums", False, 2, "CUDA: out of memory"),
    ],
)
def test_tensorrt_in_cpp_against_a_stand_in(
    tensorrt: Path, tmp_path: Path, engine: str, memory: bool, code: int, words: str
) -> None:
    """What it asks of TensorRT and in which order; the real one takes its library and a GPU."""
    x = np.random.default_rng(0).standard_normal((2, 3, 12, 16)).astype(np.float32)
    how, picture = Preprocess(resize=20, crop=(12, 16)), np.zeros((30, 30, 3), np.uint8)
    engines = {"tensorrt.fp16": (bundle.built_path("fp16"), 1e-5)}
    apps.write_app(tmp_path, App(how, picture, ("tensorrt",), "linux"), Ends("x", "y", x, x.sum((2, 3))), engines)
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    path = tmp_path / bundle.built_path("fp16")
    path.parent.mkdir(parents=True)
    path.write_text(engine)
    environment = {**os.environ, **({} if memory else {"NO_GPU_MEMORY": "1"})}
    done = subprocess.run([tensorrt, "check", tmp_path], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == code
    assert words in done.stdout + done.stderr


def test_of_engines_that_the_device_builds_the_one_that_is_there(tensorrt: Path, tmp_path: Path) -> None:
    """A Jetson's bundle names fp32 and each typed file; the engine may be for one of its DLAs."""
    x = np.random.default_rng(0).standard_normal((2, 3, 12, 16)).astype(np.float32)
    how, picture = Preprocess(resize=20, crop=(12, 16)), np.zeros((30, 30, 3), np.uint8)
    engines = {f"tensorrt.{each}": (bundle.built_path(each), 1e-5) for each in ("fp16", "fp32", "int8")}
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")

    def checked(dla: int | None, *words: str) -> tuple[int, str]:
        app = App(how, picture, ("tensorrt",), "linux", dla)
        apps.write_app(tmp_path, app, Ends("x", "y", x, x.sum((2, 3))), engines)
        done = subprocess.run([tensorrt, "check", tmp_path, *words], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    path = tmp_path / bundle.built_path("int8")
    path.parent.mkdir(parents=True)
    path.write_text("sums")
    for words in ((), ("int8",)):
        code, said_ = checked(None, *words)
        assert (code, "passed  tensorrt int8" in said_) == (0, True), said_
    code, said_ = checked(None, "fp32")
    assert (code, "tensorrt-fp32/model.engine is missing: build the engine" in said_) == (2, True), said_
    path.write_text("sums on DLA 1")
    assert [checked(dla)[0] for dla in (None, 0, 1)] == [2, 2, 0]


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        ("", "Say for which runtime"),
        ("litert", "Say for which runtime"),
        ("tensorrt", "NvInfer.h or the library nvinfer is not found"),
    ],
)
def test_what_cannot_be_built_is_said(tmp_path: Path, runtime: str, words: str) -> None:
    if shutil.which("cmake") is None or Path("/usr/include/x86_64-linux-gnu/NvInfer.h").exists():
        pytest.skip("there is no cmake here, or there is a TensorRT")
    compiler()
    command = ["cmake", "-S", str(SOURCES / "cpp"), "-B", str(tmp_path), f"-DRUNTIME={runtime}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert words in " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def tensorrt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program, cpp = tmp_path_factory.mktemp("tensorrt") / "thinet-tensorrt", SOURCES / "cpp"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{STAND_INS / 'tensorrt'}", f"-I{cpp}", "-pthread"]
    said(compiler(), *flags, "-o", program, cpp / "main.cpp", cpp / "tensorrt.cpp")
    return program


@pytest.mark.slow
def test_preprocessing_on_arm64_is_that_of_training(tmp_path: Path) -> None:
    """Under emulation, with the flags of CMakeLists.txt: arm64 could fuse multiplications, and must not."""
    cross, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not (cross and emulator):
        pytest.skip("no arm64 compiler or emulator here (apt install g++-aarch64-linux-gnu qemu-user)")
    (tmp_path / "main.cpp").write_text(PREPROCESSOR)
    program = tmp_path / "preprocessor"
    flags = ["-std=c++17", "-O2", "-static", "-ffp-contract=off", f"-I{SOURCES / 'cpp'}"]
    said(cross, *flags, "-o", program, tmp_path / "main.cpp")
    for folder in folders(tmp_path):
        kind, size, _, pixels = (folder / "app/golden/picture.ppm").read_bytes().split(b"\n", 3)
        (folder / "image").write_bytes(size + (b" 3\n" if kind == b"P6" else b" 1\n") + pixels)
        done = subprocess.run([emulator, program, folder, folder / "image"], capture_output=True, check=True)
        assert done.stdout == (folder / "app/golden/picture.f32").read_bytes()


# ------------------------------------------------------------------------------------------ Kotlin and Swift


@pytest.mark.slow
def test_kotlin(tmp_path: Path) -> None:
    """The real compiler and a real JVM; Android and LiteRT are stand-ins with their signatures."""
    found = util.find_spec("run_kotlin_kernel")
    if shutil.which("java") is None or found is None or not found.origin:
        pytest.skip("no java or no Kotlin compiler here (pip install --no-deps kotlin-jupyter-kernel)")
    jars = Path(found.origin).with_name("jars")
    (library,), whole = jars.glob("kotlin-stdlib-[0-9]*.jar"), ":".join(map(str, jars.glob("*.jar")))
    sources = [*(SOURCES / "kotlin").glob("*.kt"), *(STAND_INS / "kotlin").glob("*.kt")]
    compile_ = [
        "java",
        "-cp",
        whole,
        "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler",
        "-no-stdlib",
        "-no-reflect",
        "-Werror",
    ]
    said(*compile_, "-cp", library, "-d", tmp_path / "classes", *sources)
    made = folders(tmp_path)
    lines = said("java", "-cp", f"{tmp_path / 'classes'}:{library}", "MainKt", *made).splitlines()
    assert lines[: len(made)] == ["0"] * len(made)
    x = np.fromfile(made[0] / "app" / "golden" / "picture.f32", "<f4").reshape(3, -1).sum(1).astype(np.float64)
    shares = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    got = [line.split() for line in lines[len(made) :]]
    assert [label for label, _ in got] == ["abc"[index] for index in np.argsort(-shares)]
    assert [float(share) for _, share in got] == pytest.approx(sorted(shares)[::-1], rel=1e-3, abs=1e-12)


@pytest.mark.slow
def test_swift(tmp_path: Path) -> None:
    """Preprocessing runs anywhere; Classifier.swift, which needs Apple's frameworks, is parsed only."""
    swift = shutil.which("swiftc")
    if swift is None:
        pytest.skip("there is no Swift compiler here (apt install swiftlang, from Debian 13 on)")
    sources = [SOURCES / "swift" / "Preprocess.swift", SOURCES / "swift" / "Check.swift", STAND_INS / "main.swift"]
    said(swift, "-O", "-o", tmp_path / "check", *sources)
    made = folders(tmp_path)
    assert said(tmp_path / "check", *made).splitlines() == ["0"] * len(made)
    said(swift, "-frontend", "-parse", SOURCES / "swift" / "Classifier.swift")
