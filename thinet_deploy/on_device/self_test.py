"""What run.py says of a bundle: is every file whole, does every engine give the golden outputs?

Python 3.8 and numpy only: a copy lies beside run.py in every bundle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterable, Mapping, Sequence

import numpy as np

from .engine import MissingRuntimeError, RunnerError, reason
from .engines import open_engine

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

SCHEMA, VERSION = "thinet-deploy/bundle", 1
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


def load_arrays(path: str, prefix: str) -> dict[str, Array]:
    """The arrays of an .npz whose names start with `prefix` ("input:" or "output:"), without it."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name[len(prefix) :]: archive[name] for name in archive.files if name.startswith(prefix)}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise RunnerError(f"{path} cannot be read as an .npz of arrays: {error}") from error


def compare_outputs(expected: Mapping[str, Array], got: Mapping[str, Array], tolerance: float) -> dict[str, Any]:
    """Compare outputs by name; `passed` when no value is off by more than `tolerance` × max|expected|.

    Returns:
        passed, tolerance, max_abs_error, max_relative_error (to that scale), top1_agreement (share of equal
        argmax, over 2-D outputs only), each the worst over all outputs; `problem` says in words why it failed.
        Where nothing can be compared (an output is missing, NaN) there are no errors, only the problem.
    """
    failed = {"passed": False, "tolerance": tolerance}
    if not expected:
        return {**failed, "problem": "there is nothing to compare"}
    result: dict[str, Any] = {"passed": True, "tolerance": tolerance, "max_abs_error": 0.0, "max_relative_error": 0.0}
    for name, want in expected.items():
        have = got.get(name)
        if have is None or have.shape != want.shape:
            shape = "missing" if have is None else f"of shape {have.shape}"
            return {**failed, "problem": f"output {name!r} is {shape}, expected {want.shape}"}
        exact, value = want.astype("float64"), have.astype("float64")
        if not (np.isfinite(exact).all() and np.isfinite(value).all()):
            return {**failed, "problem": f"output {name!r} holds NaN or infinity"}
        error, scale = float(np.abs(value - exact).max(initial=0)), float(np.abs(exact).max(initial=0))
        result["max_abs_error"] = max(result["max_abs_error"], error)
        result["max_relative_error"] = max(result["max_relative_error"], error / (scale or 1.0))
        if want.ndim == 2 and want.size:
            agreement = float((exact.argmax(1) == value.argmax(1)).mean())
            result["top1_agreement"] = min(result.get("top1_agreement", 1.0), agreement)
    off = result["max_relative_error"]
    if not off <= tolerance:
        result.update(passed=False, problem=f"outputs are off by {off:.2g} of their scale, allowed {tolerance:g}")
    return result


