"""The main job on trained networks for CIFAR-10, as a user has it: from weights to engines, verdicts and the table.

`thinet-deploy build`, at half of the multiply-accumulates: the ResNet-20 with two epochs and no other option, and the
ThiNet-GAP recipe on the VGG with BatchNorm, an epoch at each end. What it writes (the table with its ledger, the
verdicts, raw latency samples) is kept. With --out the run's folder stays, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _record import keep
from _trained import RESNET20_WEIGHTS, cifar10, missing, trained_vgg, vgg_weights
from rich.console import Console

from thinet_deploy import pipeline
from thinet_deploy.artifact import read_json
from thinet_deploy.environment import cache_folder
from thinet_deploy.options import make_options
from thinet_deploy.reports import texts
from thinet_deploy.reports.hops import render_hops
from thinet_deploy.reports.ledger import render_ledger


def _vgg() -> Path:
    trained_vgg(norm=True)
    return vgg_weights(norm=True)


WEIGHTS: dict[str, Callable[[], Path]] = {"resnet20": lambda: RESNET20_WEIGHTS, "vgg_bn": _vgg}
OPTIONS: dict[str, dict[str, Any]] = {
    "resnet20": {"preset": "thinet-conv", "macs": "2x", "finetune_epochs": 2},
    "vgg_bn": {"macs": "2x", "finetune_epochs": 1, "batch_size": 64, "train": {"precision": "bf16"}},
}


def run(network: str, out: Path, *, quick: bool) -> None:
    """Build, keep, show."""
    asked = OPTIONS[network] | ({"finetune_epochs": 0} if quick else {})
    weights, data = WEIGHTS[network](), cache_folder() / cifar10().name
    model = f"{Path(__file__).with_name('_trained.py')}:{network}"
    done = pipeline.build(make_options({**asked, "model": model, "weights": weights, "data": data, "out": out}))
    found = {
        "options": {name: str(value) for name, value in asked.items()},
        "table": done.table.to_json(),
        "parity": list(map(asdict, done.hops)),
        "latency": read_json(done.run / "latency" / "latency.json"),
    }
    path = keep(f"end_to_end-{network}", found, quick=quick)
    console = Console(width=160)
    console.print(texts.render([done.table], console.width), render_ledger(done.table.ledger))
    console.print(render_hops(done.hops, done.table), path)


def main() -> None:
    """One network, or all."""
    parser = argparse.ArgumentParser(description="The main job on trained networks, end to end.")
    parser.add_argument("--quick", action="store_true", help="the ResNet-20 without training: shows that it works")
    parser.add_argument("--network", choices=OPTIONS, help="one of them")
    parser.add_argument("--out", type=Path, help="a folder for the runs, which stay there")
    given = parser.parse_args()
    if absent := missing():
        print(f"end_to_end: skipped, {absent}")
        return
    with tempfile.TemporaryDirectory() as folder:
        for network in [given.network] if given.network else ["resnet20"] if given.quick else OPTIONS:
            run(network, (given.out or Path(folder)) / network, quick=given.quick)


if __name__ == "__main__":
    main()
