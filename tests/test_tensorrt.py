"""TensorRT: names and signatures on the real bindings of four versions; real engines with TensorRT-RTX.

TensorRT's own library cannot be had here, so no engine of it was ever built by these tests.
"""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorrt_versions import BINDINGS, Version, as_tensorrt, version_of, with_bindings

from thinet_deploy import registry
from thinet_deploy.errors import ConversionError
from thinet_deploy.interfaces import Conversion, Precision
from thinet_deploy.on_device import tensorrt_builder
from thinet_deploy.on_device.tensorrt_builder import BuildError, Settings, workspace_mb

Build = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module", params=BINDINGS)
def version(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Version:
    """The bindings of one version."""
    return version_of(request.param, tmp_path_factory.mktemp("libraries"))


@pytest.fixture
def pretend(version: Version, tmp_path: Path) -> Build:
    """Builds with objects that have the names and signatures of the real bindings (tensorrt_stand_in.py)."""
    (tmp_path / "net.onnx").write_bytes(b"")

    def run(dtype: str, **settings: Any) -> dict[str, Any]:
        script = Path(__file__).with_name("tensorrt_stand_in.py")
        done = with_bindings(version, script, tmp_path, dtype, json.dumps(settings))
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout.splitlines()[-1]))

    return run


# ------------------------------------------------------------------------------------- on the real bindings


def test_every_name_and_signature_exists_in_the_bindings(version: Version, pretend: Build, tmp_path: Path) -> None:
    made = pretend("HALF", precision="fp16", workspace_mb=512, with_cache=True)
    report = made["report"]
    assert report["tensorrt"].startswith(version.name)
    assert report["strongly_typed"] is (version.major >= 10)
    assert report["flags"] == (["FP16"] if version.major == 8 else [])
    assert report["workspace_mb"] == 512
    assert report["inspected"] == {"Half": 1}
    assert (tmp_path / "net.engine").read_bytes()
    assert json.loads((tmp_path / "net.build.json").read_text()) == report
    assert json.loads((tmp_path / "net.layers.json").read_text())["Layers"]
    used = {
        *("Builder", "OnnxParser", "Runtime", "Builder.create_network", "OnnxParser.parse_from_file"),
        *("IBuilderConfig.set_memory_pool_limit", "IBuilderConfig.profiling_verbosity", "IBuilderConfig.clear_flag"),
        *("IBuilderConfig.set_timing_cache", "ITimingCache.serialize", "IOptimizationProfile.set_shape"),
        *("IBuilderConfig.add_optimization_profile", "Builder.build_serialized_network"),
        *("Runtime.deserialize_cuda_engine", "EngineInspector.get_engine_information"),
    }
    assert used <= set(made["called"])
    # TensorRT 8 has no progress monitor.
    assert made["steps"] == ([] if version.major == 8 else [[0, 2, "Building"]])


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ("config.workspace", "AttributeError"),
        ("config.set_memory_pool_limit(1 << 20)", "TypeError"),
        ("config.set_memory_pool_limit(trt.BuilderFlag.TF32, 1 << 20)", "TypeError"),
        ("config.set_timing_cache(config.create_timing_cache(b''), ignore=True)", "TypeError"),
        ("config.DLA_core = 'first'", "TypeError"),
        ("config.num_optimization_profiles = 1", "AssertionError"),
    ],
)
def test_what_pretends_to_be_tensorrt_refuses_what_the_bindings_would(wrong: str, error: str, version: Version) -> None:
    code = f"from tensorrt_stand_in import StandIn, trt\nconfig = StandIn(trt.IBuilderConfig)\n{wrong}"
    done = with_bindings(version, "-c", code)
    assert done.stderr.splitlines()[-1].startswith(error), done.stderr


def test_a_timing_cache_is_written_and_read_again(pretend: Build) -> None:
    assert pretend("FLOAT", with_cache=True)["report"]["timing_cache"] == "new"
    again = pretend("FLOAT", with_cache=True)
    assert again["report"]["timing_cache"] == "reused"
    assert again["called"].count("IBuilderConfig.create_timing_cache") == 1
    assert pretend("FLOAT")["report"]["timing_cache"] == "none"


def test_a_fixed_batch_needs_no_profile(pretend: Build) -> None:
    called = pretend("FLOAT", batch=(4, 4, 4))["called"]
    assert "ITensor.shape" in called
    assert "IBuilderConfig.add_optimization_profile" not in called


def test_a_file_of_another_type_is_not_built_silently(version: Version, pretend: Build) -> None:
    """What TensorRT 11 did to many: an engine asked for in fp16, and made in fp32."""
    made = pretend("FLOAT", precision="fp16")
    if version.major == 8:
        assert made["report"]["flags"] == ["FP16"], "there the flag makes it fp16"
    else:
        assert "fp16 was asked for, but the ONNX file computes in FLOAT only" in made["error"]
        assert "Builder.build_serialized_network" not in made["called"]


