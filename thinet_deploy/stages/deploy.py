"""What finished networks become: ONNX files, engines, their milliseconds, the accuracy lost; one function each."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import write_json
from ..counting import count
from ..errors import ConversionError, ThinetDeployError
from ..export import INPUT, export_onnx, export_program
from ..interfaces import Array, Conversion, Precision
from ..on_device.runner import ROUNDS
from ..precision.graph import read_onnx
from ..registry import convert, sources
from ..store import Stage
from ..tasks.base import Judgement
from ..timing import latency
from ..timing.layer_times import PROFILES, layer_times
from ..timing.torch_latency import measure_torch
from ..training import judge
from .precision import CALIBRATION, quantises, typed_judgement
from .tools import Tools

EXPORTED, LATENCY, LAYERS, DROPS = "export.json", "latency.json", "layers.json", "drops.json"
ENGINES, REFUSED = "engines.json", "refused.json"
UNTIMED = "untimed"  # in latency.json: why no network was timed in torch, or ""
ENGINE_SECONDS = 3.0
ENGINE_ROUNDS = ROUNDS
TORCH_BATCH = 32
TORCH_ROUNDS = 11  # enough to see that the machine changed half-way
_FOLDERS = re.compile(r"(?<![\w.])/(?:[^\s/:]+/)+")  # of this machine: what is said of an engine goes into the bundle


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
    tools.progress("Exporting to ONNX", len(networks), len(networks), ", ".join(networks))
    write_json(folder / EXPORTED, report)


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

    def typed_as(self, name: str) -> Mapping[str, Any]:
        """How the typed file that a network's engines are made from was made; {} where they are made from float32."""
        how: Mapping[str, Any] = self.report.get(name, {}).get(self.engines, {})
        return how if "path" in how else {}

    def source(self, name: str) -> Path:
        """What a network's engines are made from."""
        how = self.typed_as(name)
        return self.typed / how["path"] if how else self.onnx / f"{name}.onnx"


def engines(tools: Tools, files: Files, names: list[str], runtimes: Sequence[str], folder: Path) -> None:
    """An engine per network and runtime; none of a runtime that refuses one of them, as long as another takes them all.

    Raises:
        ConversionError: no runtime takes all networks.
    """
    made, refused = dict[str, Any](), dict[str, ConversionError]()
    jobs = [(name, runtime) for name in names for runtime in runtimes]
    for index, (name, runtime) in enumerate(jobs):
        if runtime in refused:
            continue
        tools.progress("Converting", index, len(jobs), f"{name} to {runtime}")
        place = folder / runtime / name
        place.mkdir(parents=True)
        own = quantises(runtime)
        source = files.onnx / f"{name}.pt2" if own else files.source(name)
        images = files.typed / CALIBRATION if own and files.engines == "int8" else None
        job = Conversion(source, place, files.engines, target=tools.job.options.target, calibration=images)
        log = tools.job.options.out / "logs" / f"{name}-{runtime}.log"
        try:
            made[f"{name}/{runtime}"] = convert(runtime, job, folder, log=log, progress=tools.progress).to_json()
        except ConversionError as error:
            refused[runtime] = error
            shutil.rmtree(folder / runtime)
    made = {key: entry for key, entry in made.items() if key.split("/")[1] not in refused}
    if refused and not made:
        raise next(iter(refused.values()))
    tools.progress("Converting", len(jobs), len(jobs), f"{len(made)} engines")
    write_json(folder / ENGINES, made)
    write_json(folder / REFUSED, {runtime: _FOLDERS.sub("", error.what) for runtime, error in refused.items()})


def drops(tools: Tools, folders: Mapping[str, Path], files: Files, folder: Path) -> None:
    """How much accuracy each network lost against the original, paired by the test images.

    The networks in the type of their engines, the original as it was.
    """
    judged, images = dict[str, Judgement](), tools.job.data.test
    for index, (name, source) in enumerate(folders.items()):
        tools.progress("Comparing accuracy", index, len(folders), name)
        typed = name != "original" and files.typed_as(name)
        judged[name] = typed_judgement(tools, files.source(name)) if typed else judge(tools.load(source), images)
    tools.progress("Comparing accuracy", len(folders), len(folders), ", ".join(folders))
    lost = {name: asdict(own.behind(judged["original"])) for name, own in judged.items()}
    write_json(folder / DROPS, {name: drop for name, drop in lost.items() if name != "original"})


def measured(
    tools: Tools,
    folders: dict[str, Path],
    engine_paths: dict[tuple[str, str], Path],
    files: Files,
    folder: Path,
) -> None:
    """Milliseconds of every engine on this machine, and forward and backward in torch; raw samples kept.

    Where a network cannot be timed in torch, such as for want of memory, none is: what ships does not depend on it.
    """
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
    models = {name: tools.load(path) for name, path in folders.items()}
    torch_rows, why = list[latency.TorchLatency](), ""
    try:
        torch_rows = measure_torch(
            models, job.input_shape, batch=TORCH_BATCH, rounds=TORCH_ROUNDS, progress=tools.progress
        )
    except ThinetDeployError as error:
        why = error.what
    write_json(folder / LATENCY, {**latency.report(engine_rows, torch_rows).to_json(), UNTIMED: why})
    write_json(folder / LAYERS, _profiled(tools, engine_paths, files, image))


def undisturbed(stage: Stage) -> bool:
    """Whether `measured` left no time that is invalid, as those of a machine that throttled are, and no network out."""
    found = stage.json(LATENCY)
    if found.get(UNTIMED):
        return False
    engines = [row["samples"] for row in found["engines"]]
    models = [row[part] for row in found["models"] for part in ("forward", "backward")]
    return not any(samples["summary"]["invalid"] for samples in [*engines, *models])


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
    tools.progress("Profiling", len(engine_paths), len(engine_paths), f"layers on {', '.join(found) or 'no runtime'}")
    return found
