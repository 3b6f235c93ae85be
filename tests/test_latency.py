"""latency.py: engines and models measured in turn, raw samples kept, failures explained. Times are never asserted."""

import functools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_onnx import pooled_onnx

from thinet_deploy.errors import InputError, MissingError, ThinetDeployError
from thinet_deploy.interfaces import Precision
from thinet_deploy.on_device import runner, runner_text, samples, sensors
from thinet_deploy.on_device.engines import gpus_of
from thinet_deploy.timing import latency
from thinet_deploy.timing.latency import EngineLatency, EngineRef

INPUTS = {"x": np.ones((2, 3, 16, 16), "float32")}


def engines(folder: Path) -> list[EngineRef]:
    """Two models on two runtimes."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    found = []
    for model, width in (("original", 32), ("thin", 8)):
        source = pooled_onnx(folder / f"{model}.onnx", width)
        openvino.save_model(openvino.convert_model(source), folder / f"{model}.xml", compress_to_fp16=False)
        found += [EngineRef(model, "onnxruntime", source), EngineRef(model, "openvino", folder / f"{model}.xml")]
    return found


def test_engines_are_measured_in_turn_and_compared_with_the_original(tmp_path: Path) -> None:
    seen: list[tuple[Any, ...]] = []
    found = latency.measure_engines(
        engines(tmp_path), INPUTS, threads=1, rounds=7, seconds=0.2, progress=lambda *state: seen.append(state)
    )
    assert [(e.model, e.runtime, e.batch, e.threads) for e in found] == [
        ("original", "onnxruntime", 2, 1),
        ("thin", "onnxruntime", 2, 1),
        ("original", "openvino", 2, 1),
        ("thin", "openvino", 2, 1),
    ]
    for engine in found:
        assert len(engine.samples.rounds_ms) == 7
        assert engine.samples.summary["n"] == sum(map(len, engine.samples.rounds_ms))
        assert (engine.speedup is None) == (engine.model == "original")
        if engine.speedup:
            assert engine.speedup.baseline == f"original {engine.runtime} fp32"
            assert engine.speedup.low is not None
    assert [state[1:3] for state in seen] == [(done, 14) for done in range(1, 15)]
    document = latency.report(found, environment={"cpu": "test"}).to_json()
    assert json.loads(json.dumps(document, allow_nan=False))["engines"][1]["samples"]["rounds_ms"]
    assert document["environment"] == {"cpu": "test"}


def test_a_report_takes_this_machine_when_none_is_given() -> None:
    pytest.importorskip("thinet_deploy.environment", reason="environment.py is not there yet")
    assert latency.report().environment


def a_row(model: str, precision: Precision, ms: float, *, finite: bool = True) -> EngineLatency:
    """As `runner.measure` gives it, seven rounds of one run each."""
    machine: dict[str, Any] = {"throttled": [], "warnings": []}
    summary = samples.judged(samples.summarize_rounds([[ms]] * 7), machine, finite=finite)
    row = {"rounds_ms": [[ms]] * 7, "summary": summary, "machine": machine, "load_ms": 1.0, "first_ms": 1.0}
    more: dict[str, Any] = {"describe": {}, "clocks_ms": {}, "memory": {}, "energy": None}
    return latency.latencies([EngineRef(model, "a", Path("x"), precision)], [{**row, **more}], 1, 1)[0]


def test_the_baseline_of_a_speedup_has_the_same_precision_where_there_is_one() -> None:
    rows = [a_row("original", "fp32", 8.0), a_row("original", "int8", 4.0)]
    same, other = a_row("thin", "int8", 2.0), a_row("thin", "bf16", 2.0)
    assert latency._engine_speedup(same, [*rows, same]) == latency.Speedup(2.0, 2.0, 2.0, "original a int8")
    assert latency._engine_speedup(other, [*rows, other]) == latency.Speedup(4.0, 4.0, 4.0, "original a fp32")


@pytest.mark.parametrize("finite", [(False, True), (True, False)])
def test_no_speedup_is_made_of_a_time_that_does_not_hold(finite: tuple[bool, bool]) -> None:
    rows = [a_row("original", "fp32", 8.0, finite=finite[0]), a_row("thin", "fp32", 2.0, finite=finite[1])]
    assert latency._engine_speedup(rows[1], rows) is None


def test_failures_are_explained_and_leave_no_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[runner.Worker] = []
    start = runner.Worker.__init__

    def remember(self: runner.Worker) -> None:
        start(self)
        started.append(self)

    monkeypatch.setattr(runner.Worker, "__init__", remember)
    (tmp_path / "bad.onnx").write_bytes(b"garbage")
    refs = [EngineRef("original", "abacus", tmp_path)]
    with pytest.raises(MissingError, match="no runtime called 'abacus'"):
        latency.measure_engines(refs, INPUTS, threads=1, seconds=0.1)
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    good = EngineRef("original", "onnxruntime", pooled_onnx(tmp_path / "good.onnx", 8))
    bad = EngineRef("thin", "onnxruntime", tmp_path / "bad.onnx")
    with pytest.raises(ThinetDeployError, match=r"thin \(.*bad.onnx\) failed\. onnxruntime refuses"):
        latency.measure_engines([good, bad], INPUTS, threads=1, seconds=0.1)
    wrong = {"x": np.ones((2, 4, 16, 16), "float32")}
    with pytest.raises(ThinetDeployError, match=r"original .*failed"):
        latency.measure_engines([good], wrong, threads=1, seconds=0.1)
    assert len(started) == 4
    assert all(worker.process.poll() is not None for worker in started)


def test_a_child_that_dies_while_measuring_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    ask = runner.Worker.ask

    def die(self: runner.Worker, op: str, *given: float, **arguments: Any) -> dict[str, Any]:
        if op == "time":
            self.process.kill()
        return ask(self, op, *given, **arguments)

    monkeypatch.setattr(runner.Worker, "ask", die)
    ref = EngineRef("original", "onnxruntime", pooled_onnx(tmp_path / "good.onnx", 8))
    with pytest.raises(ThinetDeployError, match=r"Measuring onnxruntime failed.*ended by itself at 'time'"):
        latency.measure_engines([ref], INPUTS, threads=1, seconds=0.1)


def test_senseless_measurements_are_refused(tmp_path: Path) -> None:
    for wrong in ({"rounds": 0}, {"seconds": 0.0}, {"threads": 0}, {"fps": -1.0}):
        with pytest.raises(InputError, match="have to be positive"):
            latency.measure_engines([], INPUTS, **{"threads": 1, **wrong})  # type: ignore[arg-type]


def one_engine(folder: Path) -> EngineRef:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    return EngineRef("original", "onnxruntime", pooled_onnx(folder / "one.onnx", 8))


def test_parts_memory_and_the_machine_are_measured_where_there_are_clocks_for_them(tmp_path: Path) -> None:
    for found in latency.measure_engines(engines(tmp_path), INPUTS, threads=1, rounds=6, seconds=0.1):
        assert set(found.clocks_ms) == ({"compute", "host"} if found.runtime == "openvino" else set())
        assert found.machine["seconds"] > 0
        assert found.fps == 0
        if Path("/proc/self/status").exists():
            assert found.memory["engine_bytes"]
            assert found.memory["process_peak_bytes"]
            assert 0 < found.memory["engine_bytes"] < found.memory["process_peak_bytes"] < 2**30, "torch is not in it"


def test_one_round_of_one_run_is_measured_and_said_to_be_little(tmp_path: Path) -> None:
    (found,) = latency.measure_engines([one_engine(tmp_path)], INPUTS, threads=1, rounds=1, seconds=1e-6)
    assert found.samples.summary["n"] == 1
    assert found.samples.summary["interval_ms"] is None
    assert "there is 1 sample only" in found.samples.summary["warnings"][0]
    row = {**vars(found), "summary": found.samples.summary}
    assert "[" not in runner_text.latency_words(row)
    assert found.launch_ms is None, "there is no GPU that could wait for its work"
    row["describe"] = {"cuda_graph": "no: a layer on the DLA"}
    words = "launched kernel by kernel, for it is no CUDA graph: a layer on the DLA"
    assert runner_text.latency_notes(row)[-1] == words
    for graph in ("yes", "not yet"):
        assert words not in runner_text.latency_notes({**row, "describe": {"cuda_graph": graph}})


def test_runs_can_be_paced(tmp_path: Path) -> None:
    (found,) = latency.measure_engines([one_engine(tmp_path)], INPUTS, threads=1, rounds=6, seconds=0.6, fps=50)
    assert found.fps == 50
    assert 6 <= found.samples.summary["n"] <= 24, "0.48 s at 50 a second, however fast the engine is"


def test_outputs_that_are_no_numbers_make_a_time_invalid(tmp_path: Path) -> None:
    inputs = {"x": np.full((1, 3, 16, 16), np.nan, "float32")}
    (found,) = latency.measure_engines([one_engine(tmp_path)], inputs, threads=1, rounds=2, seconds=0.01)
    assert found.samples.summary["invalid"] == ["the outputs hold NaN or infinity"]
    row = {**vars(found), "summary": found.samples.summary}
    assert runner_text.latency_notes(row)[0] == "INVALID because the outputs hold NaN or infinity"


def test_a_machine_that_throttles_makes_a_time_invalid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = tmp_path / "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
    counter.parent.mkdir(parents=True)
    counter.write_text("1")
    watch = sensors.Watch
    monkeypatch.setattr(sensors, "Watch", functools.partial(watch, str(tmp_path)))
    look = watch.look

    def hotter(self: Any) -> None:
        counter.write_text(str(int(counter.read_text()) + 1))
        look(self)

    monkeypatch.setattr(watch, "look", hotter)
    (found,) = latency.measure_engines([one_engine(tmp_path)], INPUTS, threads=1, rounds=2, seconds=0.01)
    (reason,) = found.samples.summary["invalid"]
    assert reason.startswith("the machine throttled: cpu0 core_throttle_count rose by")


class HotGpu:
    """NVIDIA's library on a machine whose GPU works for somebody else, at its power cap."""

    def __init__(self, bus: str | None = None) -> None: ...

    def state(self) -> dict[str, dict[str, int]]:
        return {"gpu0": {"slowed": 0x4, "temperature_c": 90, "energy_mj": time.monotonic_ns()}}


