"""--device ssh://… cut in the middle: what goes on there, what is not done twice, and what is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from ssh_bundles import Make, builder, deploy, in_thread, kill_jobs, on_path, starts, wait_for
from ssh_server import Server, serving

from thinet_deploy.artifact import read_json
from thinet_deploy.devices.ssh import Ssh
from thinet_deploy.errors import DeviceError


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
