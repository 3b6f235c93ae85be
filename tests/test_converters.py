"""The contract that every converter holds."""

import ast
import inspect
import json
import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from thinet_deploy import registry
from thinet_deploy.artifact import Artifact, sha256_of, size_of
from thinet_deploy.errors import MissingError, UnknownNameError
from thinet_deploy.export import INPUT, OUTPUT, export_onnx
from thinet_deploy.interfaces import Conversion, Converter
from thinet_deploy.runner import ENGINES, open_engine
from thinet_deploy.target import load_profile, profile_names

EVERY = pytest.mark.parametrize("runtime", registry.CONVERTERS)
PROTOCOL = {name for name, value in vars(Converter).items() if inspect.isfunction(value) and name[0] != "_"}
IMPORT_ALONE = """
import json, sys
from thinet_deploy import registry
tool = registry.converter(sys.argv[1])
print(json.dumps([name for name in sys.argv[2:] if name in sys.modules]))
"""


def installed(runtime: str) -> None:
    pytest.importorskip(ENGINES[runtime].package, reason=f"{runtime} is not installed")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 5, 3)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ).eval()


@pytest.fixture(scope="module")
def source(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    export_onnx(network, (3, 12, 12), path, opset=20, ir_version=9)
    return path


@pytest.fixture
def made(runtime: str, source: Path, tmp_path: Path) -> tuple[Artifact, Path]:
    installed(runtime)
    place = tmp_path / "engines" / runtime
    place.mkdir(parents=True)
    return registry.convert(runtime, Conversion(source, place), tmp_path), tmp_path


@EVERY
def test_it_has_exactly_the_functions_of_the_protocol(runtime: str) -> None:
    tool = registry.converter(runtime)
    own = {n for n, f in inspect.getmembers(tool, inspect.isfunction) if f.__module__ == tool.__name__ and n[0] != "_"}  # type: ignore[attr-defined]
    assert own == PROTOCOL == {"check", "made_by", "convert"}
    for name in PROTOCOL:
        asked, given = inspect.signature(getattr(Converter, name)), inspect.signature(getattr(tool, name))
        assert list(asked.parameters)[1:] == list(given.parameters)
        assert asked.return_annotation == given.return_annotation


@EVERY
def test_it_loads_its_runtime_only_when_it_converts(runtime: str) -> None:
    command = [sys.executable, "-c", IMPORT_ALONE, runtime, "torch", "onnx", *registry.CONVERTERS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@EVERY
def test_a_missing_runtime_names_the_extra(
    runtime: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    job = Conversion(source, tmp_path)
    for call in (registry.converter(runtime).check, lambda: registry.convert(runtime, job, tmp_path)):
        with pytest.raises(MissingError, match="is not installed") as failure:
            call()
        assert f'pip install "thinet-deploy[{runtime}]"' in failure.value.hint
    assert list(tmp_path.iterdir()) == []


@EVERY
def test_the_engine_computes_what_torch_computes(runtime: str, made: tuple[Artifact, Path], network: nn.Module) -> None:
    artifact, root = made
    engine = open_engine(runtime, str(root / artifact.path), 1, "fp32")
    try:
        assert engine.input_names == [INPUT]
        for batch in (1, 5):
            images = np.random.default_rng(batch).standard_normal((batch, 3, 12, 12)).astype(np.float32)
            with torch.inference_mode():
                expected = network(torch.from_numpy(images)).numpy()
            np.testing.assert_allclose(engine.run({INPUT: images})[OUTPUT], expected, rtol=1e-4, atol=1e-5)
    finally:
        engine.close()


@EVERY
def test_it_says_where_the_engine_came_from(runtime: str, made: tuple[Artifact, Path], source: Path) -> None:
    artifact, root = made
    path = root / artifact.path
    assert path.is_file()
    assert path.parent == root / "engines" / runtime
    assert artifact.kind == runtime
    assert artifact.sha256 == sha256_of(path)
    assert artifact.size_bytes == size_of(path.parent)
    assert artifact.inputs == (sha256_of(source),)
    name, version = artifact.made_by.split()
    assert name == runtime
    assert version[0].isdigit()
    read = json.loads(json.dumps(artifact.to_json()))
    assert Artifact(**{**read, "inputs": tuple(read["inputs"])}) == artifact


@EVERY
def test_its_files_tell_nothing_of_this_machine(runtime: str, made: tuple[Artifact, Path], source: Path) -> None:
    artifact, root = made
    words = [str(root), str(source.parent), str(Path.cwd()), os.fspath(Path.home()), "site-packages", "pytest"]
    for file in (root / artifact.path).parent.iterdir():
        data = file.read_bytes()
        assert [word for word in words if len(word) > 4 and word.encode() in data] == [], file.name


@EVERY
def test_it_leaves_its_source_alone_and_writes_into_its_folder_only(
    runtime: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(runtime)
    place, elsewhere = tmp_path / "place", tmp_path / "elsewhere"
    place.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    before = sha256_of(source.parent)
    registry.convert(runtime, Conversion(source, place), tmp_path)
    assert sha256_of(source.parent) == before
    assert list(elsewhere.iterdir()) == []


@EVERY
def test_it_reports_to_nobody(runtime: str, source: Path, tmp_path: Path) -> None:
    """No process is forked that would outlive the conversion, hold the run's lock, and call its maker."""
    installed(runtime)
    code = (
        "import multiprocessing.process as p, sys; from pathlib import Path\n"
        "p.BaseProcess.start = lambda self: sys.exit('a process was started')\n"
        "from thinet_deploy import registry; from thinet_deploy.interfaces import Conversion\n"
        "registry.convert(sys.argv[1], Conversion(Path(sys.argv[2]), Path(sys.argv[3])), Path(sys.argv[3]))\n"
        "assert 'openvino_telemetry.backend.backend_ga4' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code, runtime, str(source), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_file_in_converters_is_registered_and_every_runtime_can_be_run() -> None:
    folder = Path(inspect.getfile(registry.converter(next(iter(registry.CONVERTERS))))).parent  # type: ignore[arg-type]
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} == set(registry.CONVERTERS.values())
    assert set(registry.CONVERTERS) <= set(ENGINES)
    assert all(ast.get_docstring(ast.parse(path.read_text())) for path in folder.glob("*.py"))


def test_an_unknown_runtime_is_named() -> None:
    with pytest.raises(UnknownNameError, match="openvini") as failure:
        registry.converter("openvini")
    assert "Did you mean 'openvino'?" in failure.value.hint


@pytest.mark.parametrize("name", profile_names())
def test_every_target_is_told_what_is_left_to_do(name: str) -> None:
    target = load_profile(name)
    notes = "\n".join(registry.device_notes(target, INPUT, (3, 8, 8)))
    local = name == "cpu"
    assert registry.runs_here(target) == local
    assert ("latency was not measured" in notes) != local
    assert ("trtexec --onnx=model.onnx" in notes) == ("tensorrt" in target.runtimes)
    assert ("there is no engine in this bundle" in notes) == (name == "ios")
    assert ("python3 run.py latency" in notes) == (not local and target.os == "linux")
    for runtime in ("ncnn", "litert", "coreml", "executorch"):
        assert (runtime in notes) == (runtime in target.runtimes)
