"""Budgets of time and staircases on a device: against a real sshd on this machine. No time is asserted."""

from __future__ import annotations

import importlib.metadata
import json
import math
import sys
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from boards import PI_FILES, a_machine
from ssh_bundles import wait_for
from ssh_server import Server

from thinet_deploy import pipeline
from thinet_deploy.artifact import read_json
from thinet_deploy.devices import site as device_site
from thinet_deploy.devices import timer as device_timer
from thinet_deploy.devices.address import find_device
from thinet_deploy.devices.ssh import Ssh
from thinet_deploy.devices.timer import DeviceTimer
from thinet_deploy.errors import DeviceError, GateError, InputError, MissingError, ThinetDeployError
from thinet_deploy.interfaces import Progress, silent
from thinet_deploy.on_device import runner
from thinet_deploy.options import Options
from thinet_deploy.stages import latency as latency_stage
from thinet_deploy.stages import tools
from thinet_deploy.stages.latency import Bench, engine_for
from thinet_deploy.target import load_profile
from thinet_deploy.timing import budget as latency_budget
from thinet_deploy.timing import staircase, timers
from thinet_deploy.timing.layer_networks import LayerShape, framed
from thinet_deploy.timing.staircase import Engine, Points, Task
from thinet_deploy.timing.surfaces import Timing
from thinet_deploy.timing.timers import HERE

Cli = Callable[..., Any]
MakeOptions = Callable[..., Options]
PYTHON = sys.executable
CONV = LayerShape("conv", (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), 1, (8, 8))


@pytest.fixture
def server(server: Server, brief: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The device; nothing is timed here, and there for moments only."""
    for runtime in staircase.RUNTIMES:
        pytest.importorskip(runtime, reason=f"{runtime} is not installed")
    monkeypatch.setattr(runner, "Worker", lambda: pytest.fail("something is timed on this machine"))
    return server


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What every archive that went to the device held."""
    found, push = list[list[str]](), Ssh.push

    def watched(self: Ssh, source: Path, target: str) -> None:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as packed:
                found.append(packed.namelist())
        push(self, source, target)

    monkeypatch.setattr(Ssh, "push", watched)
    return found


def board(runtime: str, path: Path) -> str:
    """A target like cpu, with one runtime."""
    source = '[[sources]]\nfacts = ["runtimes"]\nsource = "this test"\nas_of = 2026-11-01\nconfidence = "check"\n'
    path.write_text(f'extends = "cpu"\nid = "board"\nruntimes = ["{runtime}"]\n{source}')
    return str(path)


REAL = Engine.time


def as_work(self: Engine, tasks: Sequence[Task], progress: Progress = silent, power: int = 1) -> list[Timing]:
    """Layers are timed, and then said to take as long as they have work, so that pruning pays, or to some power."""
    assert all(timing.ms > 0 for timing in REAL(self, tasks, progress))
    work = (math.prod((*shape.kernel, *shape.map_size, i, o)) / shape.groups for shape, i, o in tasks)
    return [Timing((each / 1000) ** power, 0.0) for each in work]


def the_machine(server: Server) -> device_site.Machine:
    return device_site.reach(find_device(server.address), PYTHON)


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "staircase").iterdir())


# ------------------------------------------------------------------------------------------ budgets


