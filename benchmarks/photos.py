"""SqueezeNet v1.1, trained on ImageNet, at 1.5x and 2x fewer multiply-accumulates on ten of its classes.

Without training and after fine-tuning on 1,000 photos with the unpruned network as teacher, beside the unpruned network
with the same epochs, everybody at either of two rates; 400 test photos, so intervals are wide. Rows are kept as they
come.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import replace
from typing import Any

import torch
from _judge import best, judged, percent
from _ours import TUNING, pruned
from _record import keep, kept
from _trained import few, missing, photos10, trained_squeezenet1_1
from rich.console import Console
from rich.table import Table
from torch import nn

from thinet_deploy.counting import count
from thinet_deploy.data.dataset import Dataset
from thinet_deploy.pruning.budget import Wish
from thinet_deploy.pruning.oneshot import Method
from thinet_deploy.training import train

FACTORS = (1.5, 2.0)
METHODS = {"best": (Method(), True), "ThiNet, ICCV 2017": (Method("thinet", "scale"), False)}
RECIPE = replace(TUNING, epochs=5, batch=32)
RATES = (0.001, 0.01)  # a network without BatchNorm, which is good as it is


def run(data: Dataset, *, quick: bool) -> None:
    """Measure what is not there yet, keep each row at once, print the table."""
    model, shape = trained_squeezenet1_1(), data.preprocess.input_shape
    rows = kept("photos", quick=quick)
    macs = count(model, shape).macs
    todo = [("unpruned", 1.0, Method(), False)]
    todo += [(f"{factor}x, {name}", factor, *how) for factor in FACTORS for name, how in METHODS.items()]
    for name, factor, method, allocated in todo[:2] if quick else todo:
        if name in rows:
            continue
        start, wish = time.perf_counter(), Wish(macs=macs / factor)
        thin = copy.deepcopy(model)
        if factor > 1:
            thin = pruned(model, data, wish, method, allocated=allocated, images=900, batch=8)
        row: dict[str, Any] = {"macs": count(thin, shape).macs, "seconds": time.perf_counter() - start}
        row["untuned"] = judged(thin, data)
        rows[name] = row | {"tuned": {f"{rate:g}": tuned(thin, model, data, rate, quick=quick) for rate in RATES}}
        facts = {"network": "squeezenet1_1", "recipe": repr(RECIPE), "threads": torch.get_num_threads()}
        keep("photos", {**facts, "rows": rows}, quick=quick)
        print(f"{name}: {percent(row['untuned'])}, then {percent(best(rows[name]))}", flush=True)
    table = Table("what", "MMAC", "top-1, untrained (95 %)", f"top-1, {RECIPE.epochs} epochs (95 %)")
    for name, row in rows.items():
        table.add_row(name, f"{row['macs'] / 1e6:.1f}", percent(row["untuned"]), percent(best(row)))
    Console(width=120).print(table)


def tuned(thin: nn.Module, teacher: nn.Module, data: Dataset, rate: float, *, quick: bool) -> dict[str, Any]:
    """How good a copy of the network is after its epochs at this rate."""
    model = copy.deepcopy(thin).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    recipe = replace(RECIPE, lr=rate, epochs=1 if quick else RECIPE.epochs)
    train(model, data.train, recipe, seed=0, stage="photos", teacher=teacher)
    return judged(model, data)


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description="SqueezeNet v1.1, pruned on ten classes of photos.")
    parser.add_argument("--quick", action="store_true", help="two networks, 40 photos, an epoch: shows that it works")
    given = parser.parse_args()
    if absent := missing():
        print(f"photos: skipped, {absent}")
        return
    data = photos10()
    if given.quick:
        data = few(data, 40)
    run(data, quick=given.quick)


if __name__ == "__main__":
    main()
