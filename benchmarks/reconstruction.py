"""All selections × reconstructions without any training: the trained ResNet-20, 10,000 test images.

The first convolution of every block keeps r = 0.3, 0.5, 0.7 of its filters; then the elimination once more with widths
allocated for the same multiply-accumulates, and at 2x fewer with several calibration samples. 2,000 calibration images.
Rows are kept as they come, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

import torch
from _judge import judged, percent
from _ours import pruned
from _record import RESULTS, keep
from _trained import cifar10, missing, trained_resnet20
from rich.console import Console
from rich.table import Table

from thinet_deploy.counting import count
from thinet_deploy.data import Dataset
from thinet_deploy.pruning.budget import Wish
from thinet_deploy.pruning.oneshot import Method, Reconstruction, Selection, Targets

RATIOS = (0.5, 0.3, 0.7)
SELECTIONS: tuple[Selection, ...] = ("elimination", "thinet", "thinet-omp", "weight-sum", "apoz", "taylor", "random")
RECONSTRUCTIONS: tuple[Reconstruction, ...] = ("none", "scale", "full")
TARGETS: tuple[Targets, ...] = ("symmetric", "asymmetric")
SEEDS = (0, 1, 2)


def cases() -> Iterator[tuple[str, Wish, Method, bool, int]]:
    """(name, budget, method, allocated, seed), the most telling first."""
    for seed in SEEDS:
        name = f"2x, elimination, full, allocated, sample {seed}"
        yield name, Wish(macs=trained_macs() / 2), Method(), True, seed
    for ratio in RATIOS:
        yield f"r={ratio}, elimination, full, allocated", Wish(keep=ratio), Method(), True, 0
        for reconstruction in RECONSTRUCTIONS:
            for selection in SELECTIONS:
                name = f"r={ratio}, {selection}, {reconstruction}"
                yield name, Wish(keep=ratio), Method(selection, reconstruction), False, 0
    for targets in TARGETS:
        yield f"r=0.5, elimination, full, {targets}", Wish(keep=0.5), Method(targets=targets), False, 0


def trained_macs() -> int:
    """Of the network before."""
    return count(trained_resnet20(), (3, 32, 32)).macs


def measure(data: Dataset, wish: Wish, method: Method, allocated: bool, seed: int) -> dict[str, Any]:
    """A row."""
    start = time.perf_counter()
    thin = pruned(trained_resnet20(), data, wish, method, allocated=allocated, seed=seed)
    seconds = time.perf_counter() - start
    counted = count(thin, (3, 32, 32))
    return {"macs": counted.macs, "parameters": counted.parameters, "seconds": seconds, **judged(thin, data)}


def show(rows: dict[str, Any]) -> None:
    """A table in the order of the measurement."""
    table = Table("what", "MMAC", "top-1 (95 %)", "s")
    for name, row in rows.items():
        table.add_row(name, f"{row['macs'] / 1e6:.2f}", percent(row), f"{row.get('seconds', 0):.0f}")
    Console(width=120).print(table)


def main() -> None:
    """Measure what is not there yet, keep each row at once, print the table."""
    parser = argparse.ArgumentParser(description="Selections × reconstructions without training, on ResNet-20.")
    parser.add_argument("--quick", action="store_true", help="two rows, 500 test images: shows that it works")
    given = parser.parse_args()
    if absent := missing():
        print(f"reconstruction: skipped, {absent}")
        return
    data = cifar10()
    if given.quick:
        few = data.test.view(data.test.sample(500, seed=0, stage="quick"))
        data = Dataset(data.name, data.classes, data.train, few, data.digest)
    path = RESULTS / "reconstruction.json"
    rows: dict[str, Any] = json.loads(path.read_text())["rows"] if path.exists() and not given.quick else {}
    if "unpruned" not in rows:
        rows["unpruned"] = {"macs": trained_macs(), **judged(trained_resnet20(), data)}
    for name, wish, method, allocated, seed in list(cases())[: 2 if given.quick else None]:
        if name in rows:
            continue
        rows[name] = measure(data, wish, method, allocated, seed)
        facts = {"network": "resnet20", "calibration_images": 2000, "threads": torch.get_num_threads()}
        keep("reconstruction", {**facts, "rows": rows}, quick=given.quick)
        print(f"{name}: {rows[name]['top1']['value']:.2f} %, {rows[name]['macs'] / 1e6:.2f} M", flush=True)
    show(rows)


if __name__ == "__main__":
    main()
