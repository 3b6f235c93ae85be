"""ONNX → ONNX Runtime: an optimised ONNX file, ready to load."""

from __future__ import annotations

from pathlib import Path

from ..interfaces import Contract, Conversion, Progress

CONTRACT = Contract(
    source="onnx",
    suffix=".onnx",
    modules=("onnxruntime",),
    extra="onnxruntime",
    precisions=("fp32", "int8"),  # the file's own types decide
    without={"fp16": "on a CPU it turns fp16 back to fp32"},
)


def convert(job: Conversion, progress: Progress) -> Path:
    """Optimise off-line at the extended level: fusions that hold on every machine.

    The layout optimisations above that level depend on the processor, so ONNX Runtime does them when it loads the file.
    """
    import onnxruntime

    path = job.folder / f"{job.source.stem}.onnx"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    if job.batch:
        options.add_free_dimension_override_by_name("batch", job.batch)
    onnxruntime.InferenceSession(str(job.source), options, providers=["CPUExecutionProvider"])
    return path