def test_a_gpu_that_throttles_says_nothing_of_a_time_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("on_device.sensors", "on_device.engines", "timing.torch_latency"):
        monkeypatch.setattr(f"thinet_deploy.{module}.Nvml", HotGpu)
    assert sensors.Watch(gpus=gpus_of("onnxruntime", "tensorrt")).summary()["throttled"] == ["gpu0: power cap"]
    (found,) = latency.measure_engines([one_engine(tmp_path)], INPUTS, threads=1, rounds=2, seconds=0.01)
    assert not any("gpu" in reason for reason in found.samples.summary["invalid"])
    assert not any("gpu" in sensor for sensor in (found.energy or {}).get("joules_per_run", {}))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for the engine's process in /proc")
def test_killing_a_measurement_leaves_no_process_behind(tmp_path: Path) -> None:
    path = one_engine(tmp_path).path
    arrays: dict[str, Any] = {"input:x": INPUTS["x"]}
    np.savez(tmp_path / "inputs.npz", **arrays)
    code = f"""
from thinet_deploy.on_device import runner
with runner.Worker() as worker:
    worker.ask("open", runtime="onnxruntime", path={str(path)!r}, threads=1, precision="fp32", batch=1,
               inputs={str(tmp_path / "inputs.npz")!r})
    print(worker.process.pid, flush=True)
    worker.ask("warm", seconds=120)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = Path("/proc", parent.stdout.readline().strip())
    assert child.is_dir()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    # It was in the midst of a warm-up of two minutes.
    deadline = time.monotonic() + 30
    while child.is_dir() and "State:\tZ" not in (child / "status").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.is_dir() or "State:\tZ" in (child / "status").read_text()
