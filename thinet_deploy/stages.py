"""The stages of a build, one function each: from the results of earlier stages to files in an empty folder."""

from __future__ import annotations

import inspect
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from . import verify
from .artifact import read_json, write_json
from .counting import count
from .errors import ModelError
from .export import check_exportable, export_onnx, export_program
from .interfaces import Conversion, Progress
from .job import Job
from .models.loading import load_function
from .models.weights import load_weights, save_weights
from .pruning.budget import Widths, Wish, choose_widths, cost
from .pruning.discovery import channel_graph
from .pruning.graph import ChannelGraph, ChannelGroup
from .pruning.layerwise import Layer, Schedule, prunable, prune_layerwise
from .pruning.plan import Plan, empty_plan, load_plan, weights_fingerprint
from .pruning.proof import Proof, prove
from .pruning.surgery import apply, gap_head, load_thin
from .pruning.trace import example_inputs, named_tensors
from .registry import convert
from .seeds import derive
from .store import Checkpoint
from .training import Accuracy, Recipe, evaluate, train

PLAN, WEIGHTS, REPORT, PROGRAM = "plan.json", "model.safetensors", "report.json", "model.pt2"
PROOF_IMAGES = 3
ONNX_IMAGES = 8
ENGINE_IMAGES = 1000
GOLDEN_IMAGES = 8
PARITY_BATCH = 64


@dataclass(frozen=True)
class Tools:
    """What every stage may use.

    Attributes:
        job: what is being built.
        progress: to report to.
    """

    job: Job
    progress: Progress

    def train(self, model: nn.Module, stage: str, epochs: int, lr: float, checkpoint: Checkpoint | None = None) -> None:
        """Train in place: by the user's --trainer if there is one, else by ours."""
        options, images = self.job.options, self.job.data.train
        if not options.trainer:
            recipe = Recipe(epochs, lr, options.batch_size, warmup=1 if epochs > 3 else 0)
            train(model, images, recipe, seed=options.seed, stage=stage, checkpoint=checkpoint, progress=self.progress)
            return
        fit = load_function(options.trainer, "fit")
        offered = {"epochs": epochs, "lr": lr, "stage": stage, "seed": options.seed, "batch_size": options.batch_size}
        taken = inspect.signature(fit).parameters
        takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
        torch.manual_seed(derive(options.seed, stage))  # so that a plain loop gives the same weights when it is resumed
        try:
            fit(model, images, **{name: value for name, value in offered.items() if takes_all or name in taken})
        except Exception as error:  # the user's own code may raise anything
            raise ModelError(f"{options.trainer} failed in {stage}: {type(error).__name__}: {error}") from error
        model.cpu().eval()

    def test(self, model: nn.Module, name: str) -> Accuracy:
        """Accuracy on the test images."""
        return evaluate(model, self.job.data.test, f"Testing {name}", self.progress)

    def load(self, folder: Path) -> nn.Module:
        """The network that a stage left: plan and weights, or weights alone."""
        plan = load_plan(folder / PLAN) if (folder / PLAN).exists() else None
        model = self.job.fresh()
        if plan:
            return load_thin(plan, model, folder / WEIGHTS)
        load_weights(model, folder / WEIGHTS)
        return model.eval()


def write_network(folder: Path, model: nn.Module, plan: Plan | None) -> None:
    """plan.json (for a thin network) and model.safetensors."""
    if plan:
        plan.save(folder / PLAN)
    save_weights(model, folder / WEIGHTS)


def read_accuracy(folder: Path) -> Accuracy:
    """The accuracy that a stage measured."""
    return Accuracy(**read_json(folder / REPORT)["accuracy"])


def dense(tools: Tools, folder: Path, checkpoint: Checkpoint) -> None:
    """The original network: the user's weights, or trained here."""
    options, model = tools.job.options, tools.job.fresh()
    _check_way(tools, model)
    if options.weights:
        load_weights(model, options.weights)
    else:
        tools.train(model, "Training the original", options.epochs, options.lr, checkpoint)
    write_network(folder, model, None)
    write_json(folder / REPORT, {"accuracy": asdict(tools.test(model, "the original"))})


def _check_way(tools: Tools, model: nn.Module) -> None:
    """Raise what would fail after the training: nothing to prune, a budget out of reach, no way to ONNX."""
    graph = _graph(tools, model)
    groups = _groups(tools, graph)
    choose_widths(dict(named_tensors(model)), graph, groups, _wish(tools, model, graph))
    target = tools.job.target
    check_exportable(model, tools.job.input_shape, opset=target.opset)


def _graph(tools: Tools, model: nn.Module) -> ChannelGraph:
    return channel_graph(model, example_inputs(model, tools.job.input_shape), ignore=tools.job.options.ignore)


