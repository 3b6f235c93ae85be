"""`build --precision`: engines, typed files for devices, proof and gates, on a tiny network of the user's own."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from thinet_deploy import registry
from thinet_deploy.artifact import Artifact, read_json
from thinet_deploy.bundle import read_manifest, verify_bundle
from thinet_deploy.errors import GateError, MissingError, TargetError
from thinet_deploy.interfaces import Conversion, Precision
from thinet_deploy.options import Options
from thinet_deploy.pipeline import build, build_from, prune
from thinet_deploy.precision import plan
from thinet_deploy.precision.accuracy_gate import outputs
from thinet_deploy.precision.graph import opset_of, read_onnx
from thinet_deploy.stages import deploy as deploy_stage
from thinet_deploy.stages import precision as precision_stage
from thinet_deploy.stages.deployment import Build
from thinet_deploy.target import load_profile
from thinet_deploy.verify import distance

pytestmark = pytest.mark.usefixtures("quick_module")
MakeOptions = Callable[..., Options]
NETWORKS = ("original", "conv", "gap")
INSTALLED = registry.installed  # before conftest.py stands in for it
# A JetPack whose TensorRT reads opset 17 and has no strongly typed networks.
OLD_JETSON = """
extends = "jetson"
id = "old-jetson"
stacks = [{ name = "jetpack-6.0", tensorrt = "8.6.2", opset_max = 17, ir_max = 8, strong_typing = "none" }]
[[sources]]
facts = ["stacks"]
source = "as jetson has it"
as_of = 2026-11-21
confidence = "check"
"""


@pytest.fixture(scope="module")
def full(tiny_options: MakeOptions, tmp_path_factory: pytest.TempPathFactory) -> Build:
    # Drops on a handful of held-out images are no better than noise: these tests are about other things.
    return build(
        tiny_options(
            tmp_path_factory.mktemp("int8") / "run", target="cpu", precision="int8", max_drop=100, controls="none"
        )
    )


@pytest.fixture
def copy(full: Build, tmp_path: Path) -> Path:
    return Path(shutil.copytree(full.run, tmp_path / "copy"))


def again(tiny_options: MakeOptions, out: Path, **changes: Any) -> Options:
    asked = {"target": "cpu", "precision": "int8", "controls": "none", **changes}
    return tiny_options(out, **asked, **({"max_drop": 100} if asked["precision"] in ("int8", None) else {}))


# ---------------------------------------------------------------------------------------------- on this machine


def test_what_top1_lost_counts_the_int8_too(full: Build) -> None:
    before = next(entry for entry in full.table.ledger if (entry.network, entry.step) == ("Original", "trained here"))
    for row in full.table.rows:
        if row.name != "original":
            assert row.drop is not None
            assert row.drop.value == pytest.approx(before.main.value - row.main.value)


def test_engines_are_int8_and_it_is_proved(full: Build) -> None:
    proofs = read_json(full.run / "precision" / "precision.json")
    assert set(proofs) == {f"{name}/{runtime}" for name in NETWORKS for runtime in ("openvino", "onnxruntime")}
    for proof in proofs.values():
        assert proof["shares"] == {"int8": 100.0}
        assert {layer["asked"] for layer in proof["layers"]} == {"int8"}
    hops = [(hop.model, hop.hop) for hop in full.hops]
    for name in NETWORKS:
        kinds = ("FP32 → int8 ONNX", "ONNX → openvino", "ONNX → onnxruntime", "openvino runs int8")
        assert {(name, kind) for kind in kinds} <= set(hops)
    assert all(hop.passed for hop in full.hops)


def test_the_report_says_what_was_measured_in_which_type(full: Build) -> None:
    assert full.table.precision == "int8"
    typed = read_json(full.run / "typed" / "typed.json")
    for row in full.table.rows:
        how = typed[row.name]["int8"]
        assert row.main.value == how["accuracy"]["figures"]["top-1"]["value"], "of the network that the times are of"
        assert row.size_bytes == (full.run / "typed" / "int8" / f"{row.name}.onnx").stat().st_size
        assert (how["layout"], how["method"] in ("min-max", "percentile", "entropy")) == (plan_layout(), True)
        assert how["weights"]["int8"] > how["weights"].get("float", 0) / 4
        assert how["calibration_images"] == 33, "36 training images, of which one in ten per class is held out"
    steps = [(entry.network, entry.step) for entry in full.table.ledger]
    assert steps[-1] == ("ThiNet-GAP", "in int8, as ONNX")


def plan_layout() -> str:
    from thinet_deploy.environment import fingerprint

    return plan.plan_precision(load_profile("cpu"), "int8", fingerprint()["cpu"]["flags"]).layout.name


def test_the_bundle_checks_itself_in_int8(full: Build) -> None:
    manifest, checked = read_manifest(full.bundle), verify_bundle(full.bundle)
    assert [(engine.runtime, engine.precision) for engine in manifest.engines] == [
        ("openvino", "int8"),
        ("onnxruntime", "int8"),
    ]
    assert checked["exit_code"] == 0
    assert manifest.typed == (), "model.onnx is the INT8 file"
    assert {each.data_type for each in onnx.load(full.bundle / "model.onnx").graph.initializer} >= {TensorProto.INT8}


def test_an_engine_in_fp32_does_not_pass_for_int8(
    copy: Path, tiny_options: MakeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def widened(runtime: str, job: Conversion, *rest: Any, **others: Any) -> Artifact:
        if runtime == "onnxruntime":
            job = replace(job, source=copy / "onnx" / job.source.name)
        return registry.convert(runtime, job, *rest, **others)

    (copy / ".records" / "engines.json").unlink()
    monkeypatch.setattr(deploy_stage, "convert", widened)
    with pytest.raises(GateError) as failure:
        build(again(tiny_options, copy))
    assert failure.value.exit_code == 1
    lines = [line for line in str(failure.value).splitlines() if "gap: onnxruntime runs int8" in line]
    assert len(lines) == 1
    assert "fp32 100.0 % of the MACs; features.0 was to be int8 and is fp32; features.2 was to be" in lines[0]
    assert not (copy / "bundle").exists()
    assert (copy / "precision" / "precision.json").exists(), "what was found is kept"


def test_another_precision_makes_the_engines_anew_and_fp32_is_proved_too(copy: Path, tiny_options: MakeOptions) -> None:
    done = build(again(tiny_options, copy, precision=None))
    assert done.table.precision == "fp32"
    assert {json.dumps(each["shares"]) for each in read_json(copy / "precision" / "precision.json").values()} == {
        '{"fp32": 100.0}'
    }
    assert [engine.precision for engine in read_manifest(done.bundle).engines] == ["fp32", "fp32"]


def test_bf16_has_one_engine_and_a_note(copy: Path, tiny_options: MakeOptions) -> None:
    from thinet_deploy.environment import cpu_precisions, fingerprint

    if "bf16" not in cpu_precisions(fingerprint()["cpu"]["flags"]):
        pytest.skip("this CPU has neither AVX512_BF16 nor AMX, so bf16 is refused on it")
    done = build(again(tiny_options, copy, precision="bf16"))
    assert [(e.runtime, e.precision) for e in read_manifest(done.bundle).engines] == [("openvino", "bf16")]
    assert "No engine for onnxruntime: it does not compute in bf16 on a CPU." in done.notes
    assert verify_bundle(done.bundle)["exit_code"] == 0


def test_int8_after_the_users_own_training(tiny_options: MakeOptions, tmp_path: Path) -> None:
    folder = prune(again(tiny_options, tmp_path / "run", precision=None))
    done = build_from(tmp_path / "run", folder / "model.safetensors", precision="int8")
    assert {engine.precision for engine in read_manifest(done.bundle).engines} == {"int8"}
    assert [hop.passed for hop in done.hops if hop.hop.endswith("runs int8")] == [True] * 4
    with pytest.raises(TargetError, match="cannot compute in fp16"):
        build_from(tmp_path / "run", folder / "model.safetensors", precision="fp16")


# ---------------------------------------------------------------------------------------------- for a device


@pytest.mark.parametrize("old", [False, True], ids=["jetpack-6.2", "jetpack-6.0"])
def test_a_jetson_gets_its_typed_files(
    old: bool, full: Build, copy: Path, tiny_options: MakeOptions, tmp_path: Path
) -> None:
    profile = tmp_path / "old-jetson.toml"
    profile.write_text(OLD_JETSON)
    done = build(again(tiny_options, copy, target=str(profile) if old else "jetson", precision=None))
    manifest = read_manifest(done.bundle)
    assert [(each.precision, each.path, each.layout) for each in manifest.typed] == [
        ("fp16", "typed/model-fp16.onnx", ""),
        ("int8", "typed/model-int8.onnx", "S8S8"),
    ]
    golden = np.load(done.bundle / "golden.npz")
    exact = golden["output:logits"]
    for each in manifest.typed:
        file = read_onnx(done.bundle / each.path)
        assert opset_of(file) == opset_of(read_onnx(done.bundle / "model.onnx")) == (17 if old else 20)
        assert file.ir_version <= (8 if old else 9)
        assert 0 < distance(exact, outputs(file, golden["input:input"])) <= each.tolerance
        assert each.path in manifest.files, "its checksum is kept"
    kinds = {each.data_type for each in onnx.load(done.bundle / "typed" / "model-int8.onnx").graph.initializer}
    assert TensorProto.INT8 in kinds
    assert not {TensorProto.UINT8, TensorProto.INT32} & kinds, "TensorRT's parser takes neither"
    assert [(engine.runtime, engine.precision) for engine in manifest.engines] == [("onnxruntime", "fp32")]
    assert verify_bundle(done.bundle)["exit_code"] == 0
    notes = "\n".join(done.notes)
    assert "tensorrt_builder.py typed/model-int8.onnx engines/tensorrt-int8/model.engine --precision int8" in notes
    assert {("gap", "FP32 → fp16 ONNX"), ("gap", "FP32 → int8 ONNX")} <= {(hop.model, hop.hop) for hop in done.hops}


def test_a_thor_gets_a_bf16_file_and_how_to_build_from_it(copy: Path, tiny_options: MakeOptions) -> None:
    done = build(again(tiny_options, copy, target="jetson-thor", precision="bf16"))
    (typed,) = read_manifest(done.bundle).typed
    assert (typed.precision, typed.path) == ("bf16", "typed/model-bf16.onnx")
    golden, file = np.load(done.bundle / "golden.npz"), read_onnx(done.bundle / typed.path)
    assert (opset_of(file), opset_of(read_onnx(done.bundle / "model.onnx"))) == (22, 20)
    assert {each.data_type for each in file.graph.initializer} <= {TensorProto.BFLOAT16, TensorProto.INT64}
    assert 0 < distance(golden["output:logits"], outputs(file, golden["input:input"])) <= typed.tolerance
    assert "typed/model-bf16.onnx engines/tensorrt-bf16/model.engine --precision bf16" in "\n".join(done.notes)
    assert ("gap", "FP32 → bf16 ONNX") in {(hop.model, hop.hop) for hop in done.hops if hop.passed}
    assert verify_bundle(done.bundle)["exit_code"] == 0


def test_what_a_device_builds_is_judged_by_the_file_that_it_is_built_from(
    copy: Path, tiny_options: MakeOptions
) -> None:
    asked = {"precision": "int8", "require": ("top1>=1", "top1-drop<=99", "size<=1MB")}
    done = build(again(tiny_options, copy, target="jetson", **asked))
    typed = read_json(copy / "typed" / precision_stage.TYPED)["gap"]["int8"]
    assert (done.table.precision, done.table.ships) == ("int8", "gap")
    assert done.table.shipped.main.value == typed["accuracy"]["figures"]["top-1"]["value"]
    assert done.table.shipped.size_bytes == (copy / "typed" / typed["path"]).stat().st_size
    assert all(" in int8" in verdict.detail for verdict in done.verdicts)


def test_a_dla_gets_what_it_computes_in(copy: Path, tiny_options: MakeOptions) -> None:
    done = build(again(tiny_options, copy, target="jetson-agx-orin", precision=None, dla=1))
    assert [each.precision for each in read_manifest(done.bundle).typed] == ["fp16"]
    notes = "\n".join(done.notes)
    assert "typed/model-fp16.onnx engines/tensorrt-fp16/model.engine --precision fp16" in notes
    assert "--dla-core 1 --batch 1 1 1" in notes


@pytest.mark.parametrize(
    ("target", "precision", "words"),
    [
        ("jetson-orin-nano", "int8", "DLA 0 was asked for on jetson-orin-nano: it has none"),
        ("jetson-agx-orin", "int8", "with jetpack-6.2 it takes ONNX files in fp16 only, not in int8"),
        ("jetson-agx-orin@jetpack-7.2", None, "jetpack-7.2 cannot drive one"),
        ("cpu", None, "DLA 0 was asked for on cpu: its profile knows of none"),
    ],
)
def test_a_dla_that_cannot_be_is_refused_before_any_work(
    target: str, precision: Precision | None, words: str, tiny_options: MakeOptions, tmp_path: Path
) -> None:
    with pytest.raises(TargetError, match=words):
        build(tiny_options(tmp_path / "run", target=target, precision=precision, dla=0))
    assert not (tmp_path / "run").exists()


def test_only_what_is_asked_for_goes_to_the_device(copy: Path, tiny_options: MakeOptions) -> None:
    done = build(again(tiny_options, copy, target="raspberry-pi-5", precision="int8"))
    manifest = read_manifest(done.bundle)
    assert [(each.runtime, each.precision) for each in manifest.engines] == [
        ("onnxruntime", "int8"),
        ("openvino", "int8"),
    ]
    assert manifest.typed == (), "model.onnx is the INT8 file"
    assert verify_bundle(done.bundle)["exit_code"] == 0


def test_fp16_for_a_board_is_refused_where_nothing_makes_it_here(copy: Path, tiny_options: MakeOptions) -> None:
    with pytest.raises(
        MissingError, match="no fp16 engine for raspberry-pi-5: what makes one for ncnn or litert"
    ) as why:
        build(again(tiny_options, copy, target="raspberry-pi-5", precision="fp16"))
    assert why.value.hint == 'Install it: pip install "thinet-deploy[ncnn]".'


def test_ncnn_in_fp16_is_made_checked_and_read_back(
    copy: Path, tiny_options: MakeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ncnn", reason="ncnn is not installed")
    pytest.importorskip("pnnx", reason="pnnx is not installed")
    monkeypatch.setattr(registry, "installed", lambda runtime: runtime == "ncnn")
    done = build(again(tiny_options, copy, target="raspberry-pi-5", precision="fp16"))
    assert [(each.runtime, each.precision) for each in read_manifest(done.bundle).engines] == [("ncnn", "fp16")]
    proofs = [hop for hop in done.hops if hop.hop == "ncnn holds fp16"]
    assert [(hop.model, hop.passed, hop.detail) for hop in proofs] == [
        (name, True, "fp16 100.0 % of the MACs") for name in NETWORKS
    ]
    assert "No fp16 engine for onnxruntime: on a CPU it turns fp16 back to fp32." in done.notes
    assert verify_bundle(done.bundle)["exit_code"] == 0


def test_engines_for_a_phone_are_int8_for_every_network_that_the_table_says_so_of(
    copy: Path, tiny_options: MakeOptions
) -> None:
    done = build(again(tiny_options, copy, target="android", precision="int8"))
    assert set(read_json(copy / "typed" / "typed.json")) == set(NETWORKS)
    for name in NETWORKS:
        engine = next((copy / "engines" / "onnxruntime" / name).glob("*.onnx"))
        assert any(node.op_type.startswith(("QLinear", "QGemm", "Quantize")) for node in onnx.load(engine).graph.node)
    assert not (done.bundle / "typed").exists()
    assert "typed/" not in " ".join(done.notes), "model.onnx is the INT8 file itself"
    assert verify_bundle(done.bundle)["exit_code"] == 0


@pytest.mark.slow
def test_litert_and_executorch_are_quantised_with_the_calibration_images(
    copy: Path, tiny_options: MakeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tuple(each for each in ("litert", "executorch") if INSTALLED(each))
    if not here:
        pytest.skip("neither LiteRT's nor ExecuTorch's toolchain is installed")
    monkeypatch.setattr(registry, "installed", lambda runtime: runtime in here)
    done = build(again(tiny_options, copy, target="android", precision="int8"))
    made = [each.runtime for each in read_manifest(done.bundle).engines]
    assert made == [each for each in ("litert", "onnxruntime", "executorch") if each in (*here, "onnxruntime")]
    assert {hop.hop for hop in done.hops if hop.passed} >= {f"{each} holds int8" for each in here}
    judged = [hop for hop in done.hops if hop.hop in {f"ONNX → {each}" for each in here}]
    assert len(judged) == len(NETWORKS) * len(here)
    assert all("by the runtime's own tools; top-1 on" in hop.detail for hop in judged)
    assert len(np.load(copy / "typed" / "calibration.npy")) == 33
    assert verify_bundle(done.bundle)["exit_code"] == 0


@pytest.mark.slow
def test_core_ml_is_quantised_with_the_calibration_images(
    copy: Path, tiny_options: MakeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("coremltools", reason="coremltools is not installed")
    monkeypatch.setattr(registry, "installed", INSTALLED)
    done = build(again(tiny_options, copy, target="ios", precision="int8"))
    assert [(each.runtime, each.precision) for each in read_manifest(done.bundle).engines] == [("coreml", "int8")]
    proofs = [hop for hop in done.hops if hop.hop == "coreml holds int8"]
    assert [(hop.model, hop.detail) for hop in proofs] == [(name, "int8 100.0 % of the MACs") for name in NETWORKS]
    assert any(note.startswith("coreml: quantised by the runtime's own tools") for note in done.notes)
    assert verify_bundle(done.bundle)["exit_code"] == 3, "nothing here runs it"


def test_int8_that_costs_too_much_is_told_where_nobody_asked_and_stops_where_someone_did(
    copy: Path, tiny_options: MakeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise GateError("INT8 costs more than --max-drop 1 allows: …")

    monkeypatch.setattr(precision_stage, "quantise_within", never)
    done = build(again(tiny_options, copy, target="jetson", precision=None))
    assert [each.precision for each in read_manifest(done.bundle).typed] == ["fp16"]
    assert "ThiNet-GAP: no int8 file. INT8 costs more than --max-drop 1 allows: …" in done.notes
    with pytest.raises(GateError, match="costs more"):
        build(again(tiny_options, copy, target="jetson", precision="int8"))
    assert not (copy / "bundle").exists(), "the one without int8 must not be taken for what was asked for"
    assert (copy / "gap" / "model.safetensors").exists(), "results are kept"
