"""The only place that knows the order of the stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from . import feasibility_stage, networks, precision_stage, registry, stages, verify
from .artifact import hash_json, read_json, sha256_of, write_json
from .environment import fingerprint, machine_id
from .errors import GateError, InputError, first_line
from .export import INPUT
from .interfaces import Progress, silent
from .job import Job, load_job, moved
from .ledger import Entry
from .networks import Networks, Pruning, gate
from .options import Options, make_options
from .parallel import join
from .precision.plan import PrecisionPlan
from .registry import device_notes, host_runtimes, runs_here
from .report import Row, Table
from .runner import __file__ as _RUNNER_FILE
from .runner import usable_cores
from .shared_run import SharedRun
from .store import Checkpoint, Run, Stage, open_run
from .target import load_profile
from .tools import Tools, read_accuracy
from .training import Accuracy
from .transfer import transfer

RUNNER = Path(_RUNNER_FILE)


@dataclass(frozen=True)
class Build:
    """What a build leaves.

    Attributes:
        run: the run directory.
        table: the papers' table.
        hops: the parity verdicts.
        bundle: the bundle's folder.
        notes: what the user has to know or to do.
    """

    run: Path
    table: Table
    hops: tuple[verify.Hop, ...]
    bundle: Path
    notes: tuple[str, ...]


def prune(options: Options, progress: Progress = silent) -> Path:
    """Prune only: RUN/thin gets plan.json, model.safetensors and report.json, for the user's own training.

    Returns:
        The folder with the thin network.
    """
    progress = join().speaking(progress)
    job = load_job(options, progress)
    run = SharedRun(options.out)
    with run.locked():
        run.team.once(partial(_remember, job.options, run.root))
        tools = Tools(job, progress)
        return _unfinished(run, tools, networks.prune(run, tools)).folder


def feasibility(options: Options, progress: Progress = silent) -> Path:
    """What budgets would cost, without pruning or training: RUN/feasibility gets feasibility.json and feasibility.svg.

    The error curves are kept in the run, so that another budget is solved in seconds.

    Returns:
        The folder with both.

    Raises:
        InputError: something the user gave is wrong, or there are no error curves with this recipe or method.
        GateError: the budget cannot be reached.
    """
    progress = join().speaking(progress)
    feasibility_stage.check_curves(options)
    # With weights few images are needed: none of them to solve another budget.
    job = load_job(options, progress, checked=options.weights is None)
    run = SharedRun(options.out)
    with run.locked():
        tools = Tools(job, progress)
        original = networks.original(run, tools)
        inputs = {
            **job.identity,
            "dense": original.digest,
            "head": job.replaces_head,
            **options.model_dump(mode="json", include=feasibility_stage.OF_CURVES),
        }
        work = partial(feasibility_stage.weighed, tools, original.folder)
        curves = run.stage("curves", inputs, lambda f, _: work(f))
        inputs = {
            "curves": curves.digest,
            "widths": options.model_dump(mode="json", include=networks.WIDTHS),
            "asked": feasibility_stage.asks(options),
            "grid": job.grid,
        }
        solve = partial(feasibility_stage.solved, tools, original.folder, curves.folder)
        return run.alone("feasibility", inputs, lambda f, _: solve(f)).folder


def build(options: Options, progress: Progress = silent) -> Build:
    """The whole way: prune → fine-tune → export → convert → verify → measure → bundle.

    Raises:
        InputError: something the user gave is wrong; found before any work starts.
        MissingError: a runtime of the target is not installed.
        GateError: a parity verdict failed; all results so far are kept in the run directory.
    """
    progress = join().speaking(progress)
    job = load_job(options, progress)
    there = moved(job, options.transfer_to, progress) if options.transfer_to else None
    plan = precision_stage.planned(there or job)
    _check_runtimes(plan)
    run = SharedRun(options.out)
    with run.locked():
        run.team.once(partial(_remember, job.options, run.root))
        tools = Tools(job, progress)
        if there:
            return _deploy(run, Tools(there, progress), plan, transfer(run, tools, Tools(there, progress)))
        return _deploy(run, tools, plan, networks.finish(run, tools, networks.prune(run, tools)))


def _remember(options: Options, root: Path) -> None:
    """Keep the options for `build_from`, with whole paths, so that it may be called from another folder."""
    kept = options.model_dump(mode="json")
    for name, value in options:
        if isinstance(value, Path) or ".py:" in str(value) or str(value).endswith(".toml"):
            kept[name] = str(Path(value).absolute())
    write_json(root / "options.json", kept)


def build_from(
    root: Path,
    weights: Path,
    target: str | None = None,
    progress: Progress = silent,
    *,
    precision: str | None = None,
) -> Build:
    """Go on after the user's own training of the thin network that `prune` left in RUN.

    Args:
        root: the run directory of `prune`.
        weights: trained weights of the thin network.
        target: profile to build for, if another one than `prune` was given.
        progress: to report to.
        precision: of the engines (see `Options`), if another one than `prune` was given.
    """
    if not weights.is_file():
        raise InputError(f"There is no weights file {weights}.", hint="Give what your training saved with --weights.")
    stored = open_run(root) / "options.json"
    if not stored.exists():
        raise InputError(f"{root} has no options.json.", hint="Prune first: thinet-deploy prune --out RUN …")
    try:
        options = make_options({**read_json(stored), "out": root})
    except (OSError, ValueError, TypeError, InputError) as error:
        raise InputError(
            f"{stored} is damaged, or of another version: {first_line(error)}",
            hint="Run the same `thinet-deploy prune` again: it writes the file anew, and finished stages are kept.",
        ) from error
    progress = join().speaking(progress)
    job = load_job(options, progress)
    # The network was pruned for the target of `prune`, whose grid its widths follow; it may be shipped to another.
    changes = {name: value for name, value in {"target": target, "precision": precision}.items() if value}
    shipped = replace(job, options=make_options({**options.model_dump(), **changes}))
    if target:
        shipped = replace(shipped, target=load_profile(target))
    plan = precision_stage.planned(shipped)
    _check_runtimes(plan)
    run = SharedRun(root)
    with run.locked():
        tools = Tools(job, progress)
        pruning = networks.prune(run, tools)
        thin = _unfinished(run, tools, pruning)
        inputs = {"thin": thin.digest, "weights": sha256_of(weights)}
        own = run.alone("own", inputs, lambda f, _: stages.own(tools, thin.folder, weights, f))
        return _deploy(run, Tools(shipped, progress), plan, networks.own(pruning, thin, own, options))


def _unfinished(run: SharedRun, tools: Tools, pruning: Pruning) -> Stage:
    prunings = {method: stage.folder for method, stage in pruning.by_method.items()}
    return run.stage(
        "thin",
        {
            "prune": {method: stage.digest for method, stage in pruning.by_method.items()},
            "dense": pruning.original.digest,
            "head": pruning.head,
        },
        lambda f, _: stages.unfinished(tools, pruning.original.folder, prunings, pruning.head, f),
    )


def _deploy(run: SharedRun, tools: Tools, plan: PrecisionPlan, made: Networks) -> Build:
    """Export → type → convert → verify → measure → bundle → report."""
    job, target = tools.job, tools.job.target
    folders = {name: stage.folder for name, stage in made.stages.items()}
    digests = {name: stage.digest for name, stage in made.stages.items()}
    inputs = {**digests, "opset": target.opset, "ir": target.ir_version, "shape": list(job.input_shape)}
    inputs["sources"] = sorted(registry.sources(target))
    onnx = run.alone("onnx", inputs, lambda f, _: stages.exported(tools, folders, f))
    typed = _typed(run, tools, plan, onnx, list(folders) if runs_here(target) else [made.ship])
    report = typed.json(precision_stage.TYPED) if typed else {}
    files = stages.Files(onnx.folder, typed.folder if typed else onnx.folder, report, plan.engines)
    sources = {"onnx": onnx.digest, "typed": typed.digest if typed else "", "precision": plan.engines}
    engines = run.alone(
        "engines",
        {**sources, "tools": [registry.made_by(r) for r in plan.runtimes]},
        lambda f, _: stages.engines(tools, files, list(folders), plan.runtimes, f),
    )
    paths = {
        tuple(key.split("/")): engines.folder / entry["path"] for key, entry in engines.json("engines.json").items()
    }
    engine_paths = {(name, runtime): path for (name, runtime), path in paths.items()}
    executed = _executed(run, tools, plan, files, engines, engine_paths)
    parity = run.alone(
        "parity",
        {**sources, "engines": engines.digest, "data": job.data.digest, "hops": hash_json(str([made.hops, executed]))},
        lambda f, _: stages.parity(tools, folders, made.hops, executed, files, engine_paths, f),
    )
    hops = tuple(verify.Hop(**hop) for hop in parity.json("parity.json")["hops"])
    gate(hops, run, parity)
    measured = run.alone(
        "latency",
        {
            "engines": engines.digest,
            "engines run": runs_here(target),
            "threads": job.options.threads,
            "machine": machine_id(fingerprint()),
            **digests,
        },
        lambda f, _: stages.measured(tools, folders, engine_paths if runs_here(target) else {}, plan.engines, f),
    )
    notes = (*device_notes(target, INPUT, job.input_shape), *plan.notes)
    notes += tuple(precision_stage.file_notes(report, made.labels, target))
    ship = stages.Shipped(made.ship, made.labels[made.ship], folders[made.ship])
    bundle = run.alone(
        "bundle",
        {
            **sources,
            "engines": engines.digest,
            "parity": parity.digest,
            "runner": sha256_of(RUNNER),
            "target": [target.id, target.builds_on_device],
            "model": [job.model_name, made.labels],
            "notes": list(notes),
        },
        lambda f, _: stages.bundled(tools, ship, files, engine_paths, parity.folder, notes, f),
    )
    table = _table(job, made, onnx, measured, files)
    run.alone(
        "report",
        {"table": hash_json(table.to_json())},
        lambda f, _: write_json(f / "table.json", table.to_json()),
    )
    return Build(run.root, table, hops, bundle.folder, (*job.data.notes, *notes))


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
    files: stages.Files,
    engines: Stage,
    paths: dict[tuple[str, str], Path],
) -> list[verify.Hop]:
    """Verdicts on what the engines execute; none where they are to run on another machine, which decides that anew."""
    if not runs_here(tools.job.target):
        return []
    inputs = {"engines": engines.digest, "machine": machine_id(fingerprint()), "precision": plan.engines}
    work = partial(precision_stage.executed, tools, plan, files.onnx, files.report, paths)
    stage = run.alone("precision", inputs, lambda f, _: work(f))
    return [verify.Hop(**proof["hop"]) for proof in stage.json(precision_stage.EXECUTED).values()]


def _check_runtimes(plan: PrecisionPlan) -> None:
    for runtime in plan.runtimes:
        registry.check(runtime)


def _table(job: Job, made: Networks, onnx: Stage, measured: Stage, files: stages.Files) -> Table:
    """The papers' table from the stages' files."""
    timing, exported = measured.json("latency.json"), onnx.json("export.json")
    rows = []
    for name, stage in made.stages.items():
        typed = files.report.get(name, {}).get(files.engines)
        rows.append(
            Row.make(
                name,
                made.labels[name],
                Accuracy(**typed["accuracy"]) if typed else read_accuracy(stage.folder),
                exported[name]["count"],
                files.source(name).stat().st_size,
                timing,
            )
        )
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
        batch=stages.TORCH_BATCH,
        runtimes=tuple(host_runtimes(job.target) if runs_here(job.target) else job.target.runtimes),
        rows=tuple(rows),
        ledger=tuple(_with_types(made, files.report)),
        precision=files.engines,
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
                    yield Entry.of(f"in {precision}, as ONNX", Accuracy(**how["accuracy"]), entry.network)
