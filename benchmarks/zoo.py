"""Every filter that can go, over the model zoos: half of each group is removed, the rest proved to be the same network.

Random weights, inputs of 64×64 (other sizes stand in the table), all groups with residual streams, random channels.
Results are written after every model, so a run that was stopped goes on where it was; docs/zoo.md is made from them.
"""

from __future__ import annotations

import argparse
import fcntl
import fnmatch
import functools
import importlib
import importlib.util
import json
import os
import re
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _record import RESULTS, keep
from _zoo_heads import HEADS
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
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
from thinet_deploy.pruning.trace import Inputs, arguments, named_tensors, operation, owner, shape

PAGE = Path(__file__).parent.parent / "docs" / "zoo.md"
OUTPUT = "its filters are outputs of the network"
_CODE = ("graph", "grouping", "labels", "rules", "discovery", "retrace", "plan", "surgery", "proof", "trace", "watch")

# Family → names; tv: torchvision, timm: timm, own: _zoo_heads.py.
FAMILIES = {
    "ResNet": (
        "tv:resnet18 tv:resnet50 timm:resnet26d timm:resnet33ts timm:resnetblur18 timm:resnetaa34d timm:resnet50_gn"
    ),
    "ResNet v2, BiT": "timm:resnetv2_50 timm:resnetv2_50x1_bit",
    "ResNeXt, Wide": "tv:resnext50_32x4d tv:wide_resnet50_2 timm:resnext26ts",
    "SE, ECA, GC, SK, attention": (
        "timm:seresnet18 timm:seresnet50 timm:seresnext26d_32x4d timm:legacy_seresnext26_32x4d "
        "timm:ecaresnet26t timm:eca_resnext26ts timm:gcresnet33ts timm:bat_resnext26ts timm:skresnet18 "
        "timm:skresnet50"
    ),
    "ResNeSt": "timm:resnest14d timm:resnest50d_4s2x40d",
    "Res2Net": "timm:res2net50_26w_4s timm:res2net50_14w_8s timm:res2next50 timm:dla60_res2net",
    "DenseNet": "tv:densenet121 timm:densenetblur121d timm:rdnet_tiny",
    "Inception, GoogLeNet": "tv:googlenet tv:inception_v3 timm:inception_v4 timm:inception_resnet_v2",
    "Xception": "timm:legacy_xception timm:xception41 timm:xception41p",
    "MobileNet v1–v4": (
        "timm:mobilenetv1_100 timm:mobilenetv1_125 tv:mobilenet_v2 timm:mobilenetv2_110d "
        "tv:mobilenet_v3_small tv:mobilenet_v3_large timm:mobilenetv3_rw timm:mobilenetv4_conv_small "
        "timm:mobilenetv4_conv_medium timm:mobilenetv4_hybrid_medium timm:mobilenet_edgetpu_100"
    ),
    "EfficientNet": (
        "tv:efficientnet_b0 timm:efficientnet_b1 timm:efficientnet_es timm:efficientnet_lite0 "
        "timm:tf_efficientnet_lite0 timm:efficientnet_b0_gn timm:efficientnet_blur_b0 timm:tinynet_a "
        "timm:tinynet_e"
    ),
    "EfficientNet v2": "timm:efficientnetv2_rw_t timm:gc_efficientnetv2_rw_t timm:tf_efficientnetv2_b0",
    "NAS nets": (
        "tv:mnasnet0_5 timm:mnasnet_100 timm:semnasnet_075 timm:fbnetc_100 timm:fbnetv3_b timm:spnasnet_100 "
        "timm:hardcorenas_a timm:mixnet_s timm:tf_mixnet_m timm:pnasnet5large"
    ),
    "RegNet x, y, z, v": (
        "tv:regnet_x_400mf tv:regnet_y_400mf timm:regnetx_002 timm:regnety_008_tv timm:regnetz_005 "
        "timm:regnetz_b16 timm:regnetv_040"
    ),
    "ShuffleNet": (
        "tv:shufflenet_v2_x0_5 tv:shufflenet_v2_x1_0 tv:shufflenet_v2_x1_5 own:shufflenet_v1_g3 "
        "own:shufflenet_v1_g4 own:shufflenet_v1_g8"
    ),
    "GhostNet": "timm:ghostnet_050 timm:ghostnet_100 timm:ghostnetv2_100 timm:ghostnetv3_050 timm:repghostnet_050",
    "SqueezeNet, AlexNet, VGG": "tv:squeezenet1_0 tv:squeezenet1_1 tv:alexnet tv:vgg11 tv:vgg11_bn timm:vgg16_bn",
    "ConvNeXt": (
        "timm:convnext_atto timm:convnext_tiny timm:convnext_atto_ols timm:convnextv2_atto "
        "timm:inception_next_atto timm:mambaout_femto"
    ),
    "HRNet": "timm:hrnet_w18_small",
    "DLA": "timm:dla34 timm:dla46_c timm:dla46x_c timm:dla60x_c",
    "CSP, DarkNet": (
        "timm:cspresnet50 timm:cspresnext50 timm:cspdarknet53 timm:darknet17 timm:darknet53 timm:darknetaa53 "
        "timm:sedarknet21 timm:cs3darknet_s timm:cs3darknet_focus_s timm:cs3sedarknet_xdw timm:cspnext_tiny"
    ),
    "RepVGG, MobileOne, RepViT": (
        "timm:repvgg_a0 timm:repvgg_b1g4 timm:mobileone_s0 timm:mobileone_s4 timm:repvit_m0_9"
    ),
    "DPN": "timm:dpn68 timm:dpn68b timm:dpn92",
    "VoVNet": "timm:vovnet39a timm:ese_vovnet19b_dw timm:ese_vovnet19b_slim timm:eca_vovnet39b",
    "SelecSLS, TResNet, GENet, ReXNet": (
        "timm:selecsls42 timm:selecsls42b timm:tresnet_m timm:gernet_s timm:gernet_m timm:rexnet_100 timm:rexnetr_100"
    ),
    "LCNet, HGNet, StarNet, FasterNet": (
        "timm:lcnet_050 timm:lcnetv2_small timm:hgnet_tiny timm:hgnetv2_b0 timm:starnet_s1 timm:starnet_s050 "
        "timm:fasternet_t0"
    ),
    "ConvMixer, PoolFormer, mixed": (
        "timm:convmixer_768_32 timm:poolformer_s12 timm:poolformerv2_s12 timm:convformer_s18 "
        "timm:edgenext_xx_small timm:focalnet_tiny_srf timm:swiftformer_xs"
    ),
    "NFNet (weights computed)": ("timm:nfnet_l0 timm:dm_nfnet_f0 timm:eca_nfnet_l0 timm:nf_regnet_b0 timm:nf_resnet50"),
    "Segmentation, 3-D": (
        "tv:lraspp_mobilenet_v3_large tv:deeplabv3_mobilenet_v3_large tv:fcn_resnet50 tv:r3d_18 "
        "tv:r2plus1d_18 tv:mc3_18"
    ),
    "Heads with several outputs": (
        "own:unet_transposed own:unet_bilinear_3_outputs own:linknet_deep_supervision own:fpn_shared_head "
        "own:fpn_own_heads own:panet_shared_head own:ssd_heads own:semantic_fpn_and_classes own:deeplab_aspp "
        "own:hourglass_2_stacks own:super_resolution own:two_streams"
    ),
}
QUICK = ["tv:resnet18", "tv:squeezenet1_1", "timm:lcnet_050", "own:shufflenet_v1_g4", "own:fpn_shared_head"]
_NEEDS = {"own": (), "tv": ("torchvision",), "timm": ("timm", "torchvision")}
# Nets that shrink their maps without padding, or have a size in their code, need more than 64 pixels.
_SIZES = {
    **dict.fromkeys(
        ["tv:inception_v3", "timm:inception_v4", "timm:inception_resnet_v2", "timm:pnasnet5large"], (128, 128)
    ),
    **dict.fromkeys(["timm:mobilenetv4_hybrid_medium", "tv:alexnet", "timm:legacy_xception"], (96, 96)),
    "timm:bat_resnext26ts": (256, 256),  # its blocks of eight have to fill the last map
    **dict.fromkeys(["tv:r3d_18", "tv:r2plus1d_18", "tv:mc3_18"], (8, 32, 32)),
}


