"""The criteria of the papers' figure against each other: top-1 at each share r of the filters that stay.

The papers' is a VGG-16-GAP on CUB-200; ours the CIFAR VGG without BatchNorm, whose hidden layers narrow down with its
convolutions, before training and after the same epochs of fine-tuning on labels alone, as the papers had it. Rows are
kept as they come, so a run that was stopped goes on.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from _judge import judged, percent
from _ours import RATES, TUNING, pruned, tuned
from _papers import CRITERIA, FILTER_PRUNING, FLOPS_LEFT
from _record import RESULTS, keep, kept
from _trained import trained_vgg
from rich.console import Console
from rich.table import Table

from thinet_deploy.counting import count
from thinet_deploy.data.dataset import Dataset
from thinet_deploy.pruning.budget import Wish
from thinet_deploy.pruning.oneshot import Method

RATIOS = (0.5, 0.3, 0.7, 0.1, 0.9, 0.4, 0.6, 0.2, 0.8)
METHODS = {
    "ThiNet": Method("thinet", "scale"),
    "ThiNet without ŵ": Method("thinet", "none"),
    "APoZ": Method("apoz", "none"),
    "weight sum": Method("weight-sum", "none"),
    "random": Method("random", "none"),
    "Taylor": Method("taylor", "none"),
    "thinet-deploy best": Method(),
}
NAME, EPOCHS = "paper_tables-criteria", 1
RATE = RATES["vgg"][0]  # the one that leaves the original where it is


def criteria(data: Dataset, *, quick: bool) -> None:
    """Measure what is not there yet, keep each row at once; the figure, and the comparison at r = 0.5."""
    model, rows = trained_vgg(norm=False), kept(NAME, quick=quick)
    shape = data.preprocess.input_shape
    todo = [("original, r=1.0", 1.0, Method())]
    todo += [(f"{name}, r={ratio}", ratio, method) for ratio in RATIOS for name, method in METHODS.items()]
    for name, ratio, method in todo[:3] if quick else todo:
        if name in rows:
            continue
        thin = copy.deepcopy(model) if ratio == 1 else pruned(model, data, Wish(keep=ratio), method)
        counted = count(thin, shape)
        rows[name] = {"flops": counted.flops, "parameters": counted.parameters, "untuned": judged(thin, data)}
        rows[name]["tuned"] = judged(tuned(thin, data, None, EPOCHS, rate=RATE), data)
        facts = {"network": "vgg", "epochs": EPOCHS, "tuning": repr(replace(TUNING, lr=RATE))}
        keep(NAME, {**facts, "rows": rows}, quick=quick)
        print(f"{name}: {percent(rows[name]['untuned'])}, then {percent(rows[name]['tuned'])}", flush=True)
    compare(rows)
    if not quick:
        plot(rows, RESULTS / f"{NAME}.svg")


def compare(rows: dict[str, Any]) -> None:
    """The papers' comparison of filter pruning: ours at r = 0.5, theirs below."""
    table = Table("what", "top-1, change", "↓#Param / ↓#FLOPs", "whose")
    base = rows["original, r=1.0"]
    for name in METHODS:
        if row := rows.get(f"{name}, r=0.5"):
            change = row["tuned"]["top1"]["value"] - base["tuned"]["top1"]["value"]
            smaller = f"{base['parameters'] / row['parameters']:.2f}×/{base['flops'] / row['flops']:.2f}×"
            table.add_row(name, f"{change:+.2f}", smaller, f"measured: CIFAR VGG, {EPOCHS} epoch each")
    table.add_section()
    for name, (change, smaller) in FILTER_PRUNING.items():
        table.add_row(name, change, smaller, "paper: VGG-16, ImageNet, top-1/top-5")
    Console(width=140).print(table)


def plot(rows: dict[str, Any], path: Path) -> None:
    """Top-1 against FLOPs left: ours without training and after it, and the papers'."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    titles = ("ours, no training", f"ours, {EPOCHS} epoch", "the papers' (VGG-16-GAP, CUB-200)")
    panels = figure.subplots(1, 3)
    base = rows["original, r=1.0"]
    for axes, state in zip(panels, ("untuned", "tuned"), strict=False):
        for name in METHODS:
            mine = [rows[each] for each in (f"{name}, r={ratio}" for ratio in sorted(RATIOS)) if each in rows]
            left = [100 * row["flops"] / base["flops"] for row in [*mine, base]]
            axes.plot(left, [row[state]["top1"]["value"] for row in [*mine, base]], "o-", markersize=3, label=name)
        axes.legend(fontsize=7)
    for name, top1 in CRITERIA.items():
        panels[-1].plot(FLOPS_LEFT, top1, "o-", markersize=3, label=name)
    panels[-1].legend(fontsize=7)
    for axes, title in zip(panels, titles, strict=True):
        axes.set(xlabel="FLOPs left (%)", ylabel="top-1 (%)", title=title)
    figure.savefig(path, metadata={"Date": None})