@pytest.mark.parametrize(
    ("runtime", "precision"), [("onnxruntime", "fp32"), pytest.param("openvino", "int8", marks=pytest.mark.slow)]
)
def test_a_budget_of_time_is_met_on_the_device(
    runtime: str,
    precision: str,
    server: Server,
    sent: list[list[str]],
    tiny_options: MakeOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    made: Any,
) -> None:
    monkeypatch.setattr(latency_budget, "SLACK", 1e9)  # so small a network gets as fast as the machine's mood lets it
    monkeypatch.setattr(latency_budget, "CORRECTIONS", 0)
    monkeypatch.setattr(Engine, "time", as_work)
    usual = {
        "target": board(runtime, tmp_path / "board.toml"),
        "preset": "thinet-conv",
        "epochs": 1,
        "round_to": 4,
        "precision": precision,
    }
    there = {"device": server.address, "device_python": PYTHON}
    options = tiny_options(tmp_path / "run", **usual, **there, speedup="4x")
    folder, _ = made(lambda: pipeline.prune(options))
    timing = read_json(folder / "report.json")["timing"]
    assert (timing["runtime"], timing["precision"]) == (runtime, precision)
    assert timing["device"]["modules"].keys() >= set(staircase.RUNTIMES)
    assert len(timing["trials"]) == 2
    assert all(trial["ms"] > 0 for trial in timing["trials"])
    machine = the_machine(server)
    (points,) = kept(tmp_path)
    assert points.name.startswith(f"{machine.speed}-{runtime}-")
    networks = [name for names in sent for name in names if name.partition("/")[2].startswith(("original.", "thin"))]
    assert sum("/original." in name for name in networks) == (2 if runtime == "openvino" else 1), "sent once"
    assert sum("/thin" in name for name in networks) >= 1
    assert not list((server.cache / "trials").iterdir()), "nothing stays there"
    assert made(lambda: pipeline.prune(options)) == (folder, [])
    # The user's own training may be shipped anywhere; where the widths come from stays as it was.
    monkeypatch.setattr(pipeline, "deploy", lambda run, tools, plan, networks, machine: machine)
    assert made(lambda: pipeline.build_from(tmp_path / "run", folder / tools.WEIGHTS)) == (None, ["own"])


