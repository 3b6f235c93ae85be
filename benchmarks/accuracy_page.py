"""docs/accuracy.md from the results of the accuracy benchmarks: every figure on that page has a row in results/."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _judge import best, unpack
from _markdown import head, line, top1
from _record import RESULTS, kept
from peers import OURS, THEIRS
from reconstruction import RATIOS, RECONSTRUCTIONS, SELECTIONS, TARGETS

from thinet_deploy.intervals import difference_interval

TEST_IMAGES = 10_000
PAGE = Path(__file__).parents[1] / "docs" / "accuracy.md"
NETWORKS = {"resnet20": "ResNet-20", "vgg_bn": "VGG with BatchNorm", "vgg": "VGG without BatchNorm"}
BUDGETS = {"resnet20": [f"r={ratio}" for ratio in sorted(RATIOS, reverse=True)], "vgg_bn": ["2x"], "vgg": ["2x"]}
HEAD = """# Accuracy, measured

Made by `benchmarks/accuracy_page.py` from `benchmarks/results/`, where every image of every row is kept as right or
wrong. CIFAR-10 as JPEG files, 10,000 test images: a 95 % interval reaches about 0.7 points to either side, less for the
difference of two networks on the same images. ResNet-20 has given weights, the VGGs (37.7 M multiply-accumulates) are
trained by the benchmarks. 2,000 calibration images.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(
        "\n".join([HEAD, *_reconstruction(), *_tuned(), *_longer(), *_peers(), *_end_to_end(), *_photos()]) + "\n",
        "utf-8",
    )


def _reconstruction() -> Iterator[str]:
    yield from (
        "## Without any training",
        "",
        "Filters chosen in seven ways (rows); what is left of the next layer's weights stays as it",
        "was (none), gets one factor for each channel (scale, the papers')",
        "or is refitted (full). The first convolution of each block of ResNet-20 keeps a share r of",
        "its filters, the VGGs have half of their multiply-accumulates.",
        "*Allocated* puts widths where they cost least, at as many multiply-accumulates.",
        "`benchmarks/reconstruction.py`",
        "",
        "![Accuracy against the share of FLOPs left](../benchmarks/results/reconstruction-resnet20.svg)",
        "",
    )
    for network, title in NETWORKS.items():
        if not (rows := kept(f"reconstruction-{network}", quick=False)):
            continue
        columns = [f"{budget}, {how}" for budget in BUDGETS[network] for how in RECONSTRUCTIONS]
        yield from (f"**{title}**, {top1(rows['unpruned'])} before:", "", *head("", columns))
        for selection in SELECTIONS:
            names = [f"{budget}, {selection}, {how}" for budget in BUDGETS[network] for how in RECONSTRUCTIONS]
            yield line(selection, [top1(rows.get(name)) for name in names])
        allocated = [
            top1(rows.get(f"{budget}, elimination, full, allocated")) if how == "full" else ""
            for budget in BUDGETS[network]
            for how in RECONSTRUCTIONS
        ]
        yield from (line("**elimination, allocated**", allocated), "")
    if rows := kept("reconstruction-resnet20", quick=False):
        named = ", ".join(f"{name} {top1(rows[f'r=0.5, elimination, full, {name}'])}" for name in TARGETS)
        usual = top1(rows["r=0.5, elimination, full"])
        yield from (
            "What a layer is refitted to (ResNet-20, elimination at r=0.5):",
            f"{named}, residual-aware (as above) {usual}.",
            "",
        )


def _tuned() -> Iterator[str]:
    yield from (
        "## After one epoch",
        "",
        "Three seeds, the original as teacher, batches of 64. An epoch at a rate that suits",
        "ResNet-20 takes a VGG three points below where it started, so those",
        "get one at either rate. `build` [tries the rate](adr/0024-trying-the-rate.md). The intervals are those of the",
        "test images.",
        "",
        *head("network", ["row", "before", "rate", "after, each seed", "mean [95 %]"]),
    )
    for network, title in NETWORKS.items():
        for name, row in kept(f"reconstruction-{network}", quick=False).items():
            for rate, seeds in row.get("tuned", {}).items():
                if seeds:
                    yield line(title, [name, top1(row), rate, ", ".join(map(top1, seeds)), _mean(seeds)])
    yield ""


