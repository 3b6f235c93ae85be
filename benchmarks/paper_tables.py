"""The papers' tables: our columns measured here, theirs beside them and marked as theirs (thinet.md, section 4).

`--table vgg16` and `--table resnet50`: weights and FLOPs by the papers' rule, and forward / backward time per batch of
224×224 images in training mode, all networks in turn in one run, with fresh weights (time does not depend on them). The
papers' times are of a Tesla M40 in Caffe: compare speed-ups, not milliseconds. Their accuracies are theirs; ours would
take ImageNet, which is not here.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch
from _record import keep
from rich.console import Console
from rich.table import Table
from torch import nn

from thinet_deploy import samples
from thinet_deploy.counting import count
from thinet_deploy.models.loading import build_model
from thinet_deploy.torch_latency import measure_torch

# --model → what the papers' table calls it, and what it prints there: top-1/top-5, #Param, #FLOPs, f./b. in ms.
Printed = tuple[str, str, str, str, tuple[float, float] | None]
TABLES: dict[str, dict[str, Printed]] = {
    "vgg16": {
        "vgg16": ("Original", "68.34/88.44", "138.34M", "30.94B", (189.92, 407.56)),
        "thinet-conv": ("ThiNet-Conv", "69.80/89.53", "131.44M", "9.58B", (76.71, 152.05)),
        "thinet-gap": ("ThiNet-GAP", "67.34/87.92", "8.32M", "9.34B", (71.73, 145.51)),
        "thinet-tiny": ("ThiNet-Tiny", "59.34/81.97", "1.32M", "2.01B", (29.51, 55.83)),
        "squeezenet": ("SqueezeNet", "57.67/80.39", "1.24M", "1.72B", (37.30, 68.62)),
    },
    "resnet50": {
        "resnet50-caffe": ("Original", "72.88/91.14", "25.56M", "7.72B", None),
        "thinet-70": ("ThiNet-70", "72.04/90.67", "16.94M", "4.88B", None),
        "thinet-50": ("ThiNet-50", "71.01/90.02", "12.38M", "3.41B", None),
        "thinet-30": ("ThiNet-30", "68.42/88.30", "8.66M", "2.20B", None),
    },
}


def networks(names: list[str], shape: tuple[int, int, int] | None) -> dict[str, nn.Module]:
    """With fresh weights, 1,000 classes, for their own input or another."""
    return {name: build_model(name, input_shape=shape, num_classes=1000, seed=0) for name in names}


def run(name: str, batch: int, rounds: int, device: str, *, quick: bool) -> None:
    """Measure a table, keep it with raw samples, print it."""
    printed = TABLES[name]
    models = networks(list(printed), (3, 64, 64) if quick else None)
    shapes = {each: tuple(model.input_shape) for each, model in models.items()}  # type: ignore[arg-type]
    size = (3, 64, 64) if quick else (3, 224, 224)
    first = next(iter(printed))
    # SqueezeNet takes 227×227 where its FLOPs are counted, and any size when it is timed beside the others.
    timed = {("original" if each == first else each): model for each, model in models.items()}
    times = {row.model: row for row in measure_torch(timed, size, batch=batch, rounds=rounds, device=device)}
    rows: dict[str, Any] = {}
    for each, model in models.items():
        row = times["original" if each == first else each]
        rows[each] = {"count": asdict(count(model, shapes[each])), "times": asdict(row), "printed": printed[each]}
        for part in ("forward", "backward"):
            base, own = (getattr(times[key], part).rounds_ms for key in ("original", row.model))
            rows[each][f"{part}_speedup"] = samples.ratio_interval(base, own)
    facts = {"batch": batch, "size": size, "device": device, "threads": torch.get_num_threads()}
    print(keep(f"paper_tables-{name}", {**facts, "rows": rows}, quick=quick))
    show(name, rows)


def show(name: str, rows: dict[str, Any]) -> None:
    """Ours, and the papers' in columns of their own."""
    theirs = ("top-1/top-5, paper", "#Param, paper", "#FLOPs, paper", "f./b. (×), paper")
    table = Table("network", "#Param", "#FLOPs", "f. (ms)", "b. (ms)", "f. (×)", "b. (×)", *theirs)
    base = next(iter(rows.values()))["printed"][4]
    for row in rows.values():
        label, accuracy, parameters, flops, paper = row["printed"]
        speed = f"{base[0] / paper[0]:.2f}×/{base[1] / paper[1]:.2f}×" if base and paper else "-"
        medians = (f"{row['times'][part]['summary']['median_ms']:.0f}" for part in ("forward", "backward"))
        ratios = ("{:.2f} ({:.2f}-{:.2f})".format(*row[f"{part}_speedup"]) for part in ("forward", "backward"))
        counts = f"{row['count']['parameters'] / 1e6:.2f}M", f"{row['count']['flops'] / 1e9:.2f}B"
        table.add_row(label, *counts, *medians, *ratios, accuracy, parameters, flops, speed)
    table.title = name
    Console(width=180).print(table)


def main() -> None:
    """One table, or all."""
    parser = argparse.ArgumentParser(description="The papers' tables, measured.")
    parser.add_argument("--quick", action="store_true", help="small images, batch 2: shows that it works")
    parser.add_argument("--table", choices=list(TABLES), help="one of them")
    parser.add_argument("--batch", type=int, default=32, help="images per pass")
    parser.add_argument("--rounds", type=int, default=7, help="passes of each network that count")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    given = parser.parse_args()
    for name in [given.table] if given.table else TABLES:
        run(name, 2 if given.quick else given.batch, given.rounds, given.device, quick=given.quick)


if __name__ == "__main__":
    main()
