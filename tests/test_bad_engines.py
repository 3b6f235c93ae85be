"""Damaged and foreign engines and ONNX files, devices that are not reached, images that are too few.

Each is one message that says what to do, with the exit code that belongs to it, through the real command line.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorrt_versions import BINDINGS, Version, as_tensorrt, fake_engine, version_of
from tiny_onnx import scored_onnx

from thinet_deploy.bundle import Manifest
from thinet_deploy.precision.calibration import MIN_IMAGES

Change = Callable[[bytes], bytes]
REFUSED, BUILD = "tensorrt refuses net.engine: ", "so build it there. TensorRT 10.3.0 said: IRuntime::deserialize"
SHAPE = ("--input-shape", "3x12x12", "--seconds", 1)


def one_message(done: Any, code: int, *words: str) -> None:
    """What every mistake ends in."""
    said = done.err[done.err.rindex("Error: ") :]
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    assert [word for word in words if word not in said] == [], said
    assert len(said.strip().splitlines()) >= 2, f"what is to be done? {said}"


# ------------------------------------------------------------------------------------------ ONNX files


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[: len(data) // 2], ("net.onnx cannot be read: ", "Convert it again.")),
        (lambda data: b"\x08\x09garbage" * 50, ("net.onnx cannot be read: ", "Convert it again.")),
        (lambda data: b"", ("net.onnx cannot be read: it is empty.", "Convert it again.")),
        (
            lambda data: data.replace(b"GlobalAveragePool", b"GlobalFrobnicated"),
            ("onnxruntime refuses net.onnx: ", "No Op registered for GlobalFrobnicated", "convert it again"),
        ),
    ],
    ids=["truncated", "garbage", "empty", "unsupported operator"],
)
def test_an_onnx_file_that_is_none(
    change: Change, words: tuple[str, ...], cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    monkeypatch.chdir(tmp_path)
    source = scored_onnx(tmp_path / "net.onnx")
    source.write_bytes(change(source.read_bytes()))
    one_message(cli("latency", "net.onnx", *SHAPE), 2, *words)


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime", "ort"])
def test_an_operator_that_a_toolchain_lacks_is_named(runtime: str, tmp_path: Path) -> None:
    from thinet_deploy import registry
    from thinet_deploy.errors import ThinetDeployError
    from thinet_deploy.interfaces import Conversion

    for name in registry.converter(runtime).CONTRACT.modules:
        pytest.importorskip(name, reason=f"{name} is not installed")
    source = scored_onnx(tmp_path / "net.onnx")
    source.write_bytes(source.read_bytes().replace(b"GlobalAveragePool", b"GlobalFrobnicated"))
    (tmp_path / "made").mkdir()
    with pytest.raises(ThinetDeployError, match="GlobalFrobnicated") as stop:
        registry.convert(runtime, Conversion(source, tmp_path / "made"), tmp_path)
    assert stop.value.exit_code == 2
    assert stop.value.hint


OF_OPSET_18 = """
from torch import nn
from torch.nn.functional import interpolate

class Smooth(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.classifier = nn.Linear(8, 2)

    def forward(self, x):
        x = interpolate(self.features(x), size=(5, 5), mode="bilinear", antialias=True)
        return self.classifier(x.mean((2, 3)))

smooth = lambda: Smooth()
smooth.input_shape = (3, 16, 16)
"""


def test_what_a_jetpacks_opset_cannot_say_is_refused_before_the_training(cli: Any, workplace: Path) -> None:
    (workplace / "own.py").write_text(OF_OPSET_18)
    build = ("build", "--data", "data", "--model", "own.py:smooth", "--input-shape", "3x16x16", "--out", "run")
    done = cli(*build, "--target", "jetson@jetpack-5.1")
    one_message(done, 2, "antialias", "opset 17")
    stages = {path.name for path in (workplace / "run").iterdir() if not path.name.startswith(".")}
    assert stages <= {"run.json", "options.json"}, "nothing was trained"
    assert "Training" not in done.err


# ------------------------------------------------------------------------------------------ TensorRT engines


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Version:
    """What JetPack 6.2 brings."""
    assert "10.3" in BINDINGS
    return version_of("10.3", tmp_path_factory.mktemp("libraries"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[: len(data) // 2], (REFUSED, "it is damaged, or no engine: copy it again, or build it")),
        (lambda data: data.replace(b"10.3.0", b"10.4.0"), (REFUSED, "it was built by another TensorRT: ", BUILD)),
        (lambda data: data.replace(b'"8.7"', b'"8.6"'), (REFUSED, "it was built for another GPU: ", BUILD)),
        (lambda data: data, ("the engine takes x, but was given input",)),  # its file does not say which it takes
    ],
    ids=["truncated", "another version", "another GPU", "another input"],
)
def test_an_engine_that_tensorrt_refuses(
    change: Change, words: tuple[str, ...], version: Version, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a TensorRT that has the real one's names, and refuses files in its words (see tensorrt_device.py)."""
    monkeypatch.chdir(tmp_path)
    known = version.environment(as_tensorrt(tmp_path / "modules"))
    for name in ("PYTHONPATH", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, known[name])
    data = fake_engine(scored_onnx(tmp_path / "net.onnx").read_bytes(), version.exact)
    (tmp_path / "net.engine").write_bytes(change(data))
    one_message(cli("latency", "net.engine", *SHAPE), 2, *words)


# ------------------------------------------------------------------------------------------ the way to a device


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("ssh: connect to host orin port 22: No route to host", ("ssh://orin cannot be reached", "No route to host")),
        ("ssh: connect to host orin port 22: Network is unreachable", ("ssh://orin cannot be reached", "same network")),
        ("ssh: connect to host orin port 22: Connection timed out", ("ssh://orin cannot be reached", "switched on")),
        ("kex_exchange_identification: read: Connection reset by peer", ("The connection to ssh://orin was cut",)),
        ("client_loop: send disconnect: Broken pipe", ("The connection to ssh://orin was cut", "goes on where it was")),
    ],
)
def test_a_device_that_is_not_reached(
    said: str, words: tuple[str, ...], cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the words of OpenSSH, which a network of this machine alone does not bring out of it."""
    fake = tmp_path / "ssh"
    fake.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 255\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    empty = {"schema": "thinet-deploy/bundle", "version": 1, "created_by": "", "target": "cpu", "model": ""}
    empty |= {"labels": [], "preprocess": {}, "inputs": [], "outputs": [], "engines": [], "files": {}, "parity": {}}
    manifest = Manifest.model_validate({**empty, "golden": {"path": "g", "tolerance": 0}, "plan": "", "notes": []})
    (tmp_path / "manifest.json").write_text(manifest.model_dump_json(by_alias=True))
    one_message(cli("verify", tmp_path, "--device", "ssh://orin"), 3, *words)


# ------------------------------------------------------------------------------------------ calibration


def test_too_few_images_to_calibrate_with_are_refused_before_any_work(cli: Any, workplace: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    build = ("build", "--data", "data", "--model", "net.py:tiny", "--out", "run")
    for more, count in (((), 10), (("--calibration-images", 3), 3)):
        done = cli(*build, "--precision", "int8", *more)
        words = f"there are {count} calibration images, and at least {MIN_IMAGES} are needed"
        one_message(done, 2, f"--precision int8: {words}", "Give more training images")
    assert not (workplace / "run").exists()
