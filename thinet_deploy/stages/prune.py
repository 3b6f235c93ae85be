"""The stage that prunes: which groups, which widths, layer by layer or all at once, and the proof."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..artifact import write_json
from ..counting import count
from ..data.dataset import ImageSet
from ..errors import ModelError
from ..export import check_exportable
from ..norms import reestimate_norms
from ..options import Options
from ..pruning.allocation import Costs, Curve, allocate, with_budget
from ..pruning.budget import Widths, choose_widths
from ..pruning.calibration import Sample
from ..pruning.discovery import channel_graph
from ..pruning.graph import ChannelGraph, ChannelGroup
from ..pruning.layerwise import Layer, Schedule, prunable, prune_layerwise
from ..pruning.oneshot import Method, Pruned, prune_once
from ..pruning.plan import Plan, weights_fingerprint
from ..pruning.proof import prove
from ..pruning.retrace import RetraceError, settled_plan
from ..pruning.surgery import apply
from ..pruning.trace import example_inputs
from ..pruning.wide import within_reach
from ..reports.ledger import Entry, epochs_in_words
from ..store import Checkpoint
from ..timing.budget import Found
from ..training import evaluate
from .latency import bench_of, fitting, told
from .tools import REPORT, Tools, json_ready, labelled_by, remarks, write_network
from .wish import branches_of, counted, wish_of

_PROOF_IMAGES = 3


def check_way(tools: Tools, model: nn.Module) -> None:
    """Raise what would fail after the training: nothing to prune, a budget out of reach, no way to ONNX."""
    graph = graph_of(tools, model)
    groups = groups_of(tools, graph)
    wish = wish_of(tools, model, graph, groups)
    choose_widths(*counted(tools.job, model, graph), groups, wish, branches_of(tools, graph, groups, wish))
    target = tools.job.target
    check_exportable(model, tools.job.input_shape, opset=target.opset)


def graph_of(tools: Tools, model: nn.Module) -> ChannelGraph:
    """The channels of the job's network."""
    return channel_graph(model, example_inputs(model, tools.job.input_shape), ignore=tools.job.options.ignore)


def groups_of(tools: Tools, graph: ChannelGraph) -> tuple[ChannelGroup, ...]:
    """What of it is to be pruned.

    Raises:
        ModelError: nothing can be.
    """
    options, groups = tools.job.options, _candidates(tools, graph)
    left = tools.job.widths.keys() - {producer for group in groups for producer in group.producers}
    if left:
        layer = min(left)
        why = graph.whole.get(layer, "nothing reads it")
        raise ModelError(
            f"--preset {options.preset} prunes {layer}, which stays whole: {why}.",
            hint="Prune what can be pruned of this network by --keep, --macs or --size instead of --preset.",
        )
    if not options.layerwise:
        within = within_reach(graph)
        groups = tuple(group for group in groups if within.issuperset(each.weight for each in group.consumers))
    if not groups:
        reasons = "; ".join(f"{name}: {why}" for name, why in graph.whole.items())
        streams = any(group.shortcut for group in graph.groups)
        raise ModelError(
            f"There is nothing to prune in {options.model}. {reasons}",
            hint="Only its residual streams can go: --prune-shortcuts."
            if streams
            else "See which operations are named.",
        )
    return groups


def _candidates(tools: Tools, graph: ChannelGraph) -> tuple[ChannelGroup, ...]:
    """The papers' groups; in the recipe best all others too, unless a head that is going to be replaced reads them.

    With a preset that says all widths, the groups that it names.
    """
    options, widths = tools.job.options, tools.job.widths
    if widths:
        return tuple(group for group in graph.groups if widths.keys() & set(group.producers))
    if options.layerwise or tools.job.replaces_head:
        # Which layers are the last ones does not depend on which are ignored.
        everything = _unignored(tools) if options.ignore else graph
        inner = prunable(everything, shortcuts=options.prune_shortcuts)
        names = {producer for group in inner for producer in group.producers}
        return tuple(group for group in graph.groups if names.issuperset(group.producers))
    return tuple(group for group in graph.groups if options.prune_shortcuts or not group.shortcut)


