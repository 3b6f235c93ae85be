"""The command line: thin commands, progress on stderr, results on stdout."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from .cli_options import (
    BatchSize,
    CalibrationImages,
    Config,
    Data,
    Epochs,
    FinetuneEpochs,
    Ignore,
    InputShape,
    Json,
    Keep,
    KeepLayer,
    LayerEpochs,
    LearningRate,
    Macs,
    Method,
    Model,
    Out,
    Preprocess,
    Preset,
    Recipe,
    Reconstruction,
    RoundTo,
    Seed,
    Shortcuts,
    Size,
    Target,
    Threads,
    Trainer,
    Weights,
)
from .cli_processes import INTERRUPTED, one_voice
from .cli_progress import bars
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
        "Exit codes: 0 done, 1 a parity gate failed, 2 the input is wrong, 3 something is not installed, "
        "130 interrupted (run the same command again to go on)."
    ),
)

_ERR = Console(stderr=True)


@app.command()
def build(  # noqa: PLR0917 - one argument per option
    target: Target = None,
    model: Model = None,
    data: Data = None,
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
    round_to: RoundTo = None,
    keep_layer: KeepLayer = None,
    ignore: Ignore = None,
    prune_shortcuts: Shortcuts = None,
    epochs: Epochs = None,
    layer_epochs: LayerEpochs = None,
    finetune_epochs: FinetuneEpochs = None,
    lr: LearningRate = None,
    batch_size: BatchSize = None,
    trainer: Trainer = None,
    threads: Threads = None,
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

    with bars(_ERR) as progress:
        if from_run:
            if weights is None or set(given) - {"weights", "target"} or config:
                raise InputError(
                    "--from takes --weights and, if it changes, --target; all else comes from the run.",
                    hint="thinet-deploy build --from RUN --weights mine.safetensors",
                )
            done = pipeline.build_from(from_run, weights, target, progress)
        else:
            done = pipeline.build(_options(given, config), progress)
    if as_json:
        _print_json(
            {
                "run": str(done.run),
                "bundle": str(done.bundle),
                "table": done.table.to_json(),
                "parity": [vars(hop) for hop in done.hops],
                "notes": list(done.notes),
            }
        )
        return
    console = _stdout()
    console.print(report.render([done.table], console.width))
    console.print(report.render_hops(done.hops, done.table))
    typer.echo(f"\nBundle: {done.bundle}   (check it anywhere: python {done.bundle}/run.py)")
    for note in done.notes:
        typer.echo(note)


@app.command()
def prune(  # noqa: PLR0917 - one argument per option
    target: Target = None,
    model: Model = None,
    data: Data = None,
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
    round_to: RoundTo = None,
    keep_layer: KeepLayer = None,
    ignore: Ignore = None,
    prune_shortcuts: Shortcuts = None,
    epochs: Epochs = None,
    layer_epochs: LayerEpochs = None,
    lr: LearningRate = None,
    batch_size: BatchSize = None,
    trainer: Trainer = None,
    seed: Seed = None,
    out: Out = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Prune only, and train the thin network yourself: RUN/thin gets plan.json, model.safetensors, report.json.

    [bold]thinet-deploy prune --data photos --model net.py:make --weights net.pth --out RUN[/bold]

    In your own training: [bold]thin = thinet_deploy.load_thin(load_plan("RUN/thin/plan.json"), fresh_model,
    Path("RUN/thin/model.safetensors"))[/bold]. Afterwards: [bold]thinet-deploy build --from RUN --weights FILE[/bold].
    """
    given = {key: value for key, value in locals().items() if value not in (None, []) and key not in _NOT_OPTIONS}
    from . import pipeline
    from .artifact import read_json

    with bars(_ERR) as progress:
        folder = pipeline.prune(_options(given, config), progress)
    report = read_json(folder / "report.json")
    if as_json:
        _print_json({"folder": str(folder), **report})
        return
    _show_pruned(folder, report)


