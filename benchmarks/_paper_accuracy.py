"""The accuracy columns of the papers' tables: whole recipes through `thinet-deploy build`, from trained weights.

With ImageNet the papers' networks, presets and schedules, from torchvision's weights. Without it what is at hand: the
CIFAR VGG in place of VGG-16, ResNet-20 in place of ResNet-50, two epochs of fine-tuning; the table says so.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from _record import keep, kept
from _trained import RESNET20_WEIGHTS, cifar10, trained_vgg, vgg_weights
from rich.console import Console

from thinet_deploy import pipeline
from thinet_deploy.environment import cache_folder
from thinet_deploy.options import make_options
from thinet_deploy.reports import texts
from thinet_deploy.reports.ledger import render_ledger

TRAINED = Path(__file__).with_name("_trained.py")
PAPERS: dict[str, list[dict[str, Any]]] = {
    "vgg16": [{"model": "vgg16", "preset": preset} for preset in ("thinet-gap", "thinet-tiny")],
    "resnet50": [{"model": "resnet50", "preset": f"thinet-{left}"} for left in (70, 50, 30)],
}


def at_hand(name: str, *, quick: bool) -> list[dict[str, Any]]:
    """What stands for a table's networks where there is no ImageNet."""
    epochs = {"finetune_epochs": 0 if quick else 2, "batch_size": 64}
    shared = epochs | {"data": cache_folder() / cifar10().name, "train": {"precision": "bf16"}}
    if name == "resnet50":
        mine = {"model": f"{TRAINED}:resnet20", "weights": RESNET20_WEIGHTS}
        # The original trained for longer is the same beside all three.
        controls = {0.7: "unpruned", 0.5: "none", 0.3: "none"}
        return [{**shared, **mine, "keep": keep, "controls": control} for keep, control in controls.items()]
    trained_vgg(norm=False)
    return [{**shared, "model": f"{TRAINED}:vgg", "weights": vgg_weights(norm=False), "preset": "thinet-gap"}]


def accuracies(name: str, imagenet: Path | None, weights: str, *, quick: bool) -> None:
    """Run a table's recipes that are not there yet, keep each at once, and print it."""
    if imagenet:
        common = {"data": imagenet, "weights": weights, "recipe": "iccv2017", "controls": "all"}
        recipes = [{**common, **each} for each in PAPERS[name]]
    else:
        recipes = at_hand(name, quick=quick)
    title = f"paper_tables-{name}-accuracy" + ("-imagenet" if imagenet else "")
    rows, console = kept(title, quick=quick), Console(width=160)
    for recipe in recipes[:1] if quick else recipes:
        label = str(recipe.get("preset", f"r={recipe.get('keep')}"))
        if label in rows:
            continue
        with tempfile.TemporaryDirectory() as folder:
            done = pipeline.build(make_options({**recipe, "out": Path(folder) / "run"}))
        asked = {key: str(value) for key, value in recipe.items()}
        rows[label] = {"options": asked, "table": done.table.to_json(), "parity": [vars(hop) for hop in done.hops]}
        keep(title, {"rows": rows}, quick=quick)
        console.print(texts.render([done.table], console.width), render_ledger(done.table.ledger))
