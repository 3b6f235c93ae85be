"""What multiply-accumulates are worth at the same time: ResNet-20, 1.5x faster, an epoch, on images nobody has seen.

Where milliseconds and multiply-accumulates disagree, a budget of time may be met with less predicted error or with more
multiply-accumulates. The network of held_out.py is pruned to the same sum of layer times (OpenVINO in fp32, its fine
grid) with these being worth nothing, and more and more; each is fine-tuned on the 40,000 images that the network was
trained on, and judged on the other 10,000, before and after. Rows are kept as they come.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from _budgets import Shop, Subject, bench
from _judge import judged, percent
from _ours import tuned
from _record import keep, kept
from _trained import cifar10, few, missing
from held_out import HELD_OUT, trained
from rich.console import Console
from rich.table import Table

from thinet_deploy.data.dataset import Dataset
from thinet_deploy.pruning.allocation import Costs, Descent, predicted_error
from thinet_deploy.pruning.budget import Widths
from thinet_deploy.timing.budget import Goal

TIMES, EPOCHS, SEEDS, SHARE = 1.5, 1, (0, 1), 0.5  # the last: of the loss from the original
WORTH = (0.0, 12.0, 20.0)  # of all multiply-accumulates, in predicted errors of what loses least
CALIBRATION = 2000


def widths_by_worth(mine: Subject, *, quick: bool) -> dict[float, tuple[Widths, float, float]]:
    """What they are worth → widths, predicted error, share of the multiply-accumulates that stay."""
    found = dict[float, tuple[Widths, float, float]]()
    curves = mine.curves()
    with tempfile.TemporaryDirectory() as folder:
        stand = bench("openvino", "fp32", mine.images, Path(folder), rounds=6, seconds=0.3)
        shop = Shop(mine, stand, Path(folder))
        wish = shop.wish(Goal(speedup=TIMES))
        costs = shop.costs(wish)
    macs = Costs(mine.tensors, mine.graph, mine.groups)
    all_macs, budget, least = macs(mine.whole)[0], costs(mine.whole)[0] / TIMES, 0.0
    for worth in WORTH[:2] if quick else WORTH:
        each = worth * least / all_macs
        widths = Descent(costs, mine.groups, curves, wish, valued=macs, worth=each).reach(budget)
        error = predicted_error(curves, widths)
        least = least or error
        if all(widths != known for known, *_ in found.values()):
            found[worth] = widths, error, macs(widths)[0] / all_macs
    return found


def run(data: Dataset, *, quick: bool) -> None:
    """Measure what is not there yet, keep each row at once, print the table."""
    fit, held_out = data.train.split(HELD_OUT, 0)
    data = replace(data, train=fit, test=held_out)
    rows: dict[str, Any] = kept("worth", quick=quick)
    model = trained(data, quick=quick)
    mine = Subject(model, fit, 100 if quick else CALIBRATION, 100)
    for worth, (widths, error, share) in widths_by_worth(mine, quick=quick).items():
        pruned = mine.pruned(widths)
        for seed in (None, *SEEDS):
            name = f"worth {worth:g}, " + ("untrained" if seed is None else f"after an epoch, seed {seed}")
            if name in rows:
                continue
            thin = pruned if seed is None else tuned(copy.deepcopy(pruned), data, model, EPOCHS, seed, share=SHARE)
            rows[name] = {"widths": widths, "error": error, "macs_left": share, **judged(thin, data)}
            keep("worth", {"rows": rows}, quick=quick)
            print(f"{name}: {percent(rows[name])}", flush=True)
    table = Table("all multiply-accumulates are", "predicted error", "of them stay", "held-out top-1 (95 %)")
    for name, row in rows.items():
        table.add_row(name, f"{row['error']:.4g}", f"{row['macs_left']:.1%}", percent(row))
    Console(width=120).print(table)


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description="Less predicted error, or more multiply-accumulates, at one time.")
    parser.add_argument("--quick", action="store_true", help="few images, one epoch: shows that it works")
    given = parser.parse_args()
    if absent := missing():
        print(f"worth: skipped, {absent}")
        return
    run(few(cifar10(), 1000) if given.quick else cifar10(), quick=given.quick)


if __name__ == "__main__":
    main()
