"""All selections × reconstructions without any training, and some of them after one epoch; 10,000 test images.

On the trained ResNet-20 the first convolution of every block keeps r = 0.3, 0.5, 0.7 of its filters; then the
elimination once more with widths allocated for the same multiply-accumulates, and at 2x fewer with several calibration
samples. On the CIFAR VGG with and without BatchNorm all is done at 2x fewer multiply-accumulates. 2,000 calibration
images. Telling rows are fine-tuned for an epoch (`_ours.tuned`) at each of `RATES`, with several
seeds of the order. Rows are kept as they come, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _judge import judged, percent
from _ours import RATES, TUNING, pruned, tuned
from _record import RESULTS, keep, kept
from _trained import NETWORKS, cifar10, few, missing
from rich.console import Console
from rich.table import Table
from torch import nn

from thinet_deploy.counting import count
from thinet_deploy.data.dataset import Dataset
from thinet_deploy.interfaces import Reconstruction, Selection
from thinet_deploy.pruning.budget import Wish
from thinet_deploy.pruning.oneshot import Method, Targets

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.typing import LineStyleType

RATIOS = (0.5, 0.3, 0.7)
SELECTIONS: tuple[Selection, ...] = ("elimination", "thinet", "thinet-omp", "weight-sum", "apoz", "taylor", "random")
RECONSTRUCTIONS: tuple[Reconstruction, ...] = ("none", "scale", "full")
TARGETS: tuple[Targets, ...] = ("symmetric", "asymmetric")
SEEDS = (0, 1, 2)
TELLING = {
    "resnet20": (
        "r=0.5, elimination, full, allocated",
        "r=0.5, elimination, full",
        "r=0.5, thinet, scale",
        "r=0.5, thinet-omp, scale",
        "r=0.5, weight-sum, none",
        "r=0.5, random, none",
    ),
    "vgg_bn": ("2x, elimination, full, allocated", "2x, thinet, scale", "2x, weight-sum, none"),
    "vgg": ("2x, elimination, full, allocated", "2x, thinet, scale", "2x, weight-sum, none"),
}
Case = tuple[str, Wish, Method, bool, int]


def cases(network: str, macs: int) -> Iterator[Case]:
    """(name, budget, method, allocated, seed), the most telling first; of `macs` before."""
    half = Wish(macs=macs / 2)
    if network != "resnet20":
        yield "2x, elimination, full, allocated", half, Method(), True, 0
        yield from _table("2x", half)
        return
    for seed in SEEDS:
        yield f"2x, elimination, full, allocated, sample {seed}", half, Method(), True, seed
    for ratio in RATIOS:
        yield f"r={ratio}, elimination, full, allocated", Wish(keep=ratio), Method(), True, 0
        yield from _table(f"r={ratio}", Wish(keep=ratio))
    for targets in TARGETS:
        yield f"r=0.5, elimination, full, {targets}", Wish(keep=0.5), Method(targets=targets), False, 0


def _table(name: str, wish: Wish) -> Iterator[Case]:
    for reconstruction in RECONSTRUCTIONS:
        for selection in SELECTIONS:
            yield f"{name}, {selection}, {reconstruction}", wish, Method(selection, reconstruction), False, 0


def measure(model: nn.Module, data: Dataset, case: Case, row: dict[str, Any], unpruned: dict[str, Any]) -> None:
    """What a row lacks, added to it."""
    _, wish, method, allocated, seed = case
    start = time.perf_counter()
    thin = pruned(model, data, wish, method, allocated=allocated, seed=seed)
    if "macs" not in row:
        row["seconds"], counted = time.perf_counter() - start, count(thin, data.preprocess.input_shape)
        row |= {"macs": counted.macs, "parameters": counted.parameters, **judged(thin, data, unpruned)}
    for rate, rows in row.get("tuned", {}).items():
        for each in SEEDS[len(rows) :]:
            rows.append(judged(tuned(copy.deepcopy(thin), data, model, 1, each, float(rate)), data))


def show(rows: dict[str, Any]) -> None:
    """A table in the order of the measurement."""
    table = Table("what", "MMAC", "top-1 (95 %)", "after an epoch at a rate, each seed", "s")
    for name, row in rows.items():
        after = "; ".join(
            f"{rate}: " + ", ".join(f"{each['top1']['value']:.2f}" for each in seeds)
            for rate, seeds in row.get("tuned", {}).items()
        )
        table.add_row(name, f"{row['macs'] / 1e6:.2f}", percent(row), after, f"{row.get('seconds', 0):.0f}")
    Console(width=140).print(table)


def plot(rows: dict[str, Any], path: Path) -> None:
    """Accuracy against the share of FLOPs left, as in the papers' figure 3, without training and after one epoch."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes, after = figure.subplots(1, 2, width_ratios=(7, 3))
    _trained(after, rows)
    styles: dict[Reconstruction, LineStyleType] = {"full": "-", "scale": "--", "none": ":"}

    def line(*how: str) -> tuple[list[float], list[float]]:
        mine = [rows[", ".join((f"r={ratio}", *how))] for ratio in sorted(RATIOS)]
        left = [100 * row["macs"] / rows["unpruned"]["macs"] for row in mine]
        return left, [row["top1"]["value"] for row in mine]

    for number, selection in enumerate(SELECTIONS):
        for reconstruction, style in styles.items():
            axes.plot(*line(selection, reconstruction), style, color=f"C{number}", marker="o", markersize=3)
    axes.plot(*line("elimination", "full", "allocated"), "k-", marker="s")
    axes.axhline(rows["unpruned"]["top1"]["value"], color="0.6", linewidth=0.8)
    axes.set(xlabel="FLOPs left (%)", ylabel="top-1 (%)", title="ResNet-20 on CIFAR-10 (JPEG), without training")
    names = [*((f"C{number}", name) for number, name in enumerate(SELECTIONS)), ("k", "elimination, widths allocated")]
    chosen = [Line2D([], [], color=colour, label=name) for colour, name in names]
    mended = [Line2D([], [], color="0.4", linestyle=style, label=name) for name, style in styles.items()]
    between = (0.0, 0.7)  # of the lines
    by = axes.legend(handles=chosen, title="filters chosen by", fontsize=8, loc="upper left", bbox_to_anchor=between)
    axes.add_artist(by)
    axes.legend(handles=mended, title="weights refitted", fontsize=8, loc="lower right")
    figure.savefig(path, metadata={"Date": None})


