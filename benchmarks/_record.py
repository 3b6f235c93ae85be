"""Keep a benchmark's raw samples and the machine they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thinet_deploy.artifact import write_json
from thinet_deploy.environment import fingerprint

RESULTS = Path(__file__).parent / "results"


def keep(name: str, samples: dict[str, Any], *, quick: bool) -> Path:
    """Write results/NAME.json; a quick run, which shows only that the script works, goes to results/NAME-quick.json."""
    path = RESULTS / (f"{name}-quick.json" if quick else f"{name}.json")
    write_json(path, {"benchmark": name, "environment": fingerprint(), **samples})
    return path
