"""Every filter that can go, over the model zoos: half of each group is removed, the rest proved to be the same network.

Random weights, inputs of 64×64 (other sizes stand in the table), all groups with residual streams, random channels.
Results are written after every model, so a run that was stopped goes on where it was; docs/zoo.md is made from them.
"""

from __future__ import annotations

import argparse
import fcntl
import fnmatch
import importlib.util
import json
import os
import re
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _record import RESULTS, keep
from _zoo_nets import FAMILIES, NEEDS, QUICK, make
from _zoo_page import cells, page, sentence, show
from numpy.typing import NDArray
from torch import fx, nn

from thinet_deploy.artifact import hash_json
from thinet_deploy.environment import fingerprint
from thinet_deploy.errors import ModelError
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.graph import STAYS, ChannelGraph
from thinet_deploy.pruning.labels import FIXED, Site
from thinet_deploy.pruning.proof import prove
from thinet_deploy.pruning.retrace import RetraceError, settled_plan
from thinet_deploy.pruning.surgery import apply
from thinet_deploy.pruning.trace import arguments, named_tensors, operation, owner, shape

PAGE = Path(__file__).parent.parent / "docs" / "zoo.md"
OUTPUT = "its filters are outputs of the network"
# Modules of the pruning that decide a result.
_CODE = (
    *("attributes", "branches", "calls", "discovery", "graph", "grouping", "label_pass", "labels", "layer_rules"),
    *("plan", "proof", "readers", "retrace", "rules", "shape_rules", "shares", "surgery", "trace", "watch"),
)


