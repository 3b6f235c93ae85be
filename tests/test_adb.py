"""--device adb:SERIAL, against a fake adb: engines by a real program in C++, errors, cuts, full storage, odd words."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adb_fake import Fake, install, program
from tiny_onnx import scored_onnx

from thinet_deploy import bundle
from thinet_deploy.apps import App
from thinet_deploy.artifact import hash_json, read_json
from thinet_deploy.bundle import BundleSpec, EngineFile
from thinet_deploy.cli.device import show_device
from thinet_deploy.data.preprocess import Preprocess
from thinet_deploy.devices import android as android_site
from thinet_deploy.devices.address import find_device
from thinet_deploy.errors import DeviceError, GateError, MissingError, TargetError
from thinet_deploy.interfaces import TensorSpec, silent
from thinet_deploy.on_device.runner import ROUNDS
from thinet_deploy.shared_run import SharedRun
from thinet_deploy.stages import android as android_stage
from thinet_deploy.stages import device as device_stage
from thinet_deploy.store import Stage
from thinet_deploy.target import load_profile

HOW = Preprocess(resize=14, crop=(12, 12))


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> BundleSpec:
    """A tiny network with an engine of ONNX Runtime."""
    reference = pytest.importorskip("onnx.reference", reason="onnx is not installed")
    source = scored_onnx(tmp_path_factory.mktemp("engines") / "tiny.onnx")
    x = np.random.default_rng(1).standard_normal((3, 3, 12, 12)).astype("float32")
    return BundleSpec(
        model="tiny",
        target="android",
        onnx=source,
        engines=(EngineFile("onnxruntime", source, "fp32", 1e-4),),
        inputs=(TensorSpec("x", ("batch", 3, 12, 12), "float32"),),
        outputs=(TensorSpec("y", ("batch", 5), "float32"),),
        golden_inputs={"x": x},
        golden_outputs={"y": np.asarray(next(iter(reference.ReferenceEvaluator(str(source)).run(None, {"x": x}))))},
        tolerance=1e-4,
        app=App(
            HOW, np.random.default_rng(2).integers(0, 256, (25, 17, 3)).astype(np.uint8), ("onnxruntime",), "android"
        ),
    )


@pytest.fixture
def made(spec: BundleSpec, tmp_path: Path) -> Path:
    return written(tmp_path / "the 'bundle' $(touch pwned)", spec)


def written(folder: Path, spec: BundleSpec) -> Path:
    folder.mkdir()
    bundle.write_bundle(folder, spec)
    return folder


def reached() -> android_site.Phone:
    return android_site.reach(find_device("adb:FP5"), load_profile("android"))


def verified(made: Path) -> dict[str, Any]:
    return android_stage.verify(reached(), made, silent)


# ------------------------------------------------------------------------------------------ engines there


def test_a_bundle_is_verified_there(phone: Fake, made: Path) -> None:
    report = verified(made)
    (row,) = report["engines"]
    assert (report["exit_code"], row["verdict"], row["top1_agreement"]) == (0, "passed", 1)
    assert row["max_relative_error"] < 1e-6
    assert not list(phone.folder.rglob("pwned"))


def test_what_is_there_is_not_sent_twice(phone: Fake, made: Path) -> None:
    verified(made)
    first = len(phone.calls)
    verified(made)
    assert not [call for call in phone.calls[first:] if ".partial" in call[-1]]
    (there,) = phone.storage.glob("thinet-deploy/*/bundle/model.onnx")
    there.write_bytes(b"x")
    assert verified(made)["exit_code"] == 0
    assert there.read_bytes() == (made / "model.onnx").read_bytes()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (program("echo 'error: ncnn refuses it' >&2; exit 2"), "ncnn refuses it"),
        (program("kill -SEGV $$"), "it was ended by SIGSEGV"),
        (program("echo words; exit 0"), "it did not answer in JSON"),
        (program("exit 5"), "it ended with code 5"),
        (program(same="false"), "images are preprocessed otherwise there than in training"),
        (program('tail -c 4 "$2/app/golden/output.f32" > "$2/x"; mv "$2/x" "$2/app/golden/output.f32"'), "of shape"),
        (program('head -c 40 /dev/zero > "$2/app/golden/output.f32"'), "outputs are off"),
    ],
)
def test_an_engine_that_fails_there_has_failed(phone: Fake, made: Path, tmp_path: Path, text: str, reason: str) -> None:
    install(tmp_path, text)
    report = verified(made)
    assert report["exit_code"] == 1
    assert reason in report["engines"][0]["reason"]


def test_a_program_of_another_version_is_to_be_built_again(phone: Fake, made: Path, tmp_path: Path) -> None:
    install(tmp_path, program(protocol=2))
    with pytest.raises(MissingError, match="was built from another version"):
        verified(made)


def test_where_no_program_was_built_it_is_said_how(phone: Fake, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(MissingError, match=r"adb:FP5 needs a program.*arm64-v8a has none") as stop:
        reached()
    assert "NDK" in stop.value.hint


def test_an_engine_without_a_program_is_not_run(phone: Fake, spec: BundleSpec, tmp_path: Path) -> None:
    install(tmp_path, program(), "ncnn").with_name("thinet-onnxruntime").unlink()
    report = verified(written(tmp_path / "bundle", spec))
    assert (report["exit_code"], report["engines"][0]["verdict"]) == (3, "not run")
    assert "no program for onnxruntime" in report["engines"][0]["reason"]


def test_another_device_than_the_target_is_refused(phone: Fake) -> None:
    properties = phone.folder / "properties"
    properties.write_text(properties.read_text().replace("arm64-v8a", "armeabi-v7a"))
    with pytest.raises(TargetError, match=r"adb:FP5 is no android.*it is Fairphone FP5 QCM6490"):
        reached()


def test_times_come_with_all_samples(phone: Fake, made: Path) -> None:
    report = android_stage.latency(reached(), made, silent, threads=2, seconds=0.9)
    (row,) = report["engines"]
    assert row["rounds_ms"] == [[1.5, 1.25, 1.75]] * ROUNDS
    assert row["summary"]["median_ms"] == 1.5
    assert (row["summary"]["invalid"], row["memory"]["process_peak_bytes"]) == ([], 4096)
    assert report["processor"] == "Fairphone FP5 QCM6490"
    (started,) = phone.storage.glob("thinet-deploy/*/started")
    runs = [line.split()[2:] for line in started.read_text().splitlines()]
    assert runs == [["fp32", "2", "0.060000", "0"]] * ROUNDS


@pytest.mark.parametrize(
    ("statuses", "invalid", "warned"),
    [((0, 0, 2, 0), "the machine throttled: thermal status 2", False), ((None,), "", True), ((0,), "", False)],
)
def test_a_device_that_throttles_is_no_measure(
    phone: Fake, made: Path, statuses: tuple[int | None, ...], invalid: str, warned: bool
) -> None:
    phone.thermal(*statuses)
    (row,) = android_stage.latency(reached(), made, silent, seconds=0.9)["engines"]
    assert row["summary"]["invalid"] == ([invalid] if invalid else [])
    assert any("not known" in warning for warning in row["summary"]["warnings"]) == warned


# ------------------------------------------------------------------------------------------ when it goes wrong


@pytest.mark.parametrize("at", ["bundle/model.onnx", "sha256sum", "outputs"])
def test_a_device_that_goes_away_is_no_success_and_the_next_try_goes_on(phone: Fake, made: Path, at: str) -> None:
    phone.set(cut=at)
    with pytest.raises(DeviceError, match="The connection to adb:FP5 was cut") as stop:
        verified(made)
    assert "Run the same command again" in stop.value.hint
    phone.set(cut="")
    assert verified(made)["exit_code"] == 0


@contextmanager
def small(folder: Path) -> Iterator[None]:
    """A disk of 100 kB; skips the test where none can be mounted."""
    if (
        os.getuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "none", str(folder)], check=False).returncode
    ):
        pytest.skip("only root can mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_full_storage_is_said(phone: Fake, made: Path) -> None:
    with small(phone.storage):
        (phone.storage / "photos").write_bytes(b"x" * 90_000)
        with pytest.raises(DeviceError, match="The disk of adb:FP5 is full") as stop:
            verified(made)
        assert "/data/local/tmp/thinet-deploy" in stop.value.hint
        (phone.storage / "photos").unlink()
        assert verified(made)["exit_code"] == 0


def test_storage_that_is_full_when_outputs_are_written_is_said_too(phone: Fake, made: Path, tmp_path: Path) -> None:
    install(tmp_path, program('set -- $1 "$2" $3 $4 /dev/full'))
    with pytest.raises(DeviceError, match="The disk of adb:FP5 is full"):
        verified(made)


# ------------------------------------------------------------------------------------------ the whole way


def deployed(made: Path, run: Path) -> dict[str, Any]:
    found, target = device_stage.reach("adb:FP5", "python3", load_profile("android"))
    bundle = Stage(made, hash_json(str(made)), {}, reused=False)
    return device_stage.on_device(SharedRun(run), found, target, bundle, 1, silent)


def test_a_build_keeps_what_the_device_gave(
    phone: Fake, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device_stage, "SECONDS", 0.9)
    found = deployed(made, tmp_path / "run")
    kept = {path.name for path in Path(found["folder"]).iterdir()}
    assert {"facts.json", "verify.json", "latency.json"} <= kept
    facts = read_json(Path(found["folder"]) / "facts.json")
    assert (facts["system"], facts["properties"]["ro.soc.model"]) == ("Android 15", "QCM6490")
    assert "SECRET" not in json.dumps(found)
    show_device(found)
    shown = capsys.readouterr().out
    assert "Measured on the device: Fairphone FP5 QCM6490, arm64-v8a, Android 15" in shown
    assert "onnxruntime fp32: golden outputs passed there" in shown
    count = len(phone.calls)
    deployed(made, tmp_path / "run")
    assert not [call for call in phone.calls[count:] if "thinet-onnxruntime" in call[-1]], "it is done"


def test_a_build_fails_with_its_engine(phone: Fake, made: Path, tmp_path: Path) -> None:
    install(tmp_path, program("exit 1"))
    with pytest.raises(GateError, match="The bundle failed on adb:FP5: onnxruntime fp32: it ended with code 1") as stop:
        deployed(made, tmp_path / "run")
    assert stop.value.exit_code == 1


def test_the_command_line(phone: Fake, made: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    done = cli("verify", made, "--device", "adb:FP5")
    assert done.code == 0, done.err
    assert "PASSED: 1 of 1 engines" in done.out
    done = cli("latency", made, "--device", "adb:", "--seconds", "1", "--rounds", "7", "--out", tmp_path / "times.json")
    assert done.code == 0, done.err
    assert "Fairphone FP5 QCM6490, arm64-v8a, Android 15" in done.out
    assert len(read_json(tmp_path / "times.json")["engines"][0]["rounds_ms"]) == 7
    done = cli("latency", made, "--device", "adb:", "--seconds", "1", "--fps", "30", "--out", tmp_path / "times.json")
    assert done.code == 0, done.err
    assert [row["fps"] for row in read_json(tmp_path / "times.json")["engines"]] == [0, 30]
    assert read_json(tmp_path / "times.json")["fps"] == 30
    assert done.out.count("onnxruntime fp32: median") == done.out.count("onnxruntime fp32, 30 a second: median") == 1
    done = cli("latency", made, "--device", "adb:FP5", "--batch", "4")
    assert (done.code, "one image per run" in done.err) == (2, True)
    phone.set(devices={"FP5": "unauthorized"})
    done = cli("verify", made, "--device", "adb:FP5")
    assert (done.code, "Traceback" in done.err) == (3, False)


def test_a_real_program_runs_a_real_engine(
    phone: Fake, spec: BundleSpec, tmp_path: Path, openvino_program: Path
) -> None:
    """The program that an NDK would build, built for this machine; OpenVINO stands in for a runtime of phones."""
    import openvino

    shutil.copy(openvino_program, install(tmp_path, "", "openvino"))
    openvino.save_model(openvino.convert_model(spec.onnx), tmp_path / "tiny.xml", compress_to_fp16=False)
    assert spec.app
    app = replace(spec.app, runtimes=("openvino", "onnxruntime"))
    made = written(
        tmp_path / "bundle",
        replace(spec, engines=(EngineFile("openvino", tmp_path / "tiny.xml", "fp32", 1e-4),), app=app),
    )
    report = verified(made)
    (row,) = report["engines"]
    assert (row["verdict"], row["reason"], row["top1_agreement"]) == ("passed", "", 1)
    assert row["describe"]["version"].startswith("20")
    (row,) = android_stage.latency(reached(), made, silent, seconds=0.5)["engines"]
    assert (row["verdict"], len(row["rounds_ms"]), row["summary"]["invalid"]) == ("passed", ROUNDS, [])
    assert row["load_ms"] > 0
    assert row["memory"]["process_peak_bytes"] > 1 << 20
