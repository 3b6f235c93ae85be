"""ONNX → TensorRT-RTX engine for every RTX GPU from Ampere on: built without a GPU, compiled on first use."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConversionError
from ..interfaces import Contract, Conversion, Progress
from ..on_device.tensorrt_builder import BuildError, Settings, build

CONTRACT = Contract(
    source="onnx",
    suffix=".engine",
    modules=("tensorrt_rtx",),
    extra="tensorrt-rtx",
    precisions=("fp32", "fp16", "bf16", "int8"),
)


def convert(job: Conversion, progress: Progress) -> Path:
    """Build for `tensorrt_builder.RTX_CAPABILITIES`; the types are those of the ONNX file, as in TensorRT 11."""
    import tensorrt_rtx

    batch = (job.batch,) * 3 if job.batch else (1, 1, job.max_batch)
    path = job.folder / f"{job.source.stem}.engine"
    try:
        settings = Settings(job.precision, batch)
        build(tensorrt_rtx, job.source, path, settings, lambda *step: progress("Building with TensorRT-RTX", *step))
    except BuildError as error:
        raise ConversionError(str(error), hint="The ONNX file itself is fine: see what TensorRT says of it.") from error
    progress("Building with TensorRT-RTX", 1, 1)
    return path
