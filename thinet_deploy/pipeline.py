"""The only place that knows the order of the stages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import registry, stages, verify
from .artifact import hash_json, read_json, sha256_of, write_json
from .environment import fingerprint, machine_id
from .errors import GateError, InputError, first_line
from .export import INPUT
from .interfaces import Progress, silent
from .job import Job, load_job
from .options import Options, make_options
from .parallel import join
from .prune_stage import pruned as pruned_stage
from .pruning.proof import Proof
from .pruning.surgery import gap_head
from .registry import device_notes, host_runtimes, runs_here
from .report import Row, Table
from .runner import __file__ as _RUNNER_FILE
from .runner import usable_cores
from .shared_run import SharedRun
from .store import Stage, open_run
from .target import TargetProfile
from .tools import PLAN, REPORT, Tools, read_accuracy
from .training import Accuracy

RUNNER = Path(_RUNNER_FILE)
# Options that decide which filters stay.
WIDTHS = {"keep", "macs", "size", "round_to", "keep_layer", "ignore", "prune_shortcuts", "calibration_images"}


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


@dataclass(frozen=True)
class Networks:
    """The finished networks of a build, and the hops that led to them.

    Attributes:
        stages: name → stage, the original first, the one to ship last.
        labels: name → what the table calls it.
        hops: verdicts on the way.
        scratch: the control, trained from scratch; None where nobody knows the equal amount of training.
    """

    stages: dict[str, Stage]
    labels: dict[str, str]
    hops: list[verify.Hop]
    scratch: Stage | None


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
        _, pruned, head = _pruned(run, Tools(job, progress))
        return _unfinished(run, Tools(job, progress), pruned, head).folder


def build(options: Options, progress: Progress = silent) -> Build:
    """The whole way: prune → fine-tune → export → convert → verify → measure → bundle.

    Raises:
        InputError: something the user gave is wrong; found before any work starts.
        MissingError: a runtime of the target is not installed.
        GateError: a parity verdict failed; all results so far are kept in the run directory.
    """
    progress = join().speaking(progress)
    job = load_job(options, progress)
    _check_runtimes(job.target)
    run = SharedRun(options.out)
    with run.locked():
        run.team.once(partial(_remember, job.options, run.root))
        tools = Tools(job, progress)
        return _deploy(run, tools, _train_and_prune(run, tools))


def _remember(options: Options, root: Path) -> None:
    """Keep the options for `build_from`, with whole paths, so that it may be called from another folder."""
    kept = options.model_dump(mode="json")
    for name, value in options:
        if isinstance(value, Path) or ".py:" in str(value) or str(value).endswith(".toml"):
            kept[name] = str(Path(value).absolute())
    write_json(root / "options.json", kept)


def build_from(root: Path, weights: Path, target: str | None = None, progress: Progress = silent) -> Build:
    """Go on after the user's own training of the thin network that `prune` left in RUN.

    Args:
        root: the run directory of `prune`.
        weights: trained weights of the thin network.
        target: profile to build for, if another one than `prune` was given.
        progress: to report to.
    """
    if not weights.is_file():
        raise InputError(f"There is no weights file {weights}.", hint="Give what your training saved with --weights.")
    stored = open_run(root) / "options.json"
    if not stored.exists():
        raise InputError(f"{root} has no options.json.", hint="Prune first: thinet-deploy prune --out RUN …")
    try:
        options = make_options({**read_json(stored), "out": root, **({"target": target} if target else {})})
    except (OSError, ValueError, TypeError, InputError) as error:
        raise InputError(
            f"{stored} is damaged, or of another version: {first_line(error)}",
            hint="Run the same `thinet-deploy prune` again: it writes the file anew, and finished stages are kept.",
        ) from error
    progress = join().speaking(progress)
    job = load_job(options, progress)
    _check_runtimes(job.target)
    run = SharedRun(root)
    with run.locked():
        tools = Tools(job, progress)
        original, pruned, head = _pruned(run, tools)
        thin = _unfinished(run, tools, pruned, head)
        inputs = {"thin": thin.digest, "weights": sha256_of(weights)}
        own = run.alone("own", inputs, lambda f, _: stages.own(tools, thin.folder, weights, f))
        hops = [
            verify.pruning_hop("own", Proof(**pruned.json(REPORT)["proof"])),
            verify.tuning_hop("own", "pruned → trained", read_accuracy(thin.folder), read_accuracy(own.folder)),
        ]
        name = "ThiNet-GAP" if head else "ThiNet-Conv"
        labels = {"original": "Original", "own": f"{name} ({options.widths}), own training"}
        return _deploy(run, tools, Networks({"original": original, "own": own}, labels, hops, None))


def _pruned(run: SharedRun, tools: Tools) -> tuple[Stage, Stage, bool]:
    """The original, the network pruned layer by layer, and whether its head is to be replaced."""
    job, options, training = tools.job, tools.job.options, _training(tools.job.options)
    weights = {"weights": sha256_of(options.weights)} if options.weights else {**training, "epochs": options.epochs}
    original = run.stage("dense", {**job.identity, **weights}, partial(stages.dense, tools))
    inputs = {
        **job.identity,
        **training,
        "dense": original.digest,
        "widths": options.model_dump(mode="json", include=WIDTHS),
        **({"grid": job.target.channel_grid} if options.round_to == "target" else {}),
        "method": [options.recipe, options.selection, options.rebuilding],
        "epochs": options.layer_epochs,
    }
    pruned = run.stage("prune", inputs, partial(pruned_stage, tools, original.folder))
    _gate((verify.pruning_hop("conv", Proof(**pruned.json(REPORT)["proof"])),), run, pruned)
    return original, pruned, options.preset == "thinet-gap" or (not options.preset and bool(gap_head(job.fresh())))


def _training(options: Options) -> dict[str, Any]:
    """What the result of any training depends on, besides its epochs."""
    training: dict[str, Any] = {"lr": options.lr, "batch_size": options.batch_size}
    if options.trainer:
        file, _, function = options.trainer.rpartition(":")
        training["trainer"] = [function, sha256_of(Path(file))]
    return training


def _unfinished(run: SharedRun, tools: Tools, pruned: Stage, head: bool) -> Stage:
    return run.alone(
        "thin", {"prune": pruned.digest, "head": head}, lambda f, _: stages.unfinished(tools, pruned.folder, head, f)
    )


def _train_and_prune(run: SharedRun, tools: Tools) -> Networks:
    """Original → ThiNet-Conv → ThiNet-GAP, and the control from scratch."""
    options = tools.job.options
    original, pruned, head = _pruned(run, tools)
    after = {**_training(options), "seed": options.seed, "epochs": options.finetune_epochs, "distil": options.distils}
    conv = run.stage(
        "conv", {**after, "prune": pruned.digest}, partial(stages.tuned, tools, original.folder, pruned.folder)
    )
    networks = {"original": original, "conv": conv}
    hops = [
        verify.pruning_hop("conv", Proof(**pruned.json(REPORT)["proof"])),
        verify.tuning_hop("conv", "pruned → fine-tuned", read_accuracy(pruned.folder), read_accuracy(conv.folder)),
    ]
    if head:
        networks["gap"] = run.stage(
            "gap", {**after, "conv": conv.digest}, partial(stages.gap, tools, original.folder, conv.folder)
        )
        report = networks["gap"].json(REPORT)
        hops.append(
            verify.tuning_hop(
                "gap", "head replaced → fine-tuned", Accuracy(**report["before"]), Accuracy(**report["accuracy"])
            )
        )
    last = list(networks.values())[-1]
    epochs = options.epochs + pruned.json(REPORT)["epochs"]
    epochs += options.finetune_epochs * (2 if head else 1)
    inputs = {**after, "thin": sha256_of(last.folder / PLAN), "epochs": epochs, **tools.job.identity}
    scratch = run.stage("scratch", inputs, partial(stages.scratch, tools, last.folder, epochs))
    labels = {"original": "Original", "conv": f"ThiNet-Conv ({options.widths})", "gap": "ThiNet-GAP"}
    return Networks(networks, labels, hops, scratch)


def _deploy(run: SharedRun, tools: Tools, networks: Networks) -> Build:
    """Export → convert → verify → measure → bundle → report."""
    job, target = tools.job, tools.job.target
    folders = {name: stage.folder for name, stage in networks.stages.items()}
    digests = {name: stage.digest for name, stage in networks.stages.items()}
    inputs = {**digests, "opset": target.opset, "ir": target.ir_version, "shape": list(job.input_shape)}
    onnx = run.alone("onnx", inputs, lambda f, _: stages.exported(tools, folders, f))
    runtimes = host_runtimes(target)
    made = run.alone(
        "engines",
        {"onnx": onnx.digest, "tools": [registry.converter(r).made_by() for r in runtimes]},
        lambda f, _: stages.engines(tools, onnx.folder, list(folders), runtimes, f),
    )
    paths = {tuple(key.split("/")): made.folder / entry["path"] for key, entry in made.json("engines.json").items()}
    engine_paths = {(name, runtime): path for (name, runtime), path in paths.items()}
    parity = run.alone(
        "parity",
        {"onnx": onnx.digest, "engines": made.digest, "data": job.data.digest, "hops": hash_json(str(networks.hops))},
        lambda f, _: stages.parity(tools, folders, networks.hops, onnx.folder, engine_paths, f),
    )
    hops = tuple(verify.Hop(**hop) for hop in parity.json("parity.json")["hops"])
    _gate(hops, run, parity)
    measured = run.alone(
        "latency",
        {
            "engines": made.digest,
            "engines run": runs_here(target),
            "threads": job.options.threads,
            "machine": machine_id(fingerprint()),
            **digests,
        },
        lambda f, _: stages.measured(tools, folders, engine_paths if runs_here(target) else {}, f),
    )
    notes = tuple(device_notes(target, INPUT, job.input_shape))
    name = list(folders)[-1]
    ship = stages.Shipped(name, networks.labels[name], folders[name])
    bundle = run.alone(
        "bundle",
        {
            "onnx": onnx.digest,
            "engines": made.digest,
            "parity": parity.digest,
            "runner": sha256_of(RUNNER),
            "target": [target.id, target.builds_on_device],
            "model": [job.model_name, networks.labels],
            "notes": list(notes),
        },
        lambda f, _: stages.bundled(tools, ship, onnx.folder, engine_paths, parity.folder, notes, f),
    )
    table = _table(job, networks, onnx, measured)
    run.alone(
        "report",
        {"table": hash_json(table.to_json())},
        lambda f, _: write_json(f / "table.json", table.to_json()),
    )
    return Build(run.root, table, hops, bundle.folder, notes)


def _check_runtimes(target: TargetProfile) -> None:
    for runtime in host_runtimes(target):
        registry.converter(runtime).check()


def _gate(hops: tuple[verify.Hop, ...], run: SharedRun, stage: Stage) -> None:
    """Raise GateError when a verdict failed; the bundle of an earlier build goes too, lest it ship."""
    failed = [hop for hop in hops if not hop.passed]
    if failed:
        lines = "\n".join(
            f"  {hop.model}: {hop.hop}: "
            + (f"error {hop.error}, allowed {hop.tolerance:.1e}" if hop.tolerance else hop.detail)
            for hop in failed
        )
        run.discard("bundle")
        run.discard("report")
        raise GateError(
            f"{len(failed)} of {len(hops)} parity verdicts failed; no bundle was written:\n{lines}",
            hint=f"All results are kept in {run.root}; {stage.folder} has the figures.",
        )


def _table(job: Job, networks: Networks, onnx: Stage, measured: Stage) -> Table:
    """The papers' table from the stages' files."""
    timing, exported = measured.json("latency.json"), onnx.json("export.json")
    rows = []
    for name, stage in networks.stages.items():
        rows.append(
            Row.make(
                name,
                networks.labels[name],
                read_accuracy(stage.folder),
                exported[name]["count"],
                (onnx.folder / f"{name}.onnx").stat().st_size,
                timing,
            )
        )
    if networks.scratch:
        thin = rows[-1]
        rows.append(thin.from_scratch(read_accuracy(networks.scratch.folder), networks.scratch.json(REPORT)["epochs"]))
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
    )
