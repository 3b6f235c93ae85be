"""The stages of a build, one function each: from the results of earlier stages to files in an empty folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from . import latency, verify
from .artifact import read_json, sha256_of, write_json
from .bundle import BundleSpec, EngineFile, TypedFile, write_bundle
from .counting import count
from .export import INPUT, OUTPUT, export_onnx, export_program
from .gcos_stage import check_layout
from .interfaces import Conversion, Precision, TensorSpec
from .models.weights import load_weights
from .precision_stage import typed_hops, typed_judgement
from .prune_stage import HELD_OUT, calibration, check_way
from .pruning.head import fit_head
from .pruning.plan import Plan, empty_plan, load_plan
from .pruning.surgery import apply, gap_head, load_thin
from .registry import convert, converter, sources
from .runner import ENGINES
from .seeds import derive
from .store import Checkpoint
from .tasks.base import Judgement, named, said
from .tools import PLAN, PROGRAM, REPORT, TEACHER, Tools, fine_tuning, json_ready, write_network
from .torch_latency import measure_torch
from .training import judge

ONNX_IMAGES = 8
ENGINE_IMAGES = 1000
GOLDEN_IMAGES = 8
PARITY_BATCH = 64
ENGINE_SECONDS = 3.0
ENGINE_ROUNDS = 15
TORCH_BATCH = 32
TORCH_ROUNDS = 9
# Numbers of all outputs that are compared at most: a class for every pixel of 1,000 images would fill gigabytes.
OUTPUT_VALUES = 1 << 25
_TOLERANCE, _OUTPUT = "tolerance:", "output:"


def dense(tools: Tools, folder: Path, checkpoint: Checkpoint) -> None:
    """The original network: the user's weights, or trained here."""
    options, model = tools.job.options, tools.job.fresh()
    check_way(tools, model)
    check_layout(tools, model)
    if options.weights:
        load_weights(model, options.weights)
    else:
        tools.train(model, "Training the original", options.epochs, options.lr, checkpoint)
    write_network(folder, model, None)
    write_json(folder / REPORT, {"accuracy": asdict(tools.test(model, "the original"))})


def taught(tools: Tools, dense_folder: Path, pruned_folder: Path, epochs: int, folder: Path) -> None:
    """Whether fine-tuning learns from the original: it does, unless held-out training images say otherwise.

    A tenth of the epochs with it and without, on the same nine tenths of the training images.
    """
    fit, held_out = tools.job.data.train.split(HELD_OUT, tools.job.options.seed)
    original, judged = tools.load(dense_folder), []
    for name, teacher in {"with": original, "without": None}.items():
        model = tools.load(pruned_folder)
        stage = f"Fine-tuning for a trial, {name} the original as teacher"
        tools.train(model, stage, epochs, tools.job.options.finetune_lr, teacher=teacher, images=fit)
        judged.append(judge(model, held_out))
    taught_by, alone = judged
    gain = taught_by.behind(alone)
    figures = {"with": taught_by.accuracy.main, "without": alone.accuracy.main, "gain": asdict(gain)}
    write_json(folder / TEACHER, {"teacher": gain.low <= 0, "images": len(held_out), "epochs": epochs, **figures})


@dataclass(frozen=True)
class FineTuning:
    """How long to train at the end, and the folder of the network to learn from, if there is one."""

    epochs: int
    teacher: Path | None


def tuned(tools: Tools, name: str, how: FineTuning, start_folder: Path, folder: Path, checkpoint: Checkpoint) -> None:
    """A network of an earlier stage, trained for longer: ThiNet-Conv from the pruned network; the control."""
    options, model = tools.job.options, tools.load(start_folder)
    plan = load_plan(start_folder / PLAN) if (start_folder / PLAN).exists() else None
    teacher = tools.load(how.teacher) if how.teacher else None
    schedule = fine_tuning(options)
    stage = f"Fine-tuning {name}"
    tools.train(model, stage, how.epochs, options.finetune_lr, checkpoint, teacher=teacher, schedule=schedule)
    write_network(folder, model, plan)
    write_json(folder / REPORT, {"accuracy": asdict(tools.test(model, name)), "epochs": how.epochs})


