"""The only place that knows the order of the stages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from . import registry
from .artifact import read_json, sha256_of, write_json
from .devices.android import Phone
from .devices.site import Machine
from .errors import GateError, InputError, TargetError, first_line
from .interfaces import Progress, silent
from .options import Options, make_options
from .parallel import join
from .precision.plan import PrecisionPlan
from .registry import host_runtimes, runs_here
from .reports import contract
from .reports.table import read_table
from .shared_run import SharedRun
from .stages import device as device_stage
from .stages import feasibility as feasibility_stage
from .stages import latency as latency_stage
from .stages import networks, steps
from .stages import precision as precision_stage
from .stages.deployment import Build, deploy
from .stages.job import Job, check_trainable, load_job, moved
from .stages.networks import Pruning
from .stages.tools import Tools
from .stages.transfer_table import transfer
from .store import Run, Stage, open_run
from .target import TargetProfile, load_profile


def prune(options: Options, progress: Progress = silent) -> Path:
    """Prune only: RUN/thin gets plan.json, model.safetensors and report.json, for the user's own training.

    Returns:
        The folder with the thin network.
    """
    progress = join().speaking(progress)
    if options.device and not options.timed:
        raise InputError(
            "--device is where a budget of time is met, but `prune` was given none.",
            hint="Give --latency or --speedup, or leave it out: `build --device` takes the bundle there.",
        )
    machine, target = _device(options) if options.timed else (None, None)
    job = _placed(load_job(options, progress), machine, target)
    run = SharedRun(options.out, progress)
    with run.locked():
        run.team.once(partial(_remember, job.options, run.root / _OPTIONS))
        tools = Tools(job, progress)
        thin = _unfinished(run, tools, networks.prune(run, tools))
        run.team.once(partial(_remember, job.options, run.root / _PRUNED))
    return thin.folder


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
    run = SharedRun(options.out, progress)
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
    _check_contract(options.require, load_profile(options.target), options.device)
    machine, target = _device(options)
    job = _placed(load_job(options, progress), machine, target)
    _check_task(job, machine)
    if options.finetune_epochs != 0:
        check_trainable(job, job.fresh())
    there = moved(job, options.transfer_to, progress) if options.transfer_to else None
    plan = precision_stage.planned(there or job)
    _check_runtimes(plan)
    run = SharedRun(options.out, progress)
    with run.locked():
        run.team.once(partial(_remember, job.options, run.root / _OPTIONS))
        tools = Tools(job, progress)
        with _withdrawn(run, "bundle", *_VERDICTS):
            last = Tools(there, progress) if there else tools
            made = transfer(run, tools, last) if there else networks.finish(run, tools, networks.prune(run, tools))
        with _withdrawn(run, *_VERDICTS):
            return deploy(run, last, plan, made, machine)


_VERDICTS = ("report", "contract")
# The last options of all, and those of the thin network that is there.
_OPTIONS, _PRUNED, _THIN = "options.json", ".records/thin-options.json", "thin"
_PRUNE_AGAIN = "Run the same `thinet-deploy prune` again: finished stages are kept."


@contextmanager
def _withdrawn(run: SharedRun, *names: str) -> Iterator[None]:
    """Where a build fails at a gate, what an earlier one in the same folder left goes: it would say "met", or ship."""
    try:
        yield
    except GateError:
        if not run.team.rank:  # the others may have failed elsewhere, and nobody waits for them here
            for name in names:
                Run.discard(run, name)
        raise


def _check_task(job: Job, machine: Machine | Phone | None) -> None:
    """Refuse what only classifiers can have."""
    task = job.data.task.name
    if task == "classification":
        return
    if isinstance(machine, Phone):
        raise InputError(
            f"--device adb: runs classifiers only so far, and this is {task}.",
            hint="Leave --device out: the bundle with its engines is made all the same.",
        )
    if top := [each for each in job.options.require if contract.parse(each).figure.startswith("top1")]:
        raise InputError(f"--require {top[0]}: there is no top-1 in {task}.", hint="Require accuracy or accuracy-drop.")


def _device(options: Options, *, shipping: bool = False) -> tuple[Machine | Phone | None, TargetProfile | None]:
    """The device, looked at before any work starts, and the target on the stack that it has.

    Args:
        options: name it.
        shipping: whether no budget of time is to be met there any more.
    """
    if options.device is None:
        return None, None
    profile = load_profile(options.target)
    reach = device_stage.reach_to_time if options.timed and not shipping else device_stage.reach
    machine, target = reach(options.device, options.device_python, profile)
    _check_stack(machine, target, options.target.rpartition("@")[2])
    return machine, target


def _placed(job: Job, machine: Machine | Phone | None, target: TargetProfile | None) -> Job:
    """The job for what its device is; whether a budget of time can be met there, or here, shows before any work."""
    job = replace(job, target=target or job.target)
    if job.options.timed:
        job = replace(job, machine=machine if isinstance(machine, Machine) else None)
        latency_stage.engine_of(job)
    return job


def _check_stack(machine: Machine | Phone, target: TargetProfile, asked: str) -> None:
    """Refuse a stack that was named and is not the device's; unnamed, the device decides."""
    if target.stack and asked != target.stack.name and asked in {stack.name for stack in target.stacks}:
        raise TargetError(
            f"--target names {asked}, but {machine.device.name} has {target.stack.name}.",
            hint=f"Leave @{asked} out: what the device has is found there.",
        )


def _remember(options: Options, file: Path) -> None:
    """Write the options down, with whole paths, so that `build_from` may be called from another folder."""
    kept = options.model_dump(mode="json")
    for name, value in options:
        if isinstance(value, Path) or ".py:" in str(value) or ".toml" in str(value):
            kept[name] = str(Path(value).absolute())
    write_json(file, kept)


