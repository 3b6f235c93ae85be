"""Converters by runtime, loaded by name and only when needed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import cast

from .artifact import Artifact, sha256_of, size_of
from .errors import UnknownNameError
from .interfaces import Conversion, Converter

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
