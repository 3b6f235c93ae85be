"""latency.py: engines and models measured in turn, raw samples kept, failures explained. Times are never asserted."""

import copy
import functools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_onnx import pooled_onnx

from thinet_deploy.errors import InputError, MissingError, ModelError, ThinetDeployError
from thinet_deploy.interfaces import Precision
from thinet_deploy.on_device import runner, runner_text, samples, sensors
from thinet_deploy.on_device.engines import gpus_of
from thinet_deploy.timing import latency, torch_latency, torch_worker
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


# ---------------------------------------------------------------------------------------------- torch


def test_a_model_whose_outputs_are_no_numbers_has_no_valid_time() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    model[1].bias.data.fill_(float("nan"))
    (found,) = torch_latency.measure_torch({"original": model}, (3, 2, 2), batch=1)
    assert found.forward.summary["invalid"] == ["the outputs hold NaN or infinity"]
    assert found.launch_share is None, "unmeasured is not 0"


def test_models_are_measured_forward_and_backward_and_left_as_they_were() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")

    def model(width: int) -> Any:
        nn = torch.nn
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Dropout(), nn.Flatten())

    models = {"original": model(8), "thin": model(2)}
    models["thin"][0].weight.requires_grad_(False)
    models["thin"].eval()
    before = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in models.items()}
    random_state = torch.get_rng_state()
    seen: list[tuple[Any, ...]] = []
    found = torch_latency.measure_torch(models, (3, 8, 8), batch=4, progress=lambda *state: seen.append(state))
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, m in models.items():
        assert all(torch.equal(value, before[name][key]) for key, value in m.state_dict().items())
        assert all(parameter.grad is None for parameter in m.parameters())
    assert not models["thin"].training
    assert not models["thin"][0].weight.requires_grad
    assert [(f.model, f.device, f.batch) for f in found] == [("original", "cpu", 4), ("thin", "cpu", 4)]
    for one in found:
        for part in (one.forward, one.backward):
            assert len(part.rounds_ms) == part.summary["n"] == 7
            assert len(part.summary["interval_ms"]) == 2
    assert found[0].speedup is None
    assert found[1].speedup is not None
    assert len(seen) == 7
    json.dumps(latency.report(models=found, environment={}).to_json(), allow_nan=False)


