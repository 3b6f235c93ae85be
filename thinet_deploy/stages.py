"""The stages of a build, one function each: from the results of earlier stages to files in an empty folder."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from . import verify
from .artifact import write_json
from .counting import count
from .export import export_onnx, export_program
from .interfaces import Conversion
from .models.weights import load_weights
from .prune_stage import check_way
from .pruning.plan import Plan, empty_plan, load_plan
from .pruning.surgery import apply, gap_head, load_thin
from .registry import convert
from .seeds import derive
from .store import Checkpoint
from .tools import PLAN, PROGRAM, REPORT, Tools, json_ready, write_network

ONNX_IMAGES = 8
ENGINE_IMAGES = 1000
GOLDEN_IMAGES = 8
PARITY_BATCH = 64


def dense(tools: Tools, folder: Path, checkpoint: Checkpoint) -> None:
    """The original network: the user's weights, or trained here."""
    options, model = tools.job.options, tools.job.fresh()
    check_way(tools, model)
    if options.weights:
        load_weights(model, options.weights)
    else:
        tools.train(model, "Training the original", options.epochs, options.lr, checkpoint)
    write_network(folder, model, None)
    write_json(folder / REPORT, {"accuracy": asdict(tools.test(model, "the original"))})


def tuned(tools: Tools, dense_folder: Path, pruned_folder: Path, folder: Path, checkpoint: Checkpoint) -> None:
    """ThiNet-Conv: the pruned network, fine-tuned at the end."""
    options, model = tools.job.options, tools.load(pruned_folder)
    teacher = tools.teacher(dense_folder)
    tools.train(model, "Fine-tuning ThiNet-Conv", options.finetune_epochs, options.lr, checkpoint, teacher)
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


def gap(tools: Tools, dense_folder: Path, conv_folder: Path, folder: Path, checkpoint: Checkpoint) -> None:
    """ThiNet-GAP: the head replaced, trained again."""
    options, (model, plan) = tools.job.options, with_gap(tools, conv_folder)
    before, teacher = tools.test(model, "the new head"), tools.teacher(dense_folder)
    tools.train(model, "Fine-tuning ThiNet-GAP", options.finetune_epochs, options.lr, checkpoint, teacher)
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
    write_json(folder / "parity.json", {"hops": [json_ready(hop) for hop in hops]})
