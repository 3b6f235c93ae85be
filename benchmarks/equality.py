"""The same however it is computed: batch size, number of processes, and a training that was interrupted.

The given ResNet-20 on CIFAR-10, pruned to half of its multiply-accumulates (elimination and full refit, widths
allocated; ThiNet and ŵ, half of each layer's filters) with batches of 100, 32 and 1 images in one process, and of 100
in two (`torchrun`, this script again). Every channel's decision is compared with the first of these: it may differ only
where floats nearly tie, and is counted. Then an epoch over the calibration images, ended in its second half and gone
on with from the checkpoint of its first: two epochs' weights, compared bit by bit with those of two without a break.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _ours import TUNING
from _record import keep
from _trained import cifar10, missing, trained_resnet20
from rich.console import Console
from rich.table import Table
from torch import nn

from thinet_deploy.counting import count
from thinet_deploy.data.dataset import Dataset
from thinet_deploy.parallel import join, leave
from thinet_deploy.pruning.allocation import Costs, Curve, allocate
from thinet_deploy.pruning.budget import Widths, Wish
from thinet_deploy.pruning.calibration import Sample
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.oneshot import Method, prune_once
from thinet_deploy.pruning.trace import example_inputs, named_tensors
from thinet_deploy.store import Checkpoint
from thinet_deploy.training import train

METHODS = {"elimination, full, allocated": Method(), "thinet, scale": Method("thinet", "scale")}
BATCHES = (100, 32, 1)
IMAGES = 300


def decisions(data: Dataset, batch: int, images: int) -> dict[str, dict[str, Any]]:
    """Method → whether each channel stays, the widths, and the weights' sums, as JSON knows them."""
    model, shape, found = trained_resnet20(), data.preprocess.input_shape, dict[str, dict[str, Any]]()
    graph = channel_graph(model, example_inputs(model, shape))
    groups = tuple(group for group in graph.groups if not group.shortcut)
    costs, wish = Costs(dict(named_tensors(model)), graph, groups), Wish(macs=count(model, shape).macs / 2)
    chosen = np.asarray(data.train.sample(images, seed=0, stage="calibration"))

    def widths(curves: Mapping[str, Curve]) -> Widths:
        half = {group.name: len(group.channels) // 2 for group in groups}
        return allocate(costs, groups, curves, wish) if curves else half

    for name, method in METHODS.items():
        start = time.perf_counter()
        done = prune_once(model, graph, groups, widths, Sample(data.train, chosen, batch, 0), shape, method)
        weights = torch.cat([each.detach().flatten() for each in done.model.parameters()])
        found[name] = {
            "kept": done.kept.tolist(),
            "widths": done.widths,
            "weights": weights.double().tolist(),
            "seconds": time.perf_counter() - start,
        }
    return found


def in_two_processes(images: int) -> dict[str, dict[str, Any]]:
    """`decisions` of this script in two processes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "two.json")
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__]
        subprocess.run([*launch, "--member", str(path), "--images", str(images)], check=True)
        found: dict[str, dict[str, Any]] = json.loads(path.read_text("utf-8"))
        return found


class _StoppedError(Exception):
    """Stands for Ctrl-C, or a machine that goes down."""


def interrupted(data: Dataset, images: int) -> dict[str, Any]:
    """Whether two epochs with a break in the second give the weights of two without."""
    chosen = data.train.view(data.train.sample(images, seed=0, stage="calibration"))
    recipe = replace(TUNING, epochs=2, precision="fp32")

    def run(model: nn.Module, checkpoint: Checkpoint | None, stop_at: int | None = None) -> nn.Module:
        def progress(stage: str, done: int, total: int, note: str = "") -> None:
            del stage, total, note
            if stop_at is not None and done >= stop_at:
                raise _StoppedError

        train(model, chosen, recipe, seed=0, stage="equality", checkpoint=checkpoint, progress=progress)
        return model

    original, steps = trained_resnet20(), 2 * -(-images // recipe.batch)
    whole = run(copy.deepcopy(original), None)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint(Path(folder, "state.safetensors"), "equality")
        stopped = False
        try:
            run(copy.deepcopy(original), checkpoint, stop_at=3 * steps // 4)
        except _StoppedError:
            stopped = True
        again = run(copy.deepcopy(original), checkpoint)
    pairs = zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
    before = zip(original.state_dict().values(), again.state_dict().values(), strict=True)
    return {
        "steps": steps,
        "stopped_after": 3 * steps // 4 if stopped else None,
        "tensors_that_differ": sum(not torch.equal(a, b) for a, b in pairs),
        "tensors_that_were_trained": sum(not torch.equal(a, b) for a, b in before),
    }


def compare(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every row against the first, method by method."""
    first, *others = rows
    found = {}
    for name in others:
        for method, row in rows[name].items():
            base = rows[first][method]
            a, b = (np.asarray(each["weights"]) for each in (base, row))
            found[f"{method}: {name} against {first}"] = {
                "decisions": len(base["kept"]),
                "decisions_that_differ": int(np.sum(np.asarray(base["kept"]) != np.asarray(row["kept"]))),
                "widths_that_differ": sum(base["widths"][each] != row["widths"][each] for each in base["widths"]),
                "largest_difference_of_weights": float(np.abs(a - b).max() / np.abs(a).max()),
            }
    return found


def main() -> None:
    """All of it; with --member one of two processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images: shows that it works")
    parser.add_argument("--images", type=int, default=IMAGES, help="to calibrate with (default %(default)s)")
    parser.add_argument("--member", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if absent := missing():
        print(f"equality: skipped, {absent}")
        return
    data, images = cifar10(), 40 if given.quick else given.images
    if given.member:
        found = decisions(data, BATCHES[0], images)
        if not join().rank:
            given.member.write_text(json.dumps(found), "utf-8")
        leave()
        return
    rows = {f"batches of {batch}": decisions(data, batch, images) for batch in BATCHES}
    rows["two processes"] = in_two_processes(images)
    compared, broken = compare(rows), interrupted(data, images)
    seconds = {name: {method: row["seconds"] for method, row in each.items()} for name, each in rows.items()}
    kept = {
        name: {method: {"kept": row["kept"], "widths": row["widths"]} for method, row in each.items()}
        for name, each in rows.items()
    }
    samples = {"images": images, "compared": compared, "interrupted": broken, "seconds": seconds, "chosen": kept}
    path = keep("equality", samples, quick=given.quick)
    table = Table("what", "decisions", "differ", "widths that differ", "weights differ by, of the largest")
    for name, row in compared.items():
        differ, widths = row["decisions_that_differ"], row["widths_that_differ"]
        cells = (row["decisions"], differ, widths, f"{row['largest_difference_of_weights']:.1e}")
        table.add_row(name, *map(str, cells))
    console = Console(width=140)
    console.print(table)
    console.print(f"Interrupted: {broken}\nKept in {path}", highlight=False)


if __name__ == "__main__":
    main()
