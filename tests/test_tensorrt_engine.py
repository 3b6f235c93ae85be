"""The engine class for TensorRT: on the real bindings of four versions, over a driver and a TensorRT of the tests' own.

What runs there is ONNX Runtime, on the addresses that the class gave to TensorRT (see tensorrt_device.py). No engine of
the real TensorRT was ever run here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorrt_versions import BINDINGS, Version, as_tensorrt, fake_engine, version_of
from tiny_onnx import scored_onnx

# What a process does with engines, each for images of all shapes; a JSON line for each of them.
USE = """
import ctypes, json, sys
import numpy as np
from tensorrt_stand_in import CALLED
from thinet_deploy.on_device import cuda, engines
from thinet_deploy.on_device.engine import RunnerError

runtime, precision, plan, paths = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4:]
live = ctypes.CDLL(cuda.LIBRARY).fake_live
for path in paths:
    said, arrays, engine = {"clocks": []}, {}, None
    try:
        engine = engines.open_engine(runtime, path, 1, precision)
        said.update(describe=engine.describe(), inputs=engine.input_names, graphs=[], launches=[])
        for number, shape in enumerate(plan):
            x = np.random.default_rng(number).standard_normal(shape).astype("float32")
            arrays[f"x{number}"], arrays[f"y{number}"] = x, engine.run({"x": x})["y"]
            said["clocks"].append(engine.clocks_ms())
            said["graphs"].append(engine.describe()["cuda_graph"])
            said["launches"].append(engine.launch_ms())
        np.savez(path + ".npz", **arrays)
    except RunnerError as error:
        said["error"] = f"{type(error).__name__}: {error}"
    if engine:
        engine.close()
    print(json.dumps({**said, "live": [live(kind) for kind in range(7)], "called": sorted(set(CALLED))}))
"""


NOTHING = [0] * 7  # is left of what libcuda.c counts


@pytest.fixture(scope="module", params=BINDINGS)
def version(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Version:
    """The bindings of one version."""
    return version_of(request.param, tmp_path_factory.mktemp("libraries"))


@pytest.fixture(scope="module")
def latest(tmp_path_factory: pytest.TempPathFactory) -> Version:
    """The bindings of the newest version, where one version is enough."""
    return version_of(list(BINDINGS)[-1], tmp_path_factory.mktemp("libraries"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scored_onnx(tmp_path_factory.mktemp("source") / "tiny.onnx")


def made(version: Version, source: Path, engine: Path) -> Path:
    """The file of an engine, as the tests' TensorRT writes it."""
    engine.write_bytes(fake_engine(source.read_bytes(), version.exact))
    return engine


def used(
    version: Version,
    engines: Sequence[Path],
    shapes: Sequence[tuple[int, ...]],
    *,
    precision: str = "fp32",
    runtime: str = "tensorrt",
    **environment: str,
) -> list[dict[str, Any]]:
    """What USE says of each engine."""
    place = as_tensorrt(engines[0].parent / "modules", runtime.replace("-", "_"))
    words = [sys.executable, "-c", USE, runtime, precision, json.dumps(shapes), *map(str, engines)]
    environment = {**version.environment(place), **environment}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def images(*batches: int) -> list[tuple[int, ...]]:
    return [(batch, 3, 12, 12) for batch in batches]


# --------------------------------------------------------------------------------------------- what it does


def test_it_computes_every_batch_and_gives_everything_back(version: Version, source: Path, tmp_path: Path) -> None:
    reference = pytest.importorskip("onnx.reference", reason="onnx is not installed").ReferenceEvaluator(str(source))
    engine = made(version, source, tmp_path / "net.engine")
    (said,) = used(version, [engine], images(1, 3, 3, 32, 70, 2))
    arrays = np.load(f"{engine}.npz")
    for number in range(6):
        (expected,) = reference.run(None, {"x": arrays[f"x{number}"]})
        np.testing.assert_allclose(arrays[f"y{number}"], expected, rtol=1e-4, atol=1e-5)
    once = {"upload": 1.0, "compute": 1.0, "download": 1.0}
    thrice = dict.fromkeys(once, 3.0)  # 70 images: it was built for 32
    assert said["clocks"] == [once, once, once, once, thrice, once]
    assert said["inputs"] == ["x"]
    assert said["describe"] == {
        "runtime": "tensorrt",
        "version": version.exact,
        "device": "A GPU of the tests (compute capability 8.7)",
        "threads": None,
        "precision_asked": "fp32",
        "precision_in_use": None,
        "executed_layers": {"fp32": 1},
        "cuda_graph": "not yet",
    }
    assert said["live"] == NOTHING
    needed = {"set_input_shape", "get_tensor_shape", "set_tensor_address", "execute_async_v3"}
    assert {f"IExecutionContext.{name}" for name in needed} <= set(said["called"])


