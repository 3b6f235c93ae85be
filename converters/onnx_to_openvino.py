"""ONNX → OpenVINO IR (.xml and .bin)."""

from __future__ import annotations

import sys
from pathlib import Path

from ..interfaces import Contract, Conversion, Progress

CONTRACT = Contract(
    source="onnx",
    suffix=".xml",
    modules=("openvino",),
    extra="openvino",
    precisions=("fp32", "fp16", "bf16", "int8"),  # the hint that the runner gives decides
)


def convert(job: Conversion, progress: Progress) -> Path:
    """Convert; weights are stored as FP16 only when fp16 was asked for (OpenVINO's own default is always)."""
    # On import, and in convert_model(), OpenVINO reports to its maker from a forked process. Without this module it
    # does not.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # absent
    import openvino

    model = openvino.Core().read_model(job.source)
    if job.batch:
        port = model.inputs[0]
        model.reshape({port: [job.batch, *list(port.get_partial_shape())[1:]]})
    path = job.folder / f"{job.source.stem}.xml"
    openvino.save_model(model, path, compress_to_fp16=job.precision == "fp16")
    return path
