"""Every converter on networks with what conversions get wrong: odd widths, groups and shuffles, ceil-mode pools."""

import functools
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from thinet_deploy import registry
from thinet_deploy.bundle import read_manifest, verify_bundle
from thinet_deploy.errors import InputError
from thinet_deploy.export import INPUT, OUTPUT
from thinet_deploy.interfaces import Conversion, Precision
from thinet_deploy.on_device.engines import ENGINES, open_engine
from thinet_deploy.pipeline import build
from thinet_deploy.precision.executed import prove_precision
from thinet_deploy.precision.graph import read_onnx
from thinet_deploy.precision.held import READERS
from thinet_deploy.target import load_profile
from thinet_deploy.verify import compare, rounding_noise, tolerance

EVALUATOR = Path(__file__).with_name("mil_evaluator.py")
SHARED = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "_deployed.py"))
SHAPE: tuple[int, int, int] = SHARED["INPUT_SHAPE"]
NETWORKS: dict[str, nn.Module] = SHARED["networks"]()
ALL = {**NETWORKS, "undelegated": SHARED["undelegated"]()}
HEAVY = ("coreml", "litert", "executorch")
RUNTIMES = [pytest.param(name, marks=pytest.mark.slow if name in HEAVY else ()) for name in registry.CONVERTERS]

INSTALLED = registry.installed  # before conftest.py stands in for it

Engine = tuple[Path, dict[str, Any]]
Make = Callable[..., Engine]
# Every cell of docs/engines.md but those in fp32, which have tests of their own; one network by default.
SHORT = [
    pytest.param(runtime, precision, name, marks=pytest.mark.slow if runtime in HEAVY or name != "resnet-odd" else ())
    for runtime in registry.CONVERTERS
    for precision in ("fp16", "int8")
    for name in NETWORKS
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A network in every form that converters take: see benchmarks/_deployed.py."""

    @functools.cache
    def once(name: str) -> Any:
        return SHARED["Sources"](name, ALL[name], tmp_path_factory.mktemp("source"))

    return once


@pytest.fixture(scope="module")
def make(sources: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The engine of a network, and what its conversion says of delegation."""

    @functools.cache
    def once(runtime: str, name: str, precision: Precision = "fp32") -> Engine:
        for module in registry.converter(runtime).CONTRACT.modules:
            if util.find_spec(module) is None:
                pytest.skip(f"{module} is not installed")
        place = tmp_path_factory.mktemp("made")
        artifact = registry.convert(runtime, sources(name).job(runtime, precision, place), place)
        path = place / artifact.path
        record = path.with_suffix(".delegation.json")
        return path, json.loads(record.read_text()) if record.exists() else {}

    return once


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, *SHAPE)).astype(np.float32)


def expected(name: str, inputs: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        outputs: np.ndarray = NETWORKS[name](torch.from_numpy(inputs)).numpy()
    return outputs


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_engine_agrees_with_torch_within_rounding(runtime: str, name: str, make: Make) -> None:
    path, _ = make(runtime, name)
    if runtime == "tensorrt-rtx":
        pytest.skip("the engine was built; running it needs an RTX GPU, which this machine does not have")
    inputs = images(5)
    if runtime == "coreml":  # the saved program by torch, since Core ML runs on Apple's systems only
        got = runpy.run_path(str(EVALUATOR))["run_mlpackage"](path, inputs)
    else:
        engine = open_engine(runtime, str(path), 1, "fp32")
        got = np.concatenate([engine.run({INPUT: part})[OUTPUT] for part in (inputs[:1], inputs[1:])])
        engine.close()
    allowed = tolerance(rounding_noise(NETWORKS[name], inputs), "fp32")
    passed, error, _ = compare(expected(name, inputs), got, allowed)
    assert passed, f"{runtime} on {name}: error {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize(("runtime", "precision", "name"), SHORT)
def test_fp16_and_int8_are_right_and_in_the_file_or_refused_with_a_reason(
    runtime: str, precision: Precision, name: str, make: Make, sources: Callable[[str], Any], tmp_path: Path
) -> None:
    contract = registry.converter(runtime).CONTRACT
    if precision not in contract.precisions:
        if not INSTALLED(runtime):
            pytest.skip(f"{runtime} is not installed")
        with pytest.raises(InputError, match=f"cannot be asked for {precision}: {contract.without[precision]}"):
            registry.convert(runtime, Conversion(tmp_path, tmp_path, precision), tmp_path)
        return
    path = make(runtime, name, precision)[0]
    found = SHARED["compared"](runtime, path, precision, sources(name))
    if runtime == "tensorrt-rtx":
        assert found == {"verdict": "built"}, "running it needs an RTX GPU"
        return
    assert found.get("as_asked", (runtime, precision) == ("openvino", "fp16")), found
    assert runtime == "coreml" or found["verdict"] == "passed", found
    if (runtime, precision) == ("coreml", "int8"):
        aim, allowed = sources(name).aim(runtime, precision)
        got = runpy.run_path(str(EVALUATOR))["run_mlpackage"](path, sources(name).images)
        passed, error, _ = compare(aim, got, allowed)
        assert passed, f"{runtime} on {name}: error {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_file_in_fp32_does_not_pass_for_another(runtime: str, make: Make, sources: Callable[[str], Any]) -> None:
    if runtime.startswith("tensorrt"):
        pytest.skip("nothing reads its types back here: the inspector takes a GPU")
    path, onnx = make(runtime, "resnet-odd")[0], read_onnx(sources("resnet-odd").onnx)
    for precision in ("fp16", "int8"):
        if runtime in READERS or precision == "int8":
            proof = prove_precision(runtime, path, onnx, precision)
            assert len(proof.wrong) == len(proof.layers) == 10
            assert {each.got for each in proof.wrong} == {"fp32"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NETWORKS, "undelegated"])
