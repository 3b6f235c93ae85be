"""ONNX → TensorRT engine: bound to this GPU, this TensorRT and this system, so it is built where it will run.

Tried on the bindings of TensorRT 8.6 to 11.4 only: their library was never at hand (see tests/test_tensorrt.py).
"""

from __future__ import annotations

from pathlib import Path

from ..errors import ConversionError
from ..interfaces import Contract, Conversion, Progress
from ..on_device.tensorrt_builder import BuildError, Settings, build
from ..target import load_profile

CONTRACT = Contract(
    source="onnx",
    suffix=".engine",
    modules=("tensorrt",),
    extra="tensorrt",
    precisions=("fp32", "fp16", "bf16", "int8"),
)


def convert(job: Conversion, progress: Progress) -> Path:
    """Build within the target's memory; beside it: what the build used, and the inspector's word on every layer."""
    import tensorrt

    limits = load_profile(job.target).build if job.target else None
    settings = Settings(
        precision=job.precision,
        batch=(job.batch,) * 3 if job.batch else (1, 1, job.max_batch),
        workspace_mb=limits.workspace_mb if limits else None,
        guard_mb=(limits.ram_guard_mb if limits else None) or 0,
        dla_core=job.dla_core,
        cache=job.cache / "tensorrt.timing" if job.cache else None,
    )
    path = job.folder / f"{job.source.stem}.engine"
    try:
        build(tensorrt, job.source, path, settings, lambda *step: progress("Building with TensorRT", *step))
    except BuildError as error:
        raise ConversionError(str(error), hint="The ONNX file itself is fine: see what TensorRT says of it.") from error
    progress("Building with TensorRT", 1, 1)
    return path
