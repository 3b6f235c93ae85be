"""thinet-deploy: from a trained CNN to a thinner, verified, measured engine on the user's own device.

The names below are the public API. They are loaded when first used, so that importing the package is quick
and needs neither torch nor any runtime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bundle import verify_bundle
    from .counting import count
    from .data.dataset import Dataset, load_digits, load_folder
    from .data.preprocess import Preprocess
    from .errors import GateError, InputError, MissingError, ThinetDeployError
    from .export import export_onnx
    from .options import Options
    from .pipeline import build, build_from, feasibility, prune
    from .pruning.plan import Plan, load_plan
    from .pruning.surgery import load_thin
    from .reports.table import read_table
    from .stages.deployment import Build
    from .target import TargetProfile, load_profile
    from .timing.latency import measure_engines
    from .timing.torch_latency import measure_torch

_HOME = {
    "Build": "stages.deployment",
    "Dataset": "data.dataset",
    "GateError": "errors",
    "InputError": "errors",
    "MissingError": "errors",
    "Options": "options",
    "Plan": "pruning.plan",
    "Preprocess": "data.preprocess",
    "TargetProfile": "target",
    "ThinetDeployError": "errors",
    "build": "pipeline",
    "build_from": "pipeline",
    "count": "counting",
    "export_onnx": "export",
    "feasibility": "pipeline",
    "load_digits": "data.dataset",
    "load_folder": "data.dataset",
    "load_plan": "pruning.plan",
    "load_profile": "target",
    "load_thin": "pruning.surgery",
    "measure_engines": "timing.latency",
    "measure_torch": "timing.torch_latency",
    "prune": "pipeline",
    "read_table": "reports.table",
    "verify_bundle": "bundle",
}

__all__ = [
    "Build",
    "Dataset",
    "GateError",
    "InputError",
    "MissingError",
    "Options",
    "Plan",
    "Preprocess",
    "TargetProfile",
    "ThinetDeployError",
    "build",
    "build_from",
    "count",
    "export_onnx",
    "feasibility",
    "load_digits",
    "load_folder",
    "load_plan",
    "load_profile",
    "load_thin",
    "measure_engines",
    "measure_torch",
    "prune",
    "read_table",
    "verify_bundle",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
