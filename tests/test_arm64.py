"""run.py on an emulated arm64 CPU: golden outputs there, with the runtime's kernels for that CPU. No times."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from arm64 import Arm64, arm64

from thinet_deploy import bundle
from thinet_deploy.artifact import sha256_of
from thinet_deploy.bundle import BundleSpec, EngineFile
from thinet_deploy.interfaces import TensorSpec

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def machine() -> Arm64:
    """The emulated machine."""
    return arm64()


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A bundle of a small VGG: in float32, and in INT8 as it is made for CPUs; it agrees with torch here."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from thinet_deploy.export import INPUT, OUTPUT, export_onnx
    from thinet_deploy.models.vgg import vgg_small
    from thinet_deploy.precision.calibration import limits, observe
    from thinet_deploy.precision.int8 import quantise
    from thinet_deploy.precision.weights import U8S8

    torch.manual_seed(0)
    network = vgg_small((1, 32, 32), 10).eval()
    x = np.random.default_rng(1).standard_normal((16, 1, 32, 32)).astype("float32")
    with torch.inference_mode():
        y = network(torch.from_numpy(x)).numpy()
    full, short = tmp_path / "full.onnx", tmp_path / "short.onnx"
    export_onnx(network, (1, 32, 32), full, opset=17, ir_version=8)
    model = onnx.load(full)
    seen = observe(model, lambda: [x])
    onnx.save(quantise(model, {name: limits(values, "min-max") for name, values in seen.items()}, U8S8), short)
    (here,) = onnxruntime.InferenceSession(str(short), providers=["CPUExecutionProvider"]).run(None, {INPUT: x})
    moved = float(np.abs(here - y).max() / np.abs(y).max())
    folder = tmp_path / "bundle"
    folder.mkdir()
    spec = BundleSpec(
        model="a small VGG",
        target="raspberry-pi-5",
        onnx=full,
        engines=(EngineFile("onnxruntime", full, "fp32", 1e-5), EngineFile("onnxruntime", short, "int8", 2 * moved)),
        inputs=(TensorSpec(INPUT, ("batch", 1, 32, 32), "float32"),),
        outputs=(TensorSpec(OUTPUT, ("batch", 10), "float32"),),
        golden_inputs={INPUT: x},
        golden_outputs={OUTPUT: y},
        tolerance=1e-5,
    )
    bundle.write_bundle(folder, spec)
    return folder


def test_golden_outputs_hold_on_arm64(machine: Arm64, made: Path) -> None:
    assert machine.run("-c", "import platform; print(platform.machine())").stdout == "aarch64\n"
    done = machine.run(made / "run.py", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["files"]["extra"] == []
    for row, precision in zip(report["engines"], ("fp32", "int8"), strict=True):
        assert (row["verdict"], row["precision"]) == ("passed", precision), row
        assert 0 <= row["max_relative_error"] <= row["tolerance"]
    assert report["engines"][1]["max_relative_error"] > 1e-4, "INT8 was computed, not float32"


def test_a_network_that_computes_something_else_fails_there_too(machine: Arm64, made: Path) -> None:
    golden = made / "golden.npz"
    with np.load(golden) as archive:
        arrays = dict(archive)
    (name,) = (name for name in arrays if name.startswith("output:"))
    arrays[name] = arrays[name][:, ::-1]
    np.savez(golden, **arrays)
    manifest = json.loads((made / "manifest.json").read_text())
    manifest["files"]["golden.npz"] = sha256_of(golden)
    (made / "manifest.json").write_text(json.dumps(manifest))
    done = machine.run(made / "run.py")
    assert (done.returncode, done.stdout.count("outputs are off by")) == (1, 2), done.stdout


def test_what_arm64_lacks_is_named(machine: Arm64, made: Path) -> None:
    """The runtime is not there: the files are checked all the same."""
    bare = Arm64(machine.qemu, machine.root, made)
    done = bare.run(made / "run.py")
    assert (done.returncode, "has no numpy. Do: " in done.stderr) == (3, True)
