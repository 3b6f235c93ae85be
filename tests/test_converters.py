"""The contract that every converter holds."""

import ast
import functools
import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from thinet_deploy import registry
from thinet_deploy.artifact import Artifact, sha256_of, size_of
from thinet_deploy.errors import ConversionError, InputError, MissingError, TargetError, UnknownNameError
from thinet_deploy.export import INPUT, OUTPUT, export_onnx, export_program
from thinet_deploy.interfaces import Contract, Conversion, Precision
from thinet_deploy.on_device import tensorrt_builder
from thinet_deploy.on_device.engines import ENGINES, open_engine
from thinet_deploy.program import load_program
from thinet_deploy.reproduce import SCRIPT
from thinet_deploy.target import load_profile, profile_names

# Their toolchains take a gigabyte and some seconds to import.
HEAVY = ("coreml", "litert", "executorch")
RUNTIMES = [pytest.param(name, marks=pytest.mark.slow if name in HEAVY else ()) for name in registry.CONVERTERS]
EVERY = pytest.mark.parametrize("runtime", registry.CONVERTERS)
EACH = pytest.mark.parametrize("runtime", RUNTIMES)
# What there is no runner for here: the library or the GPU that it needs cannot be had, or the system is another.
NOT_RUN_HERE = {"tensorrt", "tensorrt-rtx", "coreml"}
IMPORT_ALONE = """
import json, sys
from thinet_deploy import registry
tool = registry.converter(sys.argv[1])
print(json.dumps([name for name in sys.argv[2:] if name in sys.modules]))
"""


def installed(runtime: str) -> None:
    for name in registry.converter(runtime).CONTRACT.modules:
        if util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 5, 3)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ).eval()


