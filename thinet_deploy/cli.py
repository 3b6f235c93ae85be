"""The command line: thin commands, progress on stderr, results on stdout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .cli_compare import compare, exit_on_broken, show_verdicts
from .cli_count import count
from .cli_device import show_device, verify, without_samples
from .cli_latency import latency as latency_command
from .cli_options import (
    BatchSize,
    Branches,
    CalibrationImages,
    Config,
    Controls,
    Data,
    Device,
    DevicePython,
    Epochs,
    FinetuneEpochs,
    FinetuneRate,
    Gcos,
    GcosLayer,
    Ignore,
    InputShape,
    Json,
    Keep,
    KeepLayer,
    Latency,
    LayerEpochs,
    LearningRate,
    Macs,
    MaxDrop,
    Method,
    Model,
    Out,
    Precision,
    Preprocess,
    Preset,
    Recipe,
    Reconstruction,
    Require,
    RoundTo,
    Seed,
    Shortcuts,
    Size,
    SpeedUp,
    Target,
    Threads,
    TimedOn,
    Train,
    Trainer,
    TransferEpochs,
    TransferTo,
    Unlabelled,
    Weights,
)
from .cli_processes import INTERRUPTED, one_voice
from .cli_progress import bars
from .cli_staircase import staircase
from .cli_tables import grid, print_json, show_feasibility, show_pruned, stdout
from .errors import InputError, ThinetDeployError, UnknownNameError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "From a trained CNN to a thinner, verified, measured engine on your own device.\n\n"
        "[bold]thinet-deploy build --target cpu[/bold] shows the whole way on handwritten digits that are built in. "
        "Then give your own: [bold]--data DIR --model file.py:factory --weights FILE[/bold].\n\n"
        "Exit codes: 0 done, 1 a parity gate failed or a requirement is not met, 2 the input is wrong, 3 something is "
        "not installed, 130 interrupted (run the same command again to go on)."
    ),
)

_ERR = Console(stderr=True)

app.command()(count)


@app.command()
def build(  # noqa: PLR0917 - one argument per option
    target: Target = None,
    model: Model = None,
    data: Data = None,
    unlabelled: Unlabelled = None,
    weights: Weights = None,
    transfer_to: TransferTo = None,
    preprocess: Preprocess = None,
    input_shape: InputShape = None,
    preset: Preset = None,
    recipe: Recipe = None,
    method: Method = None,
    reconstruction: Reconstruction = None,
    calibration_images: CalibrationImages = None,
    keep: Keep = None,
    macs: Macs = None,
    size: Size = None,
    latency: Latency = None,
    speedup: SpeedUp = None,
    round_to: RoundTo = None,
    keep_layer: KeepLayer = None,
    gcos: Gcos = None,
    gcos_layer: GcosLayer = None,
    ignore: Ignore = None,
    prune_shortcuts: Shortcuts = None,
    drop_branches: Branches = None,
    epochs: Epochs = None,
    layer_epochs: LayerEpochs = None,
    finetune_epochs: FinetuneEpochs = None,
    transfer_epochs: TransferEpochs = None,
    controls: Controls = None,
    lr: LearningRate = None,
    finetune_lr: FinetuneRate = None,
    train: Train = None,
    batch_size: BatchSize = None,
    trainer: Trainer = None,
    precision: Precision = None,
    max_drop: MaxDrop = None,
    threads: Threads = None,
    require: Require = None,
    device: Device = None,
    device_python: DevicePython = None,
    seed: Seed = None,
    from_run: Annotated[
        Path | None, typer.Option("--from", help="Go on from a run of `prune`, with the --weights you trained.")
    ] = None,
    out: Out = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """The whole way: prune, fine-tune, export, convert, verify, measure, bundle.

    Killed or interrupted? Run the same command again: finished stages are kept.

    [bold]thinet-deploy build --target cpu[/bold]
    [bold]thinet-deploy build -t jetson --data photos --model vgg16 --weights vgg16.pth[/bold]
    [bold]thinet-deploy build --from RUN --weights mine.safetensors[/bold]   (after prune and your own training)
    """
    given = {key: value for key, value in locals().items() if value not in (None, []) and key not in _NOT_OPTIONS}
    from . import pipeline, report
    from .hops import render_hops
    from .ledger import render_ledger

    with bars(_ERR) as progress:
        if from_run:
            more = {name: given[name] for name in ("precision", "device", "device_python") if name in given}
            if weights is None or set(given) - {"weights", "target", "require", *more} or config:
                raise InputError(
                    "--from takes --weights, --require, --device and, if they change, --target and --precision.",
                    hint="thinet-deploy build --from RUN --weights mine.safetensors",
                )
            done = pipeline.build_from(from_run, weights, target, progress, require=tuple(require or ()), **more)
        else:
            done = pipeline.build(_options(given, config), progress)
    if as_json:
        print_json(
            {
                "run": str(done.run),
                "bundle": str(done.bundle),
                "table": done.table.to_json(),
                "parity": [vars(hop) for hop in done.hops],
                "notes": list(done.notes),
                "contract": [vars(verdict) for verdict in done.verdicts],
                **({"device": without_samples(done.device)} if done.device else {}),
            }
        )
        exit_on_broken(done.verdicts)
        return
    console = stdout()
    console.print(report.render([done.table], console.width))
    console.print(render_ledger(done.table.ledger))
    console.print(render_hops(done.hops, done.table))
    typer.echo(f"\nBundle: {done.bundle}   (check it anywhere: python {done.bundle}/run.py)")
    typer.echo(f"Report: {done.run / 'report' / 'report.html'}")
    if done.device:
        show_device(done.device)
    for note in done.notes:
        typer.echo(note)
    show_verdicts([("", verdict) for verdict in done.verdicts])
    exit_on_broken(done.verdicts)


@app.command()
def prune(  # noqa: PLR0917 - one argument per option
    target: Target = None,
    model: Model = None,
    data: Data = None,
    unlabelled: Unlabelled = None,
    weights: Weights = None,
    preprocess: Preprocess = None,
    input_shape: InputShape = None,
    preset: Preset = None,
    recipe: Recipe = None,
    method: Method = None,
    reconstruction: Reconstruction = None,
    calibration_images: CalibrationImages = None,
    keep: Keep = None,
    macs: Macs = None,
    size: Size = None,
    latency: Latency = None,
    speedup: SpeedUp = None,
    round_to: RoundTo = None,
    keep_layer: KeepLayer = None,
    gcos: Gcos = None,
    gcos_layer: GcosLayer = None,
    ignore: Ignore = None,
    prune_shortcuts: Shortcuts = None,
    drop_branches: Branches = None,
    epochs: Epochs = None,
    layer_epochs: LayerEpochs = None,
    lr: LearningRate = None,
    finetune_lr: FinetuneRate = None,
    train: Train = None,
    batch_size: BatchSize = None,
    trainer: Trainer = None,
    device: TimedOn = None,
    device_python: DevicePython = None,
    seed: Seed = None,
    feasibility: Annotated[
        bool,
        typer.Option(
            "--feasibility",
            help="Do not prune: show what each budget would cost, from one pass over the images, and what was asked "
            "for. Another budget then takes seconds. For the recipe best.",
        ),
    ] = False,
    out: Out = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Prune only, and train the thin network yourself: RUN/thin gets plan.json, model.safetensors, report.json.

    [bold]thinet-deploy prune --data photos --model net.py:make --weights net.pth --out RUN[/bold]
    [bold]thinet-deploy prune --feasibility --macs 2x …[/bold]   (what would it cost? nothing is pruned)

    In your own training: [bold]thin = thinet_deploy.load_thin(load_plan("RUN/thin/plan.json"), fresh_model,
    Path("RUN/thin/model.safetensors"))[/bold]. Afterwards: [bold]thinet-deploy build --from RUN --weights FILE[/bold].
    """
    given = {key: value for key, value in locals().items() if value not in (None, []) and key not in _NOT_OPTIONS}
    from . import pipeline
    from .artifact import read_json

    with bars(_ERR) as progress:
        work = pipeline.feasibility if feasibility else pipeline.prune
        folder = work(_options(given, config), progress)
    if feasibility:
        found, picture = read_json(folder / "feasibility.json"), folder / "feasibility.svg"
        if as_json:
            print_json({"folder": str(folder), "picture": str(picture), **found})
        else:
            show_feasibility(stdout(), picture, found)
        return
    report = read_json(folder / "report.json")
    if as_json:
        print_json({"folder": str(folder), **report})
        return
    show_pruned(stdout(), folder, report)


