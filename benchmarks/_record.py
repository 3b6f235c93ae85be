"""Keep a benchmark's raw samples and the machine they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from thinet_deploy.artifact import hash_json, write_json
from thinet_deploy.environment import fingerprint

RESULTS = Path(__file__).parent / "results"


def keep(name: str, samples: dict[str, Any], *, quick: bool) -> Path:
    """Write results/NAME.json; a quick run, which shows only that the script works, goes to results/NAME-quick.json.

    Where there are rows by name, `measured_on` says in which of the `environments` each of them was measured or last
    added to: rows of one file may come from several machines.
    """
    path, here = _path(name, quick), fingerprint()
    if not isinstance(rows := samples.get("rows"), dict):
        write_json(path, {"benchmark": name, "environment": here, **samples})
        return path
    before: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    key, old, known = hash_json(here)[:8], before.get("rows", {}), before.get("measured_on", {})
    machines = {**before.get("environments", {}), key: here}
    plain = json.loads(json.dumps(rows))  # as they come back from a file: tuples are lists there
    where = {row: known.get(row, key) if old.get(row) == plain[row] else key for row in plain}
    used = {each: machines[each] for each in dict.fromkeys(where.values())}
    write_json(path, {"benchmark": name, "environments": used, "measured_on": where, **samples})
    return path


def kept(name: str, *, quick: bool) -> dict[str, Any]:
    """The rows so far, for a benchmark that keeps them one by one and goes on where it was; a quick run starts anew."""
    path = _path(name, quick)
    return json.loads(path.read_text("utf-8"))["rows"] if path.exists() and not quick else {}


def _path(name: str, quick: bool) -> Path:
    return RESULTS / (f"{name}-quick.json" if quick else f"{name}.json")