def _groups(tools: Tools, graph: ChannelGraph) -> tuple[ChannelGroup, ...]:
    groups = prunable(graph, shortcuts=tools.job.options.prune_shortcuts)
    if not groups:
        reasons = "; ".join(f"{name}: {why}" for name, why in graph.whole.items())
        streams = any(group.shortcut for group in graph.groups)
        raise ModelError(
            f"There is nothing to prune in {tools.job.options.model}. {reasons}",
            hint="Only its residual streams can go: --prune-shortcuts."
            if streams
            else "See which operations are named.",
        )
    return groups


def _wish(tools: Tools, model: nn.Module, graph: ChannelGraph) -> Wish:
    """What the options ask of widths, in numbers for this network."""
    options = tools.job.options
    dense = cost(dict(named_tensors(model)), graph, np.ones(graph.channels, dtype=bool))
    return Wish(
        keep=options.keep,
        macs=options.most_macs(dense.macs),
        size=options.most_bytes,
        grid=tools.job.target.channel_grid if options.round_to == "target" else options.round_to,
        layers=options.keep_layer,
    )


def pruned(tools: Tools, dense_folder: Path, folder: Path, checkpoint: Checkpoint) -> None:
    """ThiNet front to back, fine-tuning after each layer, and the proof of the plan."""
    job, options = tools.job, tools.job.options
    original = tools.load(dense_folder)
    graph = _graph(tools, original)
    groups, tensors = _groups(tools, graph), dict(named_tensors(original))

    def tune(model: nn.Module, step: str) -> None:
        tools.train(model, f"Fine-tuning, {step}", options.layer_epochs, options.lr / 3)

    inputs = example_inputs(original, job.input_shape)
    schedule = Schedule(original, graph, job.data, inputs, options.seed, tune)
    widths = choose_widths(tensors, graph, groups, _wish(tools, original, graph))
    thin, plan, layers = prune_layerwise(schedule, groups, widths, checkpoint, tools.progress)
    plan = plan.model_copy(update={"weights": weights_fingerprint(original)})
    images = torch.from_numpy(job.data.train.inputs(np.arange(PROOF_IMAGES)))
    proof = prove(original, graph, plan, (images,), seed=options.seed)
    write_network(folder, thin, plan)
    before, after = (count(model, job.input_shape).macs for model in (original, thin))
    report = {
        "accuracy": asdict(tools.test(thin, "the pruned network")),
        "layers": [_json_ready(layer) for layer in layers],
        "whole": {**graph.whole, **_left_whole(graph, groups, widths)},
        "macs": {"before": before, "after": after},
        "proof": _json_ready(proof),
    }
    write_json(folder / REPORT, report)


def _left_whole(graph: ChannelGraph, groups: tuple[ChannelGroup, ...], widths: Widths) -> dict[str, str]:
    """Producer → why it was not pruned, although it could be."""
    reasons = {}
    for group in graph.groups:
        if group not in groups:
            why = "a residual stream (--prune-shortcuts prunes them)" if group.shortcut else "one of the last layers"
        elif widths[group.name] == len(group.channels):
            why = (
                f"no narrower width is nearer to what was asked (it has {len(group.channels)} filters; see --round-to)"
            )
        else:
            continue
        reasons.update(dict.fromkeys(group.producers, why))
    return reasons


def tuned(tools: Tools, pruned_folder: Path, folder: Path, checkpoint: Checkpoint) -> None:
    """ThiNet-Conv: the pruned network, fine-tuned at the end."""
    options, model = tools.job.options, tools.load(pruned_folder)
    tools.train(model, "Fine-tuning ThiNet-Conv", options.finetune_epochs, options.lr, checkpoint)
    write_network(folder, model, load_plan(pruned_folder / PLAN))
    write_json(folder / REPORT, {"accuracy": asdict(tools.test(model, "ThiNet-Conv"))})


def with_gap(tools: Tools, folder: Path) -> tuple[nn.Module, Plan]:
    """The network of a stage with global average pooling instead of its head, whose new layer is not trained yet."""
    model, plan = tools.load(folder), load_plan(folder / PLAN)
    head = gap_head(model)
    assert head is not None, "load_job refuses --preset thinet-gap for such a network"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(tools.job.options.seed, "ThiNet-GAP head"))
        return apply(empty_plan(model).model_copy(update={"head": head}), model), plan.model_copy(update={"head": head})


def gap(tools: Tools, conv_folder: Path, folder: Path, checkpoint: Checkpoint) -> None:
    """ThiNet-GAP: the head replaced, trained again."""
    options, (model, plan) = tools.job.options, with_gap(tools, conv_folder)
    before = tools.test(model, "the new head")
    tools.train(model, "Fine-tuning ThiNet-GAP", options.finetune_epochs, options.lr, checkpoint)
    write_network(folder, model, plan)
    after = tools.test(model, "ThiNet-GAP")
    write_json(folder / REPORT, {"accuracy": asdict(after), "before": asdict(before)})