def _unignored(tools: Tools) -> ChannelGraph:
    model = tools.job.fresh()
    return channel_graph(model, example_inputs(model, tools.job.input_shape))


def calibration(tools: Tools) -> tuple[Sample, ImageSet]:
    """Training images for statistics, and others, held out for choices between variants."""
    job, options = tools.job, tools.job.options
    fit, held_out = job.split
    chosen = fit.sample(options.calibration_images, seed=options.seed, stage="calibration")
    batch = max(4, 64 * 32 * 32 // (job.input_shape[1] * job.input_shape[2]))
    return Sample(fit, chosen, min(batch, 64), options.seed), held_out


def proof_images(train: ImageSet) -> NDArray[np.float32]:
    """What a cut is proved on: a few images, fewer where there are not as many."""
    return train.inputs(np.arange(min(_PROOF_IMAGES, len(train))))


def pruned(tools: Tools, dense_folder: Path, folder: Path, checkpoint: Checkpoint) -> None:
    """The network without the filters that go, the plan, and its proof."""
    job, options = tools.job, tools.job.options
    original = tools.load(dense_folder)
    graph = graph_of(tools, original)
    work = _layerwise if options.layerwise else _one_shot
    done = work(tools, original, graph, checkpoint)
    plan = done.plan.model_copy(update={"weights": weights_fingerprint(original), "preprocess": job.data.preprocess})
    images = torch.from_numpy(proof_images(job.data.train))
    proof = prove(original, graph, plan, (images,), seed=options.seed)
    write_network(folder, done.model, plan)
    before, after = (count(model, job.input_shape).macs for model in (original, done.model))
    report: dict[str, Any] = {
        "accuracy": asdict(tools.test(done.model, "the pruned network")),
        "layers": done.layers,
        "ledger": [asdict(entry) for entry in done.ledger],
        "epochs": done.epochs,
        "branches": graph.joins,
        "whole": {**graph.whole, **done.whole},
        "macs": {"before": before, "after": after},
        "proof": json_ready(proof),
        "notes": list(remarks(job, dense_folder)),
    }
    if done.timing:
        report["timing"] = done.timing
    write_json(folder / REPORT, report)


@dataclass(frozen=True)
class _Done:
    """A pruned network.

    Attributes:
        model: thin.
        plan: that leads to its shape.
        layers: for the report: what happened to each group.
        ledger: for the report: accuracy after each step.
        epochs: of training that went into it.
        whole: producer → why it was not pruned, although it could be.
        timing: for the report: how a budget of time was met, if there was one.
    """

    model: nn.Module
    plan: Plan
    layers: list[dict[str, Any]]
    ledger: list[Entry]
    epochs: int
    whole: dict[str, str]
    timing: dict[str, Any] = field(default_factory=dict)


def _layerwise(tools: Tools, original: nn.Module, graph: ChannelGraph, checkpoint: Checkpoint) -> _Done:
    """The papers' schedule: prune a layer, fine-tune, go on to the next."""
    options = tools.job.options

    groups = groups_of(tools, graph)
    wish = wish_of(tools, original, graph, groups)
    widths = choose_widths(*counted(tools.job, original, graph), groups, wish)
    trainings = _between(options, graph, [each for each in groups if widths[each.name] < len(each.channels)])

    def tune(model: nn.Module, group: ChannelGroup) -> int:
        for number, (epochs, lr) in enumerate(trainings[group.name]):
            stage = f"Fine-tuning, layer {group.name}" + (f", part {number + 1}" if number else "")
            tools.train(model, stage, epochs, lr, schedule="constant")
        return sum(epochs for epochs, _ in trainings[group.name])

    inputs = example_inputs(original, tools.job.input_shape)
    scaled = options.rebuilding == "scale"
    schedule = Schedule(original, graph, tools.job.data, inputs, options.seed, tune, options.selection, scaled)
    thin, plan, layers = prune_layerwise(schedule, groups, widths, checkpoint, tools.progress)
    epochs = sum(count for each in trainings.values() for count, _ in each)
    ledger = [entry for layer in layers for entry in _steps(layer)] or [_entry(tools, "pruned", thin)]
    return _Done(thin, plan, [_layer_row(each) for each in layers], ledger, epochs, _left_whole(graph, groups, widths))


def _steps(layer: Layer) -> list[Entry]:
    """What was done to a group, named by its first layer, and the accuracy after each step."""
    name = layer.producer.partition(",")[0]
    steps = {
        "pruned": layer.pruned,
        "reconstructed": layer.reconstructed,
        f"fine-tuned, {epochs_in_words(layer.epochs)}": layer.tuned,
    }
    return [Entry.of(f"{name} {step}", accuracy) for step, accuracy in steps.items() if accuracy]


def _layer_row(layer: Layer) -> dict[str, Any]:
    """What happened to a group, for the report's table; of its accuracies the task's first figure."""
    row = json_ready(layer)
    tuned = layer.tuned or layer.untrained
    row |= {"accuracy_pruned": layer.untrained.main, "accuracy_tuned": tuned.main}
    return {key: value for key, value in row.items() if key not in ("pruned", "reconstructed", "tuned")}


def _between(
    options: Options, graph: ChannelGraph, groups: list[ChannelGroup]
) -> dict[str, tuple[tuple[int, float], ...]]:
    """Group's name → trainings after it was pruned, as (epochs, learning rate).

    The papers' unless the user says how many epochs: in a plain network one epoch, in front of a pool another at a
    tenth of the rate; in others one epoch at a tenth of the rate for each block. What follows the last group is the
    fine-tuning at the end (thinet.md, section 1).
    """
    rate, trainings = options.rate, dict[str, tuple[tuple[int, float], ...]]()
    sizes = [group.map_size for group in graph.groups]
    for group, after in zip(groups, [*groups[1:], None], strict=True):
        following = sizes[graph.groups.index(group) + 1 :][:1]
        if options.layer_epochs is not None:
            parts: tuple[tuple[int, float], ...] = ((options.layer_epochs, rate),)
        elif after is None:
            parts = ()
        elif graph.joins:
            parts = ((1, rate / 10),) if _block(group) != _block(after) else ()
        else:
            parts = ((1, rate), (1, rate / 10)) if following != [group.map_size] else ((1, rate),)
        trainings[group.name] = parts
    return trainings


def _block(group: ChannelGroup) -> str:
    return group.producers[0].rpartition(".")[0]


def _one_shot(tools: Tools, original: nn.Module, graph: ChannelGraph, checkpoint: Checkpoint) -> _Done:
    """All layers at once, reconstructed without any training; nothing is saved on the way, it takes a few passes."""
    del checkpoint
    job, options = tools.job, tools.job.options
    groups, budgeted = groups_of(tools, graph), counted(job, original, graph)
    wish = wish_of(tools, original, graph, groups)
    branches = branches_of(tools, graph, groups, wish)
    uniform = choose_widths(*budgeted, groups, wish, branches)
    costs = Costs(*budgeted, groups)
    found: list[Found] = []  # by the process that measures

    def widths(curves: Mapping[str, Curve]) -> Widths:
        if options.timed:
            bench = bench_of(job, tools.progress)
            found.append(fitting(bench, job, original, graph, groups, wish, curves, branches))
            return found[0].best.widths
        # As many multiply-accumulates as the keep ratio leaves, put where they help most.
        budget = with_budget(costs, groups, wish)
        return allocate(costs, groups, curves, budget, branches) if options.selection == "elimination" else uniform

    sample, held_out = calibration(tools)
    held_out = labelled_by(original, held_out)
    method = Method(options.selection, options.rebuilding)
    done = prune_once(original, graph, groups, widths, sample, job.input_shape, method, tools.progress)
    plan = _plan_of(tools, original, graph, done)
    thin = apply(plan, done.model)
    ledger = [_entry(tools, "pruned", apply(plan, original))]
    if method.reconstruction != "none":
        ledger.append(_entry(tools, "reconstructed", thin))
    if any(isinstance(module, _BatchNorm) for module in thin.modules()):
        thin, entry = _with_norms(tools, thin, sample, held_out)
        ledger.append(entry)
    layers = [_row(group, done) for group in groups if done.widths[group.name] < len(group.channels)]
    whole = _left_whole(graph, groups, done.widths, allocated=bool(done.curves))
    for group in _candidates(tools, graph):
        if group not in groups:
            why = "a reader of it cannot be refitted: too many inputs, not channel by channel, or a 3-D convolution"
            whole.update(dict.fromkeys(group.producers, why))
    whole |= {each: why for of in found for name, why in of.unpaid.items() for each in graph.group(name).producers}
    return _Done(thin, plan, layers, ledger, 0, whole, told(found[0], job) if found else {})


def _plan_of(tools: Tools, original: nn.Module, graph: ChannelGraph, done: Pruned) -> Plan:
    """The plan of what stays; the user is told where the network without the rest would be another one."""
    if not graph.leaves_filters(done.kept):
        raise ModelError(
            "With these widths a layer would lose all of its filters or inputs.",
            hint="Ask for less, or keep more of the narrow layers: --keep-layer PATTERN=R.",
        )
    try:
        return settled_plan(original, graph, done.kept, example_inputs(original, tools.job.input_shape))
    except RetraceError as error:
        raise ModelError(
            f"Without the filters chosen the network is another one: {error.what} "
            f"({error.modules[0] or 'the network'} {error.line}).",
            hint=f'Leave this part whole: --ignore "{error.modules[0] or "*"}*".',
        ) from error


def _with_norms(tools: Tools, thin: nn.Module, sample: Sample, held_out: ImageSet) -> tuple[nn.Module, Entry]:
    """The network with BatchNorm statistics of its own, if held-out images gain by that; what the test images say."""
    again = copy.deepcopy(thin)
    seed = tools.job.options.seed
    reestimate_norms(again, sample.images, seed=seed, stage="norms", progress=tools.progress)
    # Chosen on images that took no part in the calibration, and are no test images.
    better = evaluate(again, held_out).main > evaluate(thin, held_out).main
    verdict = "" if better else " (not kept: held-out images gain nothing)"
    return again if better else thin, _entry(tools, f"BatchNorm statistics re-estimated{verdict}", again)


def _entry(tools: Tools, step: str, model: nn.Module) -> Entry:
    """A line of the ledger, on the test images."""
    return Entry.of(step, tools.test(model, f"after: {step}"))


def _row(group: ChannelGroup, done: Pruned) -> dict[str, Any]:
    """What happened to a group, for the report."""
    after = done.widths[group.name]
    row: dict[str, Any] = {
        "producer": ", ".join(group.producers),
        "consumer": ", ".join(dict.fromkeys(each.weight.removesuffix(".weight") for each in group.consumers)),
        "before": len(group.channels),
        "after": after,
    }
    if curve := done.curves.get(group.name):  # of what the narrowest width would have cost
        narrowest = int(curve.widths[curve.widths > 0].min())
        row["error_share"] = curve.at(after) / max(curve.at(narrowest), 1e-30)
    return row


def _left_whole(
    graph: ChannelGraph, groups: tuple[ChannelGroup, ...], widths: Widths, *, allocated: bool = False
) -> dict[str, str]:
    """Producer → why it was not pruned, although it could be."""
    reasons = {}
    for group in graph.groups:
        if group not in groups:
            why = "a residual stream (--prune-shortcuts prunes them)" if group.shortcut else "one of the last layers"
        elif widths[group.name] == len(group.channels):
            width = f"it has {len(group.channels)} filters; see --round-to"
            why = f"no narrower width is nearer to what was asked ({width})"
            why = "narrower widths of other layers cost less" if allocated else why
        else:
            continue
        reasons.update(dict.fromkeys(group.producers, why))
    return reasons