def test_int8_and_bf16(version: Version, pretend: Build) -> None:
    assert pretend("INT8", precision="int8")["report"]["flags"] == (["INT8", "FP16"] if version.major == 8 else [])
    if version.major == 8:
        assert "cannot compute in bf16" in pretend("FLOAT", precision="bf16")["error"]
    else:
        assert pretend("BF16", precision="bf16")["report"]["strongly_typed"]


def test_a_dla_takes_flags_until_11_and_says_what_stays_on_the_gpu(version: Version, pretend: Build) -> None:
    made = pretend("HALF", precision="fp16", batch=(1, 1, 1), dla_core=0)
    assert made["report"]["gpu_fallback"] == ["conv1", "conv1"]
    assert made["report"]["flags"] == ([] if version.major == 11 else ["FP16"])
    assert {"IBuilderConfig.DLA_core", "IBuilderConfig.default_device_type"} <= set(made["called"])
    assert "one batch size only" in pretend("HALF", precision="fp16", dla_core=0)["error"]
    assert "cannot be asked for fp32" in pretend("FLOAT", batch=(1, 1, 1), dla_core=0)["error"]
    int8 = pretend("INT8", precision="int8", batch=(1, 1, 1), dla_core=0)
    assert ("report" in int8) == (version.major == 11)


@pytest.fixture
def build_alone(version: Version, tmp_path: Path) -> Build:
    """The builder's command line, with what pretends to be TensorRT; its exit code and its last line."""
    typed_onnx(tmp_path / "net.onnx", "fp32")
    environment = version.environment(as_tensorrt(tmp_path / "modules"))

    def run(*options: object) -> dict[str, Any]:
        script, engine = tensorrt_builder.__file__, tmp_path / "made" / "net.engine"
        command = [sys.executable, script, tmp_path / "net.onnx", engine, *options]
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        return {"code": done.returncode, **json.loads(done.stdout.splitlines()[-1])}

    return run


def test_the_folder_of_the_timing_cache_need_not_be_there(build_alone: Build, tmp_path: Path) -> None:
    done = build_alone("--cache", tmp_path / "no" / "such" / "timing.cache")
    assert (done["code"], done["report"]["timing_cache"]) == (0, "new")
    assert (tmp_path / "no" / "such" / "timing.cache").read_bytes()
    done = build_alone("--cache", tmp_path / "net.onnx" / "timing.cache")
    assert (done["code"], "net.onnx" in done["error"], "progress" in done) == (1, True, False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("name", ["net.engine", "net.build.json", "net.layers.json", "timing.cache"])
def test_a_full_disk_is_said_and_leaves_no_engine_without_its_reports(
    build_alone: Build, tmp_path: Path, name: str
) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / f"{name}.partial").symlink_to("/dev/full")
    done = build_alone("--cache", tmp_path / "made" / "timing.cache")
    assert done["code"] == 1
    assert f"{tmp_path}/made/{name}" in done["error"]
    assert "No space left on device" in done["error"]
    assert not (tmp_path / "made" / "net.engine").exists()


def test_what_the_parser_cannot_read_is_named(version: Version, pretend: Build) -> None:
    node = "node 4" if version.major == 8 else "node 4 (Frobnicate 'layer7')"
    assert f"cannot read net.onnx: {node}: no such operator" in pretend("FLOAT", readable=False)["error"]


# ------------------------------------------------------------------------------------------------- memory


def test_the_workspace_leaves_the_guard_free() -> None:
    assert workspace_mb(512, 0, 600) == 512
    assert workspace_mb(512, 200, 600) == 400
    assert workspace_mb(None, 200, 600) == 400
    assert workspace_mb(None, 0, 600) is None
    assert workspace_mb(512, 200, None) == 512
    with pytest.raises(BuildError, match="Only 250 MiB of memory are free, and 200 of them"):
        workspace_mb(512, 200, 250)
    assert tensorrt_builder.available_mb() or sys.platform != "linux"


# ------------------------------------------------------------------------------------------ TensorRT-RTX


