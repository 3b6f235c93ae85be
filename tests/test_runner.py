"""runner.py: Python 3.8 alone, statistics that hold what they promise, engines that run, a protocol that survives."""

import ast
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_onnx import scored_spec

from thinet_deploy.bundle import write_bundle
from thinet_deploy.on_device import engines, runner, self_test, serving
from thinet_deploy.on_device.engine import MissingRuntimeError, RunnerError, in_steps, to_batch

SOURCE = Path(runner.__file__)


def tiny_onnx(path: Path, seed: int = 0) -> Path:
    """Conv → Relu → global pool → flatten with a dynamic batch."""
    onnx = pytest.importorskip("onnx", reason="the engines of these tests are made with onnx")
    make = onnx.helper
    weight = np.random.default_rng(seed).standard_normal((8, 3, 3, 3)).astype("float32")
    nodes = [
        make.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        make.make_node("Relu", ["c"], ["r"]),
        make.make_node("GlobalAveragePool", ["r"], ["g"]),
        make.make_node("Flatten", ["g"], ["y"]),
    ]
    ends = [make.make_tensor_value_info(n, 1, s) for n, s in (("x", ["batch", 3, 16, 16]), ("y", ["batch", 8]))]
    graph = make.make_graph(nodes, "tiny", ends[:1], ends[1:], [onnx.numpy_helper.from_array(weight, "w")])
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8), path)
    return path


def tiny_engine(runtime: str, folder: Path) -> Path:
    """The same network for a runtime that is installed here."""
    pytest.importorskip(runtime, reason=f"{runtime} is not installed")
    source = tiny_onnx(folder / "tiny.onnx")
    if runtime == "onnxruntime":
        return source
    openvino = pytest.importorskip("openvino", reason="the IR is made with openvino")
    openvino.save_model(openvino.convert_model(source), folder / "tiny.xml", compress_to_fp16=False)
    return folder / "tiny.xml"


# --------------------------------------------------------------------------------------- the language


def copied(folder: Path) -> Path:
    """run.py and what belongs beside it, as a bundle has them."""
    for name in runner.COMPANIONS:
        shutil.copyfile(SOURCE.with_name(f"{name}.py"), folder / f"{name}.py")
    return Path(shutil.copyfile(SOURCE, folder / "run.py"))


