"""The transfer table: prune here and fine-tune there, the other way round, or from scratch."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from thinet_deploy.bundle import read_manifest
from thinet_deploy.options import Options
from thinet_deploy.pipeline import build
from thinet_deploy.pruning.plan import load_plan
from thinet_deploy.reports.ledger import render_ledger
from thinet_deploy.stages.deployment import Build
from thinet_deploy.stages.job import load_job, moved
from thinet_deploy.stages.tools import Tools
from thinet_deploy.training import logits

Made = Callable[[Callable[[], Any]], tuple[Any, list[str]]]


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other images, of five classes: a bright column instead of a bright row."""
    folder, random = tmp_path_factory.mktemp("there") / "columns", np.random.default_rng(1)
    for split, count in (("train", 10), ("val", 4)):
        for label in range(5):
            place = folder / split / f"column{label}"
            place.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 60, (8, 8)).astype(np.uint8)
                pixels[:, label : label + 2] += 150
                Image.fromarray(pixels).save(place / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def done(there: Path, tiny_options: Callable[..., Options], tmp_path_factory: pytest.TempPathFactory) -> Build:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    out = tmp_path_factory.mktemp("transfer") / "run"
    return build(tiny_options(out, transfer_to=there, epochs=3, finetune_epochs=1, transfer_epochs=2))


def test_the_table_has_the_papers_rows(done: Build, there: Path) -> None:
    rows = {row.name: row for row in done.table.rows}
    assert list(rows) == ["original", "pruned-there", "transferred", "scratch"]
    assert rows["transferred"].label == f"ThiNet-GAP, then fine-tuned to {there.name}"
    assert done.table.images == 20, "of the target's test images"
    counts = {name: row.flops for name, row in rows.items()}
    assert counts["transferred"] == counts["scratch"] < counts["original"]
    assert all(hop.passed for hop in done.hops)


def test_what_ships_tells_the_new_classes_apart(done: Build, there: Path) -> None:
    manifest = read_manifest(done.bundle)
    assert manifest.labels == tuple(sorted(path.name for path in (there / "train").iterdir()))
    assert manifest.outputs[0].shape[1:] == (5,)


def test_all_but_the_last_layer_starts_from_the_source(done: Build) -> None:
    """With no epochs of fine-tuning the weights are those of the source."""
    run = done.run
    source, moved = load_plan(run / "gap" / "plan.json"), load_plan(run / "thin-there" / "plan.json")
    assert source.keep == moved.keep
    assert (source.head and source.head.classes, moved.head and moved.head.classes) == (3, 5)
    names = {name: (run / name / "model.safetensors") for name in ("gap", "thin-there", "dense", "original-there")}
    shapes = {name: {key: each.shape for key, each in load_file(path).items()} for name, path in names.items()}
    for here, away in (("gap", "thin-there"), ("dense", "original-there")):
        differing = {key for key in shapes[here] if shapes[here][key] != shapes[away][key]}
        assert {torch.Size(shapes[away][key])[0] for key in differing} == {5}
        assert len(differing) == 2, "weight and bias of the last layer"


def test_nothing_learnt_nothing_changed(there: Path, tiny_options: Callable[..., Options], tmp_path: Path) -> None:
    options = tiny_options(tmp_path, transfer_to=there, epochs=1, finetune_epochs=0, target="ios", controls="none")
    run = build(options).run
    before, after = (load_file(run / name / "model.safetensors") for name in ("gap", "thin-there"))
    same = [name for name in before if before[name].shape == after[name].shape]
    assert same
    for name in same:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)


def test_the_new_last_layer_says_what_the_teacher_says_before_any_training(
    there: Path, tiny_options: Callable[..., Options], tmp_path: Path
) -> None:
    options = tiny_options(
        tmp_path / "run", "residual", keep=0.7, transfer_to=there, transfer_epochs=0, controls="none"
    )
    found, job = build(options), load_job(options)
    tools = Tools(moved(job, there), lambda *_: None)
    networks = (tools.load(found.run / name) for name in ("original-there", "thin-there"))
    original, transferred = (each - each.mean(0) for each in (logits(net, tools.job.data.train) for net in networks))
    assert (transferred - original).square().sum() < 0.5 * original.square().sum(), "which is what a fresh one misses"
    assert ("ThiNet-Conv (r=0.7), then fine-tuned to columns", "new last layer fitted") in {
        (entry.network, entry.step) for entry in found.table.ledger
    }


def test_the_ledger_says_where_each_was_measured(done: Build, there: Path) -> None:
    networks = [entry.network for entry in done.table.ledger]
    assert any(network.endswith(", data") for network in networks)
    assert {f"Original, fine-tuned to {there.name}", "FT & prune", "Train from scratch"} < set(networks)
    steps = {(entry.network, entry.step) for entry in done.table.ledger}
    assert (f"Original, fine-tuned to {there.name}", "fine-tuned, 2 epochs at 0.01") in steps
    assert ("ThiNet-Conv (r=0.5), data", "fine-tuned, 1 epoch at 0.01, the original as teacher") in steps
    assert ("FT & prune", "fine-tuned, 2 epochs at 0.01, the original as teacher") in steps
    assert ("Train from scratch", "5 epochs") in steps


def test_the_ledger_says_on_how_many_images_where_they_differ(done: Build) -> None:
    console = Console(file=io.StringIO(), width=160)
    console.print(render_ledger(done.table.ledger))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Accuracy, step by step (95 % intervals)" in text
    page = (done.run / "report" / "report.html").read_text()
    assert page.count("<h3>Filters, layer by layer, FT &amp; prune</h3>") == 1
    for network, images in (("Original, data", 15), ("FT &amp; prune", 20)):
        assert f"{network}, on {images} test images" in page
        assert f"{network.replace('&amp;', '&')}, on {images} test images" in text


def test_only_what_depends_on_the_target_is_made_anew(
    done: Build, there: Path, tiny_options: Callable[..., Options], made: Made
) -> None:
    options = tiny_options(done.run, transfer_to=there, epochs=3, finetune_epochs=1, transfer_epochs=2)
    assert made(lambda: build(options))[1] == []


FIXED = """
from torch import nn

def make():
    conv = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3)
    net = nn.Sequential(*conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.input_shape = (1, 8, 8)
    return net
"""


def test_a_network_of_fixed_classes_is_refused(
    cli: Callable[..., Any], tiny: Path, there: Path, tmp_path: Path
) -> None:
    (tmp_path / "net.py").write_text(FIXED)
    model, out = f"{tmp_path / 'net.py'}:make", tmp_path / "run"
    ended = cli("build", "--model", model, "--data", tiny / "data", "--transfer-to", there, "--out", out)
    assert ended.code == 2
    assert "(1, 5) was expected" in ended.err
    assert not out.exists()
