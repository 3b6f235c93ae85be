"""The whole way on a tiny network of the user's own: what a build makes, keeps, refuses and says."""

import io
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from thinet_deploy import pipeline, registry, verify
from thinet_deploy.artifact import Artifact, read_json
from thinet_deploy.bundle import read_manifest, verify_bundle
from thinet_deploy.errors import GateError
from thinet_deploy.interfaces import Conversion
from thinet_deploy.options import Options
from thinet_deploy.pipeline import build
from thinet_deploy.pruning.plan import load_plan
from thinet_deploy.pruning.proof import Proof
from thinet_deploy.reports import table, texts
from thinet_deploy.reports.hops import render_hops
from thinet_deploy.stages import deploy as deploy_stage
from thinet_deploy.stages import prune as prune_stage
from thinet_deploy.stages import steps
from thinet_deploy.stages.deployment import Build
from thinet_deploy.target import load_profile

pytestmark = pytest.mark.usefixtures("quick_module")
TRAINED = ["dense", "prune", "trial", "longer", "conv", "gap", "scratch"]
DEPLOYED = ["onnx", "engines", "precision", "parity", "latency", "bundle", "accuracy", "report"]
GUESSES = "The original has"  # so many images right as guessing may give, which the tiny ones here may
MakeOptions = Callable[..., Options]
Made = Callable[[Callable[[], Any]], tuple[Any, list[str]]]


@pytest.fixture(scope="module")
def full(tiny_options: MakeOptions, tmp_path_factory: pytest.TempPathFactory) -> Build:
    return build(tiny_options(tmp_path_factory.mktemp("full") / "run", target="cpu"))


@pytest.fixture
def copy(full: Build, tmp_path: Path) -> Path:
    """A copy of the finished run, to go on with."""
    return Path(shutil.copytree(full.run, tmp_path / "copy"))


def rows(done: Build) -> list[str]:
    return [row.label for row in done.table.rows]


# ---------------------------------------------------------------------------------------------- the main job


def test_the_table_has_the_papers_rows(full: Build) -> None:
    assert rows(full) == [
        "Original",
        "Original, 2 epochs more",
        "ThiNet-Conv (r=0.5)",
        "ThiNet-GAP",
        "Train from scratch",
    ]
    original, longer, conv, gap, scratch = full.table.rows
    assert (longer.flops, longer.engines) == (original.flops, original.engines)
    assert original.flops > conv.flops > gap.flops == scratch.flops
    assert original.parameters > conv.parameters > gap.parameters == scratch.parameters
    assert original.size_bytes > conv.size_bytes > gap.size_bytes
    assert "6 epochs" in scratch.note, "2 of the original + 2 more for the teacher + 1 for Conv + 1 for GAP"
    assert read_json(full.run / "scratch" / "report.json")["epochs"] == 6
    for row in full.table.rows:
        assert set(row.engines) == {"openvino", "onnxruntime"}
        assert 0 <= row.figures["top-1"].value <= row.figures["top-5"].value == 100, (
            "with three classes the first five are all"
        )
        for time in row.engines.values():
            assert (time.speedup is None) == (row.name in {"original", "longer"})
    assert table.read_table(full.run) == full.table
    assert full.table.torch_threads == 1, "as measured, which `quick_module` sets; the machine may have more cores"
    assert "1.00×" not in texts.to_markdown([full.table]).split("\n")[2], "the original has no speed-up"


def test_every_hop_has_a_verdict_and_all_pass(full: Build) -> None:
    conversions = ("torch → ONNX", "ONNX → openvino", "ONNX → onnxruntime")
    networks, runtimes = ("original", "conv", "gap"), ("openvino", "onnxruntime")
    assert [(hop.model, hop.hop) for hop in full.hops] == [
        ("conv", "masked → pruned"),
        ("conv", "pruned → fine-tuned"),
        ("gap", "head replaced → fine-tuned"),
        *((name, hop) for name in networks for hop in conversions),
        *((name, f"{runtime} runs fp32") for name in networks for runtime in runtimes),
    ]
    assert all(hop.passed for hop in full.hops)
    assert all(hop.agreement is not None for hop in full.hops[3:12])
    assert {hop.detail for hop in full.hops[12:]} == {"fp32 100.0 % of the MACs"}
    assert {hop.images for hop in full.hops if hop.hop.startswith("ONNX")} == {15}


