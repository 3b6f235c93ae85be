"""The ThiNet-GAP recipe end to end, as a user has it: the CIFAR VGG with BatchNorm, 2x, one epoch at each end.

`thinet-deploy build` from trained weights to engines, verdicts and the table; what it writes (the table with its
ledger, the verdicts, raw latency samples) is kept.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from _record import keep
from _trained import cifar10, missing, trained_vgg, vgg_weights
from rich.console import Console

from thinet_deploy import pipeline
from thinet_deploy.artifact import read_json
from thinet_deploy.environment import cache_folder
from thinet_deploy.options import make_options
from thinet_deploy.reports import texts
from thinet_deploy.reports.hops import render_hops
from thinet_deploy.reports.ledger import render_ledger


def main() -> None:
    """Build and keep."""
    parser = argparse.ArgumentParser(description="ThiNet-GAP end to end on a VGG for CIFAR-10.")
    parser.add_argument("--quick", action="store_true", help="no training: shows that it works")
    given = parser.parse_args()
    if absent := missing():
        print(f"gap: skipped, {absent}")
        return
    trained_vgg(norm=True)
    with tempfile.TemporaryDirectory() as folder:
        asked = {
            "model": f"{Path(__file__).with_name('_trained.py')}:vgg_bn",
            "weights": vgg_weights(norm=True),
            "data": cache_folder() / cifar10().name,
            "macs": "2x",
            "finetune_epochs": 0 if given.quick else 1,
            "batch_size": 64,
            "train": {"precision": "bf16"},
            "out": Path(folder) / "run",
        }
        done = pipeline.build(make_options(asked))
        latency = read_json(done.run / "latency" / "latency.json")
    hops = [vars(hop) for hop in done.hops]
    options = {name: str(value) for name, value in asked.items() if name not in {"model", "weights", "data", "out"}}
    path = keep(
        "gap",
        {"options": options, "table": done.table.to_json(), "parity": hops, "latency": latency},
        quick=given.quick,
    )
    console = Console(width=160)
    console.print(texts.render([done.table], console.width), render_ledger(done.table.ledger))
    console.print(render_hops(done.hops, done.table), path)


if __name__ == "__main__":
    main()