def with_gap(tools: Tools, dense_folder: Path, folder: Path) -> tuple[nn.Module, Plan]:
    """The network of a stage with global average pooling instead of its head.

    In the recipe "best" its new layer is fitted to what the original says; in the papers' it is fresh.
    """
    model, plan, options = tools.load(folder), load_plan(folder / PLAN), tools.job.options
    head = gap_head(model)
    assert head is not None, "load_job refuses --preset thinet-gap for such a network"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(options.seed, "ThiNet-GAP head"))
        model = apply(empty_plan(model).model_copy(update={"head": head}), model).eval()
    if not options.layerwise:
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        fit_head(model, last, tools.load(dense_folder), calibration(tools)[0], tools.progress)
    return model, plan.model_copy(update={"head": head})


def gap(
    tools: Tools, how: FineTuning, dense_folder: Path, conv_folder: Path, folder: Path, checkpoint: Checkpoint
) -> None:
    """ThiNet-GAP: the head replaced, trained again."""
    options, (model, plan) = tools.job.options, with_gap(tools, dense_folder, conv_folder)
    before, teacher = tools.test(model, "the new head"), tools.load(how.teacher) if how.teacher else None
    lr, schedule = options.finetune_lr, fine_tuning(options)
    tools.train(model, "Fine-tuning ThiNet-GAP", how.epochs, lr, checkpoint, teacher=teacher, schedule=schedule)
    write_network(folder, model, plan)
    after = tools.test(model, "ThiNet-GAP")
    write_json(folder / REPORT, {"accuracy": asdict(after), "before": asdict(before), "epochs": how.epochs})


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


def unfinished(tools: Tools, dense_folder: Path, prunings: Mapping[str, Path], head: bool, folder: Path) -> None:
    """The thin network for the user's own training: pruned, with the new head if there is to be one.

    Of several prunings by method it is the first; its report compares them.
    """
    pruned_folder = next(iter(prunings.values()))
    if head:
        write_network(folder, *with_gap(tools, dense_folder, pruned_folder))
    else:
        write_network(folder, tools.load(pruned_folder), load_plan(pruned_folder / PLAN))
    reports = {method: read_json(each / REPORT) for method, each in prunings.items()}
    compared = {method: {key: each[key] for key in ("accuracy", "ledger", "macs")} for method, each in reports.items()}
    write_json(folder / REPORT, {**read_json(pruned_folder / REPORT), "methods": compared})
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
        if "program" in sources(target):
            export_program(model, tools.job.input_shape, path.with_suffix(".pt2"))
        report[name] = {**asdict(done), "count": asdict(count(model, tools.job.input_shape))}
    tools.progress("Exporting to ONNX", len(networks), len(networks))
    write_json(folder / "export.json", report)


@dataclass(frozen=True)
class Files:
    """The ONNX files of a build.

    Attributes:
        onnx: folder of the float32 ones.
        typed: folder of those in other types; the same where there are none.
        report: how these were made: network → precision → see `precision_stage.typed`.
        engines: precision of the engines made here.
    """

    onnx: Path
    typed: Path
    report: Mapping[str, Any]
    engines: Precision

    def source(self, name: str) -> Path:
        """What a network's engines are made from."""
        how = self.report.get(name, {}).get(self.engines, {})
        return self.typed / how["path"] if "path" in how else self.onnx / f"{name}.onnx"


def engines(tools: Tools, files: Files, names: list[str], runtimes: Sequence[str], folder: Path) -> None:
    """An engine per network and runtime."""
    made, jobs = {}, [(name, runtime) for name in names for runtime in runtimes]
    for index, (name, runtime) in enumerate(jobs):
        tools.progress("Converting", index, len(jobs), f"{name} to {runtime}")
        place = folder / runtime / name
        place.mkdir(parents=True)
        kind = converter(runtime).CONTRACT.source
        source = files.source(name) if kind == "onnx" else files.onnx / f"{name}.pt2"
        job = Conversion(source, place, files.engines, target=tools.job.options.target)
        log = tools.job.options.out / "logs" / f"{name}-{runtime}.log"
        artifact = convert(runtime, job, folder, log=log, progress=tools.progress)
        made[f"{name}/{runtime}"] = artifact.to_json()
    tools.progress("Converting", len(jobs), len(jobs))
    write_json(folder / "engines.json", made)


