"""The thin ResNet-20 at 2x fewer multiply-accumulates, fine-tuned, beside the unpruned one with the same epochs.

Both get the same images in the same order and the same rate (`_ours.tuned`), with the trained network as teacher, which
makes nine tenths of the loss or half of it; the unpruned one also without a teacher. Both also learn from the unpruned
one after its own epochs on labels, as the thin one does by default. 10,000 test images. Rows are kept as they come, so
a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from _judge import judged, percent
from _ours import TUNING, pruned, tuned
from _record import keep, kept
from _trained import cifar10, few, missing, trained_resnet20
from rich.console import Console
from rich.table import Table

from thinet_deploy.counting import count
from thinet_deploy.data.dataset import Dataset
from thinet_deploy.pruning.budget import Wish
from thinet_deploy.pruning.oneshot import Method

SEEDS = {2: (0, 1, 2), 20: (0,)}
HALF = 0.5  # of the loss from the teacher
BY_BOTH = "half of the loss from labels, half from the unpruned one after its epochs"


def run(data: Dataset, epochs: int, *, quick: bool) -> None:
    """Measure what is not there yet, keep each row at once, print the table."""
    model = trained_resnet20()
    title = f"finetuning-{epochs}"
    rows = kept(title, quick=quick)
    thin = pruned(model, data, Wish(macs=count(model, (3, 32, 32)).macs / 2), Method(), allocated=True)
    todo = [
        (f"{name}{how}, seed {seed}", network, teacher, seed, share)
        for seed in SEEDS.get(epochs, (0,))
        for name, network, teacher, how, share in (
            ("2x thinner", thin, model, ", half taught", HALF),
            ("2x thinner", thin, model, ", taught", TUNING.distill),
            ("unpruned", model, model, ", half taught", HALF),
            ("unpruned", model, model, ", taught", TUNING.distill),
            ("unpruned", model, None, "", TUNING.distill),
        )
    ]
    by_both = [
        (f"{name}, {BY_BOTH}, seed {seed}", network, seed)
        for name, network, seeds in (("2x thinner", thin, SEEDS.get(epochs, (0,))), ("unpruned", model, (0,)))
        for seed in seeds
    ]
    if any(name not in rows for name, *_ in by_both):
        best = tuned(copy.deepcopy(model), data, None, epochs)
        todo += [(name, network, best, seed, HALF) for name, network, seed in by_both]
    for name, network, teacher, seed, share in todo:
        if name in rows:
            continue
        start = time.perf_counter()
        done = tuned(copy.deepcopy(network), data, teacher, epochs, seed, share=share)
        seconds, macs = time.perf_counter() - start, count(done, (3, 32, 32)).macs
        rows[name] = {"seconds": seconds, "macs": macs, **judged(done, data)}
        facts = {
            "epochs": epochs,
            "tuning": repr(TUNING),
            "threads": torch.get_num_threads(),
            "before": judged(thin, data),
        }
        keep(title, {**facts, "rows": rows}, quick=quick)
        print(f"{name}: {percent(rows[name])}", flush=True)
    table = Table("what", "MMAC", "top-1 (95 %)", "s")
    for name, row in rows.items():
        table.add_row(name, f"{row['macs'] / 1e6:.2f}", percent(row), f"{row['seconds']:.0f}")
    Console(width=120).print(table)


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description="Fine-tuning after pruning, ResNet-20 on CIFAR-10.")
    parser.add_argument("--quick", action="store_true", help="an epoch of few images: shows that it works")
    parser.add_argument("--epochs", type=int, choices=list(SEEDS), help="of them alone")
    given = parser.parse_args()
    if absent := missing():
        print(f"finetuning: skipped, {absent}")
        return
    data = cifar10()
    for epochs in (1,) if given.quick else [given.epochs] if given.epochs else SEEDS:
        run(few(data, 1000) if given.quick else data, epochs, quick=given.quick)


if __name__ == "__main__":
    main()
