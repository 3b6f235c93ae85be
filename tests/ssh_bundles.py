"""Bundles for a device behind a real sshd on this machine, and what tests do with it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ssh_server import Server
from tiny_onnx import scored_spec

from thinet_deploy import bundle
from thinet_deploy.artifact import hash_json, read_json, sha256_of, write_json
from thinet_deploy.bundle import BundleSpec, TypedFile
from thinet_deploy.devices import site as device_site
from thinet_deploy.devices.address import find_device
from thinet_deploy.errors import ThinetDeployError
from thinet_deploy.interfaces import silent
from thinet_deploy.shared_run import SharedRun
from thinet_deploy.stages import device as device_stage
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


Make = Callable[..., Stage]


def on_path(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `ssh` know the device's key."""
    monkeypatch.setenv("PATH", f"{server.folder / 'bin'}:{os.environ['PATH']}")


def typed_spec(folder: Path) -> BundleSpec:
    """A tiny network with an engine for each of both runtimes, and an ONNX file that the device is to build from."""
    found = scored_spec(folder, 2)
    return replace(found, typed=(TypedFile(found.onnx, "fp16", "", 1e-2),))


def maker(spec: BundleSpec, folder: Path) -> Make:
    """Makes the stage of a bundle; one of its own for every folder, since a device knows bundles by their content."""

    def make(builder: str = "", runtimes: Sequence[str] = ("onnxruntime",), **changes: Any) -> Stage:
        place, target = folder / "the 'bundle' $(touch pwned)", "jetson" if builder else "cpu"
        place.mkdir()
        engines = tuple(engine for engine in spec.engines if engine.runtime in runtimes)
        known = replace(spec, model=str(folder), target=target, has_builder=bool(builder), engines=engines)
        bundle.write_bundle(place, replace(known, **changes))
        if builder:
            (place / "tensorrt_builder.py").write_text(builder)
            vouch(place, "tensorrt_builder.py")
        return Stage(place, hash_json(str(place)), {}, reused=False)

    return make


def vouch(folder: Path, name: str) -> None:
    """Let a bundle's manifest say of a file what it is now."""
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


def refused(cli: Any, make_bundle: Make, address: str, *more: str) -> str:
    done = cli("verify", make_bundle().folder, "--device", address, *more)
    assert done.code == 3, done.err
    assert "Traceback" not in done.err
    return " ".join(done.err.split())
