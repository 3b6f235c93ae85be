"""gcos on VGGs for CIFAR-10: groups by error, by position with ShuffleNet's fixed shuffle, and without any shuffle.

All three have the same parameters, the same closed-form refit and the same epoch of fine-tuning, with the ungrouped
network as teacher; three seeds of calibration images and of training order. 10,000 test images.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from _judge import judged, percent
from _ours import TUNING, regrouped, tuned
from _record import keep, kept
from _trained import cifar10, few, missing, trained_vgg
from rich.console import Console
from rich.table import Table

from thinet_deploy.counting import count
from thinet_deploy.data.dataset import Dataset
from thinet_deploy.pruning.gcos import Choose
from thinet_deploy.pruning.partition import Layer, Partition, by_position

EPOCHS = 1
SEEDS = (0, 1, 2)


def shuffled(layer: Layer, groups: int) -> Partition:
    """As ShuffleNet does it."""
    sources = int(layer.sources.max()) + 1
    return by_position(len(layer.sources), len(layer.cross), groups, shuffled_from=sources)


def unshuffled(layer: Layer, groups: int) -> Partition:
    """As AlexNet did it."""
    return by_position(len(layer.sources), len(layer.cross), groups)


WAYS: dict[str, Choose | None] = {"gcos": None, "fixed shuffle": shuffled, "no shuffle": unshuffled}


def run(data: Dataset, *, quick: bool) -> None:
    """Measure what is not there yet, keep each row at once, print the table."""
    rows = kept("gcos", quick=quick)
    for norm in (True, False):
        network, model = "vgg_bn" if norm else "vgg", trained_vgg(norm=norm)
        for seed in SEEDS[: 1 if quick else None]:
            for way, choose_by in WAYS.items():
                name = f"{network}, {way}, seed {seed}"
                if name in rows:
                    continue
                thin = regrouped(model, data, choose_by, seed)
                row: dict[str, Any] = {"network": network, "way": way, "seed": seed}
                row["parameters"] = sum(each.numel() for each in thin.parameters())
                row["macs"] = count(thin, data.preprocess.input_shape).macs
                row["untuned"] = judged(thin, data)
                rows[name] = row | {"tuned": judged(tuned(thin, data, model, EPOCHS, seed), data)}
                facts = {"epochs": EPOCHS, "tuning": repr(TUNING), "threads": torch.get_num_threads()}
                keep("gcos", {**facts, "rows": rows}, quick=quick)
                print(f"{name}: {percent(row['untuned'])}, then {percent(rows[name]['tuned'])}", flush=True)
    show(rows)


def show(rows: dict[str, Any]) -> None:
    """A table: mean over the seeds and their range."""
    table = Table("network", "groups", "parameters", "top-1, refitted", f"top-1, {EPOCHS} epoch")
    for network in dict.fromkeys(row["network"] for row in rows.values()):
        for way in WAYS:
            mine = [row for row in rows.values() if (row["network"], row["way"]) == (network, way)]
            figures = []
            for state in ("untuned", "tuned"):
                top1 = np.array([row[state]["top1"]["value"] for row in mine])
                figures.append(f"{top1.mean():.2f} ({top1.min():.2f} to {top1.max():.2f})")
            table.add_row(network, way, f"{mine[0]['parameters']:,}", *figures)
    Console(width=120).print(table)


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description="gcos against ordinary grouped convolutions, CIFAR-10.")
    parser.add_argument("--quick", action="store_true", help="a seed, few images: shows that it works")
    given = parser.parse_args()
    if absent := missing():
        print(f"gcos: skipped, {absent}")
        return
    data = cifar10()
    run(few(data, 1000) if given.quick else data, quick=given.quick)


if __name__ == "__main__":
    main()