def load_manifest(folder: str) -> dict[str, Any]:
    """manifest.json of a bundle, checked as far as this file relies on it; RunnerError if it is damaged."""
    path = Path(folder, "manifest.json")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        _check_manifest(manifest)
    except FileNotFoundError:
        raise RunnerError(
            f"There is no manifest.json in {folder}: copy the whole bundle, or name it with --bundle."
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        raise RunnerError(f"{path} is damaged or not ours: {why}. Copy the bundle again.") from error
    return dict(manifest)


def _check_manifest(manifest: Any) -> None:
    if (manifest["schema"], manifest["version"]) != (SCHEMA, VERSION):
        found = f"{manifest['schema']!r} version {manifest['version']!r}"
        raise ValueError(f"it is {found}, this run.py reads {SCHEMA!r} version {VERSION}")
    texts = [manifest[key] for key in ("model", "target", "created_by")] + [manifest["golden"]["path"]]
    texts += [*manifest["files"], *manifest["files"].values(), *manifest["notes"]]
    texts += [engine[key] for engine in manifest["engines"] for key in ("runtime", "path", "precision")]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("something in it should be text and is not")
    if not all(isinstance(engine["tolerance"], (int, float)) for engine in manifest["engines"]):
        raise ValueError("a tolerance is not a number")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex; "" if it cannot be read."""
    digest = hashlib.sha256()
    with contextlib.suppress(OSError), path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
        return digest.hexdigest()
    return ""


def check_files(folder: str, listed: Mapping[str, str]) -> dict[str, list[str]]:
    """Names of files that are missing, changed, or extra (not in the manifest; never used, so they harm nothing)."""
    paths = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if not path.is_dir()}
    missing = sorted(set(listed) - set(paths))  # also every name that leads out of the folder
    changed = sorted(name for name in set(listed) & set(paths) if sha256_of(paths[name]) != listed[name])
    return {"missing": missing, "changed": changed, "extra": sorted(set(paths) - set(listed) - {"manifest.json"})}


def _why_unusable(engine: Mapping[str, str], manifest: Mapping[str, Any], damaged: Iterable[str]) -> str:
    """Why an engine must not be loaded, or "". Loading runs native code: only on what the manifest vouches for."""
    main, golden, listed = engine["path"], manifest["golden"]["path"], manifest["files"]
    own = (main.rpartition(".")[0] + ".", main + "/")  # an .xml's .bin, an .onnx's .data; a folder's content
    bad = [name for name in damaged if name in (main, golden) or name.startswith(own)]
    if bad:
        return f"not loaded, damaged: {', '.join(bad)}"
    known = golden in listed and any(name == main or name.startswith(own[1]) for name in listed)
    return "" if known else f"not loaded, {main} or {golden} has no checksum in the manifest"


def _examine(path: str, golden: str, engine: Mapping[str, Any]) -> dict[str, Any]:
    """Run the golden inputs on one engine."""
    inputs = load_arrays(golden, "input:")
    with contextlib.closing(open_engine(engine["runtime"], path, 1, engine["precision"])) as opened:
        opened.run(inputs)
        got, about = opened.run(inputs), opened.describe()  # the second run is the one that goes on: see TensorRt
    result = compare_outputs(load_arrays(golden, "output:"), got, float(engine["tolerance"]))
    verdict = PASSED if result.pop("passed") else FAILED
    return {"verdict": verdict, "reason": result.pop("problem", ""), **result, "describe": about}


def each_engine(
    folder: str, manifest: Mapping[str, Any], damaged: Sequence[str], examine: Callable[..., dict[str, Any]]
) -> tuple[list[dict[str, Any]], int]:
    """A row with verdict and reason per engine, and the exit code: 0 passed, 1 damaged or failed, 3 nothing ran."""
    rows, golden = [], str(Path(folder, manifest["golden"]["path"]))
    for engine in manifest["engines"]:
        path = str(Path(folder, engine["path"]))
        row = {key: engine[key] for key in ("runtime", "precision", "path")}
        damage = _why_unusable(engine, manifest, damaged)
        try:
            result = {"verdict": FAILED, "reason": damage} if damage else examine(path, golden, engine)
        except MissingRuntimeError as error:
            result = {"verdict": NOT_RUN, "reason": str(error)}
        except Exception as error:  # noqa: BLE001 - runtimes raise types of their own
            result = {"verdict": FAILED, "reason": reason(error)}
        rows.append({**row, **result})
    verdicts = {row["verdict"] for row in rows}
    return rows, 1 if damaged or FAILED in verdicts else 0 if PASSED in verdicts else 3


def verify(folder: str) -> dict[str, Any]:
    """Check every file of a bundle and run every engine whose runtime is here; JSON-ready, with `exit_code`."""
    manifest = load_manifest(folder)
    files = check_files(folder, manifest["files"])
    rows, code = each_engine(folder, manifest, files["missing"] + files["changed"], _examine)
    about = {key: manifest[key] for key in ("model", "target", "created_by", "notes")}
    counted = {"listed": len(manifest["files"]), **files}
    return {"bundle": folder, **about, "files": counted, "engines": rows, "exit_code": code}
