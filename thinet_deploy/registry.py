"""Converters by runtime, loaded by name and only when needed; and what they leave to do for a target."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable
from importlib import metadata, util
from pathlib import Path
from typing import cast

from .artifact import Artifact, sha256_of, size_of
from .bundle import BUILDER, built_path
from .errors import InputError, MissingError, UnknownNameError
from .interfaces import Contract, Conversion, Converter, Precision, Progress, silent
from .isolation import LIMIT_S, convert_isolated
from .on_device.engines import can_run
from .reproduce import write_script
from .target import TargetProfile, load_profile

# Without these nothing is built that names them; the others are left out, with a note, where they are not installed.
_EXPECTED = ("openvino", "onnxruntime")
# Kind of engine → module in converters/ that makes it.
CONVERTERS = {
    "openvino": "onnx_to_openvino",
    "onnxruntime": "onnx_to_onnxruntime",
    "ort": "onnx_to_ort",
    "tensorrt": "onnx_to_tensorrt",
    "tensorrt-rtx": "onnx_to_tensorrt_rtx",
    "ncnn": "onnx_to_ncnn",
    "coreml": "program_to_coreml",
    "litert": "program_to_litert",
    "executorch": "program_to_executorch",
}


def _module(runtime: str) -> str:
    if runtime not in CONVERTERS:
        raise UnknownNameError("converter for the runtime", runtime, CONVERTERS)
    return f"{__package__}.converters.{CONVERTERS[runtime]}"


def converter(runtime: str) -> Converter:
    """The converter that makes engines for a runtime.

    Raises:
        UnknownNameError: there is none.
    """
    return cast("Converter", importlib.import_module(_module(runtime)))


def check(runtime: str) -> None:
    """Raise MissingError when the toolchain that makes engines for a runtime is not installed."""
    if missing := _missing(runtime):
        raise MissingError(
            f"There can be no {runtime} engine, because {' and '.join(missing)} is not installed.",
            hint=f'Install it: pip install "thinet-deploy[{converter(runtime).CONTRACT.extra}]"',
        )


def _missing(runtime: str) -> list[str]:
    return [name for name in converter(runtime).CONTRACT.modules if util.find_spec(name) is None]


def installed(runtime: str) -> bool:
    """Whether the toolchain that makes engines for a runtime is there."""
    return not _missing(runtime)


def made_by(runtime: str) -> str:
    """Toolchain and version, such as "openvino 2026.4.1"."""
    return versions(converter(runtime).CONTRACT.modules[:1])[0]


def toolchain(runtime: str) -> list[str]:
    """All that makes and checks a runtime's engines, the toolchain itself first, with versions."""
    return versions(converter(runtime).CONTRACT.modules)


def versions(modules: Iterable[str]) -> list[str]:
    """Installed modules with their versions."""
    return [f"{name} {_version(name)}" for name in modules]