def _trained(axes: Axes, rows: dict[str, Any]) -> None:
    """Rows that had an epoch: the mean of their seeds, with the interval of the test images."""
    names = [name for name, row in rows.items() if any(row.get("tuned", {}).values())]
    for place, name in enumerate(names):
        seeds = [each["top1"] for tuned in rows[name]["tuned"].values() for each in tuned]
        value, low, high = (statistics.fmean(each[end] for each in seeds) for end in ("value", "low", "high"))
        colour = "k" if name.endswith("allocated") else f"C{SELECTIONS.index(name.split(', ')[1])}"
        axes.errorbar([place], [value], [[value - low], [high - value]], fmt="o", color=colour, capsize=3)
    axes.axhline(rows["unpruned"]["top1"]["value"], color="0.6", linewidth=0.8)
    labels = [name.partition(", ")[2].replace(", ", "\n") for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=90, fontsize=8)
    axes.set(ylabel="top-1 (%)", title="r = 0.5, after one epoch, 95 %")


def run(network: str, data: Dataset, *, quick: bool) -> None:
    """Measure what is not there yet, keep each row at once, print the table."""
    model, name = NETWORKS[network](), f"reconstruction-{network}"
    macs = count(model, data.preprocess.input_shape).macs
    rows = kept(name, quick=quick)
    if "unpruned" not in rows:
        rows["unpruned"] = {"macs": macs, **judged(model, data)}
    for case in list(cases(network, macs))[: 2 if quick else None]:
        row = rows.setdefault(case[0], {})
        if case[0] in TELLING[network] and not quick:
            row["tuned"] = {f"{rate:g}": row.get("tuned", {}).get(f"{rate:g}", []) for rate in RATES[network]}
        if "macs" in row and all(len(seeds) == len(SEEDS) for seeds in row.get("tuned", {}).values()):
            continue
        measure(model, data, case, row, rows["unpruned"])
        facts = {"network": network, "calibration_images": 2000, "threads": torch.get_num_threads()}
        keep(name, {**facts, "tuning": repr(TUNING), "rows": rows}, quick=quick)
        print(f"{case[0]}: {percent(row)}, {row['macs'] / 1e6:.2f} M", flush=True)
    show(rows)
    if network == "resnet20" and not quick:
        plot(rows, RESULTS / f"{name}.svg")


def main() -> None:
    """Every network, or one."""
    parser = argparse.ArgumentParser(description="Selections × reconstructions without training, on CIFAR-10.")
    parser.add_argument("--quick", action="store_true", help="two rows, few images: shows that it works")
    parser.add_argument("--network", choices=list(NETWORKS), help="one of them")
    given = parser.parse_args()
    if absent := missing():
        print(f"reconstruction: skipped, {absent}")
        return
    data = cifar10()
    if given.quick:
        data = few(data, 1000)
    for network in [given.network] if given.network else ["resnet20"] if given.quick else NETWORKS:
        run(network, data, quick=given.quick)


if __name__ == "__main__":
    main()
