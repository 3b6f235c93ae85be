"""The command line: thin commands, progress on stderr, results on stdout."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..errors import InputError, ThinetDeployError
from ..interfaces import Progress
from .build import show_build
from .compare import compare
from .count import count
from .device import verify
from .errors import show_error, usage_error
from .latency import latency as latency_command
from .options import (
    BatchSize,
    Branches,
    CalibrationImages,
    Config,
    Controls,
    Data,
    Device,
    DevicePython,
    Dla,
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
from .processes import INTERRUPTED, one_voice
from .progress import bars
from .staircase import staircase
from .tables import print_json, show_feasibility, show_pruned, stdout
from .targets import doctor, targets

if TYPE_CHECKING:
    from ..stages.deployment import Build

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
        "Exit codes: 0 done, 1 a gate failed, a budget is out of reach or a requirement is not met, 2 the input is "
        "wrong, 3 something is not installed or a device cannot be reached, 130 interrupted (run the same command "
        "again to go on)."
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
    dla: Dla = None,
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
    from .. import pipeline

    with bars(_ERR) as progress:
        if from_run:
            done = _built_from(from_run, given, config, progress)
        else:
            done = pipeline.build(_options(given, config), progress)
    show_build(stdout(), done, as_json=as_json)


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
    """Prune only, and train the thin network yourself: RUN/thin has plan, weights, report and model.pt2.

    [bold]thinet-deploy prune --data photos --model net.py:make --weights net.pth --out RUN[/bold]
    [bold]thinet-deploy prune --feasibility --macs 2x …[/bold]   (what would it cost? nothing is pruned)

    In your own training: [bold]thin = thinet_deploy.load_thin(load_plan("RUN/thin/plan.json"), fresh_model,
    Path("RUN/thin/model.safetensors"))[/bold]. Afterwards: [bold]thinet-deploy build --from RUN --weights FILE[/bold].
    """
    given = {key: value for key, value in locals().items() if value not in (None, []) and key not in _NOT_OPTIONS}
    from .. import pipeline
    from ..artifact import read_json

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
app.command()(targets)
app.command()(doctor)

_NOT_OPTIONS = frozenset({"from_run", "feasibility", "config", "as_json"})


def _built_from(run: Path, given: dict[str, Any], config: Path | None, progress: Progress) -> Build:
    """Go on from a run of `prune`, with the weights of the user's own training."""
    from .. import pipeline

    may = {"weights", "target", "require", "precision", "device", "device_python", "dla"}
    if "weights" not in given or set(given) - may or config:
        raise InputError(
            "--from takes --weights, --require, --device, --dla and, if they change, --target and --precision.",
            hint="thinet-deploy build --from RUN --weights mine.safetensors",
        )
    return pipeline.build_from(run, progress=progress, **{**given, "require": tuple(given.get("require", ()))})


def _options(given: dict[str, Any], config: Path | None) -> Any:
    from ..options import check_one_budget, make_options, read_config, spelled_out

    values = spelled_out({**(read_config(config) if config else {}), **given})
    check_one_budget(values)
    return make_options(values)


def main() -> None:
    """Run a command; the user's mistakes end as one message, never as a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not of UTF-8 has no ≈
    try:
        code = one_voice(_ERR, lambda: app(prog_name="thinet-deploy", standalone_mode=False))
    except ThinetDeployError as error:
        code = show_error(_ERR, error)
    except typer.TyperException as error:  # without a message: help has been shown
        code = show_error(_ERR, usage_error(error)) if error.format_message() else InputError.exit_code
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        _ERR.print("Interrupted. Run the same command again to go on: finished stages are kept.")
    sys.exit(code)


if __name__ == "__main__":
    main()