@pytest.mark.parametrize("width", [80, 160])
def test_table_and_verdicts_fit_the_terminal(width: int, full: Build) -> None:
    console = Console(file=io.StringIO(), width=width)
    console.print(texts.render([full.table], console.width), render_hops(full.hops, full.table))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert text.count("\n model ") in ({2, 3} if width == 80 else {1}), "a third one where a mark makes cells wider"
    figures, runtimes = texts.figures_of([full.table]), texts.runtimes_of([full.table])
    assert [cell for row in full.table.rows for cell in texts.cells(row, figures, runtimes) if cell not in text] == []
    assert text.count("passed error") + text.count("passed 15 images") + text.count("passed fp32") == len(full.hops)
    assert "18 of 18 passed" in text


def test_every_stage_leaves_its_files(full: Build) -> None:
    run = full.run
    assert {p.name for p in run.iterdir() if not p.name.startswith(".")} == {
        *("run.json", "options.json", "logs"),
        *TRAINED,
        *DEPLOYED,
    }
    assert {p.stem for p in (run / ".records").iterdir()} == {*TRAINED, *DEPLOYED}
    widths = load_plan(run / "gap" / "plan.json").widths
    assert widths.keys() <= {"features.0", "features.2"}, "the last convolution stays"
    assert all(after < before for before, after in widths.values())
    assert load_plan(run / "gap" / "plan.json").head is not None
    assert load_plan(run / "conv" / "plan.json").head is None
    assert [p.name for p in sorted((run / "onnx").iterdir())] == [
        "conv.onnx",
        "export.json",
        "gap.onnx",
        "original.onnx",
    ]
    assert read_json(run / "latency" / "latency.json")["engines"][0]["samples"]["rounds_ms"]
    manifest, checked = read_manifest(full.bundle), verify_bundle(full.bundle)
    assert [engine.runtime for engine in manifest.engines] == ["openvino", "onnxruntime"]
    assert [engine["verdict"] for engine in checked["engines"]] == ["passed", "passed"]
    assert manifest.labels == ("class0", "class1", "class2")
    assert manifest.parity["passed"] is True
    assert [note for note in full.notes if not note.startswith(GUESSES)] == []
    check = [sys.executable, str(full.bundle / "app" / "python" / "classify.py"), "check"]
    assert subprocess.run(check, capture_output=True, check=True).stdout.startswith(b"passed")


def test_the_same_command_does_nothing_anew(full: Build, copy: Path, tiny_options: MakeOptions, made: Made) -> None:
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file() and p.parent.name in TRAINED + DEPLOYED}
    again, names = made(lambda: build(tiny_options(copy, target="cpu")))
    assert names == []
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert (again.table, again.hops) == (full.table, full.hops)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"threads": 2}, ["latency", "report"]),
        # Without a head to be replaced more layers may go.
        ({"preset": "thinet-conv"}, ["prune", "trial", "longer", "conv", "scratch", *DEPLOYED]),
        ({"macs": "2.5x"}, ["prune", "trial", "conv", "gap", "scratch", *DEPLOYED]),
        # Neither the original nor the pruning is trained at that rate.
        ({"finetune_lr": 0.02}, ["trial", "longer", "conv", "gap", *DEPLOYED]),
    ],
)
def test_a_changed_option_makes_only_what_depends_on_it(
    change: dict[str, Any], expected: list[str], copy: Path, tiny_options: MakeOptions, made: Made
) -> None:
    done, names = made(lambda: build(tiny_options(copy, target="cpu", **change)))
    assert names == expected
    assert rows(done)[-1] == "Train from scratch"
    assert ("ThiNet-GAP" in rows(done)) == ("preset" not in change)
    if "preset" in change:
        assert "4 epochs" in done.table.rows[-1].note


def test_a_class_that_was_renamed_has_its_new_name_in_the_bundle(
    tiny: Path, tiny_options: MakeOptions, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(tiny / "data", tmp_path / "data"))
    given = {"data": data, "controls": "none", "epochs": 1}
    first = build(tiny_options(tmp_path / "run", **given))
    *others, last = (first.bundle / "labels.txt").read_text().split()
    for folder in list(data.glob(f"*/{last}")):
        folder.rename(folder.with_name(f"{last}-renamed"))
    again = build(tiny_options(tmp_path / "run", **given))
    assert (again.bundle / "labels.txt").read_text().split() == [*others, f"{last}-renamed"]


def test_a_build_that_fails_at_a_gate_leaves_nothing_that_says_it_was_met(
    copy: Path, tiny_options: MakeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tiny_options(copy, target="cpu", require=("size<=4MB",)))
    assert (copy / "contract" / "junit.xml").exists()

    def refuse(*_: object) -> None:
        raise GateError("no budget can be met")

    monkeypatch.setattr("thinet_deploy.stages.networks.prune", refuse)
    with pytest.raises(GateError, match="no budget"):
        build(tiny_options(copy, target="cpu", require=("size<=4MB",)))
    assert [name for name in ("bundle", "report", "contract") if (copy / name).exists()] == []