def typed_onnx(path: Path, precision: str, operator: str = "Relu") -> Path:
    """Conv → operator → global pool with a dynamic batch, float32 at both ends, inside as asked for."""
    onnx = pytest.importorskip("onnx", reason="the files of these tests are made with onnx")
    make, numpy = onnx.helper.make_node, onnx.numpy_helper.from_array
    kind, half = (onnx.TensorProto.FLOAT16, np.float16) if precision == "fp16" else (onnx.TensorProto.FLOAT, np.float32)
    weight = np.random.default_rng(0).standard_normal((8, 3, 3, 3)).astype(half)
    values: dict[str, Any] = {"w": weight}
    nodes = [make("Cast", ["x"], ["a"], to=kind)]
    if precision == "int8":
        values = {"w8": np.clip(weight * 40, -127, 127).astype(np.int8)}
        values |= {
            "s": np.float32(0.02),
            "z": np.int8(0),
            "sw": np.full(8, 0.025, np.float32),
            "zw": np.zeros(8, np.int8),
        }
        nodes = [
            make("QuantizeLinear", ["x", "s", "z"], ["q"]),
            make("DequantizeLinear", ["q", "s", "z"], ["a"]),
            make("DequantizeLinear", ["w8", "sw", "zw"], ["w"], axis=0),
        ]
    nodes += [make("Conv", ["a", "w"], ["c"], pads=[1, 1, 1, 1]), make(operator, ["c"], ["r"], name="the_operator")]
    nodes += [make("GlobalAveragePool", ["r"], ["g"]), make("Cast", ["g"], ["y"], to=onnx.TensorProto.FLOAT)]
    ends = [
        onnx.helper.make_tensor_value_info(*end)
        for end in (("x", 1, ["batch", 3, 16, 16]), ("y", 1, ["batch", 8, 1, 1]))
    ]
    constants = [numpy(np.asarray(value), name) for name, value in values.items()]
    graph = onnx.helper.make_graph(nodes, "typed", ends[:1], ends[1:], constants)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def rtx() -> None:
    if util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed")


def convert_rtx(source: Path, folder: Path, precision: Precision, **how: Any) -> dict[str, Any]:
    folder.mkdir()
    artifact = registry.convert("tensorrt-rtx", Conversion(source, folder, precision, **how), folder)
    assert (folder / artifact.path).stat().st_size > 1000
    return dict(json.loads((folder / artifact.path).with_suffix(".build.json").read_text()))


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_rtx_builds_what_is_typed_for_it_without_a_gpu(precision: Precision, tmp_path: Path) -> None:
    report = convert_rtx(typed_onnx(tmp_path / "net.onnx", precision), tmp_path / "made", precision)
    assert (report["strongly_typed"], report["flags"], report["warnings"]) == (True, [], [])
    fixed = convert_rtx(tmp_path / "net.onnx", tmp_path / "fixed", precision, batch=4)
    assert fixed["precision"] == precision


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_rtx_refuses_a_float32_file_that_is_called_something_else(precision: Precision, tmp_path: Path) -> None:
    source = typed_onnx(tmp_path / "net.onnx", "fp32")
    with pytest.raises(ConversionError, match=f"{precision} was asked for, but the ONNX file computes in FLOAT only"):
        convert_rtx(source, tmp_path / "made", precision)
    assert list((tmp_path / "made").iterdir()) == []


@pytest.mark.usefixtures("rtx")
def test_rtx_names_the_operator_that_it_cannot_read(tmp_path: Path) -> None:
    source = typed_onnx(tmp_path / "net.onnx", "fp32", "Frobnicate")
    with pytest.raises(ConversionError, match=r"cannot read net\.onnx: .*Frobnicate"):
        convert_rtx(source, tmp_path / "made", "fp32")


@pytest.mark.usefixtures("rtx")
def test_the_builder_runs_alone_and_reports_in_json_lines(tmp_path: Path) -> None:
    source = typed_onnx(tmp_path / "net.onnx", "fp16")
    script = shutil.copy(tensorrt_builder.__file__, tmp_path / "build.py")
    command = [sys.executable, "-I", script, source, tmp_path / "net.engine", "--module", "tensorrt_rtx"]
    done = subprocess.run([*command, "--precision", "fp16"], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[-1]["report"]["precision"] == "fp16"
    steps = [line["progress"] for line in lines[:-1]]
    assert steps
    assert all(0 <= done <= total for done, total, _ in steps)
    assert [done for done, _, _ in steps] == sorted(done for done, _, _ in steps)
    refused = subprocess.run([*command, "--precision", "int8"], capture_output=True, text=True, check=False)
    assert (refused.returncode, "int8 was asked for" in json.loads(refused.stdout)["error"]) == (1, True)


@pytest.mark.usefixtures("rtx")
def test_ctrl_c_ends_a_build_and_leaves_no_engine(tmp_path: Path) -> None:
    code = """
import os, signal, sys, time
from pathlib import Path
import tensorrt_rtx
from thinet_deploy.on_device.tensorrt_builder import Settings, build

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without it

def interrupt(*step):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.2)

build(tensorrt_rtx, Path(sys.argv[1]), Path(sys.argv[2]), Settings(), interrupt)
"""
    source, engine = typed_onnx(tmp_path / "net.onnx", "fp32"), tmp_path / "net.engine"
    done = subprocess.run([sys.executable, "-c", code, source, engine], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGINT, done.stderr
    assert not engine.exists()


@pytest.mark.usefixtures("rtx")
def test_an_unknown_gpu_is_named(tmp_path: Path) -> None:
    import tensorrt_rtx

    settings = Settings(capabilities=("SM90",))
    source = typed_onnx(tmp_path / "net.onnx", "fp32")
    with pytest.raises(BuildError, match=r"knows no SM90, only .*SM120"):
        tensorrt_builder.build(tensorrt_rtx, source, tmp_path / "net.engine", settings, lambda *step: None)