def parity(
    tools: Tools,
    networks: Mapping[str, Path],
    pruning_hops: list[verify.Hop],
    executed_hops: list[verify.Hop],
    files: Files,
    engine_paths: Mapping[tuple[str, str], Path],
    folder: Path,
) -> None:
    """The verdicts, hop by hop, and the golden inputs and outputs of every network."""
    data, hops = tools.job.data.test, list(pruning_hops)
    most = min(len(data), ENGINE_IMAGES, max(ONNX_IMAGES, OUTPUT_VALUES // _values(tools)))
    chosen = np.linspace(0, len(data) - 1, most).astype(np.int64)
    inputs = data.inputs(chosen)
    parts = [torch.from_numpy(part) for part in np.array_split(inputs, math.ceil(len(inputs) / PARITY_BATCH))]
    steps = len(networks) + len(engine_paths)
    for name, source in networks.items():
        tools.progress("Verifying", len(hops), steps + len(pruning_hops), f"{name}: torch to ONNX")
        model = tools.load(source)
        noise = verify.rounding_noise(model, inputs[:ONNX_IMAGES])
        with torch.inference_mode():
            runs = [named(said(model, part)) for part in parts]
        expected = {output: np.concatenate([run[output] for run in runs]) for output in runs[0]}
        allowed = verify.tolerance(noise, "fp32")
        few = {output: each[:ONNX_IMAGES] for output, each in expected.items()}
        hops.append(verify.onnx_hop(name, files.onnx / f"{name}.onnx", inputs[:ONNX_IMAGES], few, allowed))
        # Only networks with one output have typed files so far (see `precision_stage.planned`).
        written = list(typed_hops(name, files.report, files.typed, inputs, expected[OUTPUT], noise))
        hops += [hop for _, hop, _ in written]
        # An INT8 engine has to do what its file says; what the file changes has a verdict of its own.
        moved = {p: verify.distance(expected[OUTPUT], got) if p == "int8" else 0.0 for p, _, got in written}
        aim = next(({OUTPUT: got} for p, _, got in written if p == files.engines == "int8"), expected)
        allowed_of = {p: verify.engine_tolerance(p, noise, moved.get(p, 0.0)) for p in (files.engines, *moved)}
        kept: dict[str, Any] = {"input": inputs[:GOLDEN_IMAGES], "tolerance": np.float64(allowed)}
        kept |= {f"{_OUTPUT}{output}": each[:GOLDEN_IMAGES] for output, each in expected.items()}
        kept |= {f"{_TOLERANCE}{p}": np.float64(each + moved.get(p, 0.0)) for p, each in allowed_of.items()}
        np.savez(folder / f"{name}.npz", **kept)
        precision, allowed = files.engines, allowed_of[files.engines]
        for (owner, runtime), path in engine_paths.items():
            if owner == name and runtime in ENGINES:  # the others get a note: nothing runs them here
                tools.progress("Verifying", len(hops), steps + len(pruning_hops), f"{name}: ONNX to {runtime}")
                hops.append(verify.engine_hop(name, runtime, path, inputs, aim, allowed, precision=precision))
    tools.progress("Verifying", len(hops), len(hops))
    write_json(folder / "parity.json", {"hops": [json_ready(hop) for hop in (*hops, *executed_hops)]})


def _values(tools: Tools) -> int:
    """How many numbers a network says of an image."""
    job = tools.job
    shapes = job.data.task.shapes(len(job.data.classes), job.input_shape[1:])
    return sum(math.prod(shape) for shape in shapes.values())


def drops(tools: Tools, folders: Mapping[str, Path], files: Files, folder: Path) -> None:
    """How much accuracy each network lost against the original, paired by the test images.

    The networks in the type of their engines, the original as it was.
    """
    judged, images = dict[str, Judgement](), tools.job.data.test
    for index, (name, source) in enumerate(folders.items()):
        tools.progress("Comparing accuracy", index, len(folders), name)
        typed = name != "original" and "path" in files.report.get(name, {}).get(files.engines, {})
        judged[name] = typed_judgement(tools, files.source(name)) if typed else judge(tools.load(source), images)
    tools.progress("Comparing accuracy", len(folders), len(folders))
    lost = {name: asdict(own.behind(judged["original"])) for name, own in judged.items()}
    write_json(folder / "drops.json", {name: drop for name, drop in lost.items() if name != "original"})


def measured(
    tools: Tools,
    folders: dict[str, Path],
    engine_paths: dict[tuple[str, str], Path],
    precision: Precision,
    folder: Path,
) -> None:
    """Milliseconds of every engine on this machine, and forward and backward in torch; raw samples kept."""
    job = tools.job
    refs = [latency.EngineRef(name, runtime, path, precision) for (name, runtime), path in engine_paths.items()]
    image = job.data.test.inputs(np.arange(1))

    engine_rows = latency.measure_engines(
        refs,
        {INPUT: image},
        threads=job.options.threads,
        rounds=ENGINE_ROUNDS,
        seconds=ENGINE_SECONDS,
        progress=tools.progress,
    )
    torch_rows = measure_torch(
        {name: tools.load(path) for name, path in folders.items()},
        job.input_shape,
        batch=TORCH_BATCH,
        rounds=TORCH_ROUNDS,
        progress=tools.progress,
    )
    write_json(folder / "latency.json", latency.report(engine_rows, torch_rows).to_json())


@dataclass(frozen=True)
class Shipped:
    """The network that goes into the bundle: its name in the run, what people read, and its stage's folder."""

    name: str
    label: str
    folder: Path


def bundled(
    tools: Tools,
    ship: Shipped,
    files: Files,
    engine_paths: Mapping[tuple[str, str], Path],
    parity_folder: Path,
    notes: tuple[str, ...],
    folder: Path,
) -> None:
    """The bundle of the network to ship."""
    job, name = tools.job, ship.name
    spec = read_json(files.onnx / "export.json")[name]
    with np.load(parity_folder / f"{name}.npz") as golden:
        inputs, tolerance = golden["input"], float(golden["tolerance"])
        outputs = {key.removeprefix(_OUTPUT): golden[key] for key in golden if key.startswith(_OUTPUT)}
        allowed = {key.removeprefix(_TOLERANCE): float(golden[key]) for key in golden if key.startswith(_TOLERANCE)}
    precision = files.engines
    engines = [
        EngineFile(
            runtime,
            files.onnx / f"{name}.onnx" if job.target.builds_on_device else path,
            precision,
            allowed[precision],
        )
        for (owner, runtime), path in engine_paths.items()
        if owner == name and (runtime == "onnxruntime" or not job.target.builds_on_device)
    ]
    hops = [hop for hop in read_json(parity_folder / "parity.json")["hops"] if hop["model"] in (name, "conv")]
    write_bundle(
        folder,
        BundleSpec(
            model=f"{job.model_name}, {ship.label}",
            target=job.target.id,
            onnx=files.source(name),
            engines=tuple(engines),
            typed=tuple(
                TypedFile(files.typed / how["path"], each, how.get("layout", ""), allowed[each])
                for each, how in files.report.get(name, {}).items()
                if "path" in how and each != precision
            ),
            inputs=_specs(spec["inputs"]),
            outputs=_specs(spec["outputs"]),
            golden_inputs={INPUT: inputs},
            golden_outputs=outputs,
            tolerance=tolerance,
            labels=job.data.classes,
            preprocess=job.data.preprocess.model_dump(mode="json"),
            parity={"passed": all(hop["passed"] for hop in hops), "hops": hops},
            plan=sha256_of(ship.folder / PLAN),
            notes=notes,
            extras=job.data.task.bundled(),
            has_builder=job.target.builds_on_device and "tensorrt" in job.target.runtimes,
        ),
    )


def _specs(items: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(item["name"], tuple(item["shape"]), item["dtype"]) for item in items)
