"""docs/papers.md from the results of paper_tables.py: the papers' tables, ours beside theirs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _markdown import head, line, top1
from _paper_criteria import EPOCHS, METHODS, NAME, RATE, RATIOS
from _papers import ALSO, COSTS, CRITERIA, FILTER_PRUNING, TRANSFER
from _record import kept

from thinet_deploy.reports.table import Table
from thinet_deploy.reports.texts import to_markdown

PAGE = Path(__file__).parents[1] / "docs" / "papers.md"
TITLES = {"vgg16": "VGG-16", "resnet50": "ResNet-50"}
AT_HAND = {"vgg16": "the CIFAR VGG without BatchNorm in place of VGG-16", "resnet50": "ResNet-20 in place of ResNet-50"}
HEAD = """# The papers' tables, measured

Made by `benchmarks/papers_page.py` from the results of `benchmarks/paper_tables.py` in `benchmarks/results/`. What is
marked *paper* is what the ThiNet papers print, on ImageNet and other images that cannot be had here.
"""


def main() -> None:
    """Write the page."""
    parts = [part for name in COSTS for part in (*_costs(name), *_accuracy(name))]
    PAGE.write_text("\n".join([HEAD, *parts, *_criteria(), *_transfer()]) + "\n", "utf-8")


def _costs(name: str) -> Iterator[str]:
    yield from (f"## {TITLES[name]}", "")
    if not (rows := kept(f"paper_tables-{name}", quick=False)):
        return
    theirs = ["#Param, paper", "#FLOPs, paper", "f./b., paper"]
    yield from (
        "Weights and FLOPs by the papers' rule. Forward alone and backward alone of a training step, batches of 32",
        "at 224×224, all networks in turn on one thread of a CPU, medians with the intervals of their ratios;",
        "theirs are of a Tesla M40.",
        f"`benchmarks/paper_tables.py --table {name} --only costs`",
        "",
        *head("", ["#Param", "#FLOPs", "f./b. (s)", "faster, f.", "faster, b.", *theirs]),
    )
    base = next(iter(rows.values()))["printed"][4]
    for model, row in rows.items():
        label, _, parameters, flops, paper = row["printed"]
        speed = f"{base[0] / paper[0]:.2f}×/{base[1] / paper[1]:.2f}×" if base and paper else ""
        medians = "/".join(
            f"{row['times'][part]['summary']['median_ms'] / 1e3:.2f}" for part in ("forward", "backward")
        )
        ratios = ["{:.2f}× [{:.2f}, {:.2f}]".format(*row[f"{part}_speedup"]) for part in ("forward", "backward")]
        counts = [f"{row['count']['parameters'] / 1e6:.2f}M", f"{row['count']['flops'] / 1e9:.2f}B"]
        for who in (label, *([ALSO[model][0]] if model in ALSO else [])):
            yield line(who, [*counts, medians, *ratios, parameters, flops, speed])
    yield ""


def _accuracy(name: str) -> Iterator[str]:
    imagenet = kept(f"paper_tables-{name}-accuracy-imagenet", quick=False)
    if not (rows := imagenet or kept(f"paper_tables-{name}-accuracy", quick=False)):
        return
    at_hand = f"on CIFAR-10 (JPEG): {AT_HAND[name]}, pruned at once, two epochs of fine-tuning"
    said = "on ImageNet" if imagenet else at_hand
    printed = ", ".join(f"{label} {accuracy}" for label, accuracy, *_ in COSTS[name].values())
    yield from (f"Whole recipes through `thinet-deploy build`, {said}. Paper, top-1/top-5 on ImageNet: {printed}.", "")
    for label, row in rows.items():
        yield from (f"**{label}**", "", to_markdown([Table.from_json(row["table"])]))
        passed = sum(hop["passed"] for hop in row["parity"])
        yield from (f"- Parity: {passed} of {len(row['parity'])} hops passed.", "")


def _criteria() -> Iterator[str]:
    if not (rows := kept(NAME, quick=False)):
        return
    base, ratios = rows["original, r=1.0"], [str(ratio) for ratio in sorted(RATIOS, reverse=True)]
    yield from (
        "## Criteria",
        "",
        "Every layer but the last keeps a share r of its filters, chosen by each criterion: the CIFAR VGG without",
        f"BatchNorm ({top1(base['untuned'])} before), all layers at once, before training and after {EPOCHS} epoch on",
        f"labels alone at a rate of {RATE:g}, which leaves the original where it is; what was hurt most would come",
        "back further at a higher one. Theirs is VGG-16-GAP on CUB-200, layer by layer with fine-tuning in between.",
        "`benchmarks/paper_tables.py --table criteria`",
        "",
        f"![top-1 against FLOPs left](../benchmarks/results/{NAME}.svg)",
        "",
    )
    for state, title in (("untuned", "before training"), ("tuned", f"after {EPOCHS} epoch")):
        yield from head(title, [f"r={ratio}" for ratio in ("1.0", *ratios)])
        for name in METHODS:
            mine = [rows.get(f"{name}, r={ratio}", {}).get(state) for ratio in ratios]
            yield line(name, [top1(each) for each in (base[state], *mine)])
        yield ""
    yield from head("paper", [f"r={ratio}" for ratio in ("1.0", *ratios)])
    yield from (line(name, [f"{each:.2f}" for each in found]).replace("nan", "") for name, found in CRITERIA.items())
    yield from ("", "Filter pruning at r = 0.5, top-1 against each network's own original:", "")
    yield from head("", ["change", "↓#Param / ↓#FLOPs", "whose"])
    for name in METHODS:
        if row := rows.get(f"{name}, r=0.5"):
            change = row["tuned"]["top1"]["value"] - base["tuned"]["top1"]["value"]
            smaller = f"{base['parameters'] / row['parameters']:.2f}×/{base['flops'] / row['flops']:.2f}×"
            yield line(name, [f"{change:+.2f}", smaller, f"measured: CIFAR VGG, {EPOCHS} epoch"])
    for name, (change, smaller) in FILTER_PRUNING.items():
        yield line(name, [change, smaller, "paper: VGG-16, ImageNet, top-1/top-5"])
    yield ""


def _transfer() -> Iterator[str]:
    if not (rows := kept("paper_tables-transfer", quick=False)):
        return
    yield from (
        "## Transfer",
        "",
        "A VGG with BatchNorm trained on CIFAR-10, pruned to half of its multiply-accumulates there and fine-tuned to",
        "other images; fine-tuned first and pruned there; the thin architecture from scratch; each 20 epochs on the",
        "target, at 32×32 in colour. Beside them small networks that were not pruned, as many epochs: AlexNet (trained",
        "on CIFAR-10, at 67×67) and SqueezeNet v1.1 (ImageNet weights, at 227×227).",
        "`benchmarks/paper_tables.py --table transfer`",
        "",
    )
    for target, row in rows.items():
        yield from (f"**{target}**", "")
        if "table" in row:
            yield to_markdown([Table.from_json(row["table"])])
        yield from head("not pruned, fine-tuned", ["top-1 (95 %)"])
        yield from (line(name, [_interval(each["top1"])]) for name, each in row["small"].items())
        yield ""
    yield from head("paper", ["CUB-200", "Indoor-67"])
    yield from (line(name, [f"{birds:.2f}", f"{indoor:.2f}"]) for name, (birds, indoor) in TRANSFER.items())


def _interval(top1: dict[str, Any]) -> str:
    return f"{top1['value']:.2f} [{top1['low']:.2f}, {top1['high']:.2f}]"


if __name__ == "__main__":
    main()
