"""What commands do with `--device`: bundles that are checked and measured there, and what is shown of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .options import DevicePython, Json
from .progress import bars
from .tables import print_json

if TYPE_CHECKING:
    from ..devices.device import Device
    from ..interfaces import Progress

DEFAULT_PYTHON = "python3"


def ask_device(
    bundle: Path, address: str, python: str | None, command: str, pace: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Copy a bundle to a device and run run.py on it there; over adb, where no Python is, its programs in C++.

    Returns:
        The report of `run.py COMMAND --json`, with the device's fingerprint.
    """
    from ..devices import site as device_site
    from ..devices.adb import Adb
    from ..devices.address import find_device
    from ..stages import device as device_stage

    manifests, device = device_site.manifests(bundle), find_device(address)
    options = [word for name, value in (pace or {}).items() if value for word in (f"--{name}", f"{value:g}")]
    with bars(Console(stderr=True)) as progress:
        if isinstance(device, Adb):
            return _ask_phone(bundle, device, command, pace or {}, progress)
        machine = device_site.reach(device, python or DEFAULT_PYTHON)
        device_site.check_runtimes(machine, [engine.runtime for each in manifests for engine in each.engines])
        site = device_site.send(machine, bundle, progress)
        report = device_stage.ask(site, command, progress, *options)
        device_stage.forget(site, command, *options)
    return {**report, "environment": machine.fingerprint}


def _ask_phone(
    bundle: Path, device: Device, command: str, pace: Mapping[str, Any], progress: Progress
) -> dict[str, Any]:
    from ..devices import android as android_site
    from ..errors import InputError
    from ..stages import android as android_stage

    if pace.get("batch", 1) != 1:
        raise InputError(
            f"Android devices are measured with one image per run, but --batch {pace['batch']} was given.",
            hint="Leave --batch out.",
        )
    phone = android_site.reach(device)
    if command == "verify":
        report = android_stage.verify(phone, bundle, progress)
    else:
        how, fps = {name: pace[name] for name in ("threads", "seconds", "rounds")}, pace["fps"]
        report = android_stage.latency(phone, bundle, progress, **how)
        if fps:
            paced = android_stage.latency(phone, bundle, progress, **how, fps=fps)
            rows = [*report["engines"], *({**row, "fps": fps} for row in paced["engines"])]
            report = {**paced, "engines": rows, "exit_code": max(report["exit_code"], paced["exit_code"])}
    return {**report, "environment": phone.fingerprint}


def verify(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    device: Annotated[
        str | None,
        typer.Option(
            help="ssh://user@host:port (user and port may be left out) or, for Android, adb:SERIAL: copy the bundle "
            "there and check it there, with the engines that it has.",
            show_default=False,
        ),
    ] = None,
    device_python: DevicePython = None,
    as_json: Json = False,
) -> None:
    """Check a bundle: every file's checksum, and the golden inputs and outputs on every engine.

    [bold]thinet-deploy verify RUN/bundle[/bold], or on the device, where only numpy and a runtime are needed:
    [bold]python RUN/bundle/run.py[/bold]
    [bold]thinet-deploy verify RUN/bundle --device ssh://user@host[/bold]   (copies it there and checks it there)
    """
    from ..bundle import verify_bundle
    from ..on_device.runner_text import verify_text

    result = ask_device(bundle, device, device_python, "verify") if device else verify_bundle(bundle)
    if as_json:
        print_json(result)
    else:
        typer.echo(verify_text(result))
    raise typer.Exit(result["exit_code"])


def remote_latency(
    things: Sequence[str],
    address: str,
    python: str | None,
    pace: Mapping[str, Any],
    out: Path | None,
    *,
    as_json: bool,
) -> None:
    """`thinet-deploy latency BUNDLE --device …`; exits with the code of run.py."""
    from ..artifact import write_json
    from ..errors import InputError

    if len(things) != 1:
        raise InputError(
            f"--device {address} measures one bundle, but {len(things)} things were given.",
            hint="thinet-deploy latency RUN/bundle --device ssh://user@host",
        )
    report = ask_device(Path(things[0]), address, python, "latency", pace)
    if as_json:
        print_json(report)
    else:
        for line in _measured(report, report["environment"]):
            typer.echo(line)
    if out:
        write_json(out, report)
    invalid = any(row["summary"]["invalid"] for row in report["engines"] if "summary" in row)
    raise typer.Exit(report["exit_code"] or int(invalid))


def show_device(found: Mapping[str, Any]) -> None:
    """What a build brought back from its device."""
    from ..reports.texts import built_notes

    verdicts = {(row["runtime"], row["precision"]): row for row in found["verify"]["engines"]}
    typer.echo()
    for line in _measured(found["latency"], found["facts"]):
        typer.echo(line)
    for (runtime, precision), row in verdicts.items():
        error = f", error {row['max_relative_error']:.1e} of scale" if "max_relative_error" in row else ""
        typer.echo(f"  {runtime} {precision}: golden outputs {row['verdict']} there{error}")
    for precision, executed in found["precision"].items():
        for note in built_notes(executed):
            typer.echo(f"  tensorrt {precision}: {note}")
    typer.echo(f"  engines, logs and all samples: {found['folder']}")


def _measured(report: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[str]:
    from ..on_device.runner_text import latency_notes, latency_words
    from ..on_device.self_test import PASSED

    jetson = facts["jetson"] or {}
    system = facts.get("system") or f"Linux {facts['kernel']}"
    more = [f"{key} {jetson[key]}" for key in ("l4t", "tensorrt", "power_mode") if jetson.get(key)]
    yield f"Measured on the device: {', '.join([report['processor'], facts['machine'], system, *more])}"
    yield f"  milliseconds per run, batch {report['batch']}, threads {report['threads']}, with 95 % intervals"
    for row in report["engines"]:
        words = latency_words(row) if row["verdict"] == PASSED else f"{row['verdict']}: {row['reason']}"
        pace = f", {row['fps']:g} a second" if row.get("fps") else ""
        yield f"  {row['runtime']} {row['precision']}{pace}: {words}"
        if row["verdict"] == PASSED:
            yield from (f"    {note}" for note in latency_notes(row))


def without_samples(found: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a document that people read: RUN/device/latency.json has the raw samples."""
    rows = [{key: value for key, value in row.items() if key != "rounds_ms"} for row in found["latency"]["engines"]]
    return {**found, "latency": {**found["latency"], "engines": rows}}
