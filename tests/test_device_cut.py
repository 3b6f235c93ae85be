"""--device ssh://… cut in the middle: what goes on there, what is not done twice, and what is said."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from ssh_bundles import PYTHON, Make, builder, deploy, in_thread, kill_jobs, on_path, starts, wait_for
from ssh_server import Server, serving

from thinet_deploy.artifact import read_json, sha256_of
from thinet_deploy.devices import site as device_site
from thinet_deploy.devices.address import find_device
from thinet_deploy.devices.ssh import Ssh
from thinet_deploy.errors import DeviceError
from thinet_deploy.interfaces import silent
from thinet_deploy.stages import device as device_stage
from thinet_deploy.store import Stage


def kept(server: Server, stage: Stage) -> Path:
    """Where the device keeps a bundle."""
    return server.cache / sha256_of(stage.folder / "manifest.json")[:16]


def test_a_build_goes_on_while_the_connection_is_cut(server: Server, make_bundle: Make, tmp_path: Path) -> None:
    stage, before = make_bundle(builder(steps=20)), len(starts(server))
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
    server: Server, make_bundle: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, pushed, push, most = make_bundle(), list[str](), Ssh.push, 4
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
    files = [name for name in first + pushed if name]  # of the bundle; what runs it goes elsewhere
    assert set(files) == kinds
    assert len(files) == len(kinds)


def test_a_device_that_dies_in_a_build_builds_again_when_it_is_back(
    make_bundle: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, keys = make_bundle(builder(steps=20)), tmp_path / "ssh"
    keys.mkdir()
    with serving(keys) as server:
        on_path(server, monkeypatch)
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


def test_a_builder_that_is_killed_for_memory_is_named(server: Server, make_bundle: Make, tmp_path: Path) -> None:
    stage, before = make_bundle(builder(steps=50)), len(starts(server))
    thread, results = in_thread(lambda: deploy(server, stage, tmp_path / "run"))
    wait_for(lambda: starts(server)[before:])
    assert kill_jobs(server, "tensorrt_builder.py") == 1
    thread.join()
    assert isinstance(results[0], DeviceError)
    assert "SIGKILL: too little memory" in results[0].what


@pytest.mark.parametrize("damaged", ["", "engines", "model.engine", "model.build.json"])
def test_an_engine_that_was_damaged_there_is_built_again(
    server: Server, make_bundle: Make, tmp_path: Path, damaged: str
) -> None:
    """A power cut leaves files that are there and empty, and people clear folders."""
    stage, before = make_bundle(builder()), len(starts(server))
    deploy(server, stage, tmp_path / "run")
    there = kept(server, stage) / "bundle" / "engines"
    if damaged == "engines":
        shutil.rmtree(there)
    elif damaged:
        (there / "tensorrt-fp16" / damaged).write_bytes(b"")
    found = deploy(server, stage, tmp_path / "again")
    assert starts(server)[before:] == ["fp16"] * (2 if damaged else 1)
    assert found["verify"]["exit_code"] == 0
    engines = Path("device", "engines", "tensorrt-fp16")
    for name in ("model.engine", "model.build.json"):
        assert (tmp_path / "again" / engines / name).read_bytes() == (tmp_path / "run" / engines / name).read_bytes()


def test_a_measurement_that_still_runs_is_followed_and_one_that_has_ended_is_not_shown_again(
    server: Server, make_bundle: Make
) -> None:
    stage = make_bundle()
    site = device_site.send(device_site.reach(find_device(server.address), PYTHON), stage.folder, silent)
    how = ("--seconds", "3", "--rounds", "6")
    thread, results = in_thread(lambda: device_stage.ask(site, "latency", silent, *how))
    (started,) = wait_for(lambda: list(kept(server, stage).glob("jobs/latency-*/err")))
    with started.open() as first:
        server.cut()
        thread.join()
        assert isinstance(results[0], DeviceError)
        followed = device_stage.ask(site, "latency", silent, *how)
        assert os.fstat(first.fileno()).st_nlink == 1, "it went on"
        anew = device_stage.ask(site, "latency", silent, *how)
        assert os.fstat(first.fileno()).st_nlink == 0
    assert [row["rounds_ms"] for row in anew["engines"]] != [row["rounds_ms"] for row in followed["engines"]]


@pytest.mark.parametrize(("command", "shown"), [("verify", "created_by"), ("latency", "processor")])
def test_a_command_does_not_show_what_an_interrupted_one_found(
    server: Server, make_bundle: Make, cli: Any, monkeypatch: pytest.MonkeyPatch, command: str, shown: str
) -> None:
    stage, where = make_bundle(), ("--device", server.address, "--device-python", PYTHON)
    pace = ("--seconds", 0.1, "--rounds", 6) if command == "latency" else ()
    with monkeypatch.context() as interrupted:
        interrupted.setattr(device_stage, "forget", lambda *_: None)
        assert cli(command, stage.folder, *where, *pace).code == 0
    (out,) = kept(server, stage).glob(f"jobs/{command}-*/out")
    out.write_text(json.dumps({**json.loads(out.read_text()), shown: "what was there days ago"}) + "\n")
    done = cli(command, stage.folder, *where, *pace)
    assert (done.code, "days ago" in done.out) == (0, False), done.err