def _mean(rows: list[dict[str, Any]], figure: str = "top1") -> str:
    """Of several seeds, and their intervals' mean ends: seeds share the test images."""
    value, low, high = (statistics.fmean(row[figure][end] for row in rows) for end in ("value", "low", "high"))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _longer() -> Iterator[str]:
    yield from (
        "## Fine-tuned, beside the original trained for as long",
        "",
        "ResNet-20 at half of its multiply-accumulates. *Taught*: nine tenths of the loss come from the original",
        "as teacher; *half taught*: half of it. `build` takes half from the unpruned one after its epochs.",
        "`benchmarks/finetuning.py`;",
        "[what was tried](adr/0015-short-fine-tuning.md)",
        "",
        *head("epochs", ["network", "top-1, each seed", "mean [95 %]"]),
    )
    for epochs in (2, 20):
        found: dict[str, list[dict[str, Any]]] = {}
        for name, row in kept(f"finetuning-{epochs}", quick=False).items():
            found.setdefault(name.rpartition(", seed")[0], []).append(row)
        for name, seeds in found.items():
            yield line(str(epochs), [name, ", ".join(map(top1, seeds)), _mean(seeds)])
    yield ""


_RATES = (
    "The higher rate suits nobody here, the original neither; `build` [tries the rate](adr/0024-trying-the-rate.md)."
)
_PEERS_NOTES = {
    "resnet20": (
        "What is ahead after the epoch is where ours puts the widths: with uniform ones (*best, uniform*) it",
        "comes to no more than others do.",
        "*Inner*: the first convolution of each block alone may become thinner, as in ours; *all*: what",
        "Torch-Pruning would take by default, the residual streams too, of which it takes the padding of the",
        "shortcuts for an addition, so that channels behind it no longer meet their own; *1×1*: the same with",
        "shortcuts written as convolutions, which it follows rightly (and which are not counted). The part of the",
        "loss that holds blocks to the original's (`inside`) acts where their outputs have its shape, so not in *all*.",
    ),
    "vgg_bn": (_RATES,),
    "vgg": (_RATES,),
}


def _peers() -> Iterator[str]:
    for network, title in NETWORKS.items():
        if not (rows := kept(f"peers-{network}", quick=False)):
            continue
        order = sorted(rows, key=lambda name: -best(rows[name])["top1"]["value"])
        rates = list(rows["unpruned"]["tuned"])
        after = [f"after the epoch, at {rate}" for rate in rates]
        yield from (
            f"## Beside Torch-Pruning 1.6.1: {title}",
            "",
            "Half of the multiply-accumulates at most, its own importance criteria and ways to spread",
            "widths, the same data and the same epoch for everybody, one run each. Intervals are of the test",
            "images alone.",
            *_PEERS_NOTES.get(network, ()),
            *(_lead(rows, rate) for rate in rates),
            *_again(rows),
            "`benchmarks/peers.py`",
            "",
            *head("", ["MMAC", "top-1 without training", *after, "minus the original's, at its better rate"]),
            *(line(name, _contender(rows[name], rates)) for name in order),
            "",
        )


def _lead(rows: dict[str, Any], rate: str) -> str:
    """By how much ours is ahead of the best that Torch-Pruning comes to at a rate, on the same images."""
    after = {name: row["tuned"][rate] for name, row in rows.items() if name.startswith((OURS, THEIRS))}
    theirs = max((name for name in after if name.startswith(THEIRS)), key=lambda name: after[name]["top1"]["value"])
    ahead, between = _ahead([(after[OURS], after[theirs])])
    return f"Ours after the epoch at {rate} minus the best of Torch-Pruning's there ({theirs}): {ahead} {between}."


def _again(rows: dict[str, Any]) -> Iterator[str]:
    """The same with more seeds, where there are."""
    others = [name for name, row in rows.items() if "seeds" in row and name.startswith(THEIRS)]
    for theirs in others:
        pairs = [(best(rows[OURS]), best(rows[theirs]))]
        for seed, found in rows[theirs]["seeds"].items():
            pairs.append((best({"tuned": rows[OURS]["seeds"][seed]}), best({"tuned": found})))
        each = ", ".join(_ahead([pair])[0] for pair in pairs)
        ahead, between = _ahead(pairs)
        yield f"With {len(pairs)} seeds, ours minus {theirs}: {each}; in the mean {ahead} {between}."