def test_the_driver_is_called_in_order_and_shapes_are_told_once(latest: Version, source: Path, tmp_path: Path) -> None:
    engine, log = made(latest, source, tmp_path / "net.engine"), tmp_path / "log"
    used(latest, [engine], images(2, 2, 2), CUDA_FAKE_LOG=str(log))
    calls = log.read_text().split()
    there = ["cuEventRecord", "cuMemcpyHtoDAsync_v2", "cuEventRecord"]
    back = ["cuEventRecord", "cuMemcpyDtoHAsync_v2", "cuEventRecord", "cuStreamSynchronize"]
    back += ["cuEventElapsedTime"] * 3
    capture = ["cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags", "cuGraphDestroy"]
    replayed = [*there, "cuGraphLaunch", *back]
    runs = [*there, *back, *capture, *replayed, *replayed]
    first = calls.index("cuEventRecord")
    assert calls[first : first + len(runs)] == runs, "nothing is allocated or captured for a shape that is known"
    assert calls[-1] == "cuDevicePrimaryCtxRelease_v2"
    assert calls.index("cuStreamDestroy_v2") > calls.index("cuEventDestroy_v2")


def test_a_graph_is_replayed_and_captured_anew_for_another_shape(
    version: Version, source: Path, tmp_path: Path
) -> None:
    reference = pytest.importorskip("onnx.reference", reason="onnx is not installed").ReferenceEvaluator(str(source))
    engine, log = made(version, source, tmp_path / "net.engine"), tmp_path / "log"
    (said,) = used(version, [engine], images(2, 2, 2, 3, 3, 2, 2), CUDA_FAKE_LOG=str(log))
    assert said["graphs"] == ["not yet", "yes", "yes", "not yet", "yes", "not yet", "yes"]
    assert all(each > 0 for each in said["launches"])
    arrays = np.load(f"{engine}.npz")
    for number in range(7):
        (expected,) = reference.run(None, {"x": arrays[f"x{number}"]})
        np.testing.assert_allclose(arrays[f"y{number}"], expected, rtol=1e-4, atol=1e-5)
    calls = log.read_text().split()
    assert (calls.count("cuGraphInstantiateWithFlags"), calls.count("cuGraphLaunch")) == (3, 4)
    assert said["live"] == NOTHING


@pytest.mark.parametrize(("report", "named"), [('{"dla_core": 1}', True), ("{}", False), ("[", False), ("[]", False)])
def test_an_engine_for_a_dla_is_loaded_for_it(
    report: str, named: bool, version: Version, source: Path, tmp_path: Path
) -> None:
    engine = made(version, source, tmp_path / "net.engine")
    engine.with_suffix(".build.json").write_text(report)
    (said,) = used(version, [engine], images(2))
    assert ("Runtime.DLA_core" in said["called"]) == named
    assert said["live"] == NOTHING


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"TENSORRT_FAKE_UNGRAPHED": "1"}, "TensorRT did not run it"),
        ({"CUDA_FAKE_FAIL": "cuStreamEndCapture=901"}, "cuStreamEndCapture failed: CUDA_ERROR_STREAM_CAPTURE_INVALID"),
    ],
    ids=["TensorRT", "driver"],
)
def test_an_engine_that_is_no_graph_runs_all_the_same_and_says_so(
    environment: dict[str, str], why: str, latest: Version, source: Path, tmp_path: Path
) -> None:
    engine = made(latest, source, tmp_path / "net.engine")
    reference = pytest.importorskip("onnx.reference", reason="onnx is not installed").ReferenceEvaluator(str(source))
    (said,) = used(latest, [engine], images(2, 2, 2), **environment)
    assert said["graphs"][0] == "not yet"
    assert all(each.startswith(f"no: {why}") for each in said["graphs"][1:])
    arrays = np.load(f"{engine}.npz")
    for number in range(3):
        (expected,) = reference.run(None, {"x": arrays[f"x{number}"]})
        np.testing.assert_allclose(arrays[f"y{number}"], expected, rtol=1e-4, atol=1e-5)
    assert said["clocks"] == [{"upload": 1.0, "compute": 1.0, "download": 1.0}] * 3
    assert said["live"] == NOTHING


