"""Accuracy against latency on CIFAR-10: widths by time, by multiply-accumulates, and uniform; ResNet-20 and the VGG.

Each network is pruned for several ratios in three ways: widths for a budget of measured time (`latency_budget.meet`),
widths allocated for as many multiply-accumulates, uniform widths for as many. Filters are chosen by elimination and
refitted in closed form, without training; top-1 is that of the 10,000 test images. Then all networks of one kind are
measured in one run, in turn. Rows are kept as they come; the picture is results/fronts-NETWORK.svg.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _budgets import Shop, Subject, bench, read, written
from _judge import judged, percent
from _record import RESULTS, keep, kept
from _trained import NETWORKS, cifar10, few, missing
from rich.console import Console

from thinet_deploy.cli.progress import bars
from thinet_deploy.data.dataset import Dataset
from thinet_deploy.errors import GateError, InputError
from thinet_deploy.pruning.allocation import Costs, Curve, allocate
from thinet_deploy.pruning.budget import Widths, Wish, choose_widths
from thinet_deploy.timing.budget import Goal, meet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "fronts"
SUBJECTS = ("resnet20", "vgg_bn")
TIMES = (1.25, 1.5, 2.0, 3.0, 4.0)
BY_TIME, BY_MACS, UNIFORM, UNPRUNED = "by time", "by MACs", "uniform", "unpruned"
WAYS = (BY_TIME, BY_MACS, UNIFORM)
CALIBRATION = 2000
ROUNDS, SECONDS = 15, 4.0


def widths_for(shop: Shop, curves: dict[str, Curve], way: str, times: float) -> Widths:
    """Widths in one of the ways.

    Raises:
        GateError: the ratio cannot be reached.
        InputError: nothing has to be pruned for it.
    """
    mine = shop.subject
    budget = Wish(macs=mine.macs(mine.whole) / times)
    if way == UNIFORM:
        return choose_widths(mine.tensors, mine.graph, mine.groups, budget)
    macs = Costs(mine.tensors, mine.graph, mine.groups)
    if way == BY_MACS:
        return allocate(macs, mine.groups, curves, budget)
    goal = Goal(speedup=times)
    wish = shop.wish(goal)
    return meet(shop.costs(wish), mine.groups, curves, wish, goal, shop.measure, macs=macs).best.widths


def row(shop: Shop, data: Dataset, curves: dict[str, Curve], way: str, times: float) -> dict[str, Any]:
    """Widths and accuracy; or why there are none."""
    mine = shop.subject
    try:
        widths = widths_for(shop, curves, way, times)
    except (GateError, InputError) as refused:
        return {"refused": refused.what}
    return {"widths": widths, "macs": mine.macs(widths), **judged(mine.pruned(widths), data)}


def measured(shop: Shop, rows: dict[str, Any]) -> dict[str, Any]:
    """All networks in turn: milliseconds with their intervals, and every sample."""
    found = shop.in_turn({name: each["widths"] for name, each in rows.items()})
    return {
        name: {"summary": each.samples.summary, "rounds_ms": each.samples.rounds_ms, "machine": each.machine}
        for name, each in found.items()
    }


def show(rows: dict[str, Any], times: dict[str, Any]) -> None:
    """A line for each network, the fastest last."""
    for name in sorted(times, key=lambda name: -times[name]["summary"]["median_ms"]):
        ms = times[name]["summary"]["median_ms"]
        print(f"{name:28} {ms:8.4g} ms  {rows[name]['macs'] / 1e6:8.2f} MMAC  top-1 {percent(rows[name])}", flush=True)


def plot(network: str, rows: dict[str, Any], times: dict[str, Any], path: Path) -> None:
    """Top-1 against milliseconds, a line for each way, 95 % intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5))
    axes = figure.subplots()
    for way in WAYS:
        names = [name for name in times if name == UNPRUNED or name.endswith(way)]
        _line(axes, [(times[name]["summary"], rows[name]["top1"]) for name in names], way)
    axes.set(xlabel="milliseconds per image", ylabel="top-1 (%)", title=f"{network} on CIFAR-10 (JPEG), no training")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def _line(axes: Axes, points: list[tuple[dict[str, Any], dict[str, float]]], way: str) -> None:
    points = sorted(points, key=lambda point: point[0]["median_ms"])
    ms, top1 = [time["median_ms"] for time, _ in points], [share["value"] for _, share in points]
    spans = [time["interval_ms"] or [time["median_ms"]] * 2 for time, _ in points]
    across = [[at - low for at, (low, _) in zip(ms, spans, strict=True)]]
    across.append([high - at for at, (_, high) in zip(ms, spans, strict=True)])
    up = [[each["value"] - each["low"] for _, each in points], [each["high"] - each["value"] for _, each in points]]
    axes.errorbar(ms, top1, xerr=across, yerr=up, marker="o", markersize=4, capsize=2, label=way)


def run(network: str, data: Dataset, rows: dict[str, Any], *, quick: bool) -> None:
    """Prune and measure what is missing of a network."""
    mine = Subject(NETWORKS[network](), data.train, 100 if quick else CALIBRATION, 100)
    known = rows.setdefault(network, {})
    rounds, seconds = (6, 0.2) if quick else (ROUNDS, SECONDS)
    with bars(Console(stderr=True)) as progress, tempfile.TemporaryDirectory() as folder:
        stand = bench("openvino", "fp32", mine.images, Path(folder), rounds=rounds, seconds=seconds, progress=progress)
        shop = Shop(mine, stand, Path(folder))
        if "curves" not in known:
            known["curves"] = written(mine.curves(progress))
        networks = known.setdefault("networks", {})
        whole = {"widths": mine.whole, "macs": mine.macs(mine.whole)}
        networks.setdefault(UNPRUNED, {**whole, **judged(mine.model, data)})
        for times, way in itertools.product(TIMES[2:3] if quick else TIMES, WAYS):
            name = f"{times:g}x {way}"
            if name not in networks:
                networks[name] = row(shop, data, read(known["curves"]), way, times)
                keep(NAME, {"rows": rows}, quick=quick)
        there = {name: each for name, each in networks.items() if "refused" not in each}
        if known.get("latency", {}).keys() != there.keys():
            known["latency"] = measured(shop, there)
            keep(NAME, {"rows": rows}, quick=quick)
    show(there, known["latency"])
    plot(network, there, known["latency"], RESULTS / f"{NAME}-{network}{'-quick' if quick else ''}.svg")


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description="Accuracy against latency, three ways to put widths.")
    parser.add_argument("--quick", action="store_true", help="one network and ratio, few images: shows that it works")
    parser.add_argument("--network", choices=SUBJECTS, help="one of them")
    given = parser.parse_args()
    if absent := missing():
        print(f"fronts: skipped, {absent}")
        return
    data, rows = few(cifar10(), 1000) if given.quick else cifar10(), kept(NAME, quick=given.quick)
    for network in [given.network] if given.network else SUBJECTS[:1] if given.quick else SUBJECTS:
        run(network, data, rows, quick=given.quick)


if __name__ == "__main__":
    main()
