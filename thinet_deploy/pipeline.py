"""The only place that knows the order of the stages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from . import contract, feasibility_stage, html_report, latency, networks, registry, stages, verify
from .artifact import hash_json, read_json, sha256_of, write_bytes, write_json
from .environment import fingerprint, machine_id
from .errors import InputError, first_line
from .export import INPUT
from .interfaces import Progress, silent
from .intervals import Interval
from .job import Job, load_job
from .networks import Networks, Pruning, gate
from .options import Options, make_options
from .parallel import join
from .registry import device_notes, host_runtimes, runs_here
from .report import Row, Table
from .runner import COMPANIONS, usable_cores
from .runner import __file__ as _RUNNER_FILE
from .shared_run import SharedRun
from .store import Stage, open_run
from .target import TargetProfile, load_profile
from .tools import Tools, read_accuracy

RUNNER = Path(_RUNNER_FILE)
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
    """

    run: Path
    table: Table
    hops: tuple[verify.Hop, ...]
    bundle: Path
    notes: tuple[str, ...]
    verdicts: tuple[contract.Verdict, ...] = ()


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
    _check_contract(options.require, load_profile(options.target))
    job = load_job(options, progress)
    _check_runtimes(job.target)
    run = SharedRun(options.out)
    with run.locked():
        run.team.once(partial(_remember, job.options, run.root))
        tools = Tools(job, progress)
        return _deploy(run, tools, networks.finish(run, tools, networks.prune(run, tools)))


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
    require: tuple[str, ...] = (),
) -> Build:
    """Go on after the user's own training of the thin network that `prune` left in RUN.

    Args:
        root: the run directory of `prune`.
        weights: trained weights of the thin network.
        target: profile to build for, if another one than `prune` was given.
        progress: to report to.
        require: see `Options.require`.
    """
    if not weights.is_file():
        raise InputError(f"There is no weights file {weights}.", hint="Give what your training saved with --weights.")
    stored = open_run(root) / "options.json"
    if not stored.exists():
        raise InputError(f"{root} has no options.json.", hint="Prune first: thinet-deploy prune --out RUN …")
    try:
        options = make_options({**read_json(stored), "out": root, "require": require})
    except (OSError, ValueError, TypeError, InputError) as error:
        raise InputError(
            f"{stored} is damaged, or of another version: {first_line(error)}",
            hint="Run the same `thinet-deploy prune` again: it writes the file anew, and finished stages are kept.",
        ) from error
    progress = join().speaking(progress)
    job = load_job(options, progress)
    # The network was pruned for the target of `prune`, whose grid its widths follow; it may be shipped to another.
    shipped = job
    if target:
        shipped = replace(job, options=options.model_copy(update={"target": target}), target=load_profile(target))
    _check_contract(require, shipped.target)
    _check_runtimes(shipped.target)
    run = SharedRun(root)
    with run.locked():
        tools = Tools(job, progress)
        pruning = networks.prune(run, tools)
        thin = _unfinished(run, tools, pruning)
        inputs = {"thin": thin.digest, "weights": sha256_of(weights)}
        own = run.alone("own", inputs, lambda f, _: stages.own(tools, thin.folder, weights, f))
        return _deploy(run, Tools(shipped, progress), networks.own(pruning, thin, own, options))


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


def _deploy(run: SharedRun, tools: Tools, made: Networks) -> Build:
    """Export → convert → verify → measure → bundle → report."""
    job, target = tools.job, tools.job.target
    folders = {name: stage.folder for name, stage in made.stages.items()}
    digests = {name: stage.digest for name, stage in made.stages.items()}
    inputs = {**digests, "opset": target.opset, "ir": target.ir_version, "shape": list(job.input_shape)}
    onnx = run.alone("onnx", inputs, lambda f, _: stages.exported(tools, folders, f))
    runtimes = host_runtimes(target)
    engines = run.alone(
        "engines",
        {"onnx": onnx.digest, "tools": [registry.converter(r).made_by() for r in runtimes]},
        lambda f, _: stages.engines(tools, onnx.folder, list(folders), runtimes, f),
    )
    paths = {
        tuple(key.split("/")): engines.folder / entry["path"] for key, entry in engines.json("engines.json").items()
    }
    engine_paths = {(name, runtime): path for (name, runtime), path in paths.items()}
    parity = run.alone(
        "parity",
        {"onnx": onnx.digest, "engines": engines.digest, "data": job.data.digest, "hops": hash_json(str(made.hops))},
        lambda f, _: stages.parity(tools, folders, made.hops, onnx.folder, engine_paths, f),
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
            "machine": machine_id(fingerprint()),
            **digests,
        },
        lambda f, _: stages.measured(tools, folders, engine_paths if runs_here(target) else {}, f),
    )
    notes = tuple(device_notes(target, INPUT, job.input_shape))
    ship = stages.Shipped(made.ship, made.labels[made.ship], folders[made.ship])
    bundle = run.alone(
        "bundle",
        {
            "onnx": onnx.digest,
            "engines": engines.digest,
            "parity": parity.digest,
            "runner": [sha256_of(file) for file in RUNNER_FILES],
            "target": [target.id, target.builds_on_device],
            "model": [job.model_name, made.labels],
            "notes": list(notes),
        },
        lambda f, _: stages.bundled(tools, ship, onnx.folder, engine_paths, parity.folder, notes, f),
    )
    inputs = {**digests, "data": job.data.digest}
    drops = run.alone("accuracy", inputs, lambda f, _: stages.drops(tools, folders, f))
    table = _table(job, made, onnx, measured, drops)
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
        },
        lambda f, _: _report(run.root, table, verdicts, f),
    )
    return Build(run.root, table, hops, bundle.folder, (*job.data.notes, *notes), verdicts)


def _report(root: Path, table: Table, verdicts: tuple[contract.Verdict, ...], folder: Path) -> None:
    write_json(folder / "table.json", table.to_json())
    write_bytes(folder / "report.html", html_report.render([html_report.Page(root, table, verdicts)]).encode())


def _check_contract(required: tuple[str, ...], target: TargetProfile) -> None:
    """Read the requirements, and refuse what could not be judged after all the work.

    Raises:
        InputError: one cannot be read, or asks for the speed of engines that do not run on this machine.
    """
    if contract.needs_engines(required) and not (runs_here(target) and host_runtimes(target)):
        raise InputError(
            f"--require asks for latency or a speed-up, but engines for {target.id} do not run on this machine.",
            hint="Build for a target that runs here, or require size and accuracy only.",
        )


def _check_runtimes(target: TargetProfile) -> None:
    for runtime in host_runtimes(target):
        registry.converter(runtime).check()


def _table(job: Job, made: Networks, onnx: Stage, measured: Stage, drops: Stage) -> Table:
    """The papers' table from the stages' files."""
    timing, exported, lost = measured.json("latency.json"), onnx.json("export.json"), drops.json("drops.json")
    rows = []
    for name, stage in made.stages.items():
        row = Row.make(
            name,
            made.labels[name],
            read_accuracy(stage.folder),
            exported[name]["count"],
            (onnx.folder / f"{name}.onnx").stat().st_size,
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
        batch=stages.TORCH_BATCH,
        runtimes=tuple(host_runtimes(job.target) if runs_here(job.target) else job.target.runtimes),
        rows=tuple(rows),
        ledger=tuple(made.ledger),
        ships=made.ship,
    )
