"""The stages from trained networks to a bundle: ONNX, engines, verdicts, milliseconds; one function each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import latency, verify
from .apps import App, picture_of
from .artifact import read_json, sha256_of, write_json
from .bundle import BundleSpec, EngineFile, TypedFile, write_bundle
from .counting import count
from .engines import can_run
from .errors import ThinetDeployError
from .export import INPUT, OUTPUT, export_onnx, export_program
from .interfaces import Array, Conversion, Precision, TensorSpec
from .job import Job
from .layer_times import PROFILES, layer_times
from .precision.graph import read_onnx
from .precision_stage import CALIBRATION, quantises, typed_hops, typed_judgement
from .registry import convert, sources
from .tasks.base import Judgement, named, said
from .tools import PLAN, Tools, json_ready
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
        own = quantises(runtime)
        source = files.onnx / f"{name}.pt2" if own else files.source(name)
        images = files.typed / CALIBRATION if own and files.engines == "int8" else None
        job = Conversion(source, place, files.engines, target=tools.job.options.target, calibration=images)
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
            if owner == name and can_run(runtime):  # the others get a note: nothing runs them here
                tools.progress("Verifying", len(hops), steps + len(pruning_hops), f"{name}: ONNX to {runtime}")
                # What quantises by itself has no file of ours to go by: it may move the outputs twice as far as ours.
                own = expected if quantises(runtime) else aim
                hops.append(verify.engine_hop(name, runtime, path, inputs, own, allowed, precision=precision))
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
    files: Files,
    folder: Path,
) -> None:
    """Milliseconds of every engine on this machine, and forward and backward in torch; raw samples kept."""
    job = tools.job
    refs = [latency.EngineRef(name, runtime, path, files.engines) for (name, runtime), path in engine_paths.items()]
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
    write_json(folder / "layers.json", _profiled(tools, engine_paths, files, image))


def _profiled(
    tools: Tools, engine_paths: Mapping[tuple[str, str], Path], files: Files, image: Array
) -> dict[str, dict[str, dict[str, float]]]:
    """Runtime → network → layer → milliseconds; {} for an engine that cannot be profiled, whose times are known."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for index, ((name, runtime), path) in enumerate(engine_paths.items()):
        if runtime in PROFILES:
            tools.progress("Profiling", index, len(engine_paths), f"{name} on {runtime}")
            source, threads = read_onnx(files.onnx / f"{name}.onnx"), tools.job.options.threads
            with suppress(ThinetDeployError):
                times = layer_times(runtime, path, files.engines, source, image, threads)
                found.setdefault(runtime, {})[name] = times
    tools.progress("Profiling", len(engine_paths), len(engine_paths))
    return found


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
            app=_app(job),
        ),
    )


def _app(job: Job) -> App | None:
    """Of classifiers: what stands in `integrations` reads the scores of one image."""
    if job.data.task.name != "classification":
        return None
    canvas = job.data.test.read(np.arange(1))[0]
    how = job.data.preprocess
    return App(how, picture_of(canvas, how), tuple(job.target.runtimes), job.target.os)


def _specs(items: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(item["name"], tuple(item["shape"]), item["dtype"]) for item in items)
