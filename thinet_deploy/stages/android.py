"""What an Android device does with a bundle: engines run there, and this machine judges what they gave."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..apps import IMAGES
from ..artifact import write_json
from ..bundle import EngineEntry, Manifest, read_manifest
from ..devices import android as android_site
from ..devices.android import Phone, Place
from ..devices.device import full_disk
from ..errors import BundleError
from ..interfaces import Array, Progress
from ..on_device.runner import ROUNDS
from ..on_device.samples import judged, summarize_rounds
from ..on_device.self_test import FAILED, NOT_RUN, PASSED, check_files, compare_outputs, load_arrays

_OUTPUTS = "outputs.f32"


def verify(phone: Phone, bundle: Path, progress: Progress) -> dict[str, Any]:
    """Run the golden inputs on every engine of a bundle there; the report of `run.py verify`."""
    manifest = read_manifest(bundle)
    files = check_files(str(bundle), manifest.files)
    if damaged := files["missing"] + files["changed"]:
        raise BundleError(
            f"{bundle} is damaged: {', '.join(damaged[:3])} is not as the manifest says.",
            hint="Copy the bundle again from where it was built, or build it again.",
        )
    place = android_site.send(phone, bundle, progress)
    rows = []
    for number, engine in enumerate(manifest.engines):
        progress("Verifying on the device", number, len(manifest.engines), engine.runtime)
        rows.append({**_named(engine), **_examined(place, bundle, engine, manifest)})
    progress("Verifying on the device", len(rows), len(rows))
    about = {"model": manifest.model, "target": manifest.target, "created_by": manifest.created_by}
    return {
        "bundle": place.bundle,
        **about,
        "notes": list(manifest.notes),
        "files": {"listed": len(manifest.files), **files},
        "engines": rows,
        "exit_code": _exit_code(rows),
    }


def _named(engine: EngineEntry) -> dict[str, str]:
    return {"runtime": engine.runtime, "precision": engine.precision, "path": engine.path}


def _exit_code(rows: list[dict[str, Any]]) -> int:
    verdicts = {row["verdict"] for row in rows}
    return 1 if FAILED in verdicts else 0 if PASSED in verdicts else 3


def _examined(place: Place, bundle: Path, engine: EngineEntry, manifest: Manifest) -> dict[str, Any]:
    if engine.runtime not in place.phone.programs:
        return {"verdict": NOT_RUN, "reason": _no_program(place.phone, engine)}
    target = f"{place.folder}/{_OUTPUTS}"
    about, reason = place.run(engine.runtime, "outputs", engine.precision, "1", target)
    if not about:
        if "storage full" in reason:
            raise full_disk(place.phone.device)
        return {"verdict": FAILED, "reason": reason}
    if not about["same_preprocessing"]:
        return {"verdict": FAILED, "reason": "images are preprocessed otherwise there than in training"}
    expected = {
        name: array[:IMAGES] for name, array in load_arrays(str(bundle / manifest.golden.path), "output:").items()
    }
    got = _fetched(place, target, expected)
    result = compare_outputs(expected, got, engine.tolerance)
    verdict = PASSED if result.pop("passed") else FAILED
    return {"verdict": verdict, "reason": result.pop("problem", ""), **result, "describe": about}


def _no_program(phone: Phone, engine: EngineEntry) -> str:
    return f"{phone.folder} has no program for {engine.runtime}: app/README.md of the bundle says what can be built."


def _fetched(place: Place, source: str, expected: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs that lie in a file there; of another number than expected they are shown as a vector."""
    ((name, like),) = expected.items()
    with TemporaryDirectory() as folder:
        place.phone.device.pull(source, Path(folder, _OUTPUTS))
        values = np.fromfile(Path(folder, _OUTPUTS), "<f4")
    return {name: values.reshape(like.shape) if values.size == like.size else values}


