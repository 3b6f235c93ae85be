"""--device with TensorRT: built there by the real builder, verified and measured there by the real run.py.

The device is this machine behind a real sshd; its TensorRT has the real bindings' names and signatures, and runs ONNX
Runtime (see tensorrt_device.py). Neither TensorRT nor a GPU was ever at hand.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ssh_server import Server
from tensorrt_versions import Version, as_tensorrt, fake_engine, version_of

from thinet_deploy import bundle
from thinet_deploy.artifact import read_json, sha256_of, write_json
from thinet_deploy.bundle import BundleSpec, TypedFile
from thinet_deploy.cli.device import show_device
from thinet_deploy.devices import site as device_site
from thinet_deploy.devices.address import find_device
from thinet_deploy.errors import GateError
from thinet_deploy.interfaces import TensorSpec, silent
from thinet_deploy.shared_run import SharedRun
from thinet_deploy.stages import device as device_stage
from thinet_deploy.store import Stage
from thinet_deploy.target import load_profile

Deploy = Callable[..., dict[str, Any]]


ONE = pytest.mark.parametrize("version", ["10.3"], indirect=True)


@pytest.fixture(scope="module", params=["8.6", "10.3"])
def version(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Version:
    """What JetPack 6.0 and 6.2 bring."""
    return version_of(request.param, tmp_path_factory.mktemp("libraries"))


def half_onnx(path: Path, kind: str = "FLOAT16") -> Path:
    """Cast → two convolutions → global pool → flatten → cast, with the convolutions in fp16."""
    onnx = pytest.importorskip("onnx", reason="the files of these tests are made with onnx")
    make, types = onnx.helper, onnx.TensorProto
    draw, short = np.random.default_rng(0), "f2" if kind == "FLOAT16" else "f4"
    widths = {"first.weight": 3, "second.weight": 5}
    weights = {name: draw.standard_normal((5, width, 3, 3)).astype(short) for name, width in widths.items()}
    nodes = [
        make.make_node("Cast", ["x"], ["a"], to=getattr(types, kind)),
        make.make_node("Conv", ["a", "first.weight"], ["b"], name="first"),
        make.make_node("Conv", ["b", "second.weight"], ["c"], name="second"),
        make.make_node("GlobalAveragePool", ["c"], ["g"]),
        make.make_node("Flatten", ["g"], ["f"]),
        make.make_node("Cast", ["f"], ["y"], to=types.FLOAT),
    ]
    ends = [make.make_tensor_value_info(n, 1, ["batch", *s]) for n, s in (("x", [3, 12, 12]), ("y", [5]))]
    stored = [onnx.numpy_helper.from_array(weight, name) for name, weight in weights.items()]
    graph = make.make_graph(nodes, "half", ends[:1], ends[1:], stored)
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """A bundle for a Jetson: no engine yet, an fp16 file, the real builder."""
    reference = pytest.importorskip("onnx.reference", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    source = half_onnx(tmp_path / "full.onnx", "FLOAT")
    x = np.random.default_rng(1).standard_normal((2, 3, 12, 12)).astype("float32")
    (y,) = reference.ReferenceEvaluator(str(source)).run(None, {"x": x})
    spec = BundleSpec(
        model=str(tmp_path),  # so that it is another bundle for every test
        target="jetson",
        onnx=source,
        engines=(),
        inputs=(TensorSpec("x", ("batch", 3, 12, 12), "float32"),),
        outputs=(TensorSpec("y", ("batch", 5), "float32"),),
        golden_inputs={"x": x},
        golden_outputs={"y": y},
        tolerance=1e-4,
        typed=(TypedFile(half_onnx(tmp_path / "half.onnx"), "fp16", "", 1e-2),),
        has_builder=True,
    )
    folder = tmp_path / "bundle"
    folder.mkdir()
    bundle.write_bundle(folder, spec)
    return Stage(folder, sha256_of(folder / "manifest.json"), {}, reused=False)


@pytest.fixture
def deploy(server: Server, version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Deploy:
    """Takes a bundle to the device, whose Python finds the tests' TensorRT; `changes` are of its environment."""
    monkeypatch.setattr(device_stage, "SECONDS", 1)
    python, modules = tmp_path / "python", as_tensorrt(tmp_path / "modules")

    def go(stage: Stage, run: str = "run", dla: int | None = None, **changes: str) -> dict[str, Any]:
        known = version.environment(modules)
        exported = {**{name: known[name] for name in ("PYTHONPATH", "LD_LIBRARY_PATH")}, **changes}
        words = " ".join(f"{name}={shlex.quote(value)}" for name, value in exported.items())
        python.write_text(f'#!/bin/sh\n{words} exec {shlex.quote(sys.executable)} "$@"\n')
        python.chmod(0o755)
        machine = device_site.reach(find_device(server.address), str(python))
        target = load_profile(bundle.read_manifest(stage.folder).target)
        return device_stage.on_device(SharedRun(tmp_path / run), machine, target, stage, 1, silent, dla)

    return go