def test_each_model_has_a_process_and_memory_of_its_own(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")

    class Signs(torch.nn.Module):  # type: ignore[misc,name-defined]  # of a module that may be missing
        """Leaves the number of its process."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.layer, self.path = torch.nn.Conv2d(3, width, 3), tmp_path / str(width)

        def forward(self, x: Any) -> Any:
            print("to nobody's output")
            self.path.write_text(str(os.getpid()), encoding="utf-8")
            return self.layer(x)

    models = {"original": Signs(128), "thin": Signs(2)}
    wide, thin = torch_latency.measure_torch(models, (3, 64, 64), batch=8, threads=1)
    pids = {(tmp_path / name).read_text(encoding="utf-8") for name in ("2", "128")}
    assert len(pids - {str(os.getpid())}) == 2
    assert not any(Path("/proc", pid).exists() and _runs(pid) for pid in pids), "they end with the measurement"
    if Path("/proc/self/status").exists():
        maps = 4 * 8 * 62 * 62  # bytes of one channel of the output
        assert wide.peak_memory_bytes
        assert thin.peak_memory_bytes
        assert wide.peak_memory_bytes > 2 * 128 * maps, "the output and its gradient"
        assert wide.peak_memory_bytes - thin.peak_memory_bytes > 126 * maps


def _runs(pid: str) -> bool:
    deadline = time.monotonic() + 10
    while Path("/proc", pid).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return Path("/proc", pid).exists()


def test_a_model_of_a_users_file_can_be_timed(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    from thinet_deploy.models.loading import load_function
    from thinet_deploy.timing.things import Model, find

    (tmp_path / "bad.py").write_text("not python")
    with pytest.raises(ModelError):  # a file that has nothing to do with the model
        load_function(f"{tmp_path / 'bad.py'}:make", "factory")
    (tmp_path / "beside.py").write_text("WIDTH = 4\n")
    (tmp_path / "random.py").write_text("raise RuntimeError('stood in for the standard library')\n")
    (tmp_path / "net.py").write_text(  # with what does not survive pickle, and a program that has to be seen failing
        "import subprocess, threading\nimport torch\nfrom beside import WIDTH\nLOCK = threading.Lock()\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.layer = torch.nn.Conv2d(3, WIDTH, 1)\n"
        "    def forward(self, x):\n        assert subprocess.run(['false']).returncode == 1\n"
        "        with LOCK:\n            return {'out': [torch.ops.aten.relu(self.layer(x))]}\n"
        "def make():\n    return Net()\n"
    )
    found = find(f"{tmp_path / 'net.py'}:make", (3, 8, 8), "fp32")
    assert isinstance(found, Model)
    (row,) = torch_latency.measure_torch({"original": found.module}, (3, 8, 8), batch=2)
    assert row.backward.summary["n"] == 7


def test_what_a_model_does_wrong_is_said() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")

    class Wrong(torch.nn.Module):  # type: ignore[misc,name-defined]  # of a module that may be missing
        """Does it in its forward pass."""

        def __init__(self, what: Any) -> None:
            super().__init__()
            self.layer, self.what = torch.nn.Conv2d(3, 2, 1), what

        def forward(self, x: Any) -> Any:
            if callable(self.what):
                self.what(7)
            return self.layer(x)

    def refused(what: Any) -> ThinetDeployError:
        with pytest.raises(ThinetDeployError) as stop:
            torch_latency.measure_torch({"mine": Wrong(what)}, (3, 8, 8), batch=1)
        return stop.value

    def fails(_: int) -> None:
        raise ValueError("no such branch")

    assert refused(fails).what == "mine cannot be run forward and backward: ValueError: no such branch"
    assert refused(sys.exit).what == "mine cannot be run forward and backward: SystemExit: 7"
    assert refused(os._exit).what == "The process that trains mine ended by itself."
    lock = refused(threading.Lock())
    assert lock.what.startswith("mine cannot be sent to a process of its own to be timed: cannot pickle")
    assert "survive pickle" in lock.hint


def test_parametrized_weights_are_timed_as_they_are() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    model = torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(3, 4, 3)))
    (row,) = torch_latency.measure_torch({"original": model}, (3, 8, 8), batch=2)
    assert row.forward.summary["min_ms"] > 0
    assert hasattr(model[0], "parametrizations"), "the model itself stays as it was"


def test_nested_outputs_and_too_few_rounds() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    one = torch.ones(1)
    assert len(list(torch_worker.tensors({"main": one, "auxiliary": (one, None, [one])}))) == 3
    with pytest.raises(InputError, match="3 rounds are too few"):
        torch_latency.measure_torch({}, (3, 8, 8), rounds=3)


def test_modes_change_how_a_model_runs_and_not_what_it_says() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from thinet_deploy.timing.torch_modes import Mode, in_mode, laid_out

    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 8)
    model = torch.nn.Conv2d(3, 4, 3)
    said = model(images).detach()
    types: dict[Mode, Any] = {"eager": torch.float32, "channels-last": torch.float32, "amp": torch.bfloat16}
    for mode, dtype in types.items():
        taken = laid_out(images, mode)
        output = in_mode(copy.deepcopy(model), taken, mode)(taken)
        assert output.dtype == dtype
        assert taken.is_contiguous(memory_format=torch.channels_last) == (mode != "eager")
        torch.testing.assert_close(output.float(), said, atol=0.05, rtol=0.05)
    (found,) = torch_latency.measure_torch({"original": model}, (3, 8, 8), batch=2, mode="amp")
    assert (found.mode, found.backward.summary["n"]) == ("amp", 7)


def test_a_mode_that_cannot_be_is_refused() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    models = {"original": torch.nn.Conv2d(3, 4, 3)}
    with pytest.raises(MissingError, match="no CUDA graph on a CPU"):
        torch_latency.measure_torch(models, (3, 8, 8), mode="cuda-graph")
    with pytest.raises(InputError, match="no mode called 'amb'"):
        torch_latency.measure_torch(models, (3, 8, 8), mode="amb")  # type: ignore[arg-type]


def test_cuda_is_timed_with_events_or_refused() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    models = {"original": torch.nn.Conv2d(3, 4, 3)}
    if not torch.cuda.is_available():
        with pytest.raises(MissingError, match="no CUDA device"):
            torch_latency.measure_torch(models, (3, 8, 8), device="cuda")
        return
    (found,) = torch_latency.measure_torch(models, (3, 8, 8), device="cuda")
    assert found.forward.summary["min_ms"] > 0
    assert models["original"].weight.device.type == "cpu"
