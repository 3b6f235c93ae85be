"""ONNX → ONNX Runtime: an optimised ONNX file, ready to load."""

from __future__ import annotations

from importlib import metadata, util
from pathlib import Path

from ..errors import MissingError
from ..interfaces import Conversion


def check() -> None:
    """Raise MissingError unless ONNX Runtime is installed."""
    if util.find_spec("onnxruntime") is None:
        raise MissingError(
            "ONNX Runtime is not installed.", hint='Install it: pip install "thinet-deploy[onnxruntime]"'
        )


def made_by() -> str:
    """ONNX Runtime and its version."""
    return f"onnxruntime {metadata.version('onnxruntime')}"


def convert(job: Conversion) -> Path:
    """Optimise off-line at the extended level: fusions that hold on every machine.

    The layout optimisations above that level depend on the processor, so ONNX Runtime does them when it loads the file.
    """
    import onnxruntime

    path = job.folder / f"{job.source.stem}.onnx"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(job.source), options, providers=["CPUExecutionProvider"])
    return path