def test_an_engine_is_built_verified_and_measured_there(
    deploy: Deploy, stage: Stage, version: Version, tmp_path: Path
) -> None:
    found = deploy(stage)
    (verified,), (measured,) = found["verify"]["engines"], found["latency"]["engines"]
    assert (verified["runtime"], verified["precision"], verified["verdict"]) == ("tensorrt", "fp16", "passed")
    assert verified["max_relative_error"] < verified["tolerance"] == 1e-2
    assert verified["describe"]["executed_layers"] == {"fp16": 2}
    assert verified["describe"]["version"] == version.exact
    assert set(measured["clocks_ms"]) == {"upload", "compute", "download", "host"}
    assert measured["rounds_ms"]
    assert verified["describe"]["cuda_graph"] == measured["describe"]["cuda_graph"] == "yes"
    assert measured["launch_ms"] > 0
    device = tmp_path / "run" / "device"
    (engine,) = bundle.read_manifest(device).engines
    assert sha256_of(device / engine.path) == engine.sha256
    assert (device / "timing.cache").exists()
    report = read_json(device / "engines" / "tensorrt-fp16" / "model.build.json")
    assert (report["strongly_typed"], report["flags"]) == ((False, ["FP16"]) if version.major == 8 else (True, []))
    assert report["tensorrt"] == version.exact
    assert read_json(device / "engines" / "tensorrt-fp16" / "model.layers.json")["Layers"]
    executed = found["precision"]["fp16"]
    assert executed == read_json(device / "precision.json")["fp16"]
    assert (executed["text"], executed["broken"]) == ("fp16 100.0 % of the MACs", [])


def test_a_layer_in_another_type_than_its_file_binds_it_to_fails_the_build(
    deploy: Deploy, stage: Stage, version: Version, tmp_path: Path
) -> None:
    """The flags of TensorRT 8 only allow a type, and the builder takes what is faster: that is told."""
    if version.major == 8:
        text = deploy(stage, TENSORRT_FAKE_FLOAT="second")["precision"]["fp16"]["text"]
        assert text == "fp32 51.6 %, fp16 48.4 % of the MACs; second was to be fp16 and is fp32"
        return
    with pytest.raises(GateError, match=r"does not compute as its file says: second was to be fp16 and is fp32"):
        deploy(stage, TENSORRT_FAKE_FLOAT="second")
    device = tmp_path / "run" / "device"
    assert (device / "engines" / "tensorrt-fp16" / "model.engine").exists(), "everything is kept"
    assert read_json(device / "precision.json")["fp16"]["shares"]["fp16"] < 50


@ONE
def test_a_dla_takes_one_image_at_a_time_and_what_it_leaves_to_the_gpu_is_named(
    deploy: Deploy, stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bindings' TensorRT says of no layer that it can run on a DLA (see tensorrt_stand_in.py)."""
    found = deploy(stage, dla=1, TENSORRT_FAKE_UNGRAPHED="1")
    report = read_json(tmp_path / "run" / "device" / "engines" / "tensorrt-fp16" / "model.build.json")
    assert report["gpu_fallback"] == found["precision"]["fp16"]["gpu_fallback"] == ["conv1", "conv1"]
    assert (report["strongly_typed"], report["flags"], report["dla_core"]) == (False, ["FP16"], 1)
    assert found["verify"]["engines"][0]["verdict"] == "passed"
    assert found["verify"]["engines"][0]["describe"]["cuda_graph"].startswith("no: TensorRT did not run it")
    show_device(found)
    said = capsys.readouterr().out
    assert "tensorrt fp16: the DLA left to the GPU: conv1, conv1" in said
    assert "launched kernel by kernel, for it is no CUDA graph" in said


@pytest.mark.slow
@ONE
def test_after_an_update_of_its_tensorrt_the_engine_is_built_anew(deploy: Deploy, stage: Stage) -> None:
    """The machine is another one then: what was built and measured before does not hold."""
    deploy(stage)
    found = deploy(stage, "again", TENSORRT_FAKE_VERSION="10.99")
    assert [row["verdict"] for row in found["verify"]["engines"]] == ["passed"]
    assert found["verify"]["engines"][0]["describe"]["version"] == "10.99"


@ONE
def test_a_bundle_with_an_engine_of_another_version_fails_there(
    deploy: Deploy, stage: Stage, version: Version, tmp_path: Path
) -> None:
    """As when a finished bundle is copied from one JetPack to another."""
    engine = stage.folder / "engines" / "tensorrt-fp16" / "model.engine"
    engine.parent.mkdir(parents=True)
    engine.write_bytes(fake_engine((stage.folder / "typed" / "model-fp16.onnx").read_bytes(), "8.4.1"))
    manifest = json.loads((stage.folder / "manifest.json").read_text())
    entry = {"runtime": "tensorrt", "path": "engines/tensorrt-fp16/model.engine", "precision": "fp16"}
    manifest["engines"] = [{**entry, "sha256": sha256_of(engine), "tolerance": 1e-2}]
    manifest["files"][entry["path"]] = sha256_of(engine)
    manifest["target"] = "cpu"  # so that nothing is built there
    write_json(stage.folder / "manifest.json", manifest)
    said = r"tensorrt fp16: tensorrt refuses .*model\.engine: it was built by another TensorRT: .* so build it there"
    with pytest.raises(GateError, match=said):
        deploy(stage)
    (row,) = read_json(tmp_path / "run" / "device" / "verify.json")["engines"]
    assert row["verdict"] == "failed"
