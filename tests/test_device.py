"""--device ssh://…: the way there, and the whole build; against a real sshd on this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ssh_bundles import PYTHON, Make, builder, deploy, starts, vouch
from ssh_server import Server

from thinet_deploy import bundle
from thinet_deploy.artifact import read_json, sha256_of
from thinet_deploy.errors import MissingError
from thinet_deploy.stages import device as device_stage

NAMES = ("facts", "verify", "latency", "precision")


def test_a_bundle_is_verified_and_measured_there_and_all_of_it_comes_back(
    server: Server, make_bundle: Make, tmp_path: Path, made: Any
) -> None:
    stage = make_bundle(runtimes=("openvino", "onnxruntime"))
    found, todo = made(lambda: deploy(server, stage, tmp_path / "run"))
    assert todo == ["device"]
    assert {row["runtime"]: row["verdict"] for row in found["verify"]["engines"]} == dict.fromkeys(
        ("openvino", "onnxruntime"), "passed"
    )
    assert all(row["summary"]["median_ms"] > 0 and row["rounds_ms"] for row in found["latency"]["engines"])
    assert found["facts"]["modules"].keys() >= {"numpy", "openvino", "onnxruntime"}
    assert found == {
        "folder": str(tmp_path / "run" / "device"),
        **{name: read_json(tmp_path / "run" / "device" / f"{name}.json") for name in NAMES},
    }
    assert len(list((tmp_path / "run" / "device" / "logs").rglob("err"))) == 2
    assert not list(tmp_path.rglob("pwned"))
    again, todo = made(lambda: deploy(server, stage, tmp_path / "run"))
    assert (again, todo) == (found, [])


def test_engines_are_built_there_and_brought_here(server: Server, make_bundle: Make, tmp_path: Path) -> None:
    before = len(starts(server))
    found = deploy(server, make_bundle(builder()), tmp_path / "run")
    device = tmp_path / "run" / "device"
    manifest = bundle.read_manifest(device)
    engine = manifest.engines[0]
    assert (engine.runtime, engine.precision, engine.tolerance) == ("tensorrt", "fp16", 1e-2)
    assert sha256_of(device / engine.path) == engine.sha256 == manifest.files[engine.path]
    assert (device / "timing.cache").read_text() == "timings"
    assert starts(server)[before:] == ["fp16"]
    (log,) = device.glob("logs/build-fp16-*/out")
    report = json.loads(log.read_text().splitlines()[-1])["report"]
    assert (report["--workspace-mb"], report["--guard-mb"]) == ("1024", "1024")
    assert found["verify"]["files"]["extra"] == []  # the manifest there vouches for the engine as well


def test_the_real_builder_takes_what_it_is_given(server: Server, make_bundle: Make, tmp_path: Path) -> None:
    from thinet_deploy.bundle import BUILDER as REAL

    with pytest.raises(MissingError, match="tensorrt cannot be imported") as stop:
        deploy(server, make_bundle(REAL.read_text()), tmp_path / "run")
    assert "--device-python" in stop.value.hint


def test_verify_and_latency_work_there_too(server: Server, make_bundle: Make, cli: Any, tmp_path: Path) -> None:
    folder, where = make_bundle().folder, ("--device", server.address, "--device-python", PYTHON)
    done = cli("verify", folder, *where)
    assert (done.code, done.err.count("Error")) == (0, 0)
    assert "1 of 1 engines ran here" in done.out
    report = tmp_path / "report.json"
    done = cli("latency", folder, *where, "--seconds", 0.5, "--rounds", 6, "--fps", 40.5, "--out", report)
    assert (done.code, "Measured on the device" in done.out) == (0, True)
    assert len(read_json(report)["engines"][0]["rounds_ms"]) == 6
    assert (read_json(report)["seconds"], read_json(report)["fps"]) == (0.5, 40.5)
    assert [row["fps"] for row in read_json(report)["engines"]] == [0, 40.5], "also at that pace, as here"
    shown = ("onnxruntime fp32: median", "onnxruntime fp32, 40.5 a second: median")
    assert [done.out.count(words) for words in shown] == [1, 1]
    done = cli("latency", folder, *where, "--precision", "int8")
    assert (done.code, "a bundle, which says both itself" in " ".join(done.err.split())) == (2, True)
    assert read_json(report)["environment"]["modules"]["numpy"] == np.__version__


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_build_ends_on_the_device(server: Server, cli: Any, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From photos to figures from the device; the same command again does nothing anew."""
    monkeypatch.setattr(device_stage, "SECONDS", 1)
    given: tuple[object, ...] = ("build", "--model", "net.py:tiny", "--data", "data")
    given = (*given, "--epochs", 1, "--finetune-epochs", 1, "--require", "latency<=100s")
    where = ("--controls", "none", "--device", server.address, "--device-python", PYTHON, "--out", "run")
    done = cli(*given, *where)
    assert done.code == 0, done.err
    (judged,) = read_json(workplace / "run" / "contract" / "contract.json")["verdicts"]
    assert judged["outcome"] == "met"
    assert "(the device)" in judged["detail"]
    compared = cli("compare", "run", "--format", "html", "--require", "latency<=1us")
    assert (compared.code, "<h3>On the device: " in compared.out) == (1, True)
    assert "Measured on the device" in done.out
    assert done.out.count("golden outputs passed there") == 2
    page = (workplace / "run" / "report" / "report.html").read_text()
    assert "<h3>On the device: " in page
    assert page.count('<span class="badge good">passed</span></td>\n<td>') >= 2
    first = (workplace / "run" / "device" / "latency.json").read_bytes()
    done = cli(*given, *where, "--json")
    document = json.loads(done.out)["device"]
    assert {row["verdict"] for row in document["verify"]["engines"]} == {"passed"}
    assert "rounds_ms" not in done.out
    assert (workplace / "run" / "device" / "latency.json").read_bytes() == first


