"""Converters by runtime, loaded by name and only when needed; and what they leave to do for a target."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import cast

from .artifact import Artifact, sha256_of, size_of
from .errors import UnknownNameError
from .interfaces import Conversion, Converter
from .target import TargetProfile

# Runtime → module in converters/ that makes its engine from an ONNX file.
CONVERTERS = {"openvino": "onnx_to_openvino", "onnxruntime": "onnx_to_onnxruntime"}


def converter(runtime: str) -> Converter:
    """The converter that makes engines for a runtime.

    Raises:
        UnknownNameError: there is none.
    """
    if runtime not in CONVERTERS:
        raise UnknownNameError("converter for the runtime", runtime, CONVERTERS)
    return cast("Converter", importlib.import_module(f"thinet_deploy.converters.{CONVERTERS[runtime]}"))


def convert(runtime: str, job: Conversion, root: Path) -> Artifact:
    """Make an engine and say where it came from.

    Args:
        runtime: that will execute it.
        job: what to convert, and where to.
        root: the folder that the artifact's path is relative to.

    Raises:
        MissingError: the runtime's toolchain is not installed.
    """
    tool = converter(runtime)
    tool.check()
    path = tool.convert(job)
    return Artifact(
        kind=runtime,
        path=path.relative_to(root).as_posix(),
        sha256=sha256_of(path),
        size_bytes=size_of(job.folder),
        made_by=tool.made_by(),
        inputs=(sha256_of(job.source),),
    )


def host_runtimes(target: TargetProfile) -> list[str]:
    """The target's runtimes, in its order, whose engines this version makes on this machine."""
    return [runtime for runtime in target.runtimes if runtime in CONVERTERS]


def runs_here(target: TargetProfile) -> bool:
    """Whether the target's engines can be made and run on this machine."""
    return target.is_local and not target.builds_on_device


def device_notes(target: TargetProfile, input_name: str, input_shape: tuple[int, int, int]) -> list[str]:
    """What is left to do on the device, and what was not run here."""
    notes = []
    if target.builds_on_device and "tensorrt" in target.runtimes:
        notes.append(
            f"A TensorRT engine belongs to the device it was built on, so it has to be built on the {target.id}. "
            f"Copy the bundle there and run in it:\n"
            f"  {_trtexec(target, input_name, input_shape)}\n"
            f"  python3 run.py    # checks the bundle there with ONNX Runtime (pip install onnxruntime numpy)"
        )
    missing = [r for r in target.runtimes if r not in (*CONVERTERS, "tensorrt", "torch")]
    if missing:
        notes.append(
            f"This version makes no engines for {', '.join(missing)}. Their own tools make them from model.onnx, or "
            "from the torch network (thinet_deploy.load_thin with the run's plan.json and model.safetensors)."
        )
    if not host_runtimes(target):
        notes.append("So there is no engine in this bundle: it ships model.onnx, and run.py can only check the files.")
    if not runs_here(target):
        there = " `python3 run.py latency` measures it there." if target.os == "linux" else ""
        notes.append(
            f"Nothing was run on the {target.id}: numbers were compared on this machine, and latency was not "
            f"measured.{there}"
        )
    return notes


def _trtexec(target: TargetProfile, input_name: str, input_shape: tuple[int, int, int]) -> str:
    shape = "x".join(map(str, input_shape))
    sizes = " ".join(f"--{size}Shapes={input_name}:{n}x{shape}" for size, n in (("min", 1), ("opt", 1), ("max", 32)))
    workspace = f" --memPoolSize=workspace:{target.build.workspace_mb}" if target.build.workspace_mb else ""
    return f"trtexec --onnx=model.onnx --saveEngine=model.engine {sizes}{workspace}"
