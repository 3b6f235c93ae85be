"""ONNX → ORT format (.ort), and the list of operators that a reduced build of ONNX Runtime needs for it."""

from __future__ import annotations

from pathlib import Path

from ..interfaces import Contract, Conversion, Progress

CONTRACT = Contract(
    source="onnx",
    suffix=".ort",
    modules=("onnxruntime", "onnx"),
    extra="onnxruntime",
    precisions=("fp32", "int8"),  # the file's own types decide
    without={"fp16": "on a CPU it turns fp16 back to fp32"},
)
OPERATORS = "required_operators.config"


def convert(job: Conversion, progress: Progress) -> Path:
    """Write NAME.ort and required_operators.config, which build.py --include_ops_by_config takes.

    Optimised at the extended level, whose fusions hold on every machine; those above it make a file for one processor.
    """
    import onnxruntime
    from onnxruntime.tools.ort_format_model import create_config_from_models

    path = job.folder / f"{job.source.stem}.ort"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.save_model_format", "ORT")
    if job.batch:
        options.add_free_dimension_override_by_name("batch", job.batch)
    onnxruntime.InferenceSession(str(job.source), options, providers=["CPUExecutionProvider"])
    config = job.folder / OPERATORS
    create_config_from_models([path], config, enable_type_reduction=False)
    # Its first lines are comments about when and from which path it was made.
    lines = [line for line in config.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
