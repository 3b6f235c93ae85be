"""--device ssh://…: against a real sshd on this machine; cut, killed, full, foreign, and what becomes of it."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ssh_server import Server, serving
from tiny_onnx import scored_spec

from thinet_deploy import bundle, device_site, device_stage
from thinet_deploy.artifact import hash_json, read_json, sha256_of, write_json
from thinet_deploy.bundle import BundleSpec, TypedFile
from thinet_deploy.devices import find_device
from thinet_deploy.errors import (
    BundleError,
    ConversionError,
    DeviceError,
    GateError,
    MissingError,
    ThinetDeployError,
)
from thinet_deploy.interfaces import silent
from thinet_deploy.shared_run import SharedRun
from thinet_deploy.ssh import Ssh
from thinet_deploy.store import Stage
from thinet_deploy.target import load_profile

PYTHON = sys.executable
# Takes the arguments of tensorrt_builder.py and speaks as it does; counts how often it was started.
BUILDER = """
import json, os, shutil, sys, time
source, engine, *options = sys.argv[1:]
given = dict(zip(options[::2], options[1::2]))
with open(os.path.join(os.path.dirname(given["--cache"]), "starts"), "a") as starts:
    starts.write(given["--precision"] + "\\n")
for step in range({steps}):
    print(json.dumps({{"progress": [step, {steps}, "tactics"]}}), flush=True)
    time.sleep(0.1)
{end}
shutil.copyfile(source, engine)
with open(given["--cache"], "w") as cache:
    cache.write("timings")
with open(os.path.splitext(engine)[0] + ".build.json", "w") as report:
    json.dump({{"strongly_typed": True}}, report)
print(json.dumps({{"report": given}}), flush=True)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A device that all tests of this file may use."""
    with serving(tmp_path_factory.mktemp("ssh")) as server:
        yield server


@pytest.fixture
def server(place: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The device, with `ssh` knowing its key."""
    _on_path(place, monkeypatch)
    return place