def test_tensorrt_rtx_is_the_same_by_another_name(latest: Version, source: Path, tmp_path: Path) -> None:
    engine = made(latest, source, tmp_path / "net.engine")
    (said,) = used(latest, [engine], images(2), runtime="tensorrt-rtx")
    assert said["describe"]["runtime"] == "tensorrt-rtx"
    assert said["live"] == NOTHING


# --------------------------------------------------------------------------------------------- what it refuses


def test_a_foreign_or_damaged_engine_is_explained(latest: Version, source: Path, tmp_path: Path) -> None:
    own, built = source.read_bytes(), "an engine belongs to the device, the TensorRT and the system it was built on"
    damaged = "it is damaged, or no engine: copy it again, or build it again"
    whole = fake_engine(own, latest.exact)
    cases = {
        "another-version": (fake_engine(own, "9.9.9"), f"it was built by another TensorRT: {built}"),
        "another-gpu": (fake_engine(own, latest.exact, "8.6"), f"it was built for another GPU: {built}"),
        "truncated": (whole[: len(whole) // 2], damaged),
        "onnx": (own, damaged),
        "empty": (b"", damaged),
    }
    paths = [tmp_path / f"{name}.engine" for name in cases]
    for path, (data, _) in zip(paths, cases.values(), strict=True):
        path.write_bytes(data)
    for said, path, (_, meaning) in zip(used(latest, paths, images(1)), paths, cases.values(), strict=True):
        assert said["error"].startswith(f"RunnerError: tensorrt refuses {path}: {meaning}")
        assert f"TensorRT {latest.exact} said: IRuntime::deserializeCudaEngine: Error Code 1: " in said["error"]
        assert said["live"] == NOTHING


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"CUDA_FAKE_MEMORY": "400"}, "CudaError: the GPU's memory is full (cuMemAlloc_v2"),
        ({"CUDA_FAKE_FAIL": "cuStreamSynchronize=719"}, "CudaError: cuStreamSynchronize failed: CUDA_ERROR_LAUNCH"),
        ({"CUDA_FAKE_FAIL": "cuInit=100"}, "MissingRuntimeError: There is no NVIDIA GPU here that could be used"),
        ({"CUDA_FAKE_FAIL": "cuDeviceGetName=719"}, "RunnerError: tensorrt refuses"),
    ],
    ids=["memory", "launch", "no GPU", "name"],
)
def test_what_the_driver_says_is_said(
    environment: dict[str, str], said: str, latest: Version, source: Path, tmp_path: Path
) -> None:
    engine = made(latest, source, tmp_path / "net.engine")
    (found,) = used(latest, [engine], images(2), **environment)
    assert found["error"].startswith(said)
    if "cuStreamSynchronize" not in str(environment):  # a GPU that fails cannot be tidied up
        assert found["live"] == NOTHING


def test_an_engine_in_another_precision_than_asked_for_is_refused(
    latest: Version, source: Path, tmp_path: Path
) -> None:
    engine = made(latest, source, tmp_path / "net.engine")
    (found,) = used(latest, [engine], images(2), precision="fp16")
    assert "it was to compute in fp16, but all of its layers run in fp32" in found["error"]
    assert found["live"] == NOTHING


def test_an_image_of_another_size_is_refused(latest: Version, source: Path, tmp_path: Path) -> None:
    (found,) = used(latest, [made(latest, source, tmp_path / "net.engine")], [(1, 3, 10, 10)])
    assert "input 'x' has shape (1, 3, 10, 10), but the engine was built for (-1, 3, 12, 12)" in found["error"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Row major linear FP32", "fp32"),
        ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("Thirty-two wide channel vectorized row major Int8 format", "int8"),
        ("Half", "fp16"),
        ("BFloat16", "bf16"),
        ("Float", "fp32"),
        ("FP8", "FP8"),
    ],
)
def test_the_inspectors_words_for_types(text: str, kind: str) -> None:
    from types import SimpleNamespace

    from thinet_deploy.on_device.tensorrt_engine import executed_types

    for key in ("Format/Datatype", "Datatype"):  # until 10, and from 11 on
        layers = [{"LayerType": "kgen", "Inputs": [{key: text}]}, {"LayerType": "Reformat"}, "a name only"]
        inspector = SimpleNamespace(get_engine_information=lambda form, said=layers: json.dumps({"Layers": said}))
        found = executed_types(inspector, SimpleNamespace(LayerInformationFormat=SimpleNamespace(JSON=1)))
        assert found == {kind: 1}
