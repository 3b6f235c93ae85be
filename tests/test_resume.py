"""Killed at any moment, run again, the same result: `kill -9` at every rename, and at random moments."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from thinet_deploy.artifact import read_json
from thinet_deploy.bundle import read_manifest
from thinet_deploy.errors import BundleError
from thinet_deploy.on_device.engines import open_engine
from thinet_deploy.on_device.self_test import load_arrays, verify

SERVER = Path(__file__).with_name("build_server.py")
TRAINED = ["dense", "prune", "longer", "conv", "gap", "scratch"]
STAGES = [*TRAINED, "onnx", "engines", "precision", "parity", "latency", "bundle", "accuracy", "report"]
MEASURED = {"forward", "backward", "engines", "machine", "processor", "cores"}
TIMEOUT_S = 120


class Server:
    """Builds the tiny network in forked children of one process that has loaded torch and the runtimes."""

    def __init__(self, folder: Path, tiny: Path) -> None:
        self.log, self.trace = folder / "child.log", folder / "trace"
        self.networks = tiny / "net.py"
        self.options = {
            "data": str(tiny / "data"),
            "target": str(_target(folder / "target.toml")),
            "epochs": 2,
            "finetune_epochs": 1,
            "layer_epochs": 1,
            "recipe": "iccv2017",  # which has a checkpoint after each layer
            "controls": "all",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER), str(self.log)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._read() == "ready"

    def build(self, out: Path, network: str = "plain", **how: Any) -> int:
        """Exit status as subprocess has it: 0, or -9 for a child that was killed."""
        options = {**self.options, "model": f"{self.networks}:{network}", "out": str(out)}
        request = {"options": options, "trace": str(self.trace), **how}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        code = os.waitstatus_to_exitcode(int(self._read()))
        assert code in (0, -signal.SIGKILL), self.log.read_text()[-3000:]
        return code

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def _target(path: Path) -> Path:
    """The CPU with one runtime only: what is tested here does not depend on how many there are."""
    path.write_text('extends = "cpu"\nid = "one-runtime"\nruntimes = ["onnxruntime"]\n' + _SOURCE)
    return path


_SOURCE = '[[sources]]\nfacts = ["runtimes"]\nsource = "this test"\nas_of = 2026-11-21\nconfidence = "documented"\n'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Server]:
    pytest.importorskip("openvino", reason="openvino is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    server = Server(tmp_path_factory.mktemp("server"), tiny)
    yield server
    server.process.stdin.close()  # type: ignore[union-attr]
    server.process.wait(TIMEOUT_S)


def outcome(run: Path) -> dict[str, Any]:
    """Everything a build leaves, without what is measured and what tells the time."""
    found: dict[str, Any] = {"stages": sorted(p.stem for p in (run / ".records").iterdir())}
    for name in (stage for stage in TRAINED if stage in found["stages"]):
        found[f"{name} report"] = read_json(run / name / "report.json")
        tensors = load_file(run / name / "model.safetensors")
        found[f"{name} weights"] = {key: (array.shape, array.tobytes()) for key, array in sorted(tensors.items())}
        found[f"{name} plan"] = plan.read_text() if (plan := run / name / "plan.json").exists() else None
    found["onnx"] = {path.name: path.read_bytes() for path in sorted((run / "onnx").iterdir())}
    found["parity"] = read_json(run / "parity" / "parity.json")
    timing = read_json(run / "latency" / "latency.json")
    found["latency"] = [[(row["model"], row.get("runtime")) for row in timing[key]] for key in ("engines", "models")]
    table = read_json(run / "report" / "table.json")
    rows = [{key: value for key, value in row.items() if key not in MEASURED} for row in table.pop("rows")]
    found["table"] = rows, {key: value for key, value in table.items() if key not in MEASURED}
    found["bundle"] = bundle_of(run / "bundle")
    found["left behind"] = [p.name for p in run.rglob(".tmp-*")] + [p.name for p in (run / ".partial").iterdir()]
    return found


def bundle_of(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder).model_dump(mode="json", exclude={"files"})
    checked = verify(str(folder))
    assert checked["exit_code"] == 0, checked
    golden = str(folder / "golden.npz")
    engine = open_engine("onnxruntime", str(folder / manifest["engines"][0]["path"]), 1)
    outputs = engine.run(load_arrays(golden, "input:"))
    assert np.isfinite(outputs["logits"]).all()
    assert outputs["logits"].shape == (8, 3)
    return {"manifest": manifest, "outputs": {key: value.tobytes() for key, value in outputs.items()}}


@pytest.fixture(scope="module")
def undisturbed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[str]]:
    """What an undisturbed build leaves, and the labels of its renames."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    server.trace.write_text("")
    assert server.build(run) == 0
    return outcome(run), server.trace.read_text().splitlines()


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal, part by part, so that a failure names the part."""
    assert [key for key in expected if found[key] != expected[key]] == []
    assert found == expected


def test_an_undisturbed_build_is_whole_and_the_same_again(
    server: Server, undisturbed: tuple[dict[str, Any], list[str]], tmp_path: Path
) -> None:
    expected, renames = undisturbed
    assert expected["stages"] == sorted(STAGES)
    assert expected["left behind"] == []
    assert {row["label"] for row in expected["table"][0]} >= {"Original", "ThiNet-GAP", "Train from scratch"}
    for name in STAGES:
        assert f"{name}~ → {name}" in renames
    assert renames.count("~ → .partial/dense.safetensors".replace("~", ".partial/~")) == 2, "one checkpoint per epoch"
    assert renames.count(".partial/~ → .partial/prune.safetensors") == 2, "one checkpoint per layer"


def test_killed_before_and_after_every_rename(
    server: Server, undisturbed: tuple[dict[str, Any], list[str]], tmp_path: Path
) -> None:
    """Every resumed build is killed at the next rename that has not been hit yet, until there is none left."""
    expected, renames = undisturbed
    kills, run = tmp_path / "kills", tmp_path / "run"
    kills.write_text("")
    usual = Counter(renames)
    killed = 0
    while server.build(run, kills=str(kills), usual=usual) == -signal.SIGKILL:
        killed += 1
        assert killed < 10 * len(renames), kills.read_text()[-2000:]
    events = Counter(tuple(line.split("\t")[:2]) for line in kills.read_text().splitlines() if line[:4] != "done")
    assert sum(events.values()) == killed, "every kill that was ordered ended a child by signal 9"
    for name, times in usual.items():
        assert (events["before", name], events["after", name]) == (times, times), name
    same(outcome(run), expected)


@pytest.mark.slow
def test_killed_once_at_every_rename_on_its_own(
    server: Server, undisturbed: tuple[dict[str, Any], list[str]], tmp_path: Path
) -> None:
    expected, renames = undisturbed
    for number in range(1, len(renames) + 1):
        for side in ("before", "after"):
            run = tmp_path / f"{number}-{side}"
            assert server.build(run, failpoint=f"{number}:{side}") == -signal.SIGKILL
            assert server.build(run) == 0
            same(outcome(run), expected)
    assert server.build(tmp_path / "beyond", failpoint=f"{len(renames) + 1}:before") == 0, "there is no further rename"


@pytest.mark.slow
@pytest.mark.parametrize("network", ["plain", "residual"])
def test_killed_at_random_moments(server: Server, tmp_path: Path, network: str) -> None:
    start = time.monotonic()
    assert server.build(tmp_path / "undisturbed", network) == 0
    length, expected = time.monotonic() - start, outcome(tmp_path / "undisturbed")
    rng, killed = random.Random(2), 0
    for attempt in range(100):
        run, longest = tmp_path / str(attempt), length / 3
        while server.build(run, network, seconds=rng.uniform(0, longest)) == -signal.SIGKILL:
            killed += 1
            longest *= 1.1  # a stage that takes longer than this has to be finished some time
        same(outcome(run), expected)
        if killed >= 40:
            return
    pytest.fail(f"only {killed} kills happened")


def test_a_damaged_bundle_is_noticed_by_this_test(tmp_path: Path) -> None:
    """The comparison above must be able to fail."""
    with pytest.raises(BundleError):
        bundle_of(tmp_path)
    with pytest.raises(AssertionError):
        same({"a": io}, {"a": 1})
