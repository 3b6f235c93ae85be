"""From a finished bundle to engines on a device: copy, build there, verify there, measure there, bring it all back.

Every step can be cut off anywhere. What is copied stays, a command goes on without the connection, and the same call
finds both again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..artifact import read_json, write_bytes, write_json
from ..bundle import BUILDER, MANIFEST, ONNX, EngineEntry, Manifest, built_path, read_manifest
from ..devices import android as android_site
from ..devices import site as device_site
from ..devices.adb import PREFIX, Adb
from ..devices.address import find_device
from ..devices.android import Phone
from ..devices.device import Done, heard, json_lines
from ..devices.site import Machine, Site
from ..errors import ConversionError, DeviceError, GateError, InputError, MissingError
from ..interfaces import Precision, Progress
from ..on_device.self_test import FAILED
from ..precision.inspected import inspect_built
from ..registry import builder_options
from ..shared_run import SharedRun
from ..store import Stage
from ..target import TargetProfile
from . import android as android_stage

FACTS, VERIFIED, MEASURED = "facts.json", "verify.json", "latency.json"
EXECUTED = "precision.json"
SECONDS = 5  # per engine
_TIMINGS = "timing.cache"
_NOTHING_RAN, _NO_TENSORRT = 3, 3


def reach(address: str, python: str, target: TargetProfile) -> tuple[Machine | Phone, TargetProfile]:
    """The device, and the target on the stack that it has; see `device_site.reach` and `check_target` for errors."""
    device = find_device(address)
    if isinstance(device, Adb):
        return android_site.reach(device, target), target
    machine = device_site.reach(device, python, target)
    return machine, device_site.check_target(machine, target)


def reach_to_time(address: str, python: str, target: TargetProfile) -> tuple[Machine, TargetProfile]:
    """`reach`, where networks are to be timed.

    Raises:
        InputError: nothing but bundles can be measured there.
    """
    if address.startswith(PREFIX):
        raise InputError(
            f"Layers and networks cannot be timed on {address}: Android has no Python.",
            hint="Give --macs 2x instead of a budget of time: `build --device` measures there what comes of it.",
        )
    machine, target = reach(address, python, target)
    assert isinstance(machine, Machine)
    return machine, target


def on_device(
    run: SharedRun,
    machine: Machine | Phone,
    target: TargetProfile,
    bundle: Stage,
    threads: int,
    progress: Progress,
    dla: int | None = None,
) -> dict[str, Any]:
    """The stage: RUN/device gets engines, timing cache, logs, verdicts and raw samples from the device.

    Args:
        run: to add it to.
        machine: the device.
        target: whose bundle it is.
        bundle: the finished one.
        threads: of engines that run on the CPU.
        progress: to report to.
        dla: which of its DLAs takes the layers that it can.

    Returns:
        facts, verify, latency: what the three JSON files there say; precision: of each engine that was built there,
        what `inspect_built` gives, and gpu_fallback, the layers that its DLA left to the GPU (None without a DLA);
        folder.

    Raises:
        GateError: an engine failed there, or computes in another type; everything is kept in RUN/device.
        DeviceError: see `device_site`.
    """
    inputs = {"bundle": bundle.digest, "machine": machine.identity, "threads": threads, "seconds": SECONDS}
    inputs |= {"inspected": 1, "dla": dla}  # 1: version of EXECUTED
    if isinstance(machine, Phone):
        names = (FACTS, VERIFIED, MEASURED)
        make = partial(android_stage.fill, machine, bundle.folder, threads, SECONDS, progress, names=names)
    else:
        building = builder_options(target, dla) if target.builds_on_device else None
        make = partial(_fill, machine, building, bundle.folder, threads, progress)
    stage = run.alone("device", inputs, lambda folder, _: make(folder), _holds)
    results = {name.removesuffix(".json"): stage.json(name) for name in (FACTS, VERIFIED, MEASURED)}
    executed = stage.json(EXECUTED) if isinstance(machine, Machine) else {}
    _gate(machine, results["verify"], stage.folder)
    _gate_types(machine, executed, stage.folder)
    return {"folder": str(stage.folder), "precision": executed, **results}


def _fill(
    machine: Machine, building: list[str] | None, bundle: Path, threads: int, progress: Progress, folder: Path
) -> None:
    site, manifest = device_site.send(machine, bundle, progress), read_manifest(bundle)
    executed: dict[str, Any] = {}
    if building is not None and BUILDER.name in manifest.files:
        _build_all(site, manifest, building, folder, progress)
        for path, precision in _sources(manifest):
            engine = folder / built_path(precision)
            found = inspect_built(engine, bundle / ONNX, bundle / path)
            left = read_json(engine.with_suffix(".build.json")).get("gpu_fallback")
            executed[precision] = {**found, "gpu_fallback": left}
    verified = ask(site, "verify", progress)
    timing = ("--threads", str(threads), "--seconds", str(SECONDS))
    measured = ask(site, "latency", progress, *timing)
    write_json(folder / FACTS, machine.fingerprint)
    write_json(folder / VERIFIED, verified)
    write_json(folder / MEASURED, measured)
    write_json(folder / EXECUTED, executed)
    said = ("/out", "/err")
    device_site.fetch(site, f"{site.folder}/jobs", folder / "logs", lambda name: name.endswith(said), progress)
    forget(site, "verify")
    forget(site, "latency", *timing)


def _holds(stage: Stage) -> bool:
    """Whether all ran and no time is invalid; else the device may have been helped since, and is asked again."""
    times = stage.json(MEASURED)["engines"]
    failed = any(row["verdict"] == FAILED or row.get("summary", {}).get("invalid") for row in times)
    return not failed and stage.json(VERIFIED)["exit_code"] == 0


def _gate(machine: Machine | Phone, verified: dict[str, Any], folder: Path) -> None:
    """An engine that fails on the device fails the build, and so does a device where nothing ran."""
    failed = [row for row in verified["engines"] if row["verdict"] == FAILED]
    if verified["exit_code"] == _NOTHING_RAN:
        reasons = " ".join(dict.fromkeys(row["reason"] for row in verified["engines"]))
        raise MissingError(
            f"No engine ran on {machine.device.name}. {reasons}",
            hint=f"Everything is in {folder}. The same command tries again.",
        )
    if verified["exit_code"]:
        named = "; ".join(f"{row['runtime']} {row['precision']}: {row['reason']}" for row in failed) or "damaged files"
        raise GateError(
            f"The bundle failed on {machine.device.name}: {named}.",
            hint=f"All results are kept in {folder}; logs/ has what was said there. The same command tries again.",
        )


def _gate_types(machine: Machine | Phone, executed: dict[str, Any], folder: Path) -> None:
    """An engine with a layer in another type than its file binds TensorRT to fails the build."""
    for precision, found in executed.items():
        if broken := found.get("broken"):
            more = f", and {len(broken) - 8} more" if len(broken) > 8 else ""
            raise GateError(
                f"The {precision} engine that {machine.device.name} built does not compute as its file says: "
                f"{'; '.join(broken[:8])}{more}.",
                hint=f"{folder / built_path(precision)} and what TensorRT says of its layers are kept.",
            )


def ask(site: Site, command: str, progress: Progress, *options: str) -> dict[str, Any]:
    """Run run.py there, or follow it where it still runs; its JSON. What an earlier call found is not taken for it.

    Raises:
        DeviceError: it ended without.
    """
    stage = {"verify": "Verifying", "latency": "Measuring"}[command] + " on the device"
    progress(stage, 0, 1)
    forget(site, command, *options)
    code, done = site.job(command, _words(site, command, options), heard(stage, progress))
    report = [{}, *(told for told in json_lines(done.out) if "progress" not in told)][-1]
    if not report:
        last = (done.err.splitlines() or ["it said nothing"])[-1]
        raise DeviceError(
            f"run.py {command} on {site.machine.device.name} ended with code {code}: {last}",
            hint="Run the same command again; `thinet-deploy verify` shows here whether the bundle is whole.",
        )
    if "error" in report:
        raise DeviceError(f"{site.machine.device.name}: {report['error']}", hint="Build the bundle again.")
    return report


def forget(site: Site, command: str, *options: str) -> None:
    """Remove what run.py said there, unless it still runs."""
    site.tell("forget", site.place(command, _words(site, command, options)))


def _words(site: Site, command: str, options: Sequence[str]) -> list[str]:
    return [f"{site.kit}/run.py", command, "--bundle", site.bundle, "--json", *options]


# ------------------------------------------------------------------------------------------ engines built there


def _sources(manifest: Manifest) -> list[tuple[str, Precision]]:
    """The ONNX files to build engines from, and in which precision."""
    return [(typed.path, typed.precision) for typed in manifest.typed] or [(ONNX, "fp32")]


def _build_all(site: Site, manifest: Manifest, options: Sequence[str], folder: Path, progress: Progress) -> None:
    """Build TensorRT engines there, make them part of the bundle there, and bring them here."""
    for path, precision in _sources(manifest):
        _build(site, path, precision, options, folder, progress)
    device_site.fetch(site, site.cache, folder, _TIMINGS.__eq__, progress)
    found = device_site.fetch(site, site.bundle, folder, lambda name: name.startswith("engines/tensorrt-"), progress)
    tolerances: dict[str, float] = {typed.precision: typed.tolerance for typed in manifest.typed}
    built = [
        EngineEntry(
            runtime="tensorrt",
            path=name,
            precision=precision,
            sha256=digest,
            tolerance=tolerances.get(precision, manifest.golden.tolerance),
        )
        for name, digest in found.items()
        if name.endswith(".engine") and (precision := _precision_of(name))
    ]
    everything = manifest.model_copy(
        update={"engines": (*built, *manifest.engines), "files": {**manifest.files, **found}}
    )
    write_json(folder / MANIFEST, everything.model_dump(mode="json", by_alias=True))
    site.machine.device.push(folder / MANIFEST, f"{site.bundle}/{MANIFEST}")


def _precision_of(name: str) -> Precision:
    return name.split("/")[1].removeprefix("tensorrt-")  # type: ignore[return-value]  # as `_build` has it


def _build(
    site: Site, source: str, precision: Precision, options: Sequence[str], folder: Path, progress: Progress
) -> None:
    """Build one engine there within the target's memory; one that is finished, and whole, is kept."""
    engine = f"{site.bundle}/{built_path(precision)}"
    command = [f"{site.bundle}/{BUILDER.name}", f"{site.bundle}/{source}", engine]
    command += ["--precision", precision, "--cache", f"{site.cache}/{_TIMINGS}", *options]
    made = engine.rpartition("/")[0]
    for needed in (site.cache, made):
        site.tell("folder", needed)
    job = f"build-{precision}"
    code, done = site.job(job, command, heard(f"Building {precision} on the device", progress), made)
    if code:
        _refused(site, job, code, done, folder)


def _refused(site: Site, job: str, code: int, done: Done, folder: Path) -> None:
    device, words = site.machine.device.name, (done.err.splitlines() or [""])[-1]
    for told in json_lines(done.out):
        words = told.get("error", words)
    log = folder.parent / f"device-{job}.log"  # the stage's own folder goes when it fails
    write_bytes(log, f"{words}\n\n{done.err}\n".encode())
    if code == _NO_TENSORRT:
        raise MissingError(f"{device}: {words}", hint="`--device-python` names a Python that has TensorRT.")
    raise ConversionError(
        f"{job} on {device} failed: {words or f'it ended with code {code}'}",
        hint=f"What was said there is in {log}. Finished engines are kept there.",
    )
