"""Pruning methods against each other at half the multiply-accumulates, before and after the same fine-tuning.

On the trained ResNet-20 and on the CIFAR VGG with and without BatchNorm, 10,000 test images. A contender is a function
(network, images, most multiply-accumulates) → thinner network; a new one is one more entry of `contenders`. All are
counted by the same rule (thinet_deploy.counting), tested on the same images without any training, and once more after
one epoch of the same fine-tuning (`_ours.tuned`: same images in the same order, the unpruned network as teacher), which
the unpruned network gets too. Where there are several `RATES` everybody gets an epoch at each, and the table shows the
one that suited a contender best. Of ResNet-20, where it is close, ours and the best of the others get the epoch again
with more seeds. Rows are kept as they come, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import time
from importlib.metadata import version
from typing import Any

import torch
from _judge import best, judged, percent
from _ours import RATES, TUNING, pruned, tuned
from _record import keep, kept
from _torch_pruning import CRITERIA, Contender, fault, torch_pruning, with_convolutions
from _trained import NETWORKS, cifar10, few, missing
from rich.console import Console
from rich.table import Table
from torch import nn

from thinet_deploy.counting import count
from thinet_deploy.data.dataset import Dataset
from thinet_deploy.pruning.budget import Wish
from thinet_deploy.pruning.oneshot import Method

# ResNet-20: what half of the filters of every block's first convolution leaves (20.497 of 40.55 M), so that a uniform
# ratio of one half is within it and the next step of all layers at once (19.0 M) is not forced on anyone.
BUDGETS = {"resnet20": 20_500_000}
SCOPES = {"resnet20": ("inner", "inner, global", "all", "all, 1×1", "all, 1×1, global")}
EPOCHS = 1
SEEDS = {"resnet20": (1, 2)}  # beside 0
OURS, THEIRS = "thinet-deploy best", "Torch-Pruning"


def ours(method: Method, *, allocated: bool) -> Contender:
    """thinet-deploy without training."""
    return lambda model, data, macs: pruned(model, data, Wish(macs=macs), method, allocated=allocated)


def contenders(network: str) -> dict[str, Contender]:
    """Name → method."""
    return {
        OURS: ours(Method(), allocated=True),
        "thinet-deploy best, uniform": ours(Method(), allocated=False),
        "ThiNet, ICCV 2017": ours(Method("thinet", "scale"), allocated=False),
        "ThiNet, TPAMI 2019": ours(Method("thinet-omp", "scale"), allocated=False),
    } | {
        f"{THEIRS} {criterion} ({scope})": torch_pruning(criterion, scope)
        for scope in SCOPES.get(network, ("all", "all, global"))
        for criterion in CRITERIA
        if criterion != "BN scale" or network != "vgg"
    }


def measure(contender: Contender, model: nn.Module, data: Dataset, macs: int, dense: dict[str, Any]) -> dict[str, Any]:
    """A row: prune, count, test, fine-tune, test again."""
    start = time.perf_counter()
    thin = contender(copy.deepcopy(model), data, macs)
    row: dict[str, Any] = {"seconds": time.perf_counter() - start, **counted(thin, data)}
    row["widths"] = {name: each.out_channels for name, each in thin.named_modules() if isinstance(each, nn.Conv2d)}
    row["untuned"] = judged(thin, data, dense["untuned"])
    row["tuned"] = {
        rate: judged(tuned(copy.deepcopy(thin), data, model, EPOCHS, rate=float(rate)), data, other)
        for rate, other in dense["tuned"].items()
    }
    return row


def again(contender: Contender, network: str, data: Dataset, macs: int, seed: int) -> dict[str, Any]:
    """After the epoch with another seed of its batches, at each rate."""
    model = NETWORKS[network]()
    thin = contender(copy.deepcopy(model), data, macs)
    return {
        f"{rate:g}": judged(tuned(copy.deepcopy(thin), data, model, EPOCHS, seed, rate), data)
        for rate in RATES[network]
    }


def counted(model: nn.Module, data: Dataset) -> dict[str, int]:
    """Multiply-accumulates and parameters."""
    found = count(model, data.preprocess.input_shape)
    return {"macs": found.macs, "parameters": found.parameters}


def show(network: str, rows: dict[str, Any]) -> None:
    """A table, best first."""
    table = Table(network, "MMAC", "parameters", "top-1, untrained (95 %)", f"top-1, {EPOCHS} epoch (95 %)")
    for name, row in sorted(rows.items(), key=lambda item: -best(item[1])["top1"]["value"]):
        figures = (percent(row["untuned"]), percent(best(row)))
        table.add_row(name, f"{row['macs'] / 1e6:.2f}", f"{row['parameters']:,}", *figures)
    Console(width=140).print(table)


def run(network: str, data: Dataset, only: str, *, quick: bool) -> None:
    """Measure the contenders that are not there yet, keep each row at once, print the table."""
    name, model = f"peers-{network}", NETWORKS[network]()
    rows = kept(name, quick=quick)
    facts: dict[str, Any] = {"network": network, "test_images": len(data.test), "threads": torch.get_num_threads()}
    facts |= {"epochs": EPOCHS, "tuning": repr(TUNING), "torch_pruning": version("torch-pruning")}
    facts["budget_macs"] = BUDGETS.get(network, counted(model, data)["macs"] // 2)
    if network == "resnet20":
        forms = {"padding": model, "1×1 convolutions": with_convolutions(model)}
        facts["fault_of_shortcuts"] = {form: fault(each) for form, each in forms.items()}
    if "unpruned" not in rows:
        longer = {
            f"{rate:g}": judged(tuned(copy.deepcopy(model), data, model, EPOCHS, rate=rate), data)
            for rate in RATES[network]
        }
        rows["unpruned"] = counted(model, data) | {"untuned": judged(model, data), "tuned": longer}
    for title, contender in contenders(network).items():
        if title in rows or only not in title:
            continue
        rows[title] = measure(contender, model, data, facts["budget_macs"], rows["unpruned"])
        keep(name, {**facts, "rows": rows}, quick=quick)
        print(f"{title}: {percent(rows[title]['untuned'])}, then {percent(best(rows[title]))}", flush=True)
    others = [name for name in rows if name.startswith(THEIRS)]
    others.sort(key=lambda name: float(best(rows[name])["top1"]["value"]))
    for seed in () if quick or only else SEEDS.get(network, ()):
        for title in (OURS, *others[-1:]):
            seeds = rows[title].setdefault("seeds", {})
            if str(seed) not in seeds:
                found = again(contenders(network)[title], network, data, facts["budget_macs"], seed)
                seeds[str(seed)] = found
                keep(name, {**facts, "rows": rows}, quick=quick)
                print(f"{title}, seed {seed}: {percent(best({'tuned': found}))}", flush=True)
    show(network, rows)


def main() -> None:
    """Every network, or one."""
    parser = argparse.ArgumentParser(description="Pruning methods against each other on networks for CIFAR-10.")
    parser.add_argument("--quick", action="store_true", help="one contender, few images: shows that it works")
    parser.add_argument("--network", choices=list(NETWORKS), help="one of them")
    parser.add_argument("--only", default="", help="contenders with this in their name")
    given = parser.parse_args()
    absent = missing()
    if absent or importlib.util.find_spec("torch_pruning") is None:
        print(f"peers: skipped, {absent or 'torch_pruning is not installed'}")
        return
    data = cifar10()
    if given.quick:
        data = few(data, 1000)
    for network in [given.network] if given.network else ["resnet20"] if given.quick else NETWORKS:
        run(network, data, "L1 (inner)" if given.quick else given.only, quick=given.quick)


if __name__ == "__main__":
    main()