def test_a_new_bundle_has_no_report_of_the_old_one_beside_it(
    copy: Path, tiny_options: MakeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tiny_options(copy, target="cpu", require=("size<=4MB",)))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("thinet_deploy.stages.deploy.drops", killed)
    with pytest.raises(KeyboardInterrupt):
        build(tiny_options(copy, target="cpu", keep=0.8, require=("size<=4MB",)))
    assert [name for name in ("bundle", "report", "contract") if (copy / name).exists()] == ["bundle"]


def test_the_same_seed_gives_the_same_plan_and_another_seed_other_samples(
    tiny_options: MakeOptions, tmp_path: Path
) -> None:
    runs = (("a", 5), ("b", 5), ("c", 6))
    pruned = [pipeline.prune(tiny_options(tmp_path / run, epochs=1, seed=seed)) for run, seed in runs]
    files = [[(folder / name).read_bytes() for name in ("plan.json", "model.safetensors")] for folder in pruned]
    first, same, other = files
    assert first == same
    assert first[1] != other[1]
    errors = [[layer["error_share"] for layer in read_json(folder / "report.json")["layers"]] for folder in pruned]
    assert errors[0] == errors[1] != errors[2]


# ---------------------------------------------------------------------------------------------- networks and targets


def test_a_residual_network_is_pruned_inside_its_blocks(tiny_options: MakeOptions, tmp_path: Path) -> None:
    done = build(tiny_options(tmp_path / "run", "residual", recipe="iccv2017", keep=0.34))
    assert rows(done) == ["Original", "Original, 3 epochs more", "ThiNet-Conv (r=0.34)", "Train from scratch"]
    assert "5 epochs" in done.table.rows[-1].note
    assert load_plan(done.run / "conv" / "plan.json").widths == {"blocks.0.conv1": (6, 2), "blocks.1.conv1": (6, 2)}
    assert set(read_json(done.run / "prune" / "report.json")["whole"]) == {
        "stem",
        "blocks.0.conv2",
        "blocks.1.conv2",
        "linear",
    }
    assert all(hop.passed for hop in done.hops)
    assert [engine["verdict"] for engine in verify_bundle(done.bundle)["engines"]] == ["passed", "passed"]


APPS = {  # target → what its bundle has for apps, beside README.md, model.properties and golden/
    "jetson": {"cpp", "python"},
    "nvidia-gpu": {"cpp", "python"},
    "raspberry-pi-5": {"cpp", "python"},
    "android": {"cpp", "kotlin"},
    "ios": {"swift"},
}
TARGETS = {  # target → (opset, IR version, engines in the bundle)
    "jetson": (20, 9, ["onnxruntime"]),
    "nvidia-gpu": (20, 9, ["onnxruntime"]),
    "raspberry-pi-5": (20, 9, ["onnxruntime", "openvino"]),
    "android": (20, 9, ["onnxruntime"]),
    "ios": (20, 9, []),
}