def _remembered(root: Path, changes: dict[str, Any]) -> Options:
    """The options that `prune` made the thin network with, with some changes.

    Raises:
        InputError: there are none, or they cannot be read.
    """
    stored = open_run(root) / _PRUNED
    if not stored.exists():
        raise InputError(
            f"{root} has no thin network that `prune` left.", hint="Prune first: thinet-deploy prune --out RUN …"
        )
    try:
        return make_options({**read_json(stored), "out": root, **changes})
    except (OSError, ValueError, TypeError, InputError) as error:
        raise InputError(
            f"{stored} is damaged, or of another version: {first_line(error)}",
            hint=_PRUNE_AGAIN,
        ) from error


def build_from(  # noqa: PLR0913 - one argument per option that may differ from those of `prune`
    root: Path,
    weights: Path,
    target: str | None = None,
    progress: Progress = silent,
    *,
    precision: str | None = None,
    require: tuple[str, ...] = (),
    device: str | None = None,
    device_python: str = "python3",
    dla: int | None = None,
) -> Build:
    """Go on after the user's own training of the thin network that `prune` left in RUN.

    Args:
        root: the run directory of `prune`.
        weights: trained weights of the thin network.
        target: profile to build for, if another one than `prune` was given.
        progress: to report to.
        precision: of the engines (see `Options`), if another one than `prune` was given.
        require: see `Options.require`.
        device: see `Options.device`.
        device_python: see `Options.device_python`.
        dla: see `Options.dla`.
    """
    if not weights.is_file():
        raise InputError(f"There is no weights file {weights}.", hint="Give what your training saved with --weights.")
    options = _remembered(root, {"require": require})
    progress = join().speaking(progress)
    job = load_job(options, progress)
    # The network was pruned for the target of `prune`, whose grid its widths follow; it may be shipped to another.
    changes: dict[str, str | int | None] = {"device": device, "device_python": device_python, "dla": dla}
    changes |= {name: value for name, value in {"target": target, "precision": precision}.items() if value}
    if target or precision or device != options.device:  # the budget of time was of other engines
        changes |= {"latency": None, "speedup": None}
    job = replace(job, options=make_options({**options.model_dump(), **changes}))
    if target:
        job = replace(job, target=load_profile(target))
    machine, found = _device(job.options, shipping=True)
    job = _placed(job, machine, found)
    _check_task(job, machine)
    _check_contract(require, job.target, device)
    plan = precision_stage.planned(job)
    _check_runtimes(plan)
    run = SharedRun(root, progress)
    with run.locked():
        tools = Tools(job, progress)
        original, thin = _as_pruned(run)
        inputs = {**job.identity, "thin": thin.digest, "weights": sha256_of(weights)}
        own = run.alone("own", inputs, lambda f, _: steps.own(tools, thin.folder, weights, f))
        said = (*_replaced(root), *_edited(job, original))
        with _withdrawn(run, *_VERDICTS):
            done = deploy(run, tools, plan, networks.own(original, thin, own, job, options), machine)
    return replace(done, notes=(*done.notes, *said)) if said else done


def _as_pruned(run: SharedRun) -> tuple[Stage, Stage]:
    """The original and its thin network as `prune` left them: the user's training began there, so nothing is made anew.

    Raises:
        InputError: they are not there any more.
    """
    original, thin = run.kept("dense"), run.kept(_THIN)
    if original is None or thin is None or thin.inputs["dense"] != original.digest:
        raise InputError(
            f"{run.root} has not the thin network and its original any more as `prune` left them.", hint=_PRUNE_AGAIN
        )
    return original, thin


def _edited(job: Job, original: Stage) -> tuple[str, ...]:
    """What to say where the user's code of the network is another than when it was pruned."""
    if job.identity["model"] == original.inputs["model"]:
        return ()
    return (
        f"{job.model_name} has changed since `prune`: that only filters went was proved of the network as it was then.",
    )


def _replaced(root: Path) -> tuple[str, ...]:
    """What to say where RUN had a build with our own training, whose report and bundle become those of another."""
    with suppress(InputError):
        if read_table(root).ships != "own":
            return (
                f"{root} had another build: its report and bundle are replaced. The same `build` makes them again.",
            )
    return ()


def _unfinished(run: SharedRun, tools: Tools, pruning: Pruning) -> Stage:
    prunings = {method: stage.folder for method, stage in pruning.by_method.items()}
    return run.stage(
        _THIN,
        {
            "prune": {method: stage.digest for method, stage in pruning.by_method.items()},
            "dense": pruning.original.digest,
            "head": pruning.head,
            "images": tools.job.options.calibration_images,
        },
        lambda f, _: steps.unfinished(tools, pruning.original.folder, prunings, pruning.head, f),
    )


def _check_contract(required: tuple[str, ...], target: TargetProfile, device: str | None) -> None:
    """Read the requirements, and refuse what could not be judged after all the work.

    Raises:
        InputError: one cannot be read, or asks for the speed of engines that run neither here nor on a device, or for
            a speed-up on a device, where the original is not measured.
    """
    figures = {contract.parse(text).figure for text in required}
    if device and "speedup" in figures:
        raise InputError(
            f"--require asks for a speed-up, but of what is measured on {device} the thin network is all.",
            hint="Require its latency there: latency<=8ms.",
        )
    if figures & {"latency", "speedup"} and not device and not (runs_here(target) and host_runtimes(target)):
        raise InputError(
            f"--require asks for latency or a speed-up, but engines for {target.id} do not run on this machine.",
            hint="Name the device with --device ssh://user@host, build for a target that runs here, or require size "
            "and accuracy only.",
        )


def _check_runtimes(plan: PrecisionPlan) -> None:
    for runtime in plan.runtimes:
        registry.check(runtime)
