"""`thinet-deploy latency`: milliseconds of engines, bundles, runs and models, with what has to be known beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from .cli_device import remote_latency
from .cli_options import DevicePython, InputShape, Json
from .cli_progress import bars
from .interfaces import Precision

if TYPE_CHECKING:
    from .latency import EngineLatency, LatencyReport, TorchLatency
    from .things import Engines, Model

INVALID = 1
_HERE = ("cpu", "cuda")


def latency(  # noqa: PLR0913, PLR0917 - one argument per option
    things: Annotated[
        list[str],
        typer.Argument(metavar="THING…", help="Engine files, bundles, runs, models such as vgg16 or file.py:factory."),
    ],
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of an engine.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images per run.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.01, help="Per engine, warm-up included.")] = 5.0,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every engine (A B A B …); of a model its passes.")] = 15,
    fps: Annotated[
        float, typer.Option(min=0, help="Also measure at so many runs a second, with pauses, as behind a camera.")
    ] = 0.0,
    device: Annotated[
        str,
        typer.Option(
            help="cpu or cuda: where models run forward and backward; ssh://user@host:port or adb:SERIAL: where a "
            "bundle is copied to and measured."
        ),
    ] = "cpu",
    device_python: DevicePython = None,
    precision: Annotated[
        Literal["fp32", "fp16", "bf16", "int8"], typer.Option(help="That an engine file has to compute in.")
    ] = "fp32",
    input_shape: InputShape = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write the report, with all samples, here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Milliseconds with intervals, every engine in a process of its own, all in turn; models forward and backward.

    Exit code 1 when a time is invalid: the machine throttled, or the outputs are no numbers.

    [bold]thinet-deploy latency RUN/bundle --threads 4[/bold]
    [bold]thinet-deploy latency dense.onnx thin.onnx --fps 30[/bold]   (thin against dense, also at 30 frames a second)
    [bold]thinet-deploy latency vgg16 net.py:make --batch 8[/bold]
    [bold]thinet-deploy latency RUN/bundle --device ssh://user@host[/bold]   (there, instead of here)
    """
    from .artifact import write_json

    if device not in _HERE:
        pace = {"batch": batch, "threads": threads, "seconds": max(1, round(seconds)), "fps": round(fps)}
        remote_latency(things, device, device_python, pace, out, as_json=as_json)
        return

    with bars(Console(stderr=True)) as progress:
        found = _measured(things, input_shape, precision, (threads, batch, seconds, rounds, fps, device), progress)
    if out:
        write_json(out, found.to_json())
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        _show(found)
    series = [engine.samples for engine in found.engines]
    series += [part for model in found.models for part in (model.forward, model.backward)]
    if any(samples.summary["invalid"] for samples in series):
        raise typer.Exit(INVALID)


How = tuple[int, int, float, int, float, str]


def _measured(things: Sequence[str], shape: str | None, precision: Precision, how: How, progress: Any) -> LatencyReport:
    from .latency import report
    from .options import parse_shape
    from .things import Engines, find

    size = parse_shape(shape) if shape else None
    found = [find(thing, size, precision) for thing in things]
    engines, models = ([each for each in found if isinstance(each, Engines) is wanted] for wanted in (True, False))
    rows = [row for group in _alike(engines) for row in _engines(group, how, progress)]  # type: ignore[arg-type]
    return report(rows, _models(models, how, progress))  # type: ignore[arg-type]  # told apart above


def _alike(engines: Sequence[Engines]) -> list[Engines]:
    """Engines that take the same inputs together, so that they are measured in turn."""
    from .things import Engines

    groups: dict[Any, Engines] = {}
    for each in engines:
        key = tuple((name, array.shape[1:]) for name, array in sorted(each.inputs.items()))
        refs = groups[key].refs if key in groups else ()
        groups[key] = Engines((*refs, *each.refs), groups[key].inputs if key in groups else each.inputs)
    return list(groups.values())


def _engines(group: Engines, how: How, progress: Any) -> list[EngineLatency]:
    from .engine import to_batch
    from .latency import measure_engines

    threads, batch, seconds, rounds, fps, _ = how
    inputs = {name: to_batch(array, batch) for name, array in group.inputs.items()}
    return [
        row
        for pace in ([0.0, fps] if fps else [0.0])
        for row in measure_engines(
            group.refs, inputs, threads=threads, rounds=rounds, seconds=seconds, fps=pace, progress=progress
        )
    ]


def _models(models: Sequence[Model], how: How, progress: Any) -> list[TorchLatency]:
    """Models of one input shape in turn."""
    from .torch_latency import MIN_ROUNDS, measure_torch

    _, batch, _, rounds, _, device = how
    shapes = dict.fromkeys(model.input_shape for model in models)
    return [
        row
        for shape in shapes
        for row in measure_torch(
            {model.name: model.module for model in models if model.input_shape == shape},
            shape,
            batch=batch,
            rounds=max(rounds, MIN_ROUNDS),
            device=device,
            progress=progress,
        )
    ]


# ---------------------------------------------------------------------------------------------------- printing


def _show(found: LatencyReport) -> None:
    from .runner import processor
    from .runner_text import latency_notes, latency_words

    typer.echo(f"{processor()}; milliseconds, 95 % intervals, one process per engine, all in turn")
    for row in found.engines:
        pace = f", {row.fps:g} a second" if row.fps else ""
        typer.echo(f"\n{row.model}, {row.runtime} {row.precision}, batch {row.batch}, threads: {row.threads}{pace}")
        words = {**asdict(row), "summary": row.samples.summary}
        _lines(latency_words(words), _ratio(row, found.engines), *latency_notes(words))
    for model in found.models:
        typer.echo(f"\n{model.model}, torch on {model.device}, batch {model.batch}, threads: {model.threads}")
        for name, samples in (("forward", model.forward), ("backward", model.backward)):
            low, high = samples.summary["interval_ms"]
            _lines(f"{name} {samples.summary['median_ms']:.4g} [{low:.4g} .. {high:.4g}]")
            _lines(*(f"{name}: {note}" for note in latency_notes({"summary": samples.summary})))
        if model.peak_memory_bytes is not None:
            _lines(f"memory of the GPU: {model.peak_memory_bytes / 2**20:.1f} MB at its highest")


def _lines(*texts: str) -> None:
    for text in texts:
        if text:
            typer.echo(f"  {text}")


def _ratio(row: EngineLatency, rows: Sequence[EngineLatency]) -> str:
    """Against the first engine that was measured in turn with it: of the same runtime, pace and number of rounds."""
    from .latency import speedup

    first = next(each for each in rows if (each.runtime, each.fps) == (row.runtime, row.fps))
    if first is row or len(first.samples.rounds_ms) != len(row.samples.rounds_ms):
        return ""
    found = speedup(first.samples.rounds_ms, row.samples.rounds_ms, first.model)
    spread = f" [{found.low:.3g}, {found.high:.3g}]" if found.low is not None and found.high is not None else ""
    noise = " ≈ within the noise" if spread and found.low <= 1 <= found.high else ""  # type: ignore[operator]  # known
    return f"{found.ratio:.3g}{spread} times faster than {first.model} {first.precision}{noise}"
