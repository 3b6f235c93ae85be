"""bundle.py: what is written is verified by its own run.py, on a machine without this package; damage is named."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_onnx import scored_spec

from thinet_deploy import bundle
from thinet_deploy.artifact import sha256_of
from thinet_deploy.bundle import BundleSpec, EngineFile
from thinet_deploy.errors import BundleError, OutputError
from thinet_deploy.on_device import runner, runner_text, self_test
from thinet_deploy.on_device.engine import RunnerError

FORBIDDEN = ("torch", "onnx", "pydantic", "thinet_deploy")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> BundleSpec:
    """A tiny network with an engine for each of both runtimes."""
    return replace(
        scored_spec(tmp_path_factory.mktemp("engines"), 2),
        labels=("cat", "big\ndog"),
        preprocess={"mean": [0.5, 0.5, 0.5]},
        notes=("build the TensorRT engine on the device",),
    )


@pytest.fixture
def made(spec: BundleSpec, tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    bundle.write_bundle(folder, spec)
    return folder


def run(folder: Path, *arguments: str, block: Iterable[str] = FORBIDDEN) -> subprocess.CompletedProcess[str]:
    """Run the bundle's own run.py where the modules in `block` cannot be imported."""
    blocker = folder.parent / "blocker"
    blocker.mkdir(exist_ok=True)
    (blocker / "sitecustomize.py").write_text(
        f"import sys\n\nclass Block:\n    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {tuple(block)!r}:\n"
        f"            raise ImportError(f'No module named {{name!r}}')\n\nsys.meta_path.insert(0, Block())\n"
    )
    return subprocess.run(
        [sys.executable, str(folder / "run.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(blocker)},
        cwd=folder.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def report_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert "Traceback" not in done.stderr, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["exit_code"] == done.returncode
    return report


def change_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_bundle_holds_what_the_manifest_says(made: Path, spec: BundleSpec) -> None:
    manifest = bundle.read_manifest(made)
    files = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()}
    assert set(manifest.files) == files - {"manifest.json"}
    assert [engine.path for engine in manifest.engines] == ["engines/openvino-fp32/tiny.xml", "model.onnx"]
    assert manifest.inputs == spec.inputs
    assert (made / "run.py").read_bytes() == Path(runner.__file__).read_bytes()
    assert (made / "labels.txt").read_text().splitlines() == ["cat", "big dog"]
    assert json.loads((made / "preprocess.json").read_text()) == spec.preprocess
    assert json.loads((made / "manifest.json").read_text())["schema"] == "thinet-deploy/bundle"


def test_writing_twice_gives_the_same_bytes(made: Path, spec: BundleSpec, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    assert bundle.write_bundle(tmp_path / "again", spec) == bundle.read_manifest(made)


def test_it_verifies_itself_without_torch_onnx_pydantic_or_us(made: Path) -> None:
    done = run(made)
    assert (done.returncode, done.stderr) == (0, "")
    assert "PASSED: 2 of 2 engines" in done.stdout
    assert "build the TensorRT engine on the device" in done.stdout
    report = report_of(run(made, "--json"))
    assert {row["verdict"] for row in report["engines"]} == {"passed"}
    assert report == bundle.verify_bundle(made)


def test_it_needs_numpy_and_the_runtime_only(made: Path) -> None:
    code = "import runpy, sys; sys.argv = ['run.py', 'verify']\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "except SystemExit: pass\nprint(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=made, capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert {"numpy", "onnxruntime", "openvino"} <= loaded
    assert not loaded & {*FORBIDDEN, "scipy", "onnxscript"}


def test_latency_of_a_bundle(made: Path) -> None:
    report = report_of(run(made, "latency", "--seconds", "1", "--threads", "1", "--batch", "3", "--json"))
    assert report["batch"] == 3
    for row in report["engines"]:
        assert len(row["rounds_ms"]) == report["rounds"]
        assert row["summary"]["n"] == sum(map(len, row["rounds_ms"]))
    done = run(made, "latency", "--seconds", "1")
    assert done.returncode == 0
    assert done.stdout.count("  median ") == 2
    assert run(made, "latency", "--batch", "0").returncode == 2


def test_a_runtime_that_is_not_here_is_left_out(made: Path) -> None:
    done = run(made, block=[*FORBIDDEN, "openvino"])
    assert done.returncode == 0
    assert "PASSED: 1 of 2 engines" in done.stdout
    assert "pip install openvino" in done.stdout


@pytest.mark.parametrize("command", ["verify", "latency"])
def test_without_any_runtime_it_says_what_to_install(made: Path, command: str) -> None:
    done = run(made, command, block=[*FORBIDDEN, "openvino", "onnxruntime"])
    assert done.returncode == 3
    assert "pip install openvino" in done.stdout
    assert "pip install onnxruntime" in done.stdout


@pytest.mark.parametrize("name", ["engines/openvino-fp32/tiny.bin", "golden.npz", "labels.txt", "run.py"])
def test_a_changed_file_is_named(made: Path, name: str) -> None:
    path = made / name
    path.write_bytes(path.read_bytes() + b"\n")
    done = run(made)
    assert done.returncode == 1
    assert f"changed: {name}" in done.stdout
    assert "FAILED" in done.stdout
    verdicts = {row["runtime"]: row["verdict"] for row in bundle.verify_bundle(made)["engines"]}
    broken = {"golden.npz": {"openvino", "onnxruntime"}, "engines/openvino-fp32/tiny.bin": {"openvino"}}.get(
        name, set()
    )
    assert {runtime for runtime, verdict in verdicts.items() if verdict == "failed"} == broken


def test_missing_files_fail_and_extra_files_do_not(made: Path) -> None:
    (made / "notes.txt").write_text("mine")
    assert report_of(run(made, "--json"))["files"]["extra"] == ["notes.txt"]
    (made / "model.onnx").unlink()
    done = run(made)
    assert done.returncode == 1
    assert "missing: model.onnx" in done.stdout


def test_an_engine_that_computes_something_else_fails(spec: BundleSpec, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    wrong = {**spec.__dict__, "golden_outputs": {"y": np.multiply(spec.golden_outputs["y"], 1.01, dtype="float32")}}
    bundle.write_bundle(tmp_path / "bundle", BundleSpec(**wrong))
    done = run(tmp_path / "bundle")
    assert done.returncode == 1
    assert "outputs are off by 0.0099 of their scale, allowed 0.0001" in done.stdout


@pytest.mark.parametrize("path", ["../outside.onnx", "/etc/passwd", "engines/other.onnx"])
def test_nothing_without_a_checksum_is_loaded(made: Path, path: str) -> None:
    shutil.copy(made / "model.onnx", made.parent / "outside.onnx")
    engine = {"runtime": "onnxruntime", "path": path, "precision": "fp32", "tolerance": 1.0}
    change_manifest(made, engines=[engine])
    row = report_of(run(made, "--json"))["engines"][0]
    assert row["verdict"] == "failed"
    assert row["reason"].startswith("not loaded")
    files = json.loads((made / "manifest.json").read_text())["files"]
    change_manifest(made, files={**files, path: sha256_of(made.parent / "outside.onnx")})
    assert report_of(run(made, "--json"))["engines"][0]["reason"] == f"not loaded, damaged: {path}"


def test_a_truncated_manifest_is_explained(made: Path) -> None:
    manifest = (made / "manifest.json").read_bytes()
    for end in range(0, len(manifest) - 2, 97):
        (made / "manifest.json").write_bytes(manifest[:end])
        with pytest.raises(RunnerError, match=r"manifest\.json is damaged"):
            self_test.verify(str(made))
    done = run(made)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("error: ")
    assert "Copy the bundle again" in done.stdout
    with pytest.raises(BundleError, match=r"manifest\.json is damaged"):
        bundle.verify_bundle(made)
    with pytest.raises(BundleError, match=r"manifest\.json is damaged"):
        bundle.read_manifest(made)


def test_no_manifest_and_a_newer_one_are_explained(made: Path) -> None:
    change_manifest(made, version=2)
    with pytest.raises(BundleError, match=r"version 2, this run\.py reads .* version 1"):
        bundle.verify_bundle(made)
    (made / "manifest.json").unlink()
    with pytest.raises(BundleError, match=r"is no bundle: it has no manifest\.json"):
        bundle.verify_bundle(made)
    with pytest.raises(BundleError, match="is no bundle"):
        bundle.read_manifest(made)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = ["schema", "version", "model", "target", "created_by", "notes", "files", "golden", "engines"]


@given(
    changes=st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1), engine=st.dictionaries(st.text(max_size=9), JSON)
)
@settings(max_examples=200, deadline=None)
def test_no_damage_of_the_manifest_makes_a_traceback(changes: dict[str, Any], engine: dict[str, Any]) -> None:
    good = {"schema": self_test.SCHEMA, "version": 1, "model": "m", "target": "t", "created_by": "c", "notes": []}
    entry = {"runtime": "abacus", "path": "p", "precision": "fp32", "tolerance": 1, **engine}
    document = {**good, "files": {"p": "0", "g": "0"}, "golden": {"path": "g"}, "engines": [entry], **changes}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_text", lambda *_, **__: json.dumps(document))
        try:
            report = self_test.verify("nowhere")
        except RunnerError:
            return
    runner_text.verify_text(report)
    assert report["exit_code"] in {1, 3}


def test_what_cannot_become_a_bundle_is_refused(made: Path, spec: BundleSpec, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="not an empty folder"):
        bundle.write_bundle(made, spec)
    (tmp_path / "new").mkdir()
    gone = EngineFile("openvino", tmp_path / "gone.xml", "fp32", 1e-4)
    for changes, message in (
        ({"engines": (gone,)}, r"gone\.xml should go into the bundle and does not exist"),
        ({"engines": spec.engines * 2}, "one engine per runtime and precision"),
        ({"golden_inputs": {"z": np.ones(1)}}, "called z, but the network has x"),
    ):
        with pytest.raises(BundleError, match=message):
            bundle.write_bundle(tmp_path / "new", BundleSpec(**{**spec.__dict__, **changes}))
    assert not any((tmp_path / "new").iterdir())