def test_what_judges_a_bundle_does_not_come_from_it(
    server: Server, make_bundle: Make, cli: Any, tmp_path: Path
) -> None:
    folder = make_bundle().folder
    (folder / "run.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    vouch(folder, "run.py")
    done = cli("verify", folder, "--device", server.address, "--device-python", PYTHON)
    assert (done.code, "1 of 1 engines ran here" in done.out) == (0, True)
    assert not (tmp_path / "ran").exists()


def test_what_failed_there_is_tried_again(
    server: Server, make_bundle: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Any
) -> None:
    stage, ask = make_bundle(), device_stage.ask

    def hot(*given: Any) -> dict[str, Any]:
        report = ask(*given)
        if given[1] == "latency":
            report["engines"][0]["summary"]["invalid"] = ["the machine throttled: heat"]
        return report

    monkeypatch.setattr(device_stage, "ask", hot)
    _, todo = made(lambda: deploy(server, stage, tmp_path / "run"))
    assert todo == ["device"]
    monkeypatch.setattr(device_stage, "ask", ask)
    found, todo = made(lambda: deploy(server, stage, tmp_path / "run"))
    assert (found["latency"]["engines"][0]["summary"]["invalid"], todo) == ([], ["device"])


def test_engines_that_were_built_there_stay_part_of_the_bundle(
    server: Server, make_bundle: Make, cli: Any, tmp_path: Path
) -> None:
    stage = make_bundle(builder())
    deploy(server, stage, tmp_path / "run")
    shutil.copytree(tmp_path / "run" / "device", stage.folder.parent / "device")  # as they lie in a run
    done = cli("verify", stage.folder, "--device", server.address, "--device-python", PYTHON, "--json")
    rows = {row["runtime"]: row["verdict"] for row in json.loads(done.out)["engines"]}
    assert rows == {"tensorrt": "not run", "onnxruntime": "passed"}
