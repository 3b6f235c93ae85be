"""Whether residual branches should vanish: ResNet-20 with and without, at several budgets, by held-out training images.

No training but the refit in closed form. The weights given have seen the held-out images, which took no part in the
calibration; test images are not looked at. Rows are kept as they come.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from _judge import judged, percent, unpack
from _record import keep, kept
from _trained import cifar10, few, missing, trained_resnet20

from thinet_deploy.data.dataset import Dataset
from thinet_deploy.intervals import difference_interval
from thinet_deploy.pruning.allocation import Costs, allocate
from thinet_deploy.pruning.budget import Widths, Wish, may_vanish
from thinet_deploy.pruning.calibration import Sample
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.oneshot import Method, prune_once
from thinet_deploy.pruning.retrace import settled_plan
from thinet_deploy.pruning.surgery import apply
from thinet_deploy.pruning.trace import example_inputs, named_tensors

BUDGETS = (1.5, 2.0, 3.0, 4.0, 6.0)
CALIBRATION, HELD_OUT = 1000, 5000


def row(data: Dataset, times: float, *, vanishing: bool, calibration: int) -> dict[str, Any]:
    """ResNet-20 with so many times fewer multiply-accumulates."""
    model = trained_resnet20()
    inputs = example_inputs(model, data.preprocess.input_shape)
    graph = channel_graph(model, inputs)
    groups = tuple(group for group in graph.groups if not group.shortcut)
    costs = Costs(dict(named_tensors(model)), graph, groups)
    wish = Wish(macs=costs({group.name: len(group.channels) for group in groups})[0] / times)
    branches = may_vanish(graph, groups, wish) if vanishing else ()
    chosen = data.train.sample(calibration, seed=0, stage="calibration")
    predicted: list[float] = []

    def widths(curves: Any) -> Widths:
        found = allocate(costs, groups, curves, wish, branches)
        predicted.append(sum(curve.at(found[name]) for name, curve in curves.items()))
        return found

    sample = Sample(data.train, torch.as_tensor(chosen).numpy(), 100, 0)
    done = prune_once(model, graph, groups, widths, sample, data.preprocess.input_shape, Method())
    plan = settled_plan(model, graph, done.kept, inputs)
    vanished = [branch.end for branch in graph.vanished(done.kept)]
    return {**judged(apply(plan, done.model), data), "vanished": vanished, "error": predicted[0], "widths": done.widths}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description="ResNet-20 with and without branches that vanish.")
    parser.add_argument("--quick", action="store_true", help="one budget, few images: shows that it works")
    quick = parser.parse_args().quick
    if absent := missing():
        print(f"branches: skipped, {absent}")
        return
    data = few(cifar10(), 1000) if quick else cifar10()
    fit, held_out = data.train.split(HELD_OUT / 50_000, 0)
    data, rows = replace(data, train=fit, test=held_out), kept("branches", quick=quick)
    for times in BUDGETS[-1:] if quick else BUDGETS:
        for vanishing in (False, True):
            name = f"{times:g}x, {'branches may vanish' if vanishing else 'as it was'}"
            if name not in rows:
                calibration = 100 if quick else CALIBRATION
                rows[name] = row(data, times, vanishing=vanishing, calibration=calibration)
                keep("branches", {"rows": rows}, quick=quick)
            each = rows[name]
            print(f"{name}: {percent(each)}, predicted error {each['error']:.4f}, gone: {each['vanished']}", flush=True)
        without, with_it = (rows[f"{times:g}x, {kind}"] for kind in ("as it was", "branches may vanish"))
        gain = difference_interval(unpack(with_it["right"], len(held_out)), unpack(without["right"], len(held_out)))
        print(f"  gain {gain.value:+.2f} points [{gain.low:+.2f}, {gain.high:+.2f}]", flush=True)


if __name__ == "__main__":
    main()
