"""Weights, FLOPs and times of the papers' networks, ours beside theirs.

Weights and FLOPs by the papers' rule; forward and backward time per batch of 224×224 images in training mode, all
networks in turn in one run, with fresh weights (time does not depend on them). The papers' times are of a Tesla M40 in
Caffe: compare speed-ups, not milliseconds.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from _papers import ALSO, COSTS
from _record import keep
from rich.console import Console
from rich.table import Table
from torch import nn

from thinet_deploy.counting import count
from thinet_deploy.models.loading import build_model
from thinet_deploy.on_device import samples
from thinet_deploy.timing.torch_latency import measure_torch
from thinet_deploy.timing.torch_modes import Mode


def networks(names: list[str], shape: tuple[int, int, int] | None) -> dict[str, nn.Module]:
    """With fresh weights, 1,000 classes, for their own input or another."""
    return {name: build_model(name, input_shape=shape, num_classes=1000, seed=0) for name in names}


def costs(name: str, batch: int, rounds: int, device: str, mode: Mode, *, quick: bool) -> None:
    """Measure a table, keep it with raw samples, print it."""
    printed = COSTS[name]
    models = networks(list(printed), (3, 64, 64) if quick else None)
    shapes = {each: tuple(model.input_shape) for each, model in models.items()}  # type: ignore[arg-type]
    size = (3, 64, 64) if quick else (3, 224, 224)
    first = next(iter(printed))
    # SqueezeNet takes 227×227 where its FLOPs are counted, and any size when it is timed beside the others.
    timed = {("original" if each == first else each): model for each, model in models.items()}
    found = measure_torch(timed, size, batch=batch, rounds=rounds, device=device, mode=mode)
    times = {row.model: row for row in found}
    rows: dict[str, Any] = {}
    for each, model in models.items():
        row = times["original" if each == first else each]
        rows[each] = {"count": asdict(count(model, shapes[each])), "times": asdict(row), "printed": printed[each]}
        for part in ("forward", "backward"):
            base, own = (getattr(times[key], part).rounds_ms for key in ("original", row.model))
            rows[each][f"{part}_speedup"] = samples.ratio_interval(base, own)
    facts = {"batch": batch, "size": size, "device": device, "mode": mode, "threads": torch.get_num_threads()}
    where = "" if (device, mode) == ("cpu", "eager") else f"-{device}-{mode}".replace(":", "")
    print(keep(f"paper_tables-{name}{where}", {**facts, "rows": rows}, quick=quick))
    show(
        f"{name}: batches of {batch} at {size[1]}×{size[2]}, torch on {device}, {mode}, threads: {facts['threads']}",
        rows,
    )


def show(title: str, rows: dict[str, Any]) -> None:
    """Ours, and the papers' in columns of their own."""
    theirs = ("top-1/top-5, paper", "#Param, paper", "#FLOPs, paper", "f./b. (×), paper")
    table = Table("network", "#Param", "#FLOPs", "f. (ms)", "b. (ms)", "f. (×)", "b. (×)", *theirs)
    base = next(iter(rows.values()))["printed"][4]
    for model, row in rows.items():
        label, accuracy, parameters, flops, paper = row["printed"]
        speed = f"{base[0] / paper[0]:.2f}×/{base[1] / paper[1]:.2f}×" if base and paper else "-"
        medians = (f"{row['times'][part]['summary']['median_ms']:.0f}" for part in ("forward", "backward"))
        ratios = ("{:.2f} ({:.2f}-{:.2f})".format(*row[f"{part}_speedup"]) for part in ("forward", "backward"))
        counts = f"{row['count']['parameters'] / 1e6:.2f}M", f"{row['count']['flops'] / 1e9:.2f}B"
        measured = [*counts, *medians, *ratios]
        for who, top in ((label, accuracy), *([ALSO[model]] if model in ALSO else [])):
            table.add_row(who, *measured, top, parameters, flops, speed)
    table.title = title
    Console(width=190).print(table)