def _on_path(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{server.folder / 'bin'}:{os.environ['PATH']}")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> BundleSpec:
    """A tiny network with an engine for each of both runtimes, and an ONNX file that the device is to build from."""
    found = scored_spec(tmp_path_factory.mktemp("engines"), 2)
    return replace(found, typed=(TypedFile(found.onnx, "fp16", "", 1e-2),))


Make = Callable[..., Stage]


@pytest.fixture
def make(spec: BundleSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes the stage of a bundle; one of its own for every test, since a device knows bundles by their content."""
    monkeypatch.setattr(device_stage, "SECONDS", 1)

    def make(builder: str = "", runtimes: Sequence[str] = ("onnxruntime",), **changes: Any) -> Stage:
        folder = tmp_path / "the 'bundle' $(touch pwned)"
        folder.mkdir()
        target = "jetson" if builder else "cpu"
        changes["engines"] = tuple(engine for engine in spec.engines if engine.runtime in runtimes)
        bundle.write_bundle(
            folder, _changed(spec, model=str(tmp_path), target=target, has_builder=bool(builder), **changes)
        )
        if builder:
            (folder / "tensorrt_builder.py").write_text(builder)
            _vouch(folder, "tensorrt_builder.py")
        return Stage(folder, hash_json(str(folder)), reused=False)

    return make


def _changed(spec: BundleSpec, **changes: Any) -> BundleSpec:
    return BundleSpec(**{**vars(spec), **changes})


def _vouch(folder: Path, name: str) -> None:
    manifest = read_json(folder / "manifest.json")
    manifest["files"][name] = sha256_of(folder / name)
    write_json(folder / "manifest.json", manifest)


def builder(steps: int = 1, end: str = "") -> str:
    return BUILDER.format(steps=steps, end=end)


def deploy(server: Server, made: Stage, run: Path) -> dict[str, Any]:
    machine = device_site.reach(find_device(server.address), PYTHON)
    target = load_profile(bundle.read_manifest(made.folder).target)
    return device_stage.on_device(SharedRun(run), machine, target, made, 1, silent)


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []

    def catch() -> None:
        try:
            results.append(work())
        except ThinetDeployError as error:
            results.append(error)

    thread = threading.Thread(target=catch)
    thread.start()
    return thread, results


def wait_for(there: Callable[[], Any]) -> Any:
    end = time.monotonic() + 60
    while not (found := there()):
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)
    return found


def starts(server: Server) -> list[str]:
    file = server.cache / "tensorrt" / "starts"
    return file.read_text().split() if file.exists() else []


# ------------------------------------------------------------------------------------------ the way there


NAMES = ("facts", "verify", "latency", "precision")


def test_a_bundle_is_verified_and_measured_there_and_all_of_it_comes_back(
    server: Server, make: Make, tmp_path: Path, made: Any
) -> None:
    stage = make(runtimes=("openvino", "onnxruntime"))
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


def test_engines_are_built_there_and_brought_here(server: Server, make: Make, tmp_path: Path) -> None:
    before = len(starts(server))
    found = deploy(server, make(builder()), tmp_path / "run")
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


def test_the_real_builder_takes_what_it_is_given(server: Server, make: Make, tmp_path: Path) -> None:
    from thinet_deploy.bundle import BUILDER as REAL

    with pytest.raises(MissingError, match="tensorrt cannot be imported") as stop:
        deploy(server, make(REAL.read_text()), tmp_path / "run")
    assert "--device-python" in stop.value.hint


def test_verify_and_latency_work_there_too(server: Server, make: Make, cli: Any, tmp_path: Path) -> None:
    folder, where = make().folder, ("--device", server.address, "--device-python", PYTHON)
    done = cli("verify", folder, *where)
    assert (done.code, done.err.count("Error")) == (0, 0)
    assert "1 of 1 engines ran here" in done.out
    report = tmp_path / "report.json"
    done = cli("latency", folder, *where, "--seconds", 1, "--out", report)
    assert (done.code, "Measured on the device" in done.out) == (0, True)
    assert read_json(report)["engines"][0]["rounds_ms"]
    assert read_json(report)["environment"]["modules"]["numpy"] == np.__version__


# ------------------------------------------------------------------------------------------ cut in the middle


def test_a_build_goes_on_while_the_connection_is_cut(server: Server, make: Make, tmp_path: Path) -> None:
    stage, before = make(builder(steps=20)), len(starts(server))
    thread, results = in_thread(lambda: deploy(server, stage, tmp_path / "run"))
    wait_for(lambda: starts(server)[before:])
    server.cut()
    thread.join()
    (error,) = results
    assert isinstance(error, DeviceError)
    assert "was cut" in error.what
    assert "goes on where it was" in error.hint
    assert not (tmp_path / "run" / "device").exists()
    found = deploy(server, stage, tmp_path / "run")
    assert starts(server)[before:] == ["fp16"], "the same build was followed to its end"
    assert Path(found["folder"], "engines", "tensorrt-fp16", "model.engine").is_file()


def test_what_was_copied_is_not_copied_again(
    server: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, pushed, push, most = make(), list[str](), Ssh.push, 4
    kinds = {"manifest.json", *read_json(stage.folder / "manifest.json")["files"]}

    def counted(self: Ssh, source: Path, target: str) -> None:
        if len(pushed) == most:
            raise DeviceError("The connection was cut.")
        push(self, source, target)
        pushed.append(target.partition("/bundle/")[2])

    monkeypatch.setattr(Ssh, "push", counted)
    with pytest.raises(DeviceError, match="was cut"):
        deploy(server, stage, tmp_path / "run")
    first, pushed, most = pushed, [], 1000
    deploy(server, stage, tmp_path / "run")
    assert first[0] == pushed[0] == "", "the script"
    assert len(first) == 4
    assert {*first[1:], *pushed[1:]} == kinds
    assert len(first[1:]) + len(pushed[1:]) == len(kinds)


def test_a_device_that_dies_in_a_build_builds_again_when_it_is_back(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, keys = make(builder(steps=20)), tmp_path / "ssh"
    keys.mkdir()
    with serving(keys) as server:
        _on_path(server, monkeypatch)
        thread, results = in_thread(lambda: deploy(server, stage, tmp_path / "run"))
        wait_for(lambda: starts(server))
        server.stop()
        kill_jobs(server)
        thread.join()
        assert isinstance(results[0], DeviceError)
        port = int(server.address.rpartition(":")[2])
    with pytest.raises(DeviceError, match="cannot be reached"):
        deploy(server, stage, tmp_path / "run")
    with serving(keys, port) as back:
        found = deploy(back, stage, tmp_path / "run")
        assert starts(back) == ["fp16", "fp16"]
    assert found["verify"]["exit_code"] == 0


def kill_jobs(server: Server, only: str = "") -> int:
    """Kill what runs there, as a power cut or the kernel does where memory runs out."""
    count = 0
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_text(errors="replace").split("\0")
        except OSError:
            continue
        if any(str(server.cache) in word for word in words) and only in (words[1] if len(words) > 1 else ""):
            os.kill(int(file.parent.name), signal.SIGKILL)
            count += 1
    return count


def test_a_builder_that_is_killed_for_memory_is_named(server: Server, make: Make, tmp_path: Path) -> None:
    stage, before = make(builder(steps=50)), len(starts(server))
    thread, results = in_thread(lambda: deploy(server, stage, tmp_path / "run"))
    wait_for(lambda: starts(server)[before:])
    assert kill_jobs(server, "tensorrt_builder.py") == 1
    thread.join()
    assert isinstance(results[0], DeviceError)
    assert "SIGKILL: too little memory" in results[0].what


# ------------------------------------------------------------------------------------------ what goes wrong


def test_an_engine_that_computes_something_else_there_fails_the_build(
    server: Server, make: Make, spec: BundleSpec, tmp_path: Path
) -> None:
    stage = make(golden_outputs={name: array + 1 for name, array in spec.golden_outputs.items()})
    with pytest.raises(GateError, match=r"failed on ssh://.*onnxruntime fp32: outputs are off") as stop:
        deploy(server, stage, tmp_path / "run")
    assert read_json(tmp_path / "run" / "device" / "verify.json")["exit_code"] == 1
    assert stop.value.exit_code == 1


def test_what_the_builder_refuses_is_said_and_logged(server: Server, make: Make, tmp_path: Path) -> None:
    said = json.dumps({"error": "TensorRT built no engine"})
    end = f"print('layer 7 is odd', file=sys.stderr); print({said!r}); sys.exit(1)"
    with pytest.raises(ConversionError, match=r"build-fp16 on ssh://.* failed: TensorRT built no engine") as stop:
        deploy(server, make(builder(end=end)), tmp_path / "run")
    log = tmp_path / "run" / "device-build-fp16.log"
    assert str(log) in stop.value.hint
    assert "layer 7 is odd" in log.read_text()


def test_a_full_disk_there_is_named_and_nothing_is_lost(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, keys = make(), tmp_path / "ssh"
    keys.mkdir()
    with serving(keys, disk="40k") as server:
        _on_path(server, monkeypatch)
        with pytest.raises(DeviceError, match=r"disk of ssh://.* is full") as stop:
            deploy(server, stage, tmp_path / "run")
    assert "not sent twice" in stop.value.hint
    port = int(server.address.rpartition(":")[2])
    with serving(keys, port) as roomy:
        assert deploy(roomy, stage, tmp_path / "run")["verify"]["exit_code"] == 0


def test_a_damaged_bundle_is_not_sent(server: Server, make: Make, tmp_path: Path) -> None:
    stage = make()
    (stage.folder / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(BundleError, match=r"model\.onnx is not as the manifest says"):
        deploy(server, stage, tmp_path / "run")


def refused(cli: Any, make: Make, address: str, *more: str) -> str:
    done = cli("verify", make().folder, "--device", address, *more)
    assert done.code == 3, done.err
    assert "Traceback" not in done.err
    return " ".join(done.err.split())


def test_a_wrong_host_key_is_no_host(server: Server, make: Make, cli: Any) -> None:
    server.cut()  # a connection that is open needs no key again
    known = server.folder / "known_hosts"
    right = known.read_text()
    other = (server.folder / "client.pub").read_text().split()[1]
    try:
        known.write_text(right.replace(right.split()[2], other))
        assert "shows another host key than the one that is known for it, so nothing was sent" in refused(
            cli, make, server.address
        )
    finally:
        known.write_text(right)


def test_an_unknown_host_key_is_asked_for_by_hand(server: Server, make: Make, cli: Any) -> None:
    server.cut()  # a connection that is open needs no key again
    known = server.folder / "known_hosts"
    right = known.read_text()
    try:
        known.write_text("")
        said = refused(cli, make, server.address)
        assert "is not known here" in said
        assert "Connect once by hand" in said
        assert known.read_text() == "", "no key was taken for granted"
    finally:
        known.write_text(right)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ssh://nobody-of-that-name@127.0.0.1:{port}", "does not let this user in with a key"),
        ("ssh://127.0.0.1:1", "cannot be reached"),
        ("ssh://no-such-host.invalid", "There is no host of that name"),
    ],
)
def test_where_nobody_answers(address: str, said: str, server: Server, make: Make, cli: Any) -> None:
    assert said in refused(cli, make, address.format(port=server.address.rpartition(":")[2]))


def test_a_device_without_python_numpy_or_runtime(server: Server, make: Make, cli: Any, tmp_path: Path) -> None:
    assert "There is no python9 on ssh://" in refused(cli, make, server.address, "--device-python", "python9")
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {PYTHON} -S "$@"\n')  # no site-packages
    bare.chmod(0o755)
    for folder in tmp_path.glob("the*"):
        folder.rename(tmp_path / "first")
    said = refused(cli, make, server.address, "--device-python", str(bare))
    assert f"numpy is not installed for {bare}" in said
    assert "-m pip install numpy" in said


def test_ssh_itself_may_be_missing(make: Make, cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = refused(cli, make, "ssh://board")
    assert "There is no ssh on this machine" in said


# ------------------------------------------------------------------------------------------ the whole build


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_build_ends_on_the_device(server: Server, cli: Any, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From photos to figures from the device; the same command again does nothing anew."""
    monkeypatch.setattr(device_stage, "SECONDS", 1)
    given = ("build", "--model", "net.py:tiny", "--data", "data", "--epochs", 1, "--finetune-epochs", 1)
    where = ("--controls", "none", "--device", server.address, "--device-python", PYTHON, "--out", "run")
    done = cli(*given, *where)
    assert done.code == 0, done.err
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


def test_a_build_for_another_device_is_refused_before_any_work(server: Server, cli: Any, workplace: Path) -> None:
    where = ("--device", server.address, "--device-python", PYTHON, "--out", "run")
    done = cli("build", "--model", "net.py:tiny", "--data", "data", "--target", "jetson", *where)
    assert (done.code, "is no jetson, as far as can be seen: it is x86_64" in done.err) == (2, True), done.err
    done = cli("build", "--model", "net.py:tiny", "--data", "data", *where[:2], "--device-python", "python9")
    assert (done.code, "There is no python9" in done.err) == (3, True)
    assert not (workplace / "run").exists()


def test_an_old_python_is_refused(server: Server, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.touch(0o755)
    for said in ("SyntaxError: future feature annotations is not defined", "No module named 'importlib.metadata'"):
        old.write_text(f'#!/bin/sh\necho "{said}" >&2; exit 1\n')  # 3.6, 3.7
        with pytest.raises(MissingError, match=r"is an older one, but Python 3\.8 or later"):
            device_site.reach(find_device(server.address), str(old))