def make(name: str) -> tuple[nn.Module, Inputs]:
    """A network with random weights, and two random inputs for it."""
    source, _, key = name.partition(":")
    torch.manual_seed(0)
    if source != "own":
        _operators()
    if source == "own":
        model = HEADS[key]()
    elif source == "timm":
        model = importlib.import_module("timm").create_model(key)
    else:
        model = _torchvision(key)
    size = _SIZES.get(name, (64, 64))
    return model.eval(), tuple(torch.rand(2, 3, *size) for _ in range(2 if key == "two_streams" else 1))


def _torchvision(key: str) -> nn.Module:
    options: dict[str, Any] = {}
    if key in {"googlenet", "inception_v3"}:
        options = {"init_weights": False, "aux_logits": False}
    if key.startswith(("deeplab", "fcn", "lraspp")):
        options = {"weights_backbone": None}
    return importlib.import_module("torchvision.models").get_model(key, weights=None, **options)  # type: ignore[no-any-return]


@functools.cache
def _operators() -> torch.library.Library | None:
    """Make a torchvision without its C++ operators importable; no classifier needs them."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        return library  # cached: the definitions last as long as this
    return None


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
    return hash_json({"packages": packages, **{name: (folder / f"{name}.py").read_text("utf-8") for name in _CODE}})[
        :12
    ]


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


# --- what it shows -----------------------------------------------------------------------------------------------


def sentence(rows: dict[str, Any]) -> str:
    """The whole in two sentences."""
    verdicts = Counter(row["verdict"] for row in rows.values())
    told = sum(row.get("unexplained") == [] for row in rows.values())
    free = sorted(row["macs_free_share"] for row in rows.values() if "macs_free_share" in row)
    untouched = sum(row.get("groups") == 0 for row in rows.values())
    saved = [row["macs_before"] / row["macs_after"] for row in rows.values() if "macs_after" in row]
    return (
        f"{len(rows)} architectures at keep 0.5: the proof passed on {verdicts['passed']} ({untouched} of these have "
        f"nothing that can go), was wrong on {verdicts['wrong']}; {verdicts['refused']} refused. On {told} of them "
        f"({told / len(rows):.0%}) every layer is free or kept whole for a stated reason. The median share of "
        f"multiply-accumulates in free groups is {statistics.median(free):.1%} (a tenth of the networks have less than "
        f"{free[len(free) // 10]:.0%}); multiply-accumulates fell by a median of {statistics.median(saved):.2f}×."
    )


def cells(name: str, row: dict[str, Any]) -> list[str]:
    """A row of the table as text."""
    size = "×".join(map(str, row["input"][1:]))
    seconds = row.get("graph_seconds", 0) + row.get("surgery_seconds", 0)
    counts = [""] * 3
    if "filters" in row:
        after = f"{row['macs_after'] / 1e6:.0f}" if "macs_after" in row else "–"
        counts = [
            f"{row['filters_free'] / max(1, row['filters']):.0%}",
            f"{row['macs_before'] / 1e6:.0f} → {after}",
            f"{row['macs_free_share']:.0%}",
        ]
    error = f"{row['error']:.0e} ≤ {row['tolerance']:.0e}" if "error" in row else "–"
    if row["verdict"] == "wrong":
        error = error.replace("≤", ">") + f" at {row['place']}"
    return [name, size, row["verdict"], *counts, error, f"{seconds:.1f}", why(row)]


def why(row: dict[str, Any]) -> str:
    """The commonest reasons for whole layers, in short."""
    if "why" in row:
        return f"{row['why']} {row.get('line', '')}".strip()
    parts = [f"{count}× {reason}" for reason, count in list(row["reasons"].items())[:3]]
    return "; ".join(parts) + ("; …" if len(row["reasons"]) > 3 else "")


_HEAD = ["network", "input", "proof", "filters free", "MMAC", "MACs in free groups"]
_HEAD += ["error ≤ tolerance", "s", "layers kept whole"]
_LEGEND = """
Random weights; every group keeps half of its filters, chosen at random, residual streams too (a group that can only
lose certain shares, for instance thirds, keeps the next smaller one).