@pytest.fixture(scope="module")
def sources(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    export_onnx(network, (3, 12, 12), folder / "net.onnx", opset=20, ir_version=9)
    export_program(network, (3, 12, 12), folder / "net.pt2")
    return {"onnx": folder / "net.onnx", "program": folder / "net.pt2"}


Made = tuple[Artifact, Path]
Make = Callable[[str], Made]


@pytest.fixture(scope="module")
def make(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Converts the network once for each runtime."""

    @functools.cache
    def once(runtime: str) -> Made:
        installed(runtime)
        root = tmp_path_factory.mktemp("made")
        place = root / "engines" / runtime
        place.mkdir(parents=True)
        source = sources[registry.converter(runtime).CONTRACT.source]
        return registry.convert(runtime, Conversion(source, place), root), root

    return once


@EVERY
def test_it_has_exactly_what_the_protocol_asks_for(runtime: str) -> None:
    tool: Any = registry.converter(runtime)
    own = {n for n, f in inspect.getmembers(tool, inspect.isfunction) if f.__module__ == tool.__name__ and n[0] != "_"}
    assert own == {"convert"}
    assert inspect.signature(tool.convert).parameters.keys() == {"job", "progress"}
    assert isinstance(tool.CONTRACT, Contract)
    assert Path(inspect.getfile(tool)).stem.startswith(f"{tool.CONTRACT.source}_to_")


@EVERY
def test_it_loads_its_runtime_only_when_it_converts(runtime: str) -> None:
    modules = {name for known in registry.CONVERTERS for name in registry.converter(known).CONTRACT.modules}
    command = [sys.executable, "-c", IMPORT_ALONE, runtime, *sorted(modules)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@EVERY
def test_a_missing_runtime_names_an_extra_that_exists(
    runtime: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    job, contract = Conversion(sources["onnx"], tmp_path), registry.converter(runtime).CONTRACT
    for call in (lambda: registry.check(runtime), lambda: registry.convert(runtime, job, tmp_path)):
        with pytest.raises(MissingError, match="not installed") as failure:
            call()
        assert f'pip install "thinet-deploy[{contract.extra}]"' in failure.value.hint
    assert list(tmp_path.iterdir()) == []
    assert contract.extra in metadata.metadata("thinet-deploy").get_all("Provides-Extra", [])


@EACH
def test_the_engine_computes_what_torch_computes(runtime: str, make: Make, network: nn.Module) -> None:
    artifact, root = make(runtime)
    if runtime in NOT_RUN_HERE:
        pytest.skip(f"nothing on this machine can run an engine for {runtime}")
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


@EACH
def test_it_says_where_the_engine_came_from(runtime: str, make: Make, sources: dict[str, Path]) -> None:
    artifact, root = make(runtime)
    path, contract = root / artifact.path, registry.converter(runtime).CONTRACT
    assert path.suffix == contract.suffix
    assert path.parent == root / "engines" / runtime
    assert artifact.kind == runtime
    assert artifact.sha256 == sha256_of(path)
    assert artifact.size_bytes == size_of(path.parent) - (path.parent / SCRIPT).stat().st_size
    assert artifact.inputs == (sha256_of(sources[contract.source]),)
    name, version = artifact.made_by.split()
    assert name == contract.modules[0]
    assert version[0].isdigit()
    read = json.loads(json.dumps(artifact.to_json()))
    assert Artifact(**{**read, "inputs": tuple(read["inputs"])}) == artifact


@EACH
def test_its_files_tell_nothing_of_this_machine(runtime: str, make: Make, sources: dict[str, Path]) -> None:
    artifact, root = make(runtime)
    folder = str(sources["onnx"].parent)
    words = [str(root), folder, str(Path.cwd()), os.fspath(Path.home()), "site-packages", "pytest"]
    for file in filter(Path.is_file, (root / artifact.path).parent.rglob("*")):
        data = file.read_bytes()
        assert [word for word in words if len(word) > 5 and word.encode() in data] == [], file.name


def test_a_profile_of_the_users_own_is_named_without_its_folder(sources: dict[str, Path], tmp_path: Path) -> None:
    installed("onnxruntime")
    own, place = tmp_path / "private" / "board.toml", tmp_path / "made"
    own.parent.mkdir()
    own.write_text('extends = "cpu"\nid = "my-board"\n')
    place.mkdir()
    registry.convert("onnxruntime", Conversion(sources["onnx"], place, target=str(own)), tmp_path)
    script = (place / SCRIPT).read_text()
    assert "'target': 'board.toml'" in script
    assert str(tmp_path) not in script


def test_a_toolchain_may_come_under_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As onnxruntime does from onnxruntime-gpu, and tensorrt from tensorrt-cu12."""
    installed("onnxruntime")
    known, module = metadata.version, registry.converter("onnxruntime").CONTRACT.modules[0]

    def version(name: str) -> str:
        if name == module:
            raise metadata.PackageNotFoundError(name)
        return known("pytest" if name == "onnxruntime-gpu" else name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {module: ["onnxruntime-gpu"]})
    assert registry.made_by("onnxruntime") == f"{module} {known('pytest')}"
    monkeypatch.setattr(metadata, "packages_distributions", dict)
    assert registry.made_by("onnxruntime") == f"{module} {importlib.import_module(module).__version__}"
    monkeypatch.delattr(importlib.import_module(module), "__version__")
    assert registry.made_by("onnxruntime") == f"{module} of unknown version"


@pytest.mark.parametrize("affine", [True, False])
def test_core_ml_is_calibrated_on_every_image(affine: bool, tmp_path: Path) -> None:
    """The last ones too, where the number is no multiple of the batch; and with a BatchNorm that learns nothing."""
    pytest.importorskip("coremltools", reason="coremltools is not installed")  # it registers the operators, too
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, affine=affine)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(400, 2)).eval()
    images = torch.rand(20, 3, 12, 12)
    images[-1] = 10
    np.save(tmp_path / "images.npy", images.numpy())
    tool: Any = registry.converter("coreml")
    export_program(net, (3, 12, 12), tmp_path / "net.pt2")
    program = load_program(tmp_path / "net.pt2", None)
    quantised = tool._quantised(program.module(), tmp_path / "images.npy", 8)
    with torch.inference_mode():
        exact, got = net(images[-8:]), quantised(images[-8:])
    # 255 steps of 10 / 255 leave a percent or two; limits without the last image, of about 1, would cut off most of it.
    assert float((got - exact).abs().max() / exact.abs().max()) < 0.05


