"""Keep a benchmark's raw samples and the machine they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from thinet_deploy.artifact import write_json
from thinet_deploy.environment import fingerprint

RESULTS = Path(__file__).parent / "results"


def keep(name: str, samples: dict[str, Any], *, quick: bool) -> Path:
    """Write results/NAME.json; a quick run, which shows only that the script works, goes to results/NAME-quick.json."""
    write_json(_path(name, quick), {"benchmark": name, "environment": fingerprint(), **samples})
    return _path(name, quick)


def kept(name: str, *, quick: bool) -> dict[str, Any]:
    """The rows so far, for a benchmark that keeps them one by one and goes on where it was; a quick run starts anew."""
    path = _path(name, quick)
    return json.loads(path.read_text("utf-8"))["rows"] if path.exists() and not quick else {}


def _path(name: str, quick: bool) -> Path:
    return RESULTS / (f"{name}-quick.json" if quick else f"{name}.json")