@pytest.fixture(scope="module")
def thin_run(tiny_options: MakeOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run for all targets after each other: nothing of one may be taken for another."""
    return build(tiny_options(tmp_path_factory.mktemp("targets") / "run", target="ios")).run


@pytest.mark.parametrize("target", TARGETS)
def test_a_device_gets_a_bundle_and_is_not_said_to_have_been_measured(
    target: str, thin_run: Path, tiny_options: MakeOptions
) -> None:
    done = build(tiny_options(thin_run, target=target))
    opset, ir_version, runtimes = TARGETS[target]
    exported = read_json(done.run / "onnx" / "export.json")
    assert {(e["opset"], e["ir_version"]) for e in exported.values()} == {(opset, ir_version)}
    assert all(row.engines == {} for row in done.table.rows)
    table = texts.to_markdown([done.table])
    assert "not run" in table
    assert all(f"{runtime} (ms)" in table for runtime in load_profile(target).runtimes if runtime != "torch")
    manifest, checked = read_manifest(done.bundle), verify_bundle(done.bundle)
    assert manifest.target == target
    assert [engine.runtime for engine in manifest.engines] == runtimes
    assert [engine["verdict"] for engine in checked["engines"]] == ["passed"] * len(runtimes)
    assert checked["exit_code"] == (0 if runtimes else 3)
    assert list(manifest.notes) == [note for note in done.notes if not note.startswith(GUESSES)]
    assert {path.name for path in (done.bundle / "app").iterdir() if path.is_dir()} == APPS[target] | {"golden"}
    notes = "\n".join(done.notes)
    assert f"Nothing was run on the {target}" in notes
    if target in ("jetson", "nvidia-gpu"):
        assert [engine.path for engine in manifest.engines] == ["model.onnx"], "built there, from this"
        assert f"has to be built on the {target}" in notes
        assert "python3 tensorrt_builder.py model.onnx engines/tensorrt-fp32/model.engine --precision fp32" in notes
    if target == "ios":
        assert "coreml" in notes
        assert "ships model.onnx" in notes


# ---------------------------------------------------------------------------------------------- gates


def redo(run: Path, stage: str) -> None:
    (run / ".records" / f"{stage}.json").unlink()


def test_an_engine_of_another_network_does_not_pass(
    copy: Path, tiny_options: MakeOptions, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any], made: Made
) -> None:
    def mixed_up(runtime: str, job: Conversion, *rest: Any, **others: Any) -> Artifact:
        """The engine for ThiNet-Conv in ONNX Runtime is made from the original."""
        if runtime == "onnxruntime":
            job = replace(job, source=job.source.with_name(job.source.name.replace("conv", "original")))
        return registry.convert(runtime, job, *rest, **others)

    redo(copy, "engines")
    with monkeypatch.context() as patch:
        patch.setattr(deploy_stage, "convert", mixed_up)
        with pytest.raises(GateError, match=r"conv: ONNX → onnxruntime: error .*allowed") as failure:
            build(tiny_options(copy, target="cpu"))
    assert failure.value.exit_code == 1
    assert str(failure.value).count("ONNX →") == 1, "only what failed is named"
    hops = read_json(copy / "parity" / "parity.json")["hops"]
    assert [(h["model"], h["hop"]) for h in hops if not h["passed"]] == [("conv", "ONNX → onnxruntime")]
    assert not (copy / "bundle").exists(), "the bundle of the earlier build must not be taken for this one's"
    assert not (copy / "report").exists()
    assert (copy / "gap" / "model.safetensors").exists(), "results are kept"
    redo(copy, "engines")
    repaired, names = made(lambda: build(tiny_options(copy, target="cpu")))
    assert set(names) >= {"engines", "bundle", "report"}
    assert verify_bundle(repaired.bundle)["exit_code"] == 0


def test_the_tolerance_decides(copy: Path, tiny_options: MakeOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    redo(copy, "parity")
    monkeypatch.setitem(verify.ALLOWANCE, "fp32", 0.0)
    with pytest.raises(GateError, match=r"[1-9] of 18 parity verdicts failed; no bundle was written"):
        build(tiny_options(copy, target="cpu"))
    assert not (copy / "bundle").exists()


@pytest.mark.parametrize("error", [0.25, math.inf, math.nan])
def test_a_plan_whose_proof_fails_is_refused(
    error: float, tiny_options: MakeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof = Proof(False, error, 1e-14, "features.2", "features.0", 3, (1, 3))
    monkeypatch.setattr(prune_stage, "prove", lambda *_, **__: proof)
    for work in (pipeline.prune, build):
        with pytest.raises(GateError, match=rf"masked → pruned: error {error}, allowed 1\.0e-14"):
            work(tiny_options(tmp_path / "run"))
    assert not (tmp_path / "run" / "thin").exists()
    assert not (tmp_path / "run" / "conv").exists()


# ---------------------------------------------------------------------------------------------- the command line


def arguments(asked: Options) -> list[object]:
    numbers = ["--epochs", asked.epochs, "--finetune-epochs", asked.finetune_epochs, "--controls", asked.controls]
    return ["--target", asked.target, "--model", asked.model, "--data", asked.data, "--out", asked.out, *numbers]


def test_one_json_document(full: Build, copy: Path, tiny_options: MakeOptions, cli: Callable[..., Any]) -> None:
    done = cli("build", *arguments(tiny_options(copy, target="cpu")), "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert set(document) == {"run", "bundle", "table", "parity", "notes", "contract"}
    assert document["table"] == json.loads(json.dumps(full.table.to_json()))
    assert [hop["passed"] for hop in document["parity"]] == [True] * 18
    assert Path(document["bundle"]) == copy / "bundle"


def test_an_interrupt_ends_with_130_and_the_next_build_goes_on(
    tiny_options: MakeOptions, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, made: Made
) -> None:
    asked = tiny_options(tmp_path / "run", target="ios")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(steps, "tuned", interrupt)
        stopped = cli("build", *arguments(asked))
    assert stopped.code == 130
    assert "same command again" in " ".join(stopped.err.split())
    assert [p.name for p in asked.out.iterdir() if p.name.startswith(".tmp-")] == []
    names = made(lambda: build(asked))[1]
    assert names[0] == "longer", "what was done before the interrupt is kept"
