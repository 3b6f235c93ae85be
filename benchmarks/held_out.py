"""How to fine-tune, chosen on images that nobody has seen: ResNet-20, 2x thinner, two epochs on CIFAR-10.

The given weights have seen all training images, so none of these can choose between recipes. Here a ResNet-20 is
trained on 40,000 of them from scratch (once, into the user's cache), pruned and fine-tuned on the same 40,000, and
judged on the other 10,000. The test images are not looked at. Rows are kept as they come.

Weights that users bring were mostly made on other images than those they prune with. So the same comparison of teachers
is made with a network from elsewhere: that one after two more epochs on a coarse copy of its 40,000.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from _judge import judged, percent
from _ours import TUNING, pruned, tuned
from _record import keep, kept
from _trained import cifar10, few, missing, resnet20, trained_once
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn

from thinet_deploy.artifact import hash_json
from thinet_deploy.counting import count
from thinet_deploy.data.dataset import Dataset, ImageSet
from thinet_deploy.environment import cache_folder
from thinet_deploy.pruning.budget import Wish
from thinet_deploy.pruning.oneshot import Method
from thinet_deploy.training import Recipe, train

HELD_OUT, EPOCHS, SEEDS = 0.2, 2, (0, 1)
TRAINING: dict[str, Any] = {"epochs": 20, "lr": 0.1, "batch": 128, "warmup": 2, "precision": "bf16"}
# (teacher, share of the loss from it, weight of `inside`); the first two with several seeds.
WAYS = {
    "the original, 0.5": ("original", 0.5, TUNING.inside),
    "the original, 0.9": ("original", 0.9, TUNING.inside),
    "the original, 0.5, nothing held inside": ("original", 0.5, 0.0),
    "the original after two epochs on labels, 0.5": ("longer", 0.5, TUNING.inside),
    "labels alone": (None, 0.5, TUNING.inside),
}
# For a network from elsewhere: who teaches.
TEACHERS = {way: WAYS[way] for way in ("the original, 0.5", "the original after two epochs on labels, 0.5")}
ELSEWHERE, COARSE = 2, 20  # epochs; pixels of an image that has 32


def trained(data: Dataset, *, quick: bool) -> nn.Module:
    """A ResNet-20 that has seen these training images only; in eval mode."""
    path = cache_folder() / f"resnet20-cifar10-held-out-{hash_json([HELD_OUT, TRAINING])[:8]}.safetensors"
    torch.manual_seed(0)
    model = resnet20().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if quick:
        train(model, data.train, Recipe(**TRAINING | {"epochs": 1, "warmup": 0}), seed=0, stage="unseen")
        return model.eval()  # type: ignore[no-any-return]
    trained_once(model, path, lambda: data.train, TRAINING, "unseen")
    return model  # type: ignore[no-any-return]


def elsewhere(model: nn.Module, images: ImageSet, *, quick: bool) -> nn.Module:
    """The network after some epochs on the same images seen coarsely: it has left what it knew of the sharp ones."""
    from_coarse = ImageSet(images.labels, lambda indices: coarse(images.read(indices)), images.preprocess)
    recipe = Recipe(epochs=1 if quick else ELSEWHERE, lr=0.1, batch=128, precision="bf16")
    model = copy.deepcopy(model)
    train(model, from_coarse, recipe, seed=0, stage="elsewhere")
    return model.eval()


def coarse(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images as a camera of COARSE by COARSE pixels would see them, at the size they had."""
    height, width = pixels.shape[1:3]
    small = (Image.fromarray(each).resize((COARSE, COARSE), Image.Resampling.BOX) for each in pixels)
    return np.stack([np.asarray(each.resize((width, height), Image.Resampling.BICUBIC)) for each in small])


def run(data: Dataset, *, quick: bool) -> None:
    """Measure what is not there yet, keep each row at once, print the table."""
    fit, held_out = data.train.split(HELD_OUT, 0)
    data = replace(data, train=fit, test=held_out)
    rows = kept("held_out", quick=quick)
    model = trained(data, quick=quick)
    compare(model, data, WAYS, "", rows, quick=quick)
    compare(elsewhere(model, fit, quick=quick), data, TEACHERS, "from elsewhere: ", rows, quick=quick)
    table = Table("2x thinner, two epochs: teacher, its share of the loss", "held-out top-1 (95 %)")
    for name, row in rows.items():
        table.add_row(name, percent(row))
    Console(width=120).print(table)


def compare(
    model: nn.Module,
    data: Dataset,
    ways: dict[str, tuple[str | None, float, float]],
    prefix: str,
    rows: dict[str, Any],
    *,
    quick: bool,
) -> None:
    """The network made thin and fine-tuned in each way that has no row yet."""
    thin = pruned(model, data, Wish(macs=count(model, (3, 32, 32)).macs / 2), Method(), allocated=True)
    teachers: dict[str | None, nn.Module | None] = {"original": model, None: None}

    def add(name: str, network: nn.Module) -> None:
        rows[prefix + name] = judged(network, data)
        keep("held_out", {"training": TRAINING, "tuning": repr(TUNING), "rows": rows}, quick=quick)
        print(f"{prefix}{name}: {percent(rows[prefix + name])}", flush=True)

    for name, network in (("unpruned", model), ("2x thinner, untrained", thin)):
        if prefix + name not in rows:
            add(name, network)
    for number, (way, (teacher, share, inside)) in enumerate(ways.items()):
        for seed in SEEDS if number < len(SEEDS) else SEEDS[:1]:
            if prefix + (name := f"{way}, seed {seed}") in rows:
                continue
            if teacher == "longer" and teacher not in teachers:
                teachers[teacher] = longer = tuned(copy.deepcopy(model), data, None, EPOCHS)
                add("unpruned, two epochs on labels", longer)
            start = copy.deepcopy(thin)
            add(name, tuned(start, data, teachers[teacher], EPOCHS, seed, share=share, inside=inside))


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description="Fine-tuning recipes, judged on images that nobody has seen.")
    parser.add_argument("--quick", action="store_true", help="few images, one epoch: shows that it works")
    given = parser.parse_args()
    if absent := missing():
        print(f"held_out: skipped, {absent}")
        return
    run(few(cifar10(), 1000) if given.quick else cifar10(), quick=given.quick)


if __name__ == "__main__":
    main()
