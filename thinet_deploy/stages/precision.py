"""The stages around precision: typed ONNX files, and the proof of what engines execute."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from .. import verify
from ..artifact import write_bytes, write_json
from ..data.dataset import ImageSet
from ..environment import fingerprint
from ..errors import DataError, GateError, InputError
from ..interfaces import Precision
from ..options import Options
from ..precision.accuracy_gate import Judge, Quantised, outputs, quantise_within, speaking
from ..precision.calibration import MIN_IMAGES, Batches, Floats, Values, observe
from ..precision.executed import prove_precision
from ..precision.graph import names_of, read_onnx
from ..precision.half import Half, kept_names, overflowing, to_half
from ..precision.held import READERS
from ..precision.int8 import left_out
from ..precision.plan import PrecisionPlan, plan_precision
from ..registry import builder_command, converter
from ..seeds import generator
from ..target import TargetProfile
from ..tasks.base import Accuracy, Judgement
from ..tasks.classification import CLASSIFICATION
from .job import Job
from .tools import Tools

# What is usual; more changes limits by less than a step.
CALIBRATION_IMAGES = 300
JUDGING_IMAGES = 500
_FREE = (
    "TensorRT 8, and DLAs before TensorRT 11, may choose FP16 for them all the same, where that is faster: `run.py` "
    "there compares the outputs."
)
TYPED, EXECUTED, CALIBRATION = "typed.json", "precision.json", "calibration.npy"


def planned(job: Job) -> PrecisionPlan:
    """Which precision goes where, before any work starts.

    Raises:
        TargetError: the target cannot compute in what was asked for.
        InputError: files in other types than fp32 are made of classifiers only.
        DataError: there are too few images to calibrate with.
    """
    options = job.options
    plan = plan_precision(job.target, options.precision, fingerprint()["cpu"]["flags"], options.dla)
    if plan.files and job.data.task.name != CLASSIFICATION.name:
        return _fp32_only(job, plan)
    if not plan.files or (images := len(_calibrating(job)[1])) >= MIN_IMAGES:
        return plan
    short = f"{images} calibration images, and at least {MIN_IMAGES} are needed"
    if wish := _wish(options):
        raise DataError(
            f"{wish}: there are {short}; a tenth of the training images is held out to judge.",
            hint="Give more training images, or a larger --calibration-images: some hundred are usual.",
        )
    missing = f"No {' or '.join(plan.files)} file: there are {short}."
    return replace(plan, files=(), notes=(*plan.notes, missing))


def _wish(options: Options) -> str:
    """The option that cannot do without typed files; "" where nobody asked for any."""
    return f"--precision {options.precision}" if options.precision else "" if options.dla is None else "--dla"


def _fp32_only(job: Job, plan: PrecisionPlan) -> PrecisionPlan:
    """The plan without typed files: whether these may ship is judged by top-1, which other tasks do not have."""
    why = f"files in {' and '.join(plan.files)} are made of classifiers only so far, and this is {job.data.task.name}"
    if wish := _wish(job.options):
        raise InputError(f"{wish}: {why}.", hint="Leave it out: engines are fp32 then.")
    return replace(plan, files=(), notes=(*plan.notes, f"{why[0].upper()}{why[1:]}: the bundle has fp32."))


def _calibrating(job: Job) -> tuple[ImageSet, Any]:
    """Training images, and which of them to calibrate with."""
    fit, _ = job.split
    most = min(CALIBRATION_IMAGES, job.options.calibration_images)
    chosen = fit.sample(most, seed=job.options.seed, stage="precision")
    # Folders have one class after another: where the first of them are all that there is room for, these are of all.
    return fit, generator(job.options.seed, "precision", "order").permutation(chosen)


def judging(job: Job) -> Judge:
    """Held-out training images, by which it is judged what INT8 costs."""
    _, held_out = job.split
    chosen = held_out.sample(JUDGING_IMAGES, seed=job.options.seed, stage="precision")
    return Judge(held_out.inputs(chosen), held_out.labels[chosen] if held_out.labelled else None)


def typed(tools: Tools, plan: PrecisionPlan, onnx_folder: Path, names: Collection[str], folder: Path) -> None:
    """Each network as an ONNX file in each of the plan's types: PRECISION/NAME.onnx, and how it went in typed.json.

    Converters that quantise by themselves find the calibration images in calibration.npy.
    """
    job, report = tools.job, dict[str, dict[str, Any]]()
    fit, chosen = _calibrating(job)
    height, width = job.input_shape[1:]
    size = min(64, max(4, 64 * 32 * 32 // (height * width)))

    def batches() -> Iterator[Floats]:
        for start in range(0, len(chosen), size):
            yield fit.inputs(chosen[start : start + size])

    judge = judging(job)
    for index, name in enumerate(names):
        tools.progress("Calibrating types", index, len(names), name)
        model = read_onnx(onnx_folder / f"{name}.onnx")
        values, report[name] = observe(model, batches), {}
        for precision in plan.files:
            tools.progress("Calibrating types", index, len(names), f"{name} in {precision}")
            made, how = _made(tools, plan, precision, _Observed(model, values, batches, judge))
            if made is not None:
                path = folder / precision / f"{name}.onnx"
                write_bytes(path, made.SerializeToString(deterministic=True))
                how |= {"path": path.relative_to(folder).as_posix(), "weights": _stored(made)}
                how["accuracy"] = asdict(_tested(tools, made))
            report[name][precision] = {"calibration_images": len(chosen), **how}
    tools.progress("Calibrating types", len(names), len(names), f"{', '.join(plan.files)}; {len(chosen)} images")
    if plan.engines == "int8" and any(quantises(runtime) for runtime in plan.runtimes):
        np.save(folder / CALIBRATION, fit.inputs(chosen))
    write_json(folder / TYPED, report)


def quantises(runtime: str) -> bool:
    """Whether a runtime's converter quantises by itself, with its makers' tools, and not our Q/DQ file."""
    return converter(runtime).CONTRACT.source == "program"


@dataclass(frozen=True)
class _Observed:
    """A network, what it was seen to do on calibration images, these, and the ones to judge by."""

    model: ModelProto
    values: Mapping[str, Values]
    batches: Batches
    judge: Judge


def _made(
    tools: Tools, plan: PrecisionPlan, precision: Precision, seen: _Observed
) -> tuple[ModelProto | None, dict[str, Any]]:
    """A network in one type, and how it was made; None, and why, where a type that nobody asked for cannot be had."""
    model = seen.model
    if precision != "int8":
        kind: Half = "bf16" if precision == "bf16" else "fp16"
        why = overflowing(model, seen.values) if kind == "fp16" else {}
        return to_half(model, kind, keep=why), {"kept": kept_names(model, why), "kept_nodes": list(why)}
    drop, progress = tools.job.options.max_drop, tools.progress
    try:
        done = quantise_within(model, seen.values, plan.layout, seen.judge, drop, seen.batches, progress=progress)
    except GateError as error:
        if tools.job.options.precision:
            raise
        return None, {"refused": error.what}
    return done.model, {"layout": plan.layout.name, "max_drop": drop, **_told(done, model)}


def _told(done: Quantised, model: ModelProto) -> dict[str, Any]:
    names, left = names_of(model), left_out(model)
    costly = dict.fromkeys(done.kept.values(), "in INT8 too much top-1 is lost for --max-drop")
    endless = dict.fromkeys(done.unbounded.values(), "values there are not finite")
    return {
        "kept": costly | endless | {names[node]: why for node, why in left.items()},
        "kept_nodes": [*done.kept, *done.unbounded, *left],
        "method": done.method,
        "refitted": done.refitted,
        "top1_fp32": done.before,
        "top1": done.after,
        "images": done.images,
    }


def _stored(model: ModelProto) -> dict[str, int]:
    """Bytes of what the file stores, by element type."""
    sizes: dict[str, int] = {}
    for each in model.graph.initializer:
        kind = onnx.TensorProto.DataType.Name(each.data_type).lower()
        sizes[kind] = sizes.get(kind, 0) + onnx.numpy_helper.to_array(each).nbytes
    return sizes


def _tested(tools: Tools, model: ModelProto) -> Accuracy:
    """Accuracy on the test images: for the report, no choice is made by it."""
    return _judged(tools, model).accuracy


def typed_judgement(tools: Tools, path: Path) -> Judgement:
    """How good a typed file is on the test images."""
    return _judged(tools, onnx.load(path))


def _judged(tools: Tools, model: ModelProto) -> Judgement:
    say, meter = speaking(model, literal=False), tools.job.data.task.meter()
    for images, targets in tools.job.data.test.batches(256):
        meter.add([say(images)], targets)
    return meter.judge()


def executed(
    tools: Tools,
    plan: PrecisionPlan,
    onnx_folder: Path,
    report: Mapping[str, Any],
    engines: Mapping[tuple[str, str], Path],
    folder: Path,
) -> None:
    """What every engine runs in which type, or holds in it, layer by layer: precision.json."""
    found = dict[str, Any]()
    for index, ((name, runtime), path) in enumerate(engines.items()):
        tools.progress("Reading precisions back", index, len(engines), f"{name}: {runtime}")
        source = read_onnx(onnx_folder / f"{name}.onnx")
        keep = () if quantises(runtime) else report.get(name, {}).get(plan.engines, {}).get("kept_nodes", ())
        proof = prove_precision(runtime, path, source, plan.engines, keep=keep)
        does = "holds" if runtime in READERS else "runs"
        own = plan.engines == "int8" and quantises(runtime)  # as far as its makers' tools go
        passed = "int8" in proof.shares if own else not proof.wrong
        hop = verify.Hop(name, f"{runtime} {does} {plan.engines}", passed, detail=proof.describe())
        found[f"{name}/{runtime}"] = {**proof.to_json(), "hop": asdict(hop)}
    tools.progress("Reading precisions back", len(engines), len(engines), f"{len(engines)} engines")
    write_json(folder / EXECUTED, found)


def typed_hops(
    name: str, report: Mapping[str, Any], folder: Path, inputs: Floats, expected: Floats, noise: float
) -> Iterator[tuple[Precision, verify.Hop, Floats]]:
    """FP32 → each typed file of a network, computed node by node as it is written: the verdict and its outputs."""
    for precision, how in report.get(name, {}).items():
        if "path" not in how:
            continue
        got = outputs(read_onnx(folder / how["path"]), inputs)
        if precision == "int8":
            yield precision, verify.int8_hop(name, expected, got, how), got
        else:
            allowed = verify.tolerance(noise, precision)
            passed, error, agreement = verify.compare(expected, got, allowed)
            hop = verify.Hop(name, f"FP32 → {precision} ONNX", passed, error, allowed, agreement, len(inputs))
            yield precision, hop, got


def file_notes(
    report: Mapping[str, Any],
    labels: Mapping[str, str],
    target: TargetProfile,
    plan: PrecisionPlan,
    dla: int | None = None,
) -> Iterator[str]:
    """What people have to know about typed files: layers in fp32, files that could not be had, their use."""
    if own := [each for each in plan.runtimes if plan.engines == "int8" and quantises(each)]:
        yield (
            f"{' and '.join(own)}: quantised by the runtime's own tools, as far as these go (the report says of which "
            "layers), not from our INT8 ONNX file. "
            "Accuracy, size and layers in fp32 given here are that file's; judge such an engine on the device too."
        )
    for name, files in report.items():
        for precision, how in files.items():
            if "refused" in how:
                yield f"{labels[name]}: no {precision} file. {how['refused']}"
            elif how["kept"]:
                listed = "; ".join(f"{layer} ({why})" for layer, why in how["kept"].items())
                wish = f" {_FREE}" if precision == "fp16" and _chooses(target, dla) else ""
                yield f"{labels[name]} in {precision}: these layers stay in fp32: {listed}.{wish}"
            images, most = how.get("images", JUDGING_IMAGES), how.get("max_drop", 0)
            if images < JUDGING_IMAGES and 0 < most < 100 / images:
                yield (
                    f"{labels[name]} in {precision} was judged on {images} held-out training images, where one is "
                    f"{100 / images:.3g} points: too few for --max-drop {most:g}."
                )
            if "path" in how and precision != plan.engines:
                yield f"The bundle has the network in {precision}, for the device: {_use(target, precision, dla)}"


def _chooses(target: TargetProfile, dla: int | None) -> bool:
    """Whether the target's TensorRT takes the types of an FP16 file for a wish."""
    weak = target.stack is not None and target.stack.strong_typing == "none"
    return "tensorrt" in target.runtimes and (weak or dla is not None)


def _use(target: TargetProfile, precision: Precision, dla: int | None) -> str:
    """The file, or how an engine is built from it."""
    source = f"typed/model-{precision}.onnx"
    return builder_command(target, source, precision, dla) if "tensorrt" in target.runtimes else source