@EACH
def test_it_leaves_its_source_alone_and_writes_into_its_folder_only(
    runtime: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also that a batch size can be fixed, or is refused."""
    installed(runtime)
    place, elsewhere, contract = tmp_path / "place", tmp_path / "elsewhere", registry.converter(runtime).CONTRACT
    place.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    source = sources[contract.source]
    before = sha256_of(source.parent)
    batch = 1 if contract.batch == "one" else 3
    artifact = registry.convert(runtime, Conversion(source, place, batch=batch), tmp_path)
    assert sha256_of(source.parent) == before
    assert list(elsewhere.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"place", "place.log", "elsewhere"}
    if contract.batch == "one":
        with pytest.raises(InputError, match="one image at a time, but batch 3"):
            registry.convert(runtime, Conversion(source, place, batch=3), tmp_path)
    if runtime not in NOT_RUN_HERE:
        images = np.zeros((batch, 3, 12, 12), np.float32)
        assert open_engine(runtime, str(tmp_path / artifact.path), 1).run({INPUT: images})[OUTPUT].shape == (batch, 5)


@EACH
def test_the_script_beside_it_makes_it_again(
    runtime: str, make: Make, sources: dict[str, Path], tmp_path: Path
) -> None:
    artifact, root = make(runtime)
    source = sources[registry.converter(runtime).CONTRACT.source]
    command = [sys.executable, str((root / artifact.path).with_name(SCRIPT))]
    done = subprocess.run([*command, str(source), str(tmp_path / "again")], capture_output=True, text=True, check=True)
    name = Path(artifact.path).name
    assert done.stdout.startswith(f"{name}: ")
    assert artifact.made_by in done.stdout
    assert (tmp_path / "again" / name).exists()
    other = subprocess.run([*command, __file__, str(tmp_path)], capture_output=True, text=True, check=False)
    assert other.returncode == 1
    assert "is not the file that the engine was made from" in other.stderr


@EACH
def test_a_damaged_source_is_one_clear_message(runtime: str, tmp_path: Path) -> None:
    installed(runtime)
    source, place = tmp_path / "net.onnx", tmp_path / "place"
    source.write_bytes(b"\x08\x09garbage" * 50)
    place.mkdir()
    with pytest.raises(ConversionError) as failure:
        registry.convert(runtime, Conversion(source, place), tmp_path)
    assert failure.value.exit_code == 2
    assert "\n" not in failure.value.what
    assert (tmp_path / "place.log").exists()


@EVERY
def test_each_precision_is_offered_or_has_a_reason(runtime: str) -> None:
    contract = registry.converter(runtime).CONTRACT
    assert {"fp32", "fp16", "int8"} <= {*contract.precisions, *contract.without}
    assert not set(contract.precisions) & set(contract.without)


@pytest.mark.parametrize("runtime", ["litert", "executorch"])
def test_int8_without_images_to_calibrate_with_is_refused(
    runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "check", lambda runtime: None)
    with pytest.raises(InputError, match=f"{runtime} quantises by itself, .* no calibration images"):
        registry.convert(runtime, Conversion(tmp_path / "n.pt2", tmp_path, "int8"), tmp_path)


@EVERY
def test_a_precision_it_does_not_know_is_refused(runtime: str, tmp_path: Path, sources: dict[str, Path]) -> None:
    installed(runtime)
    contract = registry.converter(runtime).CONTRACT
    for precision in {"fp32", "fp16", "bf16", "int8"} - set(contract.precisions):
        job = Conversion(sources[contract.source], tmp_path, cast("Precision", precision))
        with pytest.raises(InputError, match=f"cannot be asked for {precision}"):
            registry.convert(runtime, job, tmp_path)


def test_openvino_reports_to_nobody(sources: dict[str, Path], tmp_path: Path) -> None:
    """No process is forked that would outlive the conversion and call its maker."""
    installed("openvino")
    code = (
        "import multiprocessing.process as p, sys; from pathlib import Path\n"
        "p.BaseProcess.start = lambda self: sys.exit('a process was started')\n"
        "from thinet_deploy import registry; from thinet_deploy.interfaces import Conversion, silent\n"
        "registry.converter('openvino').convert(Conversion(Path(sys.argv[1]), Path(sys.argv[2])), silent)\n"
        "assert 'openvino_telemetry.backend.backend_ga4' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code, str(sources["onnx"]), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_ort_format_comes_with_the_operators_of_a_reduced_build(make: Make) -> None:
    artifact, root = make("ort")
    lines = (root / artifact.path).with_name("required_operators.config").read_text().splitlines()
    assert all(len(line.split(";")) == 3 for line in lines)
    assert any(line.endswith("Conv") for line in lines)


def test_every_file_in_converters_is_registered_and_every_runtime_can_be_run() -> None:
    folder = Path(inspect.getfile(registry.converter(next(iter(registry.CONVERTERS))))).parent  # type: ignore[arg-type]
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} == set(registry.CONVERTERS.values())
    assert set(registry.CONVERTERS) == set(ENGINES) | NOT_RUN_HERE
    assert all(ast.get_docstring(ast.parse(path.read_text())) for path in folder.glob("*.py"))


def test_a_dla_on_a_board_without_one_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "check", lambda runtime: None)
    job = Conversion(tmp_path / "none.onnx", tmp_path, precision="int8", target="jetson-orin-nano", dla_core=0)
    with pytest.raises(TargetError, match="DLA 0 was asked for on jetson-orin-nano: it has none"):
        registry.convert("tensorrt", job, tmp_path)


def test_on_a_dla_the_builder_is_told_one_batch_size() -> None:
    notes = "\n".join(registry.device_notes(load_profile("jetson-agx-orin"), dla=1))
    assert "--dla-core 1 --batch 1 1 1" in notes
    assert "DLA" not in "\n".join(registry.device_notes(load_profile("jetson-agx-orin")))


@pytest.mark.skipif(util.find_spec("tensorrt") is not None, reason="it would build")
@pytest.mark.parametrize("dla", [None, 0])
def test_the_builder_takes_what_is_said_of_it(dla: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    command = registry.builder_command(load_profile("jetson-agx-orin"), "typed/model-fp16.onnx", "fp16", dla)
    python, script, *options = command.split()
    assert (python, script) == ("python3", "tensorrt_builder.py")
    assert tensorrt_builder.main(options) == 3
    assert "tensorrt cannot be imported" in capsys.readouterr().out


def test_an_unknown_runtime_is_named() -> None:
    with pytest.raises(UnknownNameError, match="openvini") as failure:
        registry.converter("openvini")
    assert "Did you mean 'openvino'?" in failure.value.hint


@pytest.mark.parametrize("name", profile_names())
def test_every_target_is_told_what_is_left_to_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda module: None)
    target = load_profile(name)
    notes = "\n".join(registry.device_notes(target))
    local = name == "cpu"
    assert registry.runs_here(target) == local
    assert ("latency was not measured" in notes) != local
    assert ("tensorrt_builder.py model.onnx engines/tensorrt-fp32/model.engine" in notes) == (
        "tensorrt" in target.runtimes
    )
    assert ("there is no engine in this bundle" in notes) == (name == "ios")
    assert ("python3 run.py latency" in notes) == (not local and target.os == "linux")
    for runtime in ("ncnn", "litert", "coreml", "executorch"):
        assert (runtime in notes) == (runtime in target.runtimes)
        assert (f'"thinet-deploy[{runtime}]"' in notes) == (runtime in target.runtimes)
    monkeypatch.setattr(registry, "installed", lambda runtime: True)
    everything = registry.host_runtimes(target)
    assert everything == [
        r for r in target.runtimes if r != "torch" and (r != "tensorrt" or not target.builds_on_device)
    ]
    assert ("coreml engine was made, but" in "\n".join(registry.device_notes(target))) == (name == "ios")