def scratch(tools: Tools, thin_folder: Path, epochs: int, folder: Path, checkpoint: Checkpoint) -> None:
    """The control: the thin architecture with fresh weights, trained for as many epochs as all of the above."""
    plan = load_plan(thin_folder / PLAN)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(tools.job.options.seed, "from scratch"))
        model = apply(plan, tools.job.fresh())
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    tools.train(model, "Training from scratch", epochs, tools.job.options.lr, checkpoint)
    write_network(folder, model, plan)
    write_json(folder / REPORT, {"accuracy": asdict(tools.test(model, "the control")), "epochs": epochs})


def unfinished(tools: Tools, pruned_folder: Path, head: bool, folder: Path) -> None:
    """The thin network for the user's own training: pruned, with the new head if there is to be one."""
    if head:
        write_network(folder, *with_gap(tools, pruned_folder))
    else:
        write_network(folder, tools.load(pruned_folder), load_plan(pruned_folder / PLAN))
    shutil.copyfile(pruned_folder / REPORT, folder / REPORT)
    export_program(tools.load(folder), tools.job.input_shape, folder / PROGRAM)


def own(tools: Tools, thin_folder: Path, weights: Path, folder: Path) -> None:
    """The thin network with the weights that the user trained."""
    plan = load_plan(thin_folder / PLAN)
    model = load_thin(plan, tools.job.fresh(), weights)
    write_network(folder, model, plan)
    write_json(folder / REPORT, {"accuracy": asdict(tools.test(model, "the trained network"))})


def exported(tools: Tools, networks: Mapping[str, Path], folder: Path) -> None:
    """One checked ONNX file per network."""
    target, report = tools.job.target, {}
    for index, (name, source) in enumerate(networks.items()):
        tools.progress("Exporting to ONNX", index, len(networks), name)
        model = tools.load(source)
        path = folder / f"{name}.onnx"
        done = export_onnx(model, tools.job.input_shape, path, opset=target.opset, ir_version=target.ir_version)
        report[name] = {**asdict(done), "count": asdict(count(model, tools.job.input_shape))}
    tools.progress("Exporting to ONNX", len(networks), len(networks))
    write_json(folder / "export.json", report)


def engines(tools: Tools, onnx_folder: Path, names: list[str], runtimes: list[str], folder: Path) -> None:
    """An engine per network and runtime."""
    made, jobs = {}, [(name, runtime) for name in names for runtime in runtimes]
    for index, (name, runtime) in enumerate(jobs):
        tools.progress("Converting", index, len(jobs), f"{name} to {runtime}")
        place = folder / runtime / name
        place.mkdir(parents=True)
        artifact = convert(runtime, Conversion(onnx_folder / f"{name}.onnx", place), folder)
        made[f"{name}/{runtime}"] = artifact.to_json()
    tools.progress("Converting", len(jobs), len(jobs))
    write_json(folder / "engines.json", made)


def parity(
    tools: Tools,
    networks: Mapping[str, Path],
    pruning_hops: list[verify.Hop],
    onnx_folder: Path,
    engine_paths: Mapping[tuple[str, str], Path],
    folder: Path,
) -> None:
    """The verdicts, hop by hop, and the golden inputs and outputs of every network."""
    data, hops = tools.job.data.test, list(pruning_hops)
    chosen = np.linspace(0, len(data) - 1, min(len(data), ENGINE_IMAGES)).astype(np.int64)
    inputs = data.inputs(chosen)
    parts = [torch.from_numpy(part) for part in np.array_split(inputs, math.ceil(len(inputs) / PARITY_BATCH))]
    steps = len(networks) + len(engine_paths)
    for name, source in networks.items():
        tools.progress("Verifying", len(hops), steps + len(pruning_hops), f"{name}: torch to ONNX")
        model = tools.load(source)
        noise = verify.rounding_noise(model, inputs[:ONNX_IMAGES])
        with torch.inference_mode():
            expected = torch.cat([model(part) for part in parts]).numpy()
        allowed = verify.tolerance(noise, "fp32")
        few = slice(ONNX_IMAGES)
        hops.append(verify.onnx_hop(name, onnx_folder / f"{name}.onnx", inputs[few], expected[few], allowed))
        golden = slice(GOLDEN_IMAGES)
        np.savez(folder / f"{name}.npz", input=inputs[golden], output=expected[golden], tolerance=np.float64(allowed))
        for (owner, runtime), path in engine_paths.items():
            if owner == name:
                tools.progress("Verifying", len(hops), steps + len(pruning_hops), f"{name}: ONNX to {runtime}")
                hops.append(verify.engine_hop(name, runtime, path, inputs, expected, allowed, precision="fp32"))
    tools.progress("Verifying", len(hops), len(hops))
    write_json(folder / "parity.json", {"hops": [_json_ready(hop) for hop in hops]})


def _json_ready(record: verify.Hop | Proof | Layer) -> dict[str, object]:
    """JSON knows neither infinity nor NaN: an error that is no number becomes a string."""
    fields = asdict(record).items()
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value for key, value in fields
    }