app.command("latency")(latency_command)
app.command()(staircase)
app.command()(compare)
app.command()(verify)


@app.command()
def targets(
    name: Annotated[str | None, typer.Argument(help="Show everything about one target.")] = None,
    as_json: Json = False,
) -> None:
    """The targets that --target knows, and what is known about them, with sources.

    [bold]thinet-deploy targets jetson[/bold] prints everything about one of them as JSON.
    """
    from .target import load_profile, profile_names

    if name:
        print_json(load_profile(name).model_dump(mode="json", exclude_none=True))
        return
    profiles = [load_profile(each) for each in profile_names()]
    if as_json:
        print_json([profile.model_dump(mode="json", exclude_none=True) for profile in profiles])
        return
    table = grid("target", "also called", "engines", "runtimes, in order", "precision", wrap=("runtimes, in order",))
    for profile in profiles:
        where = "on device" if profile.builds_on_device else "made here"
        runtimes, precision = ", ".join(profile.runtimes), profile.precisions.recommended
        table.add_row(profile.id, "\n".join(profile.aliases), where, runtimes, precision)
    stdout().print(table)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What works on this machine, what is missing, and how to get it.

    [bold]thinet-deploy doctor --json[/bold] prints it for a program.
    """
    from .environment import doctor as examine

    checks = examine()
    if as_json:
        print_json([vars(check) for check in checks])
        return
    table = grid("", "what", "found", "what to do", wrap=("found", "what to do"))
    marks = {"ok": "[green]✓[/green]", "missing": "[yellow]–[/yellow]", "note": " "}
    for check in checks:
        table.add_row(marks[check.status], check.name, escape(check.found), escape(check.advice))
    stdout().print(table)


_NOT_OPTIONS = frozenset({"from_run", "feasibility", "config", "as_json"})


def _options(given: dict[str, Any], config: Path | None) -> Any:
    from .options import make_options, parse_groups, parse_layer, parse_setting, parse_shape, read_config

    given = dict(given)
    if settings := given.pop("train", None):
        given["train"] = dict(parse_setting(each) for each in settings)
    if layers := given.pop("keep_layer", None):
        given["keep_layer"] = dict(parse_layer(each) for each in layers)
    if groups := given.pop("gcos_layer", None):
        given["gcos_layer"] = dict(parse_groups(each) for each in groups)
    values = {**(read_config(config) if config else {}), **given}
    if isinstance(values.get("input_shape"), str):
        values["input_shape"] = parse_shape(values["input_shape"])
    return make_options(values)


def main() -> None:
    """Run a command; the user's mistakes end as one message, never as a traceback."""
    try:
        code = one_voice(_ERR, lambda: app(prog_name="thinet-deploy", standalone_mode=False))
    except ThinetDeployError as error:
        code = _show_error(error)
    except typer.TyperException as error:
        code = _show_error(_usage_error(error)) if error.format_message() else _USAGE  # empty: help has been shown
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        _ERR.print("Interrupted. Run the same command again to go on: finished stages are kept.")
    sys.exit(code)


_USAGE = 2


def _show_error(error: ThinetDeployError) -> int:
    """What happened and what to do on stderr, and with --json also as the one document on stdout; the exit code."""
    if "--json" in sys.argv:
        print_json({"error": error.what, "hint": error.hint, "exit_code": error.exit_code})
    # Without emoji: rich would read "adb:X:" as a cross.
    _ERR.print(f"[bold red]Error:[/bold red] {escape(error.what)}", soft_wrap=True, highlight=False, emoji=False)
    if error.hint:
        _ERR.print(error.hint, soft_wrap=True, highlight=False, markup=False, emoji=False)
    return error.exit_code


def _usage_error(error: typer.TyperException) -> ThinetDeployError:
    """Typer's own complaint about a command line, in our form; for an unknown option with the nearest name."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "thinet-deploy"
    if context and hasattr(error, "possibilities"):  # typer's NoSuchOption, a private class
        options = [name for param in context.command.params for name in param.opts if name.startswith("--")]
        return UnknownNameError(f"option of `{command}`", str(getattr(error, "option_name", "")), options)
    return InputError(error.format_message().replace("Value error, ", ""), hint=f"See `{command} --help`.")


if __name__ == "__main__":
    main()
