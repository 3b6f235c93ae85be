"""What ships of a build: the network's bundle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..apps import App, picture_of
from ..artifact import read_json, sha256_of
from ..bundle import BundleSpec, EngineFile, TypedFile, write_bundle
from ..export import INPUT
from ..interfaces import TensorSpec
from ..verify import INT8_ALLOWANCE
from .deploy import EXPORTED, Files
from .job import Job
from .parity import PARITY, GoldenFile
from .precision import quantises
from .tools import PLAN, Tools


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
    spec = read_json(files.onnx / EXPORTED)[name]
    golden = GoldenFile.load(parity_folder / f"{name}.npz")
    hops = [hop for hop in read_json(parity_folder / PARITY)["hops"] if hop["model"] in (name, "conv")]
    engines = {runtime: path for (owner, runtime), path in engine_paths.items() if owner == name}
    write_bundle(
        folder,
        BundleSpec(
            model=f"{job.model_name}, {ship.label}",
            target=job.target.id,
            onnx=files.source(name),
            engines=tuple(_engines(job, name, files, engines, golden, _moved(name, hops))),
            typed=tuple(_typed(name, files, golden)),
            inputs=_specs(spec["inputs"]),
            outputs=_specs(spec["outputs"]),
            golden_inputs={INPUT: golden.inputs},
            golden_outputs=golden.outputs,
            tolerance=golden.tolerance,
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


def _engines(
    job: Job, name: str, files: Files, engines: Mapping[str, Path], golden: GoldenFile, moved: Mapping[str, float]
) -> Iterator[EngineFile]:
    """The engines of the network; for a target that builds its own, the ONNX file to run until it has.

    What the runtime's own tools quantised may be off by twice what it was off by here: a device rounds otherwise.
    """
    on_device, precision = job.target.builds_on_device, files.engines
    for runtime, path in engines.items():
        if runtime == "onnxruntime" or not on_device:
            source = files.onnx / f"{name}.onnx" if on_device else path
            own = INT8_ALLOWANCE * moved.get(runtime, 0.0) if precision == "int8" and quantises(runtime) else 0.0
            yield EngineFile(runtime, source, precision, max(own, golden.allowed[precision]))


def _moved(name: str, hops: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Runtime → how far the network's engine was from torch here, where it was run."""
    found = [hop for hop in hops if hop["model"] == name and hop["error"] is not None]
    return {hop["hop"].removeprefix("ONNX → "): hop["error"] for hop in found if hop["hop"].startswith("ONNX → ")}


def _typed(name: str, files: Files, golden: GoldenFile) -> Iterator[TypedFile]:
    """The network in the types that its engines do not have."""
    for precision, how in files.report.get(name, {}).items():
        if "path" in how and precision != files.engines:
            layout, allowed = how.get("layout", ""), golden.allowed[precision]
            yield TypedFile(files.typed / how["path"], precision, layout, allowed)


def _app(job: Job) -> App | None:
    """Of classifiers: what stands in `integrations` reads the scores of one image."""
    if job.data.task.name != "classification":
        return None
    canvas = job.data.test.read(np.arange(1))[0]
    how = job.data.preprocess
    return App(how, picture_of(canvas, how), tuple(job.target.runtimes), job.target.os, job.options.dla)


def _specs(items: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(item["name"], tuple(item["shape"]), item["dtype"]) for item in items)