def latency(
    phone: Phone,
    bundle: Path,
    progress: Progress,
    *,
    threads: int = 1,
    seconds: float = 5,
    rounds: int = ROUNDS,
    fps: float = 0,
) -> dict[str, Any]:
    """Time every engine there, in turn, each turn in a process of its own; the report of `run.py latency`."""
    manifest, place = read_manifest(bundle), android_site.send(phone, bundle, progress)
    rows = [{**_named(engine), **_ready(place, engine)} for engine in manifest.engines]
    ready = [row for row in rows if row["verdict"] == PASSED]
    thermal = [phone.thermal_status()]
    for number in range(rounds):
        progress("Measuring on the device", number, rounds)
        order = [row for row in ready if row["verdict"] == PASSED]
        random.Random(f"latency:{number}").shuffle(order)  # so that nobody keeps its neighbour
        for row in order:
            _take_turn(place, row, (str(threads), f"{seconds / rounds:.6f}", f"{fps:g}"))
        thermal.append(phone.thermal_status())
    progress("Measuring on the device", rounds, rounds)
    machine = _machine(thermal)
    for row in ready:
        turns = row.pop("turns")
        row.update(_figures(turns, machine, fps) if row["verdict"] == PASSED else {})
    how = {"batch": 1, "threads": threads, "seconds": seconds, "rounds": rounds, "fps": fps}
    where = {"processor": phone.processor, "platform": phone.fingerprint["system"]}
    return {
        "bundle": place.bundle,
        "model": manifest.model,
        **how,
        **where,
        "engines": rows,
        "exit_code": _exit_code(rows),
    }


def _ready(place: Place, engine: EngineEntry) -> dict[str, Any]:
    if engine.runtime in place.phone.programs:
        return {"verdict": PASSED, "reason": "", "turns": []}
    return {"verdict": NOT_RUN, "reason": _no_program(place.phone, engine)}


def _take_turn(place: Place, row: dict[str, Any], pace: tuple[str, ...]) -> None:
    answer, reason = place.run(row["runtime"], "time", row["precision"], *pace)
    if answer:
        row["turns"].append(answer)
    else:
        row.update(verdict=FAILED, reason=reason)


def _machine(thermal: list[int | None]) -> dict[str, Any]:
    """What Android says of its temperature, before and after every round."""
    known = [status for status in thermal if status is not None]
    unknown = "whether the device throttled is not known: it has no thermalservice (Android 10 or later)"
    return {
        "throttled": ([f"thermal status {max(known)}"] if any(known) else []) if known else None,
        "thermal_status": thermal,
        "warnings": [] if known else [unknown],
    }


def _figures(turns: list[dict[str, Any]], machine: dict[str, Any], fps: float) -> dict[str, Any]:
    rounds_ms = [turn["samples_ms"] for turn in turns]
    finite = all(turn["finite"] for turn in turns)
    return {
        "load_ms": statistics.median(turn["load_ms"] for turn in turns),
        "first_ms": statistics.median(turn["first_ms"] for turn in turns),
        "describe": {"version": turns[0]["version"]},
        "rounds_ms": rounds_ms,
        "summary": judged(summarize_rounds(rounds_ms, fps), machine, finite=finite),
        "machine": machine,
        "fps": fps,
        "clocks_ms": {},
        "memory": {"process_peak_bytes": max(turn["peak_bytes"] for turn in turns) or None, "engine_bytes": None},
        "energy": None,
    }


def fill(
    phone: Phone,
    bundle: Path,
    threads: int,
    seconds: float,
    progress: Progress,
    folder: Path,
    names: tuple[str, str, str],
) -> None:
    """Verify and measure a bundle there, and write down what came of it: `names` are those of the three files."""
    facts, verified, measured = names
    write_json(folder / verified, verify(phone, bundle, progress))
    write_json(folder / measured, latency(phone, bundle, progress, threads=threads, seconds=seconds))
    write_json(folder / facts, phone.fingerprint)
