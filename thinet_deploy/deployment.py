"""From the finished networks to what ships: export → convert → verify → measure → bundle → report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from . import apps, contract, deploy_stage, device_stage, html_report, latency, precision_stage, registry, verify
from .android_site import Phone
from .artifact import hash_json, sha256_of, write_bytes, write_json
from .device_site import Machine
from .environment import fingerprint, machine_id
from .errors import GateError
from .export import INPUT
from .intervals import Interval
from .job import Job
from .ledger import Entry
from .networks import Networks, gate
from .precision.held import READERS
from .precision.plan import PrecisionPlan
from .registry import device_notes, host_runtimes, runs_here
from .report import Row, Table
from .runner import COMPANIONS, usable_cores
from .runner import __file__ as _RUNNER_FILE
from .shared_run import SharedRun
from .store import Checkpoint, Run, Stage
from .tasks.base import Accuracy
from .tools import Tools, read_accuracy

RUNNER = Path(_RUNNER_FILE)
BUILDER = RUNNER.with_name("tensorrt_builder.py")
RUNNER_FILES = (RUNNER, *(RUNNER.with_name(f"{name}.py") for name in COMPANIONS))


@dataclass(frozen=True)
class Build:
    """What a build leaves.

    Attributes:
        run: the run directory.
        table: the papers' table.
        hops: the parity verdicts.
        bundle: the bundle's folder.
        notes: what the user has to know or to do.
        verdicts: on every requirement.
        device: what came from the device, where one was given: see `device_stage.on_device`.
    """

    run: Path
    table: Table
    hops: tuple[verify.Hop, ...]
    bundle: Path
    notes: tuple[str, ...]
    verdicts: tuple[contract.Verdict, ...] = ()
    device: dict[str, Any] | None = None


def deploy(
    run: SharedRun, tools: Tools, plan: PrecisionPlan, made: Networks, machine: Machine | Phone | None = None
) -> Build:
    """Export → type → convert → verify → measure → bundle → the same on the device, if there is one → report."""
    job, target = tools.job, tools.job.target
    folders = {name: stage.folder for name, stage in made.stages.items()}
    digests = {name: stage.digest for name, stage in made.stages.items()}
    inputs = {**digests, "opset": target.opset, "ir": target.ir_version, "shape": list(job.input_shape)}
    inputs["sources"] = sorted(registry.sources(target))
    onnx = run.alone("onnx", inputs, lambda f, _: deploy_stage.exported(tools, folders, f))
    typed = _typed(run, tools, plan, onnx, list(folders) if runs_here(target) else [made.ship])
    report = typed.json(precision_stage.TYPED) if typed else {}
    files = deploy_stage.Files(onnx.folder, typed.folder if typed else onnx.folder, report, plan.engines)
    sources = {"onnx": onnx.digest, "typed": typed.digest if typed else "", "precision": plan.engines}
    engines = run.alone(
        "engines",
        {**sources, "tools": [registry.made_by(r) for r in plan.runtimes]},
        lambda f, _: deploy_stage.engines(tools, files, list(folders), plan.runtimes, f),
    )
    paths = {
        tuple(key.split("/")): engines.folder / entry["path"] for key, entry in engines.json("engines.json").items()
    }
    engine_paths = {(name, runtime): path for (name, runtime), path in paths.items()}
    executed = _executed(run, tools, plan, files, engines, engine_paths)
    parity = run.alone(
        "parity",
        {**sources, "engines": engines.digest, "data": job.data.digest, "hops": hash_json(str([made.hops, executed]))},
        lambda f, _: deploy_stage.parity(tools, folders, made.hops, executed, files, engine_paths, f),
    )
    hops = tuple(verify.Hop(**hop) for hop in parity.json("parity.json")["hops"])
    gate(hops, run, parity)
    measured = run.alone(
        "latency",
        {
            "engines": engines.digest,
            "engines run": runs_here(target),
            "threads": job.options.threads,
            "version": latency.VERSION,
            "layers": 1,  # of layers.json
            "machine": machine_id(fingerprint()),
            **digests,
        },
        lambda f, _: deploy_stage.measured(tools, folders, engine_paths if runs_here(target) else {}, files, f),
    )
    notes = (*device_notes(target, INPUT, job.input_shape), *plan.notes)
    notes += tuple(precision_stage.file_notes(report, made.labels, target))
    ship = deploy_stage.Shipped(made.ship, made.labels[made.ship], folders[made.ship])
    bundle = run.alone(
        "bundle",
        {
            **sources,
            "engines": engines.digest,
            "parity": parity.digest,
            "runner": [sha256_of(file) for file in (*RUNNER_FILES, BUILDER)],
            "app": apps.digest(),
            "target": [target.id, target.builds_on_device, target.os, list(target.runtimes)],
            "model": [job.model_name, made.labels],
            "notes": list(notes),
        },
        lambda f, _: deploy_stage.bundled(tools, ship, files, engine_paths, parity.folder, notes, f),
    )
    there = (
        device_stage.on_device(run, machine, target, bundle, job.options.threads, tools.progress) if machine else None
    )
    inputs = {**digests, "data": job.data.digest, "typed": sources["typed"], "precision": plan.engines}
    drops = run.alone("accuracy", inputs, lambda f, _: deploy_stage.drops(tools, folders, files, f))
    table = _table(job, made, onnx, measured, drops, files)
    required = job.options.require
    verdicts = tuple(contract.judge(required, table))
    if required:
        judged = {"required": list(required), "table": hash_json(table.to_json())}
        run.alone("contract", judged, lambda f, _: contract.write(f, verdicts))
    else:
        run.discard("contract")
    run.alone(
        "report",
        {
            "table": hash_json(table.to_json()),
            "parity": parity.digest,
            "latency": measured.digest,
            "contract": list(required),
            "page": html_report.digest(),
            **({"device": hash_json(there)} if there else {}),
        },
        lambda f, _: _report(html_report.Page(run.root, table, verdicts, there), f),
    )
    said = plan.notes if there else notes  # what is left to do on the device has been done
    return Build(run.root, table, hops, bundle.folder, (*job.data.notes, *said), verdicts, there)


def _report(page: html_report.Page, folder: Path) -> None:
    write_json(folder / "table.json", page.table.to_json())
    write_bytes(folder / "report.html", html_report.render([page]).encode())


def _typed(run: SharedRun, tools: Tools, plan: PrecisionPlan, onnx: Stage, names: list[str]) -> Stage | None:
    """The stage of the typed ONNX files, if there are to be any."""
    if not plan.files:
        return None
    options, data = tools.job.options, tools.job.data
    inputs = {
        "onnx": onnx.digest,
        "names": names,
        "files": list(plan.files),
        "layout": plan.layout.name,
        "data": data.digest,
        "asked": [options.precision, options.max_drop, options.calibration_images, options.seed],
    }

    def make(folder: Path, _: Checkpoint) -> None:
        try:
            precision_stage.typed(tools, plan, onnx.folder, names, folder)
        except GateError:
            for stale in ("bundle", "report"):  # of an earlier build, lest they be taken for this one's
                Run.discard(run, stale)  # this process alone is here
            raise

    return run.alone("typed", inputs, make)


def _executed(
    run: SharedRun,
    tools: Tools,
    plan: PrecisionPlan,
    files: deploy_stage.Files,
    engines: Stage,
    paths: dict[tuple[str, str], Path],
) -> list[verify.Hop]:
    """Verdicts on what the engines execute; for another machine, which decides that anew, on what they hold."""
    if not runs_here(tools.job.target):
        paths = {(name, runtime): path for (name, runtime), path in paths.items() if runtime in READERS}
    if not paths:
        return []
    inputs = {"engines": engines.digest, "machine": machine_id(fingerprint()), "precision": plan.engines}
    work = partial(precision_stage.executed, tools, plan, files.onnx, files.report, paths)
    stage = run.alone("precision", inputs, lambda f, _: work(f))
    return [verify.Hop(**proof["hop"]) for proof in stage.json(precision_stage.EXECUTED).values()]


def _table(job: Job, made: Networks, onnx: Stage, measured: Stage, drops: Stage, files: deploy_stage.Files) -> Table:
    """The papers' table from the stages' files."""
    timing, exported, lost = measured.json("latency.json"), onnx.json("export.json"), drops.json("drops.json")
    rows = []
    for name, stage in made.stages.items():
        typed = files.report.get(name, {}).get(files.engines)
        row = Row.make(
            name,
            made.labels[name],
            Accuracy.read(typed["accuracy"]) if typed else read_accuracy(stage.folder),
            exported[name]["count"],
            files.source(name).stat().st_size,
            timing,
        )
        rows.append(replace(row, drop=Interval(**lost[name]) if name in lost else None))
    by_name = {row.name: row for row in rows}
    for name, control in made.controls.items():
        row = by_name[control.like].with_weights(name, control.label, control.accuracy, control.note)
        rows.insert(1 if control.like == "original" else len(rows), row)
    return Table(
        target=job.target.id,
        model=job.model_name,
        data=job.data.name,
        images=len(job.data.test),
        machine=machine_id(timing["environment"]),
        processor=timing["environment"].get("cpu", {}).get("model", "unknown processor"),
        threads=job.options.threads,
        cores=usable_cores(),
        batch=deploy_stage.TORCH_BATCH,
        runtimes=tuple(host_runtimes(job.target) if runs_here(job.target) else job.target.runtimes),
        rows=tuple(rows),
        ledger=tuple(_with_types(made, files.report)),
        precision=files.engines,
        ships=made.ship,
    )


def _with_types(made: Networks, report: Mapping[str, Any]) -> Iterator[Entry]:
    """The ledger, with each network's typed files after its other steps."""
    last = {entry.network: number for number, entry in enumerate(made.ledger)}
    names = {label: name for name, label in made.labels.items()}
    for number, entry in enumerate(made.ledger):
        yield entry
        if last[entry.network] == number:
            for precision, how in report.get(names.get(entry.network, ""), {}).items():
                if "path" in how:
                    yield Entry.of(f"in {precision}, as ONNX", Accuracy.read(how["accuracy"]), entry.network)
