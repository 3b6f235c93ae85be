"""--device ssh://… and what goes wrong there: wrong engines, keys, hosts, disks and Pythons, each named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ssh_bundles import PYTHON, Make, builder, deploy, on_path, refused, vouch
from ssh_server import Server, serving

from thinet_deploy.artifact import read_json
from thinet_deploy.bundle import BundleSpec
from thinet_deploy.devices import site as device_site
from thinet_deploy.devices.address import find_device
from thinet_deploy.errors import BundleError, ConversionError, DeviceError, GateError, MissingError


def test_an_engine_that_computes_something_else_there_fails_the_build(
    server: Server, make_bundle: Make, device_spec: BundleSpec, tmp_path: Path
) -> None:
    stage = make_bundle(golden_outputs={name: array + 1 for name, array in device_spec.golden_outputs.items()})
    with pytest.raises(GateError, match=r"failed on ssh://.*onnxruntime fp32: outputs are off") as stop:
        deploy(server, stage, tmp_path / "run")
    assert read_json(tmp_path / "run" / "device" / "verify.json")["exit_code"] == 1
    assert stop.value.exit_code == 1


def test_what_the_builder_refuses_is_said_and_logged(server: Server, make_bundle: Make, tmp_path: Path) -> None:
    said = json.dumps({"error": "TensorRT built no engine"})
    end = f"print('layer 7 is odd', file=sys.stderr); print({said!r}); sys.exit(1)"
    with pytest.raises(ConversionError, match=r"build-fp16 on ssh://.* failed: TensorRT built no engine") as stop:
        deploy(server, make_bundle(builder(end=end)), tmp_path / "run")
    log = tmp_path / "run" / "device-build-fp16.log"
    assert str(log) in stop.value.hint
    assert "layer 7 is odd" in log.read_text()


def test_a_full_disk_there_is_named_and_nothing_is_lost(
    make_bundle: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, keys = make_bundle(), tmp_path / "ssh"
    keys.mkdir()
    with serving(keys, disk="40k") as server:
        on_path(server, monkeypatch)
        with pytest.raises(DeviceError, match=r"disk of ssh://.* is full") as stop:
            deploy(server, stage, tmp_path / "run")
    assert "not sent twice" in stop.value.hint
    port = int(server.address.rpartition(":")[2])
    with serving(keys, port) as roomy:
        assert deploy(roomy, stage, tmp_path / "run")["verify"]["exit_code"] == 0


def test_a_damaged_bundle_is_not_sent(server: Server, make_bundle: Make, tmp_path: Path) -> None:
    stage = make_bundle()
    (stage.folder / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(BundleError, match=r"model\.onnx is not as the manifest says"):
        deploy(server, stage, tmp_path / "run")


def test_a_bundle_whose_run_py_is_of_another_version_is_measured_by_ours(
    server: Server, make_bundle: Make, cli: Any
) -> None:
    folder = make_bundle().folder
    script = folder / "run.py"
    script.write_text(script.read_text().replace('"--rounds"', '"--turns"'))
    vouch(folder, "run.py")
    where = ("--device", server.address, "--device-python", PYTHON)
    done = cli("latency", folder, *where, "--rounds", 2, "--seconds", 0.1)
    assert (done.code, "Measured on the device" in done.out) == (0, True), done.err


def test_a_wrong_host_key_is_no_host(server: Server, make_bundle: Make, cli: Any) -> None:
    server.cut()  # a connection that is open needs no key again
    known = server.folder / "known_hosts"
    right = known.read_text()
    other = (server.folder / "client.pub").read_text().split()[1]
    try:
        known.write_text(right.replace(right.split()[2], other))
        assert "shows another host key than the one that is known for it, so nothing was sent" in refused(
            cli, make_bundle, server.address
        )
    finally:
        known.write_text(right)


def test_an_unknown_host_key_is_asked_for_by_hand(server: Server, make_bundle: Make, cli: Any) -> None:
    server.cut()  # a connection that is open needs no key again
    known = server.folder / "known_hosts"
    right = known.read_text()
    try:
        known.write_text("")
        said = refused(cli, make_bundle, server.address)
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
def test_where_nobody_answers(address: str, said: str, server: Server, make_bundle: Make, cli: Any) -> None:
    assert said in refused(cli, make_bundle, address.format(port=server.address.rpartition(":")[2]))


def test_a_device_without_python_numpy_or_runtime(server: Server, make_bundle: Make, cli: Any, tmp_path: Path) -> None:
    assert "There is no python9 on ssh://" in refused(cli, make_bundle, server.address, "--device-python", "python9")
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {PYTHON} -S "$@"\n')  # no site-packages
    bare.chmod(0o755)
    for folder in tmp_path.glob("the*"):
        folder.rename(tmp_path / "first")
    said = refused(cli, make_bundle, server.address, "--device-python", str(bare))
    assert f"numpy is not installed for {bare}" in said
    assert "-m pip install numpy" in said


def test_ssh_itself_may_be_missing(
    make_bundle: Make, cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = refused(cli, make_bundle, "ssh://board")
    assert "There is no ssh on this machine" in said


def test_a_build_for_another_device_is_refused_before_any_work(server: Server, cli: Any, workplace: Path) -> None:
    where = ("--device", server.address, "--device-python", PYTHON, "--out", "run")
    done = cli("build", "--model", "net.py:tiny", "--data", "data", "--target", "jetson", *where)
    assert (done.code, "is no jetson, as far as can be seen: it is x86_64" in done.err) == (2, True), done.err
    done = cli("build", "--model", "net.py:tiny", "--data", "data", *where[:2], "--device-python", "python9")
    assert (done.code, "There is no python9" in done.err) == (3, True)
    done = cli("build", "--model", "net.py:tiny", "--data", "data", *where[:2], "--require", "speedup>=2")
    assert (done.code, "the thin network is all" in " ".join(done.err.split())) == (2, True)
    assert not (workplace / "run").exists()


def test_an_old_python_is_refused(server: Server, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.touch(0o755)
    for said in ("SyntaxError: future feature annotations is not defined", "No module named 'importlib.metadata'"):
        old.write_text(f'#!/bin/sh\necho "{said}" >&2; exit 1\n')  # 3.6, 3.7
        with pytest.raises(MissingError, match=r"is an older one, but Python 3\.8 or later"):
            device_site.reach(find_device(server.address), str(old))