def test_widths_for_a_device_depend_on_the_device(
    server: Server, tiny_options: MakeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from thinet_deploy.stages.job import load_job

    def inputs(machine: device_site.Machine | None, **budget: str) -> dict[str, Any]:
        job = load_job(tiny_options(tmp_path / "run", target="cpu", device=server.address, **budget))
        return latency_stage.identity(pipeline._placed(job, machine, None))

    machine = the_machine(server)
    here, there = inputs(None, speedup="2x")["timed"], inputs(machine, speedup="2x")["timed"]
    assert {**there, "machine": here["machine"]} == here
    assert there["machine"] == machine.speed != here["machine"]
    assert inputs(machine, macs="2x") == inputs(None, macs="2x") == {}


# ------------------------------------------------------------------------------------------ staircases


def staircase_of(cli: Cli, server: Server, tiny: Path, grid: int, *more: object) -> Any:
    target = board("onnxruntime", tiny / "board.toml")
    where = ("--target", target, "--device", server.address, "--device-python", PYTHON)
    return cli("staircase", "--model", f"{tiny / 'net.py'}:plain", "--round-to", grid, *where, *more)


def test_a_staircase_is_measured_on_the_device(
    server: Server, sent: list[list[str]], cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "time", as_work)
    done = staircase_of(cli, server, tiny, 8, "--out", tmp_path / "stairs")
    assert done.code == 0, done.err
    machine, version = the_machine(server), importlib.metadata.version("onnxruntime")
    assert f"onnxruntime {version} on {machine.cpu['model']} in fp32" in " ".join(done.out.split())
    (points,) = kept(tmp_path)
    assert points.name.startswith(f"{machine.speed}-onnxruntime-")
    before, batches = points.read_bytes(), len(sent)
    assert sum("0.onnx" in names for names in sent) == batches - 1, "layers go there in one archive at a time"
    found = json.loads(staircase_of(cli, server, tiny, 8, "--json").out)
    assert found["device"] == machine.cpu["model"]
    assert points.read_bytes() == before, "nothing was measured again"
    assert len(sent) == batches + 1, "but the whole network"
    assert not list((server.cache / "trials").iterdir())


def test_after_a_cut_only_what_is_missing_is_measured(
    server: Server,
    sent: list[list[str]],
    cli: Cli,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Its lines are bent, so that their ends are not enough.
    monkeypatch.setattr(Engine, "time", partialmethod(as_work, power=2))
    monkeypatch.setattr(staircase, "SECONDS", 0.02)
    monkeypatch.setattr(staircase, "ROUNDS", 3)
    asked, found, layers = list[Mapping[str, Any]](), list[Any](), DeviceTimer.layers

    def there(name: str) -> list[Path]:
        return list(server.cache.glob(f"trials/*/jobs/*/{name}"))

    def cut() -> None:
        wait_for(lambda: there("out"))
        server.cut()

    def watched(self: DeviceTimer, folder: Path, wanted: Mapping[str, Any], progress: Progress) -> Any:
        asked.append(wanted)
        if len(asked) == 2:  # while the second points are measured
            threading.Thread(target=cut).start()
        found.append(layers(self, folder, wanted, progress))
        return found[-1]

    monkeypatch.setattr(DeviceTimer, "layers", watched)
    done = staircase_of(cli, server, tiny, 4)
    assert done.code == 3
    assert "was cut" in done.err
    assert "goes on where it was" in done.err
    assert (len(asked), len(found), len(sent)) == (2, 1, 2)
    (points,) = kept(tmp_path)
    known = {(key, tuple(each[:2])) for key, all_points in read_json(points).items() for each in all_points}
    assert len(known) == len(asked[0]["pairs"]), "the first points are kept"
    wait_for(lambda: there("code"))  # the command goes on without the connection
    (out,) = there("out")
    result = json.loads(out.read_text().splitlines()[-1])["found"]
    done = staircase_of(cli, server, tiny, 4)
    assert done.code == 0, done.err
    assert asked[2] == asked[1], "the first points are not measured again"
    assert found[1] == result, "nor the second, which were finished there"
    assert "0.onnx" not in sent[2], "nor are they sent again"
    assert not list((server.cache / "trials").iterdir())


def test_a_network_that_the_device_cannot_run_is_named(server: Server, tmp_path: Path) -> None:
    timer = DeviceTimer(the_machine(server))

    def ask(runtime: str, content: bytes) -> None:
        (tmp_path / "0.onnx").write_bytes(content)
        network = {"path": "0.onnx", "batch": 1, "shapes": {"x": [1, 8, 8]}, "what": "conv"}
        engine = {"runtime": runtime, "threads": 1, "precision": "fp32"}
        pace = {"rounds": 1, "at_least": 1, "seconds": 0.001, "steady": 1.0}
        asked = {"engine": engine, "networks": {"0": network}, "pairs": [["0", None]], **pace}
        timer.layers(tmp_path, asked, silent)

    good = framed(CONV, 4, 4).SerializeToString()
    with pytest.raises(ThinetDeployError, match=r"cannot be timed on ssh://.*: onnxruntime refuses .*0\.onnx") as stop:
        ask("onnxruntime", good[: len(good) // 2])
    assert "update it there" in stop.value.hint
    with pytest.raises(MissingError, match=r"^ssh://.*: tensorrt cannot be imported") as stop:
        ask("tensorrt", good)
    assert "--device-python" in stop.value.hint


# ------------------------------------------------------------------------------------------ without a device


class Scripted(DeviceTimer):
    """A device that answers at once."""

    def layers(self, folder: Path, asked: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        turns = {name: [2.0, 2.0, 2.0] if pair_of(asked, name) else [0.5, 0.5, 0.5] for name in asked["networks"]}
        return {"turns_ms": turns, "warnings": []}


def pair_of(asked: Mapping[str, Any], name: str) -> bool:
    return any(name == network for network, _ in asked["pairs"])


def test_a_device_that_throttles_in_every_attempt_is_told_of() -> None:
    words = "The machine throttled in each of 3 attempts (throttled)."

    class Site:
        bundle, machine = "bundle", SimpleNamespace(device=SimpleNamespace(name="ssh://pi"))

        def job(self, *_: Any, **__: Any) -> tuple[int, Any]:
            return 4, SimpleNamespace(out=json.dumps({"error": words}).encode(), err="")

    with pytest.raises(GateError, match=r"^ssh://pi: The machine throttled in each of 3 attempts") as stop:
        device_timer._ask(Site(), "request.json", timers.LAYERS, silent)  # type: ignore[arg-type]  # all that is asked
    assert stop.value.hint.startswith("Cool it")


def test_layers_there_are_their_networks_less_their_frames() -> None:
    engine = Engine("onnxruntime", timer=Scripted(a_machine()))
    tasks: Sequence[Task] = [(CONV, 4, 8), (CONV, 8, 8)]
    assert [timing.ms for timing in engine.time(tasks)] == [1.5, 1.5]


def test_points_belong_to_the_board_and_to_its_runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("THINET_CACHE", str(tmp_path))
    monkeypatch.setattr("thinet_deploy.timing.staircase.cache_folder", lambda: tmp_path)
    board = a_machine()

    def path(machine: device_site.Machine) -> Path | None:
        return Points.on(Engine("onnxruntime", timer=DeviceTimer(machine)))._path

    same = [a_machine(kernel="6.8"), a_machine(python="3.12.1"), a_machine(modules={"numpy": "2.0"})]
    assert {path(each) for each in same} == {path(board)}
    others = [
        a_machine(files={"/proc/device-tree/model": "another board"}),
        a_machine(files=PI_FILES),
        a_machine(cores=4),
        a_machine(memory_bytes=16 << 30),
        a_machine(commands={"nvpmodel -q": "NV Power Mode: 7W"}),
        a_machine(modules={"onnxruntime": "1.20.0"}),
    ]
    paths = {path(each) for each in (board, *others)}
    assert len(paths) == 1 + len(others)
    assert path(a_machine()) != Points.on(Engine("onnxruntime"))._path


def test_a_version_cannot_lead_out_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("THINET_CACHE", str(tmp_path))
    odd = a_machine(modules={"onnxruntime": "../../../x y"})
    path = Points.on(Engine("onnxruntime", timer=DeviceTimer(odd)))._path
    assert path is not None
    assert path.resolve().parent == (tmp_path / "staircase").resolve()
    assert DeviceTimer(a_machine(modules={"onnxruntime": ""})).version("onnxruntime") == "onnxruntime unknown"


def test_the_first_runtime_that_the_device_has_is_taken() -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    target, both = load_profile("raspberry-pi-5"), {"onnxruntime": "1.20", "openvino": "2025.0"}
    engine = engine_for(target, 4, "int8", a_machine(files=PI_FILES, modules=both))
    assert (engine.runtime, engine.threads, engine.precision) == ("onnxruntime", 4, "int8")
    assert engine.timer.device == "Raspberry Pi 5 Model B Rev 1.0"
    pytest.importorskip("openvino", reason="openvino is not installed")
    only = a_machine(files=PI_FILES, modules={**both, "onnxruntime": None})
    assert engine_for(target, 1, None, only).runtime == "openvino"
    with pytest.raises(MissingError, match="none of onnxruntime, openvino"):
        engine_for(target, 1, None, a_machine(files=PI_FILES, modules=dict.fromkeys(both)))


def test_what_a_device_s_engines_cannot_say() -> None:
    with pytest.raises(InputError, match=r"Layers for jetson cannot be timed on ssh://orin: TensorRT opens no") as stop:
        engine_for(load_profile("jetson"), 1, None, a_machine())
    assert "--macs 2x" in stop.value.hint
    with pytest.raises(InputError, match=r"raspberry-pi-5 cannot be timed here") as stop:
        engine_for(load_profile("raspberry-pi-5"), 1)
    assert "--device ssh://user@host" in stop.value.hint
    with pytest.raises(InputError, match=r"jetson cannot be timed here") as stop:
        engine_for(load_profile("jetson"), 1)
    assert "--device" not in stop.value.hint
    assert engine_for(load_profile("cpu"), 1).timer == HERE


def test_android_is_refused_before_anything_is_done(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    network, where = ("--model", f"{tiny / 'net.py'}:plain"), ("--target", "android", "--device", "adb:X")
    data = ("--data", tiny / "data", "--out", tmp_path / "run")
    for command in (
        ("staircase", *network),
        ("prune", *network, *data, "--speedup", "2x"),
        ("build", *network, *data, "--latency", "8ms"),
    ):
        done = cli(*command, *where)
        assert done.code == 2
        assert "cannot be timed on adb:X: Android has no Python" in " ".join(done.err.split())
        assert "--macs 2x" in done.err


def test_what_was_sent_is_forgotten_unless_it_will_be_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch import nn

    class Forgetful(DeviceTimer):
        gone = 0

        def forget(self, ref: Any) -> None:
            Forgetful.gone += 1

    bench = Bench(Engine("onnxruntime", timer=Forgetful(a_machine())), load_profile("cpu"), image=None)  # type: ignore[arg-type]  # nothing is made
    monkeypatch.setattr(Bench, "made", lambda *_: None)
    for error, times in ((GateError("too slow"), 1), (DeviceError("cut"), 0), (KeyboardInterrupt(), 0)):
        Forgetful.gone = 0
        with pytest.raises(type(error)), bench.meter(nn.Identity()):
            raise error
        assert Forgetful.gone == times
    with bench.meter(nn.Identity()):
        pass
    assert Forgetful.gone == 1
