"""The bundle: what ships. Engines, the ONNX file, labels, preprocessing, golden inputs and outputs, and its own test.

    manifest.json      what everything is, with the SHA-256 of every file
    typed/…            the same network in other precisions, for engines that the device builds
    run.py             a copy of runner.py: `python run.py` verifies the bundle without this package
    engine.py  cuda.py  …    what run.py needs beside it (runner.COMPANIONS)
    tensorrt_builder.py      where the target builds TensorRT engines itself
    detections.py  default_boxes.npy   of a detector: from its outputs to objects
    app/…              source code for apps, and what they are checked with (see apps.py)
    model.onnx  engines/RUNTIME-PRECISION/…  golden.npz  labels.txt  preprocess.json

Checksums show damage, not origin: who can change a file can change the manifest as well.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .apps import App, Ends, write_app
from .artifact import explain_os_errors, sha256_of, write_json
from .errors import BundleError, OutputError
from .interfaces import Array, Precision, TensorSpec
from .on_device import runner

GOLDEN, ONNX, MANIFEST = "golden.npz", "model.onnx", "manifest.json"
_RUNNER = Path(runner.__file__)
# What runs a bundle: name in it → file; and what builds TensorRT's engines beside it.
KIT = {"run.py": _RUNNER, **{f"{name}.py": _RUNNER.with_name(f"{name}.py") for name in runner.COMPANIONS}}
BUILDER = _RUNNER.with_name("tensorrt_builder.py")
WEIGHTS = (".bin", ".onnx.data")  # beside an .xml or .param, and beside a large .onnx
_GIVE = "Give the folder RUN/bundle of a finished build."
BUILD_AGAIN = "Copy the bundle again from where it was built, or build it again with `thinet-deploy build`."


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class EngineEntry(_Entry):
    """One engine of a bundle.

    Attributes:
        path: its main file, relative to the bundle, with forward slashes.
        sha256: of that file, or of that folder as `artifact.sha256_of` has it.
        tolerance: allowed error on the golden outputs, relative to max|output|.
    """

    runtime: str
    path: str
    precision: Precision
    sha256: str
    tolerance: float = Field(ge=0, allow_inf_nan=False)


class TypedEntry(_Entry):
    """The network as an ONNX file in another precision, for an engine that is built on the device.

    Attributes:
        path: relative to the bundle, with forward slashes.
        layout: of the Q/DQ pairs in INT8, such as "S8S8"; "" in other precisions.
        tolerance: allowed error of such an engine on the golden outputs, relative to max|output|.
    """

    path: str
    precision: Precision
    layout: str
    tolerance: float = Field(ge=0, allow_inf_nan=False)


class Golden(_Entry):
    """Inputs and the outputs the original pipeline gave: arrays input:NAME and output:NAME of an .npz."""

    path: str
    tolerance: float = Field(ge=0, allow_inf_nan=False)


class Manifest(_Entry):
    """manifest.json. run.py reads it as plain JSON, so a change here that it cannot read needs a new version.

    Attributes:
        created_by: "thinet-deploy" and its version.
        target: id of the target profile.
        preprocess: how an image becomes an input.
        files: SHA-256 of every file but the manifest, by relative path.
        parity: the summary of the parity report.
        plan: fingerprint of the pruning plan; "" for a network that was not pruned.
        notes: what the user has to know, such as an engine that has to be built on the device.
    """

    format: Literal["thinet-deploy/bundle"] = Field("thinet-deploy/bundle", alias="schema")
    version: Literal[1] = 1
    created_by: str
    target: str
    model: str
    labels: tuple[str, ...]
    preprocess: dict[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    engines: tuple[EngineEntry, ...]
    typed: tuple[TypedEntry, ...] = ()
    files: dict[str, str]
    golden: Golden
    parity: dict[str, Any]
    plan: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class EngineFile:
    """An engine to ship: its main file (or folder), and the tolerance it is held to (see EngineEntry)."""

    runtime: str
    path: Path
    precision: Precision
    tolerance: float


@dataclass(frozen=True)
class TypedFile:
    """An ONNX file in another precision to ship (see TypedEntry)."""

    path: Path
    precision: Precision
    layout: str
    tolerance: float


@dataclass(frozen=True)
class BundleSpec:
    """All that goes into a bundle; see `Manifest` for the words.

    Attributes:
        onnx: the ONNX file that the engines were made from.
        golden_inputs, golden_outputs: arrays by name, batch first; outputs from the model before conversion.
        tolerance: for engines built later, on the device.
        extras: file name → content: what an app needs beside the engine to read its outputs.
        has_builder: whether the device builds TensorRT engines, and so needs tensorrt_builder.py.
        app: for source code that runs a network of one input and one output; None for none.
    """

    model: str
    target: str
    onnx: Path
    engines: tuple[EngineFile, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    golden_inputs: Mapping[str, Array]
    golden_outputs: Mapping[str, Array]
    tolerance: float
    labels: tuple[str, ...] = ()
    preprocess: dict[str, Any] = field(default_factory=dict)
    parity: dict[str, Any] = field(default_factory=dict)
    plan: str = ""
    notes: tuple[str, ...] = ()
    typed: tuple[TypedFile, ...] = ()
    extras: Mapping[str, bytes] = field(default_factory=dict)
    has_builder: bool = False
    app: App | None = None


def write_bundle(folder: Path, spec: BundleSpec) -> Manifest:
    """Fill an existing empty folder; the manifest comes last, so that half a bundle is none.

    The caller renames the folder into place.

    Raises:
        BundleError: an engine is missing, or the golden arrays do not have the names of inputs and outputs.
        OutputError: the folder is not empty or cannot be written.
    """
    _check(folder, spec)
    with explain_os_errors(folder):
        shutil.copyfile(spec.onnx, folder / ONNX)
        engines = tuple(_copy_engine(engine, folder) for engine in spec.engines)
        typed = tuple(_copy_typed(file, folder) for file in spec.typed)
        labels = "".join(" ".join(label.split()) + "\n" for label in spec.labels)
        (folder / "labels.txt").write_text(labels, encoding="utf-8")
        write_json(folder / "preprocess.json", spec.preprocess)
        _write_golden(folder / GOLDEN, spec)
        for name, file in {**KIT, **({BUILDER.name: BUILDER} if spec.has_builder else {})}.items():
            shutil.copyfile(file, folder / name)
        for name, content in spec.extras.items():
            (folder / name).write_bytes(content)
        if spec.app:
            write_app(folder, spec.app, _ends(spec), _for_apps(spec, engines, typed))
        manifest = _manifest(folder, spec, engines, typed)
        write_json(folder / MANIFEST, manifest.model_dump(mode="json", by_alias=True))
    return manifest


def _check(folder: Path, spec: BundleSpec) -> None:
    if not folder.is_dir() or any(folder.iterdir()):
        raise OutputError(f"{folder} is not an empty folder, which a bundle needs.", hint="Give a new one.")
    engines, typed = ([each.path for each in spec.engines], [each.path for each in spec.typed])
    for path in (spec.onnx, *engines, *typed):
        if not path.exists():
            raise BundleError(f"{path} should go into the bundle and does not exist.", hint="Run the conversion again.")
    kinds = [(engine.runtime, engine.precision) for engine in spec.engines]
    if len(set(kinds)) < len(kinds):
        listed = ", ".join(" ".join(kind) for kind in kinds)
        raise BundleError(
            f"A bundle holds one engine per runtime and precision, but was given {listed}.", hint="Give one of each."
        )
    for tensors, arrays in ((spec.inputs, spec.golden_inputs), (spec.outputs, spec.golden_outputs)):
        names = {tensor.name for tensor in tensors}
        if names != set(arrays):
            given, expected = ", ".join(sorted(arrays)), ", ".join(sorted(names))
            raise BundleError(
                f"The golden arrays are called {given}, but the network has {expected}.",
                hint="Give one array for each of the network's inputs and outputs, under its name.",
            )


def _copy_engine(engine: EngineFile, folder: Path) -> EngineEntry:
    """Copy an engine and its weights; one that is the ONNX file itself is not doubled."""
    sha256, target = sha256_of(engine.path), folder / ONNX
    if sha256 != sha256_of(target):
        target = folder / "engines" / f"{engine.runtime}-{engine.precision}" / engine.path.name
        target.parent.mkdir(parents=True)
        for suffix in (engine.path.suffix, *WEIGHTS):
            source = engine.path.with_suffix(suffix)
            if source.exists():
                copy = shutil.copytree if source.is_dir() else shutil.copyfile
                copy(source, target.parent / source.name)
    path = target.relative_to(folder).as_posix()
    return EngineEntry(
        runtime=engine.runtime, path=path, precision=engine.precision, sha256=sha256, tolerance=engine.tolerance
    )


def _write_golden(path: Path, spec: BundleSpec) -> None:
    arrays: dict[str, Any] = {f"input:{name}": np.asarray(array) for name, array in spec.golden_inputs.items()}
    arrays |= {f"output:{name}": np.asarray(array) for name, array in spec.golden_outputs.items()}
    np.savez_compressed(path, **arrays)


def _copy_typed(file: TypedFile, folder: Path) -> TypedEntry:
    target = folder / "typed" / f"model-{file.precision}.onnx"
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(file.path, target)
    return TypedEntry(
        path=target.relative_to(folder).as_posix(),
        precision=file.precision,
        layout=file.layout,
        tolerance=file.tolerance,
    )


def _ends(spec: BundleSpec) -> Ends:
    source, result = spec.inputs[0].name, spec.outputs[0].name
    return Ends(source, result, spec.golden_inputs[source], spec.golden_outputs[result])


def _for_apps(
    spec: BundleSpec, engines: tuple[EngineEntry, ...], typed: tuple[TypedEntry, ...]
) -> dict[str, tuple[str, float]]:
    """Path and tolerance of each engine, by runtime and precision, and of those that the device will build."""
    known = {f"{engine.runtime}.{engine.precision}": (engine.path, engine.tolerance) for engine in engines}
    if spec.has_builder:
        later = {"fp32": spec.tolerance} | {entry.precision: entry.tolerance for entry in typed}
        known |= {f"tensorrt.{name}": (built_path(name), tolerance) for name, tolerance in later.items()}
    return known


def built_path(precision: str) -> str:
    """Where the device puts a TensorRT engine, relative to the bundle."""
    return f"engines/tensorrt-{precision}/model.engine"


def _manifest(
    folder: Path, spec: BundleSpec, engines: tuple[EngineEntry, ...], typed: tuple[TypedEntry, ...]
) -> Manifest:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return Manifest(
        created_by=f"thinet-deploy {_own_version()}",
        target=spec.target,
        model=spec.model,
        labels=spec.labels,
        preprocess=spec.preprocess,
        inputs=spec.inputs,
        outputs=spec.outputs,
        engines=engines,
        typed=typed,
        files={path.relative_to(folder).as_posix(): sha256_of(path) for path in files},
        golden=Golden(path=GOLDEN, tolerance=spec.tolerance),
        parity=spec.parity,
        plan=spec.plan,
        notes=spec.notes,
    )


def _own_version() -> str:
    try:
        return version("thinet-deploy")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "(not installed)"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle; BundleError when there is none or it does not hold."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except OSError as error:
        raise BundleError(
            f"{folder} is no bundle: {MANIFEST} cannot be read ({error.strerror}).", hint=_GIVE
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole file"
        raise BundleError(f"{folder / MANIFEST} is damaged: {place}: {first['msg']}.", hint=BUILD_AGAIN) from error


def verify_bundle(folder: Path) -> dict[str, Any]:
    """Verify a bundle in a child process, with the code its run.py is a copy of.

    The bundle's own run.py is not run: it could have been tampered with, and is a file to be checked like the others.

    Returns:
        The report of `python run.py --json`: files, a verdict per engine, exit_code (0 passed, 1 failed, 3 nothing
        could run here).

    Raises:
        BundleError: there is no bundle, or its manifest is damaged.
    """
    if not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder} is no bundle: it has no {MANIFEST}.", hint=_GIVE)
    command = [sys.executable, str(Path(runner.__file__).resolve()), "verify", "--bundle", str(folder), "--json"]
    child = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)
    try:
        report: dict[str, Any] = json.loads(child.stdout)
    except ValueError as error:  # a runtime took the process down with it
        tail = child.stderr.strip()[-1000:]
        raise BundleError(f"Verifying {folder} ended with code {child.returncode}. {tail}", hint=BUILD_AGAIN) from error
    if "error" in report:
        raise BundleError(report["error"], hint=BUILD_AGAIN)
    return report