def _version(module: str) -> str:
    """Of what brings a module, which may have another name: onnxruntime-gpu, tensorrt-cu12."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(module)
    brought_by = metadata.packages_distributions().get(module.partition(".")[0])  # reads the records of all packages
    if brought_by:
        return metadata.version(brought_by[0])
    return str(getattr(importlib.import_module(module), "__version__", "of unknown version"))


def convert(
    runtime: str,
    job: Conversion,
    root: Path,
    *,
    log: Path | None = None,
    progress: Progress = silent,
    limit_s: float = LIMIT_S,
) -> Artifact:
    """Make an engine, in a process of its own, and say where it came from; reproduce.py beside it makes it again.

    Args:
        runtime: that will execute it.
        job: what to convert, and where to.
        root: the folder that the artifact's path is relative to.
        log: what the toolchain says; by default FOLDER.log beside the job's folder.
        progress: to report to.
        limit_s: how long it may take.

    Raises:
        MissingError: the runtime's toolchain is not installed.
        InputError: the converter, or the target, does not do what is asked.
        ConversionError: the toolchain failed.
    """
    check(runtime)
    _check_asked(runtime, converter(runtime).CONTRACT, job)
    log = log or job.folder.with_name(f"{job.folder.name}.log")
    path = convert_isolated(_module(runtime), job, log=log, progress=progress, limit_s=limit_s)
    artifact = Artifact(
        kind=runtime,
        path=path.relative_to(root.absolute()).as_posix(),
        sha256=sha256_of(path),
        size_bytes=size_of(job.folder),
        made_by=made_by(runtime),
        inputs=(sha256_of(job.source),),
    )
    write_script(job, artifact, path)
    return artifact


def _check_asked(runtime: str, contract: Contract, job: Conversion) -> None:
    if job.precision not in contract.precisions:
        raise InputError(
            f"The converter for {runtime} cannot be asked for {job.precision}{contract.why_not(job.precision)}.",
            hint=f"It knows {', '.join(contract.precisions)}.",
        )
    if contract.source == "program" and job.precision == "int8" and job.calibration is None:
        raise InputError(
            f"The converter for {runtime} quantises by itself, and for int8 it was given no calibration images.",
            hint="Give them as Conversion.calibration, a .npy file; `thinet-deploy build --precision int8` does.",
        )
    if job.dla_core is not None and job.target:
        load_profile(job.target).require_dla(job.dla_core, job.precision)
    if contract.batch == "one" and job.batch not in (None, 1):
        raise InputError(
            f"An engine for {runtime} takes one image at a time, but batch {job.batch} was asked for.",
            hint="Leave the batch size out: the runner takes larger batches image by image.",
        )


def host_runtimes(target: TargetProfile) -> list[str]:
    """The target's runtimes, in its order, whose engines are made on this machine.

    OpenVINO and ONNX Runtime always belong to them, the others where their toolchains are installed. An engine of
    TensorRT is built on the device.
    """
    return [runtime for runtime in _made_here(target) if runtime in _EXPECTED or installed(runtime)]


def sources(target: TargetProfile) -> set[str]:
    """What the converters of `host_runtimes` start from: "onnx", "program"."""
    return {converter(runtime).CONTRACT.source for runtime in host_runtimes(target)}


def _made_here(target: TargetProfile) -> list[str]:
    on_device = {"tensorrt"} if target.builds_on_device else set()
    return [runtime for runtime in target.runtimes if runtime in CONVERTERS and runtime not in on_device]


def runs_here(target: TargetProfile) -> bool:
    """Whether the target's engines can be made and run on this machine."""
    return target.is_local and not target.builds_on_device


def device_notes(target: TargetProfile, dla: int | None = None) -> list[str]:
    """What is left to do on the device, and what was not run here; `dla` is to take the layers that it can."""
    notes = []
    if target.builds_on_device and "tensorrt" in target.runtimes:
        stack = f" ({target.stack.name}, TensorRT {target.stack.tensorrt})" if target.stack else ""
        notes.append(
            "A TensorRT engine belongs to the device it was built on, "
            f"so it has to be built on the {target.id}{stack}. "
            "--device ssh://user@host does all of it; or copy the bundle there and run in it:\n"
            f"  {builder_command(target, 'model.onnx', 'fp32', dla)}\n"
            "which is where the apps in app/ look for it, whose `check` compares it with the golden outputs (run.py "
            "checks what came in the bundle, not this one)."
        )
    made = host_runtimes(target)
    for runtime in _made_here(target):
        if runtime not in made:
            extra = converter(runtime).CONTRACT.extra
            notes.append(
                f"This bundle has no {runtime} engine, because {' and '.join(_missing(runtime))} is not installed "
                f'here: pip install "thinet-deploy[{extra}]", and run the same command again.'
            )
        elif not can_run(runtime):
            notes.append(
                f"The {runtime} engine was made, but nothing on this machine can run it: check it on the device."
            )
    if not made:
        notes.append("So there is no engine in this bundle: it ships model.onnx, and run.py can only check the files.")
    if not runs_here(target):
        there = " `python3 run.py latency` measures it there." if target.os == "linux" else ""
        notes.append(
            f"Nothing was run on the {target.id}: numbers were compared on this machine, and latency was not "
            f"measured.{there}"
        )
    return notes


def builder_options(target: TargetProfile, dla: int | None) -> list[str]:
    """Of tensorrt_builder.py: the target's memory, and the DLA, which takes one batch size only."""
    values = {"--workspace-mb": target.build.workspace_mb, "--guard-mb": target.build.ram_guard_mb, "--dla-core": dla}
    options = [word for name, value in values.items() if value is not None for word in (name, str(value))]
    return options if dla is None else [*options, "--batch", "1", "1", "1"]


def builder_command(target: TargetProfile, source: str, precision: Precision, dla: int | None) -> str:
    """What builds a TensorRT engine from a file of the bundle, to be run in it on the device."""
    words = ("python3", BUILDER.name, source, built_path(precision), "--precision", precision)
    return " ".join((*words, *builder_options(target, dla)))
