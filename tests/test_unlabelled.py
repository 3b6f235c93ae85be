"""Images without labels: calibrated on, learnt from with the original as teacher, judged by agreement with it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from thinet_deploy.data.dataset import UNLABELLED, load_folder
from thinet_deploy.data.image_files import copies
from thinet_deploy.data.preprocess import default_preprocess
from thinet_deploy.errors import InputError
from thinet_deploy.models.loading import build_model
from thinet_deploy.options import Options, make_options, read_config
from thinet_deploy.pruning.budget import Wish, uniform
from thinet_deploy.pruning.calibration import Sample
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.layerwise import prunable
from thinet_deploy.pruning.oneshot import Method, prune_once
from thinet_deploy.pruning.trace import example_inputs
from thinet_deploy.stages.job import load_job
from thinet_deploy.stages.tools import Tools, labelled_by
from thinet_deploy.training import evaluate

Cli = Callable[..., Any]
SHAPE = (3, 16, 16)


@pytest.fixture
def place(workplace: Path) -> Path:
    """As `workplace`, with photos/ instead of data/train, and trained weights."""
    from thinet_deploy.models.weights import save_weights

    model = build_model("net.py:tiny", input_shape=None, num_classes=2, seed=0)
    save_weights(model, workplace / "net.safetensors")
    shutil.move(workplace / "data" / "train", workplace / "photos")
    return workplace


def arguments(**changes: str) -> list[str]:
    usual = {
        "recipe": "best",
        "target": "raspberry-pi-5",
        "data": "data",
        "unlabelled": "photos",
        "model": "net.py:tiny",
        "weights": "net.safetensors",
        "finetune-epochs": "1",
        "out": "run",
    }
    return [part for name, value in {**usual, **changes}.items() if value for part in (f"--{name}", value)]


@pytest.mark.usefixtures("quick")
def test_the_whole_way_without_a_label(cli: Cli, place: Path) -> None:
    done = cli("build", *arguments(), "--json")
    assert done.code == 0, done.err
    built = json.loads(done.out)
    assert [row["name"] for row in built["table"]["rows"]] == ["original", "longer", "conv", "gap"]
    last = {entry["network"]: entry["step"] for entry in built["table"]["ledger"]}
    del last["Original"]
    assert all(step.endswith(", the original as teacher") for step in last.values()), "nothing else says anything"
    assert "Reading unlabelled images: done" in done.err
    assert not any("Test images" in note for note in built["notes"])
    again = cli("build", *arguments(), "--json")
    assert json.loads(again.out) == built
    shutil.copyfile(place / "photos" / "dark" / "1.png", place / "photos" / "another.png")
    assert "Fine-tuning ThiNet-Conv (r=0.5): done" in cli("build", *arguments()).err, "other images, another training"


def test_prune_and_feasibility(cli: Cli, place: Path) -> None:
    given = arguments(**{"finetune-epochs": ""})
    done = cli("prune", *given, "--json")
    assert done.code == 0, done.err
    assert [note for note in json.loads(done.out)["notes"] if "guessing" not in note] == []
    shown = cli("prune", *given, "--feasibility")
    assert (shown.code, "predicted error" in shown.out) == (0, True), shown.err


def test_test_images_among_them_are_named(cli: Cli, place: Path) -> None:
    (place / "photos" / "deep" / "er").mkdir(parents=True)
    shutil.copyfile(place / "data" / "val" / "dark" / "1.png", place / "photos" / "deep" / "er" / "x.png")
    given = arguments(**{"finetune-epochs": ""})
    done = cli("prune", *given)
    assert done.code == 0, done.err
    assert "1 of 13 in photos (such as photos/deep/er/x.png, the same as data/val/dark/1.png)" in done.out


@pytest.mark.parametrize(
    ("changes", "needs"),
    [
        ({"weights": ""}, "--weights"),
        ({"data": ""}, "--data"),
        ({"recipe": "iccv2017"}, "--recipe best: iccv2017 trains on labels"),
        ({"method": "taylor"}, "another --method: taylor"),
        ({"controls": "all"}, "--controls unpruned or none: labels are what"),
        ({"method": "elimination,taylor"}, "another --method: taylor"),
    ],
)
def test_what_takes_labels_is_refused_before_any_work(
    changes: dict[str, str], needs: str, cli: Cli, place: Path
) -> None:
    done = cli("build", *arguments(**changes))
    assert done.code == 2
    assert f"--unlabelled needs {needs}" in done.err
    assert not (place / "run").exists()


@pytest.mark.parametrize(
    ("folder", "said"), [("nowhere", "There is no folder nowhere"), ("empty", "The folder empty has no images")]
)
def test_a_folder_without_images(folder: str, said: str, cli: Cli, place: Path) -> None:
    (place / "empty").mkdir()
    done = cli("prune", *arguments(unlabelled=folder, **{"finetune-epochs": ""}))
    assert done.code == 2
    assert said in done.err


def test_data_then_needs_images_to_test_on_and_no_others(place: Path) -> None:
    preprocess = default_preprocess(SHAPE)
    whole = load_folder(place / "data", preprocess, unlabelled=place / "photos")
    assert (len(whole.train), whole.train.labelled, len(whole.test), whole.test.labelled) == (12, False, 6, True)
    shutil.rmtree(place / "data" / "val")
    (place / "data" / "train").mkdir()
    with pytest.raises(InputError, match=r"needs the folder val/ \(or test/\), but has train"):
        load_folder(place / "data", preprocess, unlabelled=place / "photos")


def test_the_identity_changes_with_the_images(place: Path) -> None:
    options = make_options(
        {"recipe": "best", "model": "net.py:tiny", "data": "data", "unlabelled": "photos", "weights": "net.safetensors"}
    )
    first = load_job(options).identity
    assert load_job(options, checked=False).identity == first
    (place / "photos" / "light" / "0.jpg").unlink()
    assert load_job(options).identity != first


def test_a_config_file_names_folders_beside_it(place: Path) -> None:
    (place / "deep").mkdir()
    (place / "deep" / "c.toml").write_text('unlabelled = "../photos"\n')
    assert Path(read_config(Path("deep/c.toml"))["unlabelled"]) == Path("deep/../photos")


def test_elimination_does_not_look_at_labels(place: Path) -> None:
    model = build_model("net.py:tiny", input_shape=None, num_classes=2, seed=0).eval()
    graph = channel_graph(model, example_inputs(model, SHAPE))
    groups = prunable(graph)
    with_labels = load_folder(place / "data", default_preprocess(SHAPE), unlabelled=place / "photos").train
    with_labels = replace(with_labels, labels=np.arange(12) % 2)
    kept = []
    for images in (with_labels, replace(with_labels, labels=np.full(12, UNLABELLED))):
        sample = Sample(images, np.arange(12), 4, 0)
        kept.append(
            prune_once(model, graph, groups, lambda _: uniform(groups, 0.5, Wish()), sample, SHAPE, Method()).kept
        )
    assert np.array_equal(kept[0], kept[1])
    assert not kept[0].all()


def test_without_labels_the_original_is_right(place: Path) -> None:
    model = build_model("net.py:tiny", input_shape=None, num_classes=2, seed=0).eval()
    data = load_folder(place / "data", default_preprocess(SHAPE), unlabelled=place / "photos")
    judged = labelled_by(model, data.train)
    assert judged.labelled
    assert evaluate(model, judged).main == 100
    with torch.no_grad():
        for parameter in model.classifier[2].parameters():  # type: ignore[index, union-attr]
            parameter.neg_()
    assert evaluate(model, judged).main == 0
    assert labelled_by(model, data.test) is data.test
    job = load_job(
        Options(
            recipe="best",
            model="net.py:tiny",
            data=Path("data"),
            unlabelled=Path("photos"),
            weights=Path("net.safetensors"),
        )
    )
    assert Tools(job, lambda *_: None).job.data.train.labels.tolist() == [UNLABELLED] * 12


def test_copies_are_found_by_their_bytes_wherever_they_are(tmp_path: Path) -> None:
    names = {"a": b"one", "b": b"two", "c": b"three", "d": b"one", "e": b"six"}
    for name, content in names.items():
        (tmp_path / name).write_bytes(content)
    files = {name: (tmp_path / name, 0) for name in names}
    found = copies([files["d"], files["e"], files["c"]], [files["a"], files["b"]])
    assert found == [(tmp_path / "d", tmp_path / "a")]
