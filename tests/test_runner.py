"""runner.py: Python 3.8 alone, statistics that hold what they promise, engines that run, a protocol that survives."""

import ast
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinet_deploy import runner

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


def test_it_is_python_3_8() -> None:
    ast.parse(SOURCE.read_text(encoding="utf-8"), feature_version=(3, 8))
    pytest.importorskip("vermin", reason="vermin is not installed")
    command = [
        sys.executable,
        "-c",
        "import vermin; vermin.main()",
        "-t=3.8-",
        "--no-tips",
        "--violations",
        str(SOURCE),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_nothing_beside_the_script_stands_in_for_a_module(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_bytes(SOURCE.read_bytes())
    for name in ("json", "numpy", "queue"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module was imported')")
    done = subprocess.run([sys.executable, tmp_path / "run.py", "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# ----------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("n", [6, 7, 15, 40])
def test_the_interval_covers_the_median_as_often_as_it_says(n: int) -> None:
    draw, repetitions = random.Random(n), 2000
    inside = 0
    for _ in range(repetitions):
        _, low, high = runner.median_interval([draw.lognormvariate(0, 1) for _ in range(n)])
        assert low is not None
        assert high is not None
        inside += low <= 1.0 <= high
    slack = 4 * math.sqrt(0.95 * 0.05 / repetitions)
    assert inside / repetitions >= 0.95 - slack


def test_the_interval_is_the_narrowest_exact_one() -> None:
    for n in (6, 11, 50, 401):
        k = next(k for k in range(1, n) if sum(math.comb(n, i) for i in range(k + 1)) * 2 > 0.05 * 2**n)
        assert runner.median_interval(range(n)) == (statistics.median(range(n)), k - 1, n - k)
    assert runner.median_interval([3.0, 1.0, 2.0, 5.0, 4.0]) == (3.0, None, None)
    with pytest.raises(ValueError, match="at least one"):
        runner.median_interval([])


@pytest.mark.parametrize(
    ("n", "known"), [(63, 0), (64, 1), (129, 1), (130, 2), (661, 2), (662, 3), (6635, 3), (6636, 4)]
)
def test_percentiles_are_hidden_below_their_least_number_of_samples(n: int, known: int) -> None:
    found = runner.summarize([1.0 + i / n for i in range(n)])["percentiles_ms"]
    assert list(found) == ["p90", "p95", "p99", "p99.9"][:known]


def test_percentiles_are_samples_with_the_right_share_below() -> None:
    found = runner.summarize([float(i) for i in range(1, 10001)])["percentiles_ms"]
    assert found == {"p90": 9000.0, "p95": 9500.0, "p99": 9900.0, "p99.9": 9990.0}


def test_a_steady_series_has_no_warning_and_an_unsteady_one_says_why() -> None:
    draw = random.Random(1)
    steady = [draw.gauss(10, 0.05) for _ in range(300)]
    assert runner.summarize(steady)["warnings"] == []
    assert "coefficient of variation" in runner.summarize([draw.gauss(10, 1) for _ in range(300)])["warnings"][0]
    (warning,) = runner.summarize([sample * (1 + i / 300 * 0.05) for i, sample in enumerate(steady)])["warnings"]
    assert "drifted by +3" in warning
    assert "only 5 samples" in runner.summarize([1.0] * 5)["warnings"][0]


def test_drift_is_rarely_seen_where_there_is_none() -> None:
    draw = random.Random(2)
    alarms = sum(runner.drift([draw.gauss(10, 1) for _ in range(90)]) != 0 for _ in range(1000))
    assert alarms <= 10


def test_rounds_give_the_interval_where_there_are_enough() -> None:
    rounds = [[float(r), r + 0.5, r + 9.0] for r in range(1, 8)]
    assert runner.summarize_rounds(rounds)["interval_over"] == "rounds"
    assert runner.summarize_rounds(rounds)["interval_ms"] == [1.5, 7.5]
    assert runner.summarize_rounds(rounds[:3])["interval_over"] == "samples"


def test_the_ratio_is_free_of_what_disturbs_both() -> None:
    draw = random.Random(3)
    pace = [draw.uniform(1, 5) for _ in range(11)]
    rounds_a = [[2 * speed * draw.gauss(1, 0.01) for _ in range(9)] for speed in pace]
    rounds_b = [[speed * draw.gauss(1, 0.01) for _ in range(9)] for speed in pace]
    ratio, low, high = runner.ratio_interval(rounds_a, rounds_b)
    assert low is not None
    assert high is not None
    assert 1.98 < low <= ratio <= high < 2.02
    with pytest.raises(ValueError, match="equally many rounds"):
        runner.ratio_interval(rounds_a, rounds_b[1:])


def test_time_run_and_warm_up_count_their_calls() -> None:
    calls: list[int] = []
    assert len(runner.time_run(lambda: calls.append(1), 5)) == len(calls) == 5
    assert runner.warm_up(lambda: calls.append(1), 0.0) == 1


# -------------------------------------------------------------------------------------------- outputs


def test_outputs_are_compared_relative_to_their_scale() -> None:
    want = {"y": np.array([[1.0, -100.0], [3.0, 2.0]], "float32")}
    near = runner.compare_outputs(want, {"y": want["y"] + 0.05}, 1e-3)
    assert near["passed"]
    assert near["max_abs_error"] == pytest.approx(0.05, rel=1e-3)
    assert near["max_relative_error"] == pytest.approx(0.0005, rel=1e-3)
    assert near["top1_agreement"] == 1.0
    far = runner.compare_outputs(want, {"y": want["y"][:, ::-1]}, 1e-3)
    assert (far["passed"], far["top1_agreement"]) == (False, 0.0)
    assert "allowed 0.001" in far["problem"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_never_passes(bad: float) -> None:
    good, broken = {"y": np.ones((1, 4))}, {"y": np.array([[1.0, bad, 1.0, 1.0]])}
    for want, have in ((good, broken), (broken, broken), (broken, good)):
        result = runner.compare_outputs(want, have, 1e9)
        assert not result["passed"]
        json.dumps(result, allow_nan=False)
        assert "NaN" in result["problem"]


def test_missing_and_misshapen_outputs_are_named() -> None:
    want = {"y": np.ones((2, 4))}
    assert "'y' is missing" in runner.compare_outputs(want, {}, 1.0)["problem"]
    assert "shape (4,)" in runner.compare_outputs(want, {"y": np.ones(4)}, 1.0)["problem"]
    assert not runner.compare_outputs({}, {}, 1.0)["passed"]


# -------------------------------------------------------------------------------------------- engines


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])  # test_converters.py has them all
def test_an_engine_runs_at_any_batch_and_tells_about_itself(runtime: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="ReferenceEvaluator gives the expected output")
    from onnx.reference import ReferenceEvaluator

    engine = runner.open_engine(runtime, str(tiny_engine(runtime, tmp_path)), threads=1)
    evaluator = ReferenceEvaluator(str(tmp_path / "tiny.onnx"))
    assert engine.input_names == ["x"]
    for batch in (1, 3, 2):
        x = np.random.default_rng(batch).standard_normal((batch, 3, 16, 16)).astype("float32")
        want = {"y": np.asarray(next(iter(evaluator.run(None, {"x": x}))))}
        assert runner.compare_outputs(want, engine.run({"x": x}), 1e-5)["passed"]
    about = engine.describe()
    assert (about["runtime"], about["threads"]) == (runtime, 1)
    assert about["version"]
    json.dumps(about, allow_nan=False)
    engine.close()


def test_openvino_computes_in_fp32_when_asked_to_even_where_bf16_is_its_default(tmp_path: Path) -> None:
    path = str(tiny_engine("openvino", tmp_path))
    about = runner.open_engine("openvino", path, 1, "fp32").describe()
    assert (about["precision_asked"], about["precision_in_use"]) == ("f32", "f32")
    assert about["executed_layers"] == {"f32": 1}


def test_what_cannot_be_opened_is_explained(tmp_path: Path) -> None:
    with pytest.raises(runner.MissingRuntimeError, match=r"no runtime called 'abacus'.*openvino"):
        runner.open_engine("abacus", "x", 1)
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    with pytest.raises(runner.RunnerError, match=r"no engine at .*nowhere\.onnx"):
        runner.open_engine("onnxruntime", str(tmp_path / "nowhere.onnx"), 1)
    (tmp_path / "bad.onnx").write_bytes(b"garbage")
    with pytest.raises(runner.RunnerError, match=r"onnxruntime refuses .*bad\.onnx"):
        runner.open_engine("onnxruntime", str(tmp_path / "bad.onnx"), 1)
    with pytest.raises(runner.RunnerError, match="no precision 'fp7'"):
        runner.open_engine("onnxruntime", str(tmp_path / "bad.onnx"), 1, "fp7")


def test_a_missing_runtime_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(runner.MissingRuntimeError, match="pip install openvino"):
        runner.open_engine("openvino", "x.xml", 1)


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
        with pytest.raises(runner.RunnerError, match="no engine at"):
            worker.ask("open", **{**what, "path": "nowhere"}, shapes={"x": [3, 16, 16]})
        with pytest.raises(runner.RunnerError, match="KeyError: 'dance'"):
            worker.ask("dance")
        with pytest.raises(runner.MissingRuntimeError, match="abacus"):
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
        with pytest.raises(runner.RunnerError, match="ended by itself at 'warm' with code -9"):
            worker.ask("warm", seconds=1)
    monkeypatch.setattr(runner.Worker, "patience_s", 0.2)
    with runner.Worker() as worker:
        worker.process.send_signal(signal.SIGSTOP)
        with pytest.raises(runner.RunnerError, match=r"hangs: no answer to 'warm' within 0\.2 s"):
            worker.ask("warm", seconds=1)
    assert worker.process.poll() is not None


@given(st.integers(1, 9), st.integers(1, 5))
def test_an_engine_of_one_batch_size_runs_any_number_of_images(count: int, batch: int) -> None:
    seen = []

    def run(inputs: Mapping[str, Any]) -> dict[str, Any]:
        seen.append(len(inputs["x"]))
        return {"y": inputs["x"] * 2}

    x = np.arange(count * 3).reshape(count, 3)
    np.testing.assert_array_equal(runner.in_steps({"x": x}, batch, run)["y"], 2 * x)
    assert seen == [batch] * math.ceil(count / batch)


def test_batches_repeat_or_cut() -> None:
    rows = np.arange(3)[:, None]
    assert runner.to_batch(rows, 5)[:, 0].tolist() == [0, 1, 2, 0, 1]
    assert runner.to_batch(rows, 2)[:, 0].tolist() == [0, 1]