def _ahead(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> tuple[str, str]:
    """The mean difference of pairs of networks, and its interval over the test images, which all pairs share."""
    right = [[unpack(each["right"], TEST_IMAGES) for each in pair] for pair in pairs]
    if len(right) == 1:
        ((ours, theirs),) = right
        found = difference_interval(ours, theirs)
        return f"{found.value:+.2f}", f"[{found.low:+.2f}, {found.high:+.2f}]"
    each = 100 * np.mean([ours.astype(float) - theirs for ours, theirs in right], axis=0)  # (images,)
    value, half = float(each.mean()), 1.96 * float(each.std(ddof=1)) / len(each) ** 0.5
    return f"{value:+.2f}", f"[{value - half:+.2f}, {value + half:+.2f}]"


def _contender(row: dict[str, Any], rates: list[str]) -> list[str]:
    after = best(row)
    behind = f"{after['minus_unpruned']['value']:+.2f}" if "minus_unpruned" in after else ""
    return [f"{row['macs'] / 1e6:.1f}", top1(row["untuned"]), *(top1(row["tuned"][rate]) for rate in rates), behind]


_DONE = {
    "resnet20": (
        "ResNet-20",
        " Made when a higher rate had to be clearly better ([24](adr/0024-trying-the-rate.md)).",
    ),
    "vgg_bn": (
        "VGG with BatchNorm, ThiNet-GAP",
        " Made on 2026-11-21; fine-tuning is another one since ([31](adr/0031-the-original-trained-on-teaches.md)).",
    ),
}


def _end_to_end() -> Iterator[str]:
    yield from (
        "## As a user has it",
        "",
        "`build` from trained weights to engines, its table. Widths are multiples of what suits the target (of fewer",
        "where layers are narrow), unless `--round-to 1` says that they need not be, as they are not above; rates are",
        "tried and variants chosen on held-out training images. *Faster* is measured in turn with the original.",
        "`benchmarks/end_to_end.py`",
        "",
    )
    for network, (title, since) in _DONE.items():
        if (path := RESULTS / f"end_to_end-{network}.json").exists():
            found = json.loads(path.read_text("utf-8"))
            rows, steps = found["table"]["rows"], found["table"]["ledger"]
            runtimes = list(rows[0]["engines"])
            asked = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in found["options"].items())
            passed = f"{sum(hop['passed'] for hop in found['parity'])} of {len(found['parity'])} parity hops passed"
            yield from (f"**{title}**; {asked}; {passed}.{since}", "")
            yield from head("", ["top-1 [95 %]", "parameters", "MFLOPs", *(f"{each}, × faster" for each in runtimes)])
            for row in rows:
                engines = row["engines"].values()
                faster = [f"{each['speedup']:.2f}" if each["speedup"] else "" for each in engines]
                yield line(
                    row["label"],
                    [_mean([row["figures"]], "top-1"), f"{row['parameters']:,}", f"{row['flops'] / 1e6:.1f}", *faster],
                )
            yield ""
            for step in steps:
                yield f"- {step['network']}, {step['step']}: {step['figures']['top-1']['value']:.2f}"
            yield ""


def _photos() -> Iterator[str]:
    if rows := kept("photos", quick=False):
        rates = list(rows["unpruned"]["tuned"])
        yield from (
            "## SqueezeNet v1.1 on photos",
            "",
            "Ten of its thousand ImageNet classes, 1,000 photos to train on, 400 to test (intervals of",
            "±4 points), five epochs at either rate. `benchmarks/photos.py`",
            "",
            *head("", ["MMAC", "top-1 without training", *(f"fine-tuned at {rate}" for rate in rates)]),
        )
        for name, row in rows.items():
            after = (top1(row["tuned"][rate]) for rate in rates)
            yield line(name, [f"{row['macs'] / 1e6:.0f}", top1(row["untuned"]), *after])


if __name__ == "__main__":
    main()