- *filters free*: of all convolutions and linear layers except the output layers; depthwise ones go with
  their inputs.
- *MMAC*: millions of multiply-accumulates before → after.
- *MACs in free groups*: of weights in the rows and columns of which channels may go.
- *error*: the pruned network against the original with the removed channels cut at the consumers, in float64, on the
  weights and on random ones, at two batch sizes; relative to the largest value at the place where it is closest to its
  tolerance.
- *s*: finding the graph, pruning, checking the second trace; on a CPU that other work shared.

Inputs are small because channels do not depend on their size and the proof is quicker.
"""


def page(rows: dict[str, Any]) -> str:
    """docs/zoo.md."""
    versions = Counter(row["version"] for row in rows.values())
    lines = [
        "# What can go, over the model zoos",
        "",
        "Made by `python benchmarks/zoo.py` from benchmarks/results/zoo.json; do not edit.",
        "",
        sentence(rows),
        "",
        _LEGEND.strip(),
        "",
        f"Code versions behind the rows: {', '.join(f'{key} ({count})' for key, count in versions.most_common())}.",
    ]
    failed = {key: row for key, row in rows.items() if row["verdict"] != "passed" or row.get("unexplained")}
    if failed:
        lines += ["", "## Not proved, or not explained", "", *_markdown(failed)]
    for family, names in FAMILIES.items():
        mine = {key: rows[key] for key in names.split() if key in rows}
        if mine:
            lines += ["", f"## {family}", "", *_markdown(mine)]
    return "\n".join(lines) + "\n"


def _markdown(rows: dict[str, Any]) -> Iterable[str]:
    yield "| " + " | ".join(_HEAD) + " |"
    yield "|" + "---|" * len(_HEAD)
    for name, row in rows.items():
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells(name, row)) + " |"


def show(rows: dict[str, Any]) -> None:
    """A short table on the screen, least free first; docs/zoo.md has the rest."""
    shown = [0, 2, 3, 4, 5, 7]
    table = Table(*(_HEAD[index] for index in shown))
    for name, row in sorted(rows.items(), key=lambda item: item[1].get("macs_free_share", -1)):
        texts = cells(name, row)
        table.add_row(*(texts[index] for index in shown), style="" if row["verdict"] == "passed" else "bold red")
    Console().print(table)


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
        if missing := [each for each in _NEEDS[name.partition(":")[0]] if importlib.util.find_spec(each) is None]:
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
