"""ONNX → OpenVINO IR (.xml and .bin)."""

from __future__ import annotations

import sys
from importlib import metadata, util
from pathlib import Path

from ..errors import MissingError
from ..interfaces import Conversion


def check() -> None:
    """Raise MissingError unless OpenVINO is installed."""
    if util.find_spec("openvino") is None:
        raise MissingError("OpenVINO is not installed.", hint='Install it: pip install "thinet-deploy[openvino]"')


def made_by() -> str:
    """OpenVINO and its version."""
    return f"openvino {metadata.version('openvino')}"


def convert(job: Conversion) -> Path:
    """Convert; weights are stored as FP16 only when fp16 was asked for (OpenVINO's own default is always)."""
    # On import, and in convert_model(), OpenVINO reports to its maker from a forked process, which also would go on
    # holding the run's lock. Without this module it does not.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # absent
    import openvino

    model = openvino.Core().read_model(job.source)
    path = job.folder / f"{job.source.stem}.xml"
    openvino.save_model(model, path, compress_to_fp16=job.precision == "fp16")
    return path