def _show_pruned(folder: Path, report: dict[str, Any]) -> None:
    """The layers that were pruned, what stayed whole and why, and what comes next."""
    titles = {"error": "error", "error_scaled": "with ŵ", "top1_pruned": "top-1 pruned", "top1_tuned": "fine-tuned"}
    shown = {key: title for key, title in titles.items() if any(key in layer for layer in report["layers"])}
    grid = _grid("layer", "filters", "kept", *shown.values())
    for layer in report["layers"]:
        figures = (f"{float(layer[key]):.{2 if key.startswith('top1') else 4}f}" for key in shown)
        first, *others = layer["producer"].split(", ")
        name = f"{first} and {len(others)} more" if others else first
        grid.add_row(name, str(layer["before"]), str(layer["after"]), *figures)
    _stdout().print(grid)
    for entry in report["ledger"]:
        span = f"{entry['top1_low']:.2f} to {entry['top1_high']:.2f}"
        typer.echo(f"{entry['step']}: top-1 {entry['top1']:.2f} % (95 %: {span}), top-5 {entry['top5']:.2f} %")
    for reason in dict.fromkeys(report["whole"].values()):
        names = [name for name, why in report["whole"].items() if why == reason]
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        typer.echo(f"Whole: {', '.join(names[:_NAMES_SHOWN])}{more}: {reason}")
    before, after = report["macs"]["before"], report["macs"]["after"]
    typer.echo(f"Multiply-accumulates: {before / 1e6:.2f}M before, {after / 1e6:.2f}M now, {before / after:.2f}x fewer")
    proof = report["proof"]
    typer.echo(f"Pruned = original minus filters: proved, error {proof['error']:.1e}, allowed {proof['tolerance']:.1e}")
    typer.echo(f"Thin network: {folder}. Train it, then: thinet-deploy build --from {folder.parent} --weights FILE")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories of finished builds.")],
    output: Annotated[
        Literal["table", "markdown", "csv", "json"], typer.Option("--format", help="How to print the table.")
    ] = "table",
    across_machines: Annotated[
        bool, typer.Option("--across-machines", help="Show runs of different machines side by side all the same.")
    ] = False,
    as_json: Json = False,
) -> None:
    """The papers' table of one or more runs.

    [bold]thinet-deploy compare runs/vgg-50 runs/vgg-30 --format markdown[/bold]
    """
    from . import report

    tables = [report.read_table(run) for run in runs]
    if not across_machines:
        report.check_machines(tables)
    if as_json or output == "json":
        _print_json([table.to_json() for table in tables])
    elif output == "table":
        console = _stdout()
        console.print(report.render(tables, console.width))
    else:
        typer.echo((report.to_markdown if output == "markdown" else report.to_csv)(tables), nl=False)


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    as_json: Json = False,
) -> None:
    """Check a bundle: every file's checksum, and the golden inputs and outputs on every engine.

    [bold]thinet-deploy verify RUN/bundle[/bold], or on the device, where only numpy and a runtime are needed:
    [bold]python RUN/bundle/run.py[/bold]
    """
    from .bundle import verify_bundle
    from .runner import verify_text

    result = verify_bundle(bundle)
    if as_json:
        _print_json(result)
    else:
        typer.echo(verify_text(result))
    raise typer.Exit(result["exit_code"])


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
        _print_json(load_profile(name).model_dump(mode="json", exclude_none=True))
        return
    profiles = [load_profile(each) for each in profile_names()]
    if as_json:
        _print_json([profile.model_dump(mode="json", exclude_none=True) for profile in profiles])
        return
    grid = _grid("target", "also called", "engines", "runtimes, in order", "precision", wrap=("runtimes, in order",))
    for profile in profiles:
        where = "on device" if profile.builds_on_device else "made here"
        runtimes, precision = ", ".join(profile.runtimes), profile.precisions.recommended
        grid.add_row(profile.id, "\n".join(profile.aliases), where, runtimes, precision)
    _stdout().print(grid)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What works on this machine, what is missing, and how to get it.

    [bold]thinet-deploy doctor --json[/bold] prints it for a program.
    """
    from .environment import doctor as examine

    checks = examine()
    if as_json:
        _print_json([vars(check) for check in checks])
        return
    grid = _grid("", "what", "found", "what to do", wrap=("found", "what to do"))
    marks = {"ok": "[green]✓[/green]", "missing": "[yellow]–[/yellow]", "note": " "}
    for check in checks:
        grid.add_row(marks[check.status], check.name, escape(check.found), escape(check.advice))
    _stdout().print(grid)


_NAMES_SHOWN = 4  # report.json has them all
_NOT_OPTIONS = frozenset({"from_run", "config", "as_json"})


def _options(given: dict[str, Any], config: Path | None) -> Any:
    from .options import make_options, parse_layer, parse_shape, read_config

    given = dict(given)
    if layers := given.pop("keep_layer", None):
        given["keep_layer"] = dict(parse_layer(each) for each in layers)
    values = {**(read_config(config) if config else {}), **given}
    if isinstance(values.get("input_shape"), str):
        values["input_shape"] = parse_shape(values["input_shape"])
    return make_options(values)


def _stdout() -> Console:
    """A terminal as it is; a pipe wide enough that no column is cut."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 180))


def _grid(*headers: str, wrap: tuple[str, ...] = ()) -> Grid:
    """A table in which only the columns named in `wrap` may break lines: names and figures are never cut."""
    grid = Grid(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for header in headers:
        grid.add_column(header, no_wrap=header not in wrap)
    return grid


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=1, default=str))


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
        _print_json({"error": error.what, "hint": error.hint, "exit_code": error.exit_code})
    _ERR.print(f"[bold red]Error:[/bold red] {escape(error.what)}", soft_wrap=True, highlight=False)
    if error.hint:
        _ERR.print(error.hint, soft_wrap=True, highlight=False, markup=False)
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
