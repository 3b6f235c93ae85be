"""The whole way for a detector and a segmenter on ThiNet-Tiny: trained, pruned further, shipped, in the table."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from voc_shapes import NETWORKS, write_voc

from thinet_deploy.artifact import read_json
from thinet_deploy.bundle import verify_bundle
from thinet_deploy.options import make_options
from thinet_deploy.pipeline import build
from thinet_deploy.reports import table as tables
from thinet_deploy.reports import texts
from thinet_deploy.stages.deployment import Build
from thinet_deploy.stages.job import load_job
from thinet_deploy.training import evaluate

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("torchvision_or_none")]
# Network → the figure that decides, and what it has to reach, in percent; guessing gives the second.
TASKS = {"detector": ("mAP@50", 40.0, 5.0), "segmenter": ("mIoU", 55.0, 30.0)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_voc(folder / "voc", 300, 100)
    (folder / "net.py").write_text(NETWORKS)
    return folder


@pytest.fixture(scope="module", params=TASKS)
def built(
    request: pytest.FixtureRequest, place: Path, quick_module: None, torchvision_or_none: None
) -> tuple[str, Build, list[float]]:
    for package in ("torchmetrics", "pycocotools"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    losses: list[float] = []

    def listen(stage: str, done: int, total: int, note: str = "") -> None:
        if stage.startswith("Training the original") and "loss" in note:
            losses.append(float(note.rpartition(" ")[2]))

    options = make_options(
        {
            "data": place / "voc",
            "model": f"{place / 'net.py'}:{request.param}",
            "out": place / f"run-{request.param}",
            "epochs": 8,
            "lr": 0.002,
            "batch_size": 8,
            "train": {"optimizer": "adamw"},
            "finetune_epochs": 3,
            "finetune_lr": 0.001,
            "controls": "none",
            "keep": 0.7,
            "calibration_images": 100,
            "require": ("accuracy>=20", "size<=10MB"),
        }
    )
    return request.param, build(options, listen), losses


def test_the_network_learns_is_pruned_and_learns_again(built: tuple[str, Build, list[float]]) -> None:
    kind, done, losses = built
    figure, least, chance = TASKS[kind]
    assert losses[-1] < 0.6 * losses[0]
    original, thin = done.table.rows
    for row in (original, thin):
        assert next(iter(row.figures)) == figure
        assert row.main.value > least > 1.5 * chance
        assert row.main.low <= row.main.value <= row.main.high
    assert thin.flops < 0.6 * original.flops, "0.7 of the filters, on both sides of most layers"
    ledger = [entry for entry in done.table.ledger if entry.network != "Original"]
    steps = {entry.step.partition(",")[0]: entry.main.value for entry in ledger}
    assert steps["reconstructed"] > steps["pruned"]
    assert thin.drop is not None
    assert thin.drop.value == pytest.approx(original.main.value - thin.main.value)


def test_every_engine_says_what_the_network_says(built: tuple[str, Build, list[float]]) -> None:
    kind, done, _ = built
    assert all(hop.passed for hop in done.hops)
    hops = {(hop.model, hop.hop) for hop in done.hops}
    for name in ("original", "conv"):
        for hop in ("torch → ONNX", "ONNX → openvino", "ONNX → onnxruntime"):
            assert (name, hop) in hops
    outputs = read_json(done.run / "onnx" / "export.json")["conv"]["outputs"]
    assert [each["name"] for each in outputs] == (["logits", "boxes"] if kind == "detector" else ["logits"])
    assert "NonMaxSuppression" not in read_json(done.run / "onnx" / "export.json")["conv"]["operators"]


def test_it_is_in_the_table_and_in_the_contract(built: tuple[str, Build, list[float]]) -> None:
    kind, done, _ = built
    table = tables.read_table(done.run)
    assert table == done.table
    head = texts.to_markdown([table]).splitlines()[0]
    assert TASKS[kind][0] in head
    assert "top-1" not in head
    assert {runtime for row in table.rows for runtime in row.engines} == {"openvino", "onnxruntime"}
    assert [verdict.outcome for verdict in done.verdicts] == ["met", "met"]
    page = (done.run / "report" / "report.html").read_text()
    assert TASKS[kind][0] in page


def test_the_bundle_tests_itself_and_has_what_an_app_needs(built: tuple[str, Build, list[float]]) -> None:
    kind, done, _ = built
    assert verify_bundle(done.bundle)["exit_code"] == 0
    checked = subprocess.run([sys.executable, done.bundle / "run.py"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    extras = {"detections.py", "default_boxes.npy"}
    assert (extras <= {path.name for path in done.bundle.iterdir()}) == (kind == "detector")


def test_another_run_takes_everything_from_before_and_the_weights_are_whats_in_the_table(
    built: tuple[str, Build, list[float]],
) -> None:
    _, done, _ = built
    from thinet_deploy.pruning.plan import load_plan
    from thinet_deploy.pruning.surgery import load_thin

    options: Any = make_options(read_json(done.run / "options.json"))
    job = load_job(options)
    thin = load_thin(load_plan(done.run / "conv" / "plan.json"), job.fresh(), done.run / "conv" / "model.safetensors")
    assert evaluate(thin, job.data.test).main == pytest.approx(done.table.rows[1].main.value, abs=0.2)
    with torch.inference_mode():
        assert np.isfinite(thin(torch.from_numpy(job.data.test.inputs(np.arange(1))))[0].numpy()).all()
