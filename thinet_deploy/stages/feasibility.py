"""The stages of `prune --feasibility`: error curves from one pass over the data, and what budgets would cost."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import read_json, write_json
from ..errors import InputError
from ..options import Options
from ..pruning.allocation import Costs, Curve, allocate, with_budget
from ..pruning.oneshot import Method, weigh
from ..pruning.sweep import FACTORS, point, sweep
from ..reports.plots import feasibility_plot
from .prune import calibration, graph_of, groups_of
from .tools import Tools
from .wish import branches_of, cost_of, counted, wish_of

CURVES, POINTS, PLOT = "curves.json", "feasibility.json", "feasibility.svg"
# Options that the curves depend on, beside the network, the images and the seed; a budget is not among them.
OF_CURVES = {"ignore", "prune_shortcuts", "calibration_images"}


def check_curves(options: Options) -> None:
    """Raise InputError if these options choose filters in a way that has no error curves, or none."""
    if options.selection != "elimination":
        how = f"--method {options.selection}" if options.method else f"--recipe {options.recipe}"
        raise InputError(
            f"--feasibility reads the error curves of the elimination, and with {how} there is none.",
            hint="Leave out --recipe and --method.",
        )
    if options.timed:
        asked = "--latency" if options.latency else "--speedup"
        raise InputError(
            f"--feasibility shows what budgets of multiply-accumulates cost, and {asked} is one of time.",
            hint=f"Leave one of them out; `thinet-deploy prune {asked} …` is refused when it cannot be reached.",
        )
    if options.fixed:
        raise InputError(
            f"--feasibility shows what widths could be chosen, and --preset {options.preset} says them all.",
            hint="Leave one of them out; `thinet-deploy count` says what the preset costs.",
        )


def asks(options: Options) -> bool:
    """Whether the user gave a budget of their own."""
    return bool({"keep", "macs", "size"} & options.model_fields_set)


def weighed(tools: Tools, dense_folder: Path, folder: Path) -> None:
    """What every narrower width of every group would cost."""
    original = tools.load(dense_folder)
    graph = graph_of(tools, original)
    groups = groups_of(tools, graph)
    sample, _ = calibration(tools)
    curves = weigh(original, graph, groups, sample, tools.job.input_shape, Method(), tools.progress).curves
    written = {name: {"widths": curve.widths.tolist(), "error": curve.error.tolist()} for name, curve in curves.items()}
    write_json(folder / CURVES, {"images": len(sample.chosen), "groups": written})


def solved(tools: Tools, dense_folder: Path, curves_folder: Path, folder: Path) -> None:
    """The networks that could be had, the one that was asked for, and a picture."""
    job, options, original = tools.job, tools.job.options, tools.load(dense_folder)
    graph = graph_of(tools, original)
    groups = groups_of(tools, graph)
    wish = wish_of(tools, original, graph, groups)
    costs, stored = Costs(*counted(job, original, graph), groups), read_json(curves_folder / CURVES)
    curves = {name: Curve(np.array(each["widths"]), np.array(each["error"])) for name, each in stored["groups"].items()}
    asked, branches, whole = None, branches_of(tools, graph, groups, wish), cost_of(original, graph)
    if asks(options):
        widths = allocate(costs, groups, curves, with_budget(costs, groups, wish), branches)
        asked = point(options.widths, whole, costs, curves, widths)
    # Each budget would get a grid of its own, as coarse as it allows: the sweep shows what a fine one gives.
    points = sweep(whole, costs, groups, curves, replace(wish, grid=1) if wish.soft else wish, branches)
    # The narrowest widths are often so far off that the rest of a picture would be squashed.
    drawn = len(points) - (points[-1].fewer > FACTORS[-1] and len(points) > 3)
    feasibility_plot(folder / PLOT, points[:drawn], asked, job.model_name)
    report: dict[str, Any] = {
        "model": job.model_name,
        "images": stored["images"],
        "points": [asdict(each) for each in points],
        "drawn": drawn,
        "asked": asdict(asked) if asked else None,
        "producers": {group.name: list(group.producers) for group in groups},
    }
    write_json(folder / POINTS, report)