def half(graph: ChannelGraph) -> NDArray[np.bool_]:
    """Random channels: half of the steps of every group, at least one, the same share in every cell."""
    rng, kept = np.random.default_rng(0), np.zeros(graph.channels, dtype=bool)
    for group in graph.groups:
        step = max(1, group.steps // 2)
        for cell in np.unique(group.cells):
            members = group.channels[group.cells == cell]
            kept[rng.permutation(members)[: len(members) * step // group.steps]] = True
    return kept


def measure(name: str) -> dict[str, Any]:
    """Prune one network by half and prove it."""
    model, inputs = make(name)
    row: dict[str, Any] = {"input": list(inputs[0].shape[1:])}
    start = time.perf_counter()
    try:
        graph = channel_graph(model, tuple(torch.zeros_like(each) for each in inputs))
        row["graph_seconds"] = time.perf_counter() - start
        row |= shares(model, graph)
        start = time.perf_counter()
        plan = settled_plan(model, graph, half(graph), inputs)
        thin = apply(plan, model)
        row["surgery_seconds"] = time.perf_counter() - start
    except (ModelError, RetraceError) as error:
        what = getattr(error, "what", "") or str(error)
        return row | {"verdict": "refused", "why": what, "line": getattr(error, "line", "")}
    row["macs_after"] = (
        sum(graph.work.get(key, 0) * each.numel() for key, each in named_tensors(thin)) + computed(graph)[1]
    )
    start = time.perf_counter()
    proof = prove(model, graph, plan, inputs, seed=0)
    row["proof_seconds"] = time.perf_counter() - start
    row |= {"verdict": "passed" if proof.passed else "wrong", "error": proof.error, "tolerance": proof.tolerance}
    return row | {"place": proof.place}


def shares(model: nn.Module, graph: ChannelGraph) -> dict[str, Any]:
    """How much of a network could go, and why the rest cannot."""
    draft, tensors = graph.draft, dict(named_tensors(model))
    free: Counter[str] = Counter()
    stays: dict[str, list[float]] = {}
    for axis in graph.axes:
        stays.setdefault(axis.site.parameter, []).append(float((axis.channels == STAYS).mean()))
        if axis.producer:
            free[axis.site.parameter] += int((axis.channels != STAYS).sum())
    computed_filters, computed_macs = computed(graph)
    layers = {site.parameter: len(draft.sites[site].labels) for site in draft.producers if site.parameter in graph.work}
    outputs = {key for key in layers if graph.whole.get(key.removesuffix(".weight")) == OUTPUT}
    filters = sum(number for key, number in layers.items() if key not in outputs) + computed_filters
    macs = {key: positions * tensors[key].numel() for key, positions in graph.work.items()}
    touched = sum(each * (1 - float(np.prod(stays.get(key, [1.0])))) for key, each in macs.items())
    unexplained = [key for key in graph.work if not _explained(graph, key, layers, free)]
    reasons = Counter(
        re.sub(r"^\d+ of its \d+ filters: ", "", why) for key, why in graph.whole.items() if why != OUTPUT
    )
    total = sum(macs.values()) + computed_macs
    return {
        "filters": filters,
        "filters_free": sum(number for key, number in free.items() if key in layers and key not in outputs),
        "layers": len(layers) - len(outputs),
        "groups": len(graph.groups),
        "macs_before": total,
        "macs_free_share": touched / total,
        "whole": sum(reasons.values()),
        "reasons": dict(reasons.most_common()),
        "unexplained": unexplained,
    }


def _explained(graph: ChannelGraph, weight: str, layers: dict[str, int], free: Counter[str]) -> bool:
    """Whether all filters of a layer can go, or it is said why not; a depthwise layer's go with its inputs."""
    if weight in layers:
        return free[weight] == layers[weight] or bool(graph.whole.get(weight.removesuffix(".weight")))
    use = graph.draft.sites.get(Site(weight, 0))
    roots = {
        root for site in graph.draft.producers for root in graph.draft.roots(graph.draft.sites[site].labels).tolist()
    }
    if use is None:
        return False
    # FIXED: its inputs are nobody's filters (the image).
    return all(
        label == FIXED or graph.draft.reason(label) or graph.draft.find(label) in roots for label in use.labels.tolist()
    )


def computed(graph: ChannelGraph) -> tuple[int, int]:
    """Filters and multiply-accumulates of convolutions whose weights are computed: all of them stay."""
    filters: dict[str, int] = {}
    macs = 0
    for node in graph.trace.nodes:
        if not operation(node).startswith("conv"):
            continue
        weight = arguments(node)["weight"]
        if isinstance(weight, fx.Node) and not graph.trace.parameter(weight):
            filters[owner(node)] = shape(node)[1]
            macs += shape(node)[2:].numel() * shape(weight).numel()
    return sum(filters.values()), macs


def version() -> str:
    """12 hex digits of the code that decides a result, and of the libraries."""
    folder = Path(__file__).parent.parent / "thinet_deploy" / "pruning"
    installed = fingerprint()["packages"]
    packages = {name: installed.get(name) for name in ("torch", "torchvision", "timm")}
    code = {name: (folder / f"{name}.py").read_text("utf-8") for name in _CODE}
    return hash_json({"packages": packages, **code})[:12]


def stored(quick: bool) -> dict[str, Any]:
    """Rows of earlier runs, by network."""
    path = RESULTS / ("zoo-quick.json" if quick else "zoo.json")
    return json.loads(path.read_text("utf-8"))["rows"] if path.exists() else {}


def store(name: str, row: dict[str, Any], *, quick: bool) -> None:
    """Add a row; two processes may share the file."""
    folder = os.open(RESULTS, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        known = {each for names in FAMILIES.values() for each in names.split()}
        rows = {key: each for key, each in stored(quick).items() if key in known}
        keep("zoo", {"threads": torch.get_num_threads(), "rows": {**rows, name: row}}, quick=quick)
    finally:
        os.close(folder)


def main() -> None:
    """Measure what has no row yet; print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="five small networks: shows that it works")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="networks whose name fits, such as 'timm:dla*'")
    parser.add_argument("--again", action="store_true", help="measure them even if this version has done so")
    parser.add_argument("--any-version", action="store_true", help="keep rows of other versions of the code")
    parser.add_argument("--backwards", action="store_true", help="the last first, for a second process beside this one")
    parser.add_argument("--table", action="store_true", help="measure nothing; write the tables from what is there")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    code, names = version(), QUICK if given.quick else [name for line in FAMILIES.values() for name in line.split()]
    for name in [] if given.table else names[::-1] if given.backwards else names:
        row = stored(given.quick).get(name)
        done = row is not None and (given.any_version or row["version"] == code) and not given.again
        if done or not fnmatch.fnmatchcase(name, given.only):
            continue
        if missing := [each for each in NEEDS[name.partition(":")[0]] if importlib.util.find_spec(each) is None]:
            print(f"{name}: skipped, {missing[0]} is not installed")
            continue
        row = {**measure(name), "version": code}
        store(name, row, quick=given.quick)
        print(*cells(name, row), sep=" · ", flush=True)
    rows = stored(given.quick)
    show({name: rows[name] for name in names if name in rows})
    if not given.quick:
        PAGE.write_text(page(rows), encoding="utf-8")
    print(sentence(rows))


if __name__ == "__main__":
    main()