def test_nothing_beside_the_script_stands_in_for_a_module(tmp_path: Path) -> None:
    copied(tmp_path)
    for name in ("json", "numpy", "queue"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module was imported')")
    done = subprocess.run([sys.executable, tmp_path / "run.py", "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# -------------------------------------------------------------------------------------- one file and others beside it


@pytest.mark.parametrize("name", ["runner", *runner.COMPANIONS])
def test_what_goes_into_bundles_is_python_3_8_and_needs_no_package(name: str) -> None:
    path = SOURCE.with_name(f"{name}.py")
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    assert not [s for s in ast.walk(tree) if isinstance(s, ast.ImportFrom) and (s.module or "").startswith("thinet")]
    pytest.importorskip("vermin", reason="vermin is not installed")
    code, options = "import vermin; vermin.main()", ["-t=3.8-", "--no-tips", "--violations", str(path)]
    done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_bundle_that_lacks_files_beside_run_py_says_so(tmp_path: Path) -> None:
    script = copied(tmp_path)
    for name in ("cuda", "sensors"):
        (tmp_path / f"{name}.py").unlink()
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path} lacks cuda.py, sensors.py: copy the whole bundle again.\n"


def test_a_python_without_numpy_is_told_so(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-S", copied(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith(f"error: {sys.executable} has no numpy. Do: ")


def test_runs_are_paced() -> None:
    calls: list[float] = []
    serving.time_run(lambda: calls.append(time.perf_counter()), 5, fps=100)
    assert calls[-1] - calls[0] > 0.02, "five runs a hundredth of a second apart, of which the first may come late"


def test_the_first_run_waits_too() -> None:
    start = time.perf_counter()
    serving.time_run(lambda: None, 1, fps=20)
    assert time.perf_counter() - start >= 0.05, "what was done before belongs to a warm-up or another engine"


def test_a_runtimes_own_clocks_are_read_at_the_same_pace() -> None:
    calls: list[float] = []
    server = serving._Server()
    server.fn = lambda: calls.append(time.perf_counter())  # type: ignore[assignment]  # not a network
    server.engine = SimpleNamespace(clocks_ms=lambda: {"compute": 0.0}, launch_ms=lambda: None)  # type: ignore[assignment]
    assert server.clocks(count=3, fps=50)["clocks_ms"]["compute"] == 0
    assert calls[-1] - calls[0] >= 0.03


def test_a_bundle_is_timed_back_to_back_and_also_at_a_pace(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    write_bundle(folder, scored_spec(tmp_path, 2))
    command = [sys.executable, str(folder / "run.py"), "latency", "--seconds", "0.1", "--fps", "200"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    rows = [(row["runtime"], row["fps"]) for row in report["engines"]]
    assert rows == [(name, fps) for fps in (0, 200) for name in ("openvino", "onnxruntime")]
    assert report["fps"] == 200
    assert len({json.dumps(row["rounds_ms"]) for row in report["engines"]}) == 4, "each has its own"
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    first, second = text.split("runs 200 a second")
    assert first.count("  load ") == second.count("  load ") == 2
    assert "runs back to back" in first


def test_time_run_and_warm_up_count_their_calls() -> None:
    calls: list[int] = []
    assert len(serving.time_run(lambda: calls.append(1), 5)) == len(calls) == 5
    assert serving.warm_up(lambda: calls.append(1), 0.0) == 1


# -------------------------------------------------------------------------------------------- outputs


def test_outputs_are_compared_relative_to_their_scale() -> None:
    want = {"y": np.array([[1.0, -100.0], [3.0, 2.0]], "float32")}
    near = self_test.compare_outputs(want, {"y": want["y"] + 0.05}, 1e-3)
    assert near["passed"]
    assert near["max_abs_error"] == pytest.approx(0.05, rel=1e-3)
    assert near["max_relative_error"] == pytest.approx(0.0005, rel=1e-3)
    assert near["top1_agreement"] == 1.0
    far = self_test.compare_outputs(want, {"y": want["y"][:, ::-1]}, 1e-3)
    assert (far["passed"], far["top1_agreement"]) == (False, 0.0)
    assert "allowed 0.001" in far["problem"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_never_passes(bad: float) -> None:
    good, broken = {"y": np.ones((1, 4))}, {"y": np.array([[1.0, bad, 1.0, 1.0]])}
    for want, have in ((good, broken), (broken, broken), (broken, good)):
        result = self_test.compare_outputs(want, have, 1e9)
        assert not result["passed"]
        json.dumps(result, allow_nan=False)
        assert "NaN" in result["problem"]


def test_missing_and_misshapen_outputs_are_named() -> None:
    want = {"y": np.ones((2, 4))}
    assert "'y' is missing" in self_test.compare_outputs(want, {}, 1.0)["problem"]
    assert "shape (4,)" in self_test.compare_outputs(want, {"y": np.ones(4)}, 1.0)["problem"]
    assert not self_test.compare_outputs({}, {}, 1.0)["passed"]


# -------------------------------------------------------------------------------------------- engines


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])  # test_converters.py has them all
def test_an_engine_runs_at_any_batch_and_tells_about_itself(runtime: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="ReferenceEvaluator gives the expected output")
    from onnx.reference import ReferenceEvaluator

    engine = engines.open_engine(runtime, str(tiny_engine(runtime, tmp_path)), threads=1)
    evaluator = ReferenceEvaluator(str(tmp_path / "tiny.onnx"))
    assert engine.input_names == ["x"]
    for batch in (1, 3, 2):
        x = np.random.default_rng(batch).standard_normal((batch, 3, 16, 16)).astype("float32")
        want = {"y": np.asarray(next(iter(evaluator.run(None, {"x": x}))))}
        assert self_test.compare_outputs(want, engine.run({"x": x}), 1e-5)["passed"]
    about = engine.describe()
    assert (about["runtime"], about["threads"]) == (runtime, 1)
    assert about["version"]
    json.dumps(about, allow_nan=False)
    engine.close()


def test_openvino_computes_in_fp32_when_asked_to_even_where_bf16_is_its_default(tmp_path: Path) -> None:
    path = str(tiny_engine("openvino", tmp_path))
    about = engines.open_engine("openvino", path, 1, "fp32").describe()
    assert (about["precision_asked"], about["precision_in_use"]) == ("f32", "f32")
    assert about["executed_layers"] == {"f32": 1}


def test_what_cannot_be_opened_is_explained(tmp_path: Path) -> None:
    with pytest.raises(MissingRuntimeError, match=r"no runtime called 'abacus'.*openvino"):
        engines.open_engine("abacus", "x", 1)
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    with pytest.raises(RunnerError, match=r"no engine at .*nowhere\.onnx"):
        engines.open_engine("onnxruntime", str(tmp_path / "nowhere.onnx"), 1)
    (tmp_path / "bad.onnx").write_bytes(b"garbage")
    with pytest.raises(RunnerError, match=r"onnxruntime refuses .*bad\.onnx"):
        engines.open_engine("onnxruntime", str(tmp_path / "bad.onnx"), 1)
    with pytest.raises(RunnerError, match="no precision 'fp7'"):
        engines.open_engine("onnxruntime", str(tmp_path / "bad.onnx"), 1, "fp7")


def test_a_missing_runtime_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingRuntimeError, match="pip install openvino"):
        engines.open_engine("openvino", "x.xml", 1)


# ------------------------------------------------------------------------------------------- protocol


def test_the_protocol_opens_warms_times_and_closes(tmp_path: Path) -> None:
    engine = str(tiny_engine("onnxruntime", tmp_path))
    with runner.Worker() as worker:
        what: dict[str, Any] = {"runtime": "onnxruntime", "path": engine, "threads": 1, "precision": "fp32", "batch": 2}
        opened = worker.ask("open", **what, shapes={"x": [3, 16, 16]}, seed=1)
        assert opened["load_ms"] > 0
        assert opened["first_ms"] > 0
        assert opened["describe"]["runtime"] == "onnxruntime"
        assert worker.ask("warm", seconds=0.01)["calls"] >= 1
        assert len(worker.ask("time", count=7)["samples_ms"]) == 7
        with pytest.raises(RunnerError, match="no engine at"):
            worker.ask("open", **{**what, "path": "nowhere"}, shapes={"x": [3, 16, 16]})
        with pytest.raises(RunnerError, match="KeyError: 'dance'"):
            worker.ask("dance")
        with pytest.raises(MissingRuntimeError, match="abacus"):
            worker.ask("open", **{**what, "runtime": "abacus"})
        worker.ask("close")
        assert worker.process.wait(20) == 0


def test_prints_of_a_runtime_do_not_reach_the_protocol(tmp_path: Path) -> None:
    noisy = "import os\nprint('hello from python')\nos.write(1, b'hello from C\\n')\nraise ImportError('just noise')"
    (tmp_path / "openvino.py").write_text(noisy)
    request = json.dumps({"op": "open", "runtime": "openvino", "path": "", "threads": 1, "precision": "", "batch": 1})
    command = [sys.executable, str(SOURCE), "serve"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, input=request, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["missing"]
    assert "hello from C" in done.stderr


def test_the_child_ends_with_its_parents_pipe() -> None:
    with runner.Worker() as worker:
        assert worker.process.stdin
        worker.process.stdin.close()
        assert worker.process.wait(20) == 0


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs POSIX signals")
def test_a_child_that_dies_or_hangs_is_reported_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with runner.Worker() as worker:
        worker.process.kill()
        with pytest.raises(RunnerError, match="ended by itself at 'warm' with code -9"):
            worker.ask("warm", seconds=1)
    monkeypatch.setattr(runner.Worker, "patience_s", 0.2)
    with runner.Worker() as worker:
        worker.process.send_signal(signal.SIGSTOP)
        with pytest.raises(RunnerError, match=r"hangs: no answer to 'warm' within 0\.2 s"):
            worker.ask("warm", seconds=1)
    assert worker.process.poll() is not None


@given(st.integers(1, 9), st.integers(1, 5))
def test_an_engine_of_one_batch_size_runs_any_number_of_images(count: int, batch: int) -> None:
    seen = []

    def run(inputs: Mapping[str, Any]) -> dict[str, Any]:
        seen.append(len(inputs["x"]))
        return {"y": inputs["x"] * 2}

    x = np.arange(count * 3).reshape(count, 3)
    np.testing.assert_array_equal(in_steps({"x": x}, batch, run)["y"], 2 * x)
    assert seen == [batch] * math.ceil(count / batch)


def test_batches_repeat_or_cut() -> None:
    rows = np.arange(3)[:, None]
    assert to_batch(rows, 5)[:, 0].tolist() == [0, 1, 2, 0, 1]
    assert to_batch(rows, 2)[:, 0].tolist() == [0, 1]
