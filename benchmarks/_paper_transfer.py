"""The transfer table: a VGG trained on CIFAR-10, pruned there and fine-tuned to other images, and the other ways.

The targets are ten classes of photos (photos10) and the built-in handwritten digits, both at 32×32 in colour: a command
each, `thinet-deploy build --transfer-to`. Beside them, as in the papers, small networks that were not pruned: AlexNet,
trained on CIFAR-10 at 67×67, and SqueezeNet v1.1 with its ImageNet weights at 227×227 (the ten classes of the photos
are among the thousand that it knows), fine-tuned to the same images for as many epochs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _judge import judged, percent
from _ours import TUNING
from _papers import TRANSFER
from _record import keep, kept
from _trained import (
    ALEXNET_PREPROCESS,
    SQUEEZENET_PREPROCESS,
    alexnet,
    cifar10,
    few,
    squeezenet1_1,
    trained_alexnet,
    trained_squeezenet1_1,
    trained_vgg,
    unpacked,
    vgg_weights,
)
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn

from thinet_deploy import pipeline
from thinet_deploy.data.dataset import digits_preprocess, load_digits, load_folder
from thinet_deploy.data.preprocess import Preprocess
from thinet_deploy.environment import cache_folder
from thinet_deploy.options import make_options
from thinet_deploy.reports import texts
from thinet_deploy.reports.ledger import render_ledger
from thinet_deploy.stages.deployment import Build
from thinet_deploy.training import train

NAME = "paper_tables-transfer"
EPOCHS = 20  # on the target
# Name → trained on the source (in a quick run hardly), fresh for so many classes, preprocessing, last layer.
SMALL: dict[str, tuple[Callable[[bool], nn.Module], Callable[[int], nn.Module], Preprocess, str]] = {
    "AlexNet": (lambda quick: trained_alexnet(quick=quick), alexnet, ALEXNET_PREPROCESS, "classifier.6"),
    "SqueezeNet": (lambda _: trained_squeezenet1_1(), squeezenet1_1, SQUEEZENET_PREPROCESS, "classifier.1"),
}


def transfers(*, quick: bool) -> None:
    """Both targets; what is there is not made again."""
    trained_vgg(norm=True)
    console, rows = Console(width=160), kept(NAME, quick=quick)
    for target in (unpacked("photos10"), digits()):
        row = rows.setdefault(target.name, {"small": {}})
        if "table" not in row:
            found = strategies(target, quick=quick)
            row |= {"table": found.table.to_json(), "parity": [vars(hop) for hop in found.hops]}
            keep(NAME, {"epochs": EPOCHS, "rows": rows}, quick=quick)
            console.print(texts.render([found.table], console.width), render_ledger(found.table.ledger))
        for network in [name for name in SMALL if name not in row["small"]]:
            row["small"][network] = small_network(network, target, quick=quick)
            keep(NAME, {"epochs": EPOCHS, "rows": rows}, quick=quick)
        console.print(table(target.name, row["small"]))


def strategies(target: Path, *, quick: bool) -> Build:
    """Prune and fine-tune, fine-tune and prune, from scratch, and the original."""
    with tempfile.TemporaryDirectory() as folder:
        asked = {
            "model": f"{Path(__file__).with_name('_trained.py')}:vgg_bn",
            "weights": vgg_weights(norm=True),
            "data": cache_folder() / cifar10().name,
            "transfer_to": target,
            "macs": "2x",
            "epochs": 1 if quick else 30,
            "finetune_epochs": 0 if quick else 1,
            "transfer_epochs": 0 if quick else EPOCHS,
            "batch_size": 64,
            "controls": "none" if quick else "all",
            "train": {"precision": "bf16"},
            "out": Path(folder) / "run",
        }
        return pipeline.build(make_options(asked))


def small_network(name: str, target: Path, *, quick: bool) -> dict[str, Any]:
    """Accuracy of a network that is small as it is, fine-tuned to the target."""
    trained, factory, preprocess, last = SMALL[name]
    data = load_folder(target, preprocess)
    data = few(data, 40) if quick else data
    model = carried(trained(quick), factory(len(data.classes)), last)
    recipe = replace(TUNING, epochs=1 if quick else EPOCHS, lr=0.01, batch=32)
    train(model, data.train, recipe, seed=0, stage=f"transfer {name}")
    return judged(model, data)


def carried(trained: nn.Module, fresh: nn.Module, last: str) -> nn.Module:
    """The fresh network with all the trained one's weights but those of its last layer."""
    taken = {name: value for name, value in trained.state_dict().items() if not name.startswith(f"{last}.")}
    fresh.load_state_dict(taken, strict=False)
    return fresh


def table(target: str, rows: dict[str, Any]) -> Table:
    """The small networks' rows, and the papers' figures."""
    shown = Table(f"to {target}", "top-1 (95 %)", "top-1, paper: CUB-200", "Indoor-67")
    for name, row in rows.items():
        shown.add_row(f"{name}, fine-tuned", percent(row))
    shown.add_section()
    for name, (birds, indoor) in TRANSFER.items():
        shown.add_row(name, "", f"{birds:.2f}", f"{indoor:.2f}")
    return shown


def digits() -> Path:
    """The built-in digits as a folder of image files, made when it is missing."""
    place = cache_folder() / "digits"
    if place.is_dir():
        return place
    data = load_digits(digits_preprocess())
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        for split, images in (("train", data.train), ("test", data.test)):
            for index, label in enumerate(images.labels.tolist()):
                name = Path(folder) / "digits" / split / data.classes[label]
                name.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images.read(np.array([index]))[0, ..., 0]).save(name / f"{index}.png")
        (Path(folder) / "digits").rename(place)
    return place