@pytest.mark.parametrize("runtime", ["litert", "executorch"])
def test_what_stays_outside_of_xnnpack_is_said(runtime: str, name: str, make: Make) -> None:
    """With a fixed batch it is nothing, not even the ceil-mode pools and the shuffle's transpose in five dimensions."""
    _, record = make(runtime, name)
    assert (record["delegate"], record["all"]) == ("XNNPACK", name != "undelegated")
    if runtime == "executorch":
        assert sum(record["left"].values()) < record["operators"]
        assert any("cumsum" in kind for kind in record["left"]) == (name == "undelegated")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["raspberry-pi-5", "android", "ios"])
def test_a_build_makes_every_engine_whose_toolchain_is_here(
    target: str, tiny_options: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "installed", INSTALLED)
    runtimes = registry.host_runtimes(load_profile(target))
    done = build(tiny_options(tmp_path / "run", target=target, epochs=1, finetune_epochs=0, controls="none"))
    assert [engine.runtime for engine in read_manifest(done.bundle).engines] == runtimes
    assert {hop.hop for hop in done.hops if hop.hop.startswith("ONNX")} == {
        f"ONNX → {r}" for r in runtimes if r in ENGINES
    }
    report = verify_bundle(done.bundle)
    for engine in report["engines"]:
        assert engine["verdict"] == ("passed" if engine["runtime"] in ENGINES else "not run"), engine
    notes = "\n".join(done.notes)
    for runtime in ("ncnn", "litert", "executorch", "coreml"):
        absent = runtime in load_profile(target).runtimes and runtime not in runtimes
        assert (f'"thinet-deploy[{runtime}]"' in notes) == absent
    assert ("coreml engine was made, but" in notes) == ("coreml" in runtimes)
    assert {path.name for path in (done.run / "logs").iterdir()} >= {f"original-{runtime}.log" for runtime in runtimes}


def test_ncnn_computes_in_fp16_only_when_asked_to(make: Make) -> None:
    """Left alone, it does wherever the CPU can."""
    path, _ = make("ncnn", "vgg-gap")
    inputs = images(3)
    error = {}
    for precision in ("fp32", "fp16", "bf16"):
        engine = open_engine("ncnn", str(path), 1, precision)
        error[precision] = compare(expected("vgg-gap", inputs), engine.run({INPUT: inputs})[OUTPUT], 1.0)[1]
    assert error["fp32"] < 1e-6 < error["fp16"] < error["bf16"] < 0.1


def test_threads_of_ncnn_do_not_spin() -> None:
    """OpenMP reads the variable when it is loaded; what it then goes by, it displays."""
    pytest.importorskip("ncnn", reason="ncnn is not installed")
    code = "from thinet_deploy.on_device.engines import import_runtime; import_runtime('ncnn')"
    policy = {}
    for own in ({}, {"OMP_WAIT_POLICY": "active"}):
        environment = {**os.environ, "OMP_DISPLAY_ENV": "true", **own}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        policy[len(own)] = [line.split("'")[1] for line in done.stderr.splitlines() if "OMP_WAIT_POLICY" in line]
    assert policy == {0: ["PASSIVE"], 1: ["ACTIVE"]}, "the user's own choice is left alone"
