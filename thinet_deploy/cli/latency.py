"""`thinet-deploy latency`: milliseconds of engines, bundles, runs and models, with what has to be known beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from ..interfaces import Precision
from .device import remote_latency
from .options import DevicePython, InputShape, Json
from .progress import bars

if TYPE_CHECKING:
    from ..timing.latency import EngineLatency, LatencyReport, Speedup, TorchLatency
    from ..timing.things import Engines, Model

INVALID = 1
_HERE = ("cpu", "cuda")


def latency(  # noqa: PLR0913, PLR0917 - one argument per option
    things: Annotated[
        list[str],
        typer.Argument(metavar="THING…", help="Engine files, bundles, runs, models such as vgg16 or file.py:factory."),
    ],
    threads: Annotated[int, typer.Option(min=1, help="CPU threads, of engines and of models.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images per run.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.01, help="Per engine, warm-up included; models have passes.")] = 5.0,
    rounds: Annotated[
        int, typer.Option(min=1, help="Turns of every engine (A B A B …); of a model its passes, 7 at least.")
    ] = 15,
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
        Literal["fp32", "fp16", "bf16", "int8"] | None,
        typer.Option(help="That an engine file has to compute in.  \\[default: fp32]", show_default=False),
    ] = None,
    input_shape: InputShape = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write the report, with all samples, here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Milliseconds with intervals, each engine and model in a process of its own, in turn; models forward and backward.

    Exit code 1 when a time is invalid: the machine throttled, or the outputs are no numbers.

    [bold]thinet-deploy latency RUN/bundle --threads 4[/bold]
    [bold]thinet-deploy latency dense.onnx thin.onnx --fps 30[/bold]   (thin against dense, also at 30 frames a second)
    [bold]thinet-deploy latency vgg16 net.py:make --batch 8[/bold]
    [bold]thinet-deploy latency RUN/bundle --device ssh://user@host[/bold]   (there, instead of here)
    """
    from ..artifact import write_json

    _check(things, device, precision, input_shape, max(seconds, fps), out)
    if device not in _HERE:
        pace = {"batch": batch, "threads": threads, "seconds": seconds, "rounds": rounds, "fps": fps}
        remote_latency(things, device, device_python, pace, out, as_json=as_json)
        return

    with bars(Console(stderr=True)) as progress:
        found = _measured(
            things, input_shape, precision or "fp32", (threads, batch, seconds, rounds, fps, device), progress
        )
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        _show(found)
    if out:  # behind what is shown, which is not lost where this fails
        write_json(out, found.to_json())
    series = [engine.samples for engine in found.engines]
    series += [part for model in found.models for part in (model.forward, model.backward)]
    if any(samples.invalid for samples in series):
        raise typer.Exit(INVALID)


def _check(
    things: Sequence[str], device: str, precision: Precision | None, shape: str | None, most: float, out: Path | None
) -> None:
    """Raise InputError for what would do nothing, or lose what was measured; `most` of --seconds and --fps."""
    from ..errors import InputError
    from ..timing.things import is_engine

    if most == math.inf:
        raise InputError("--seconds and --fps have to be finite numbers.", hint="Such as --seconds 5 --fps 30.")
    if out and out.is_dir():
        raise InputError(
            f"--out {out} is a folder, but the name of a file was expected.", hint=f"--out {out}/times.json"
        )
    if device not in _HERE and (precision or shape):
        raise InputError(
            f"--precision and --input-shape are of engine files; what --device {device} measures is a bundle, "
            "which says both itself.",
            hint="Leave them out.",
        )
    if precision and not any(map(is_engine, things)):
        raise InputError(
            f"--precision is of engine files, and {things[0]} is none.",
            hint="Bundles and runs say it themselves; models run in the type of their weights.",
        )


How = tuple[int, int, float, int, float, str]


def _measured(things: Sequence[str], shape: str | None, precision: Precision, how: How, progress: Any) -> LatencyReport:
    from ..errors import InputError
    from ..options import parse_shape
    from ..timing.latency import report
    from ..timing.things import Engines, find

    size = parse_shape(shape) if shape else None
    found = [find(thing, size, precision) for thing in things]
    called = [
        (ref.model, ref.runtime, ref.precision) for each in found if isinstance(each, Engines) for ref in each.refs
    ]
    if len(set(called)) < len(called):
        found = [_named(each, thing) for each, thing in zip(found, things, strict=True)]
    engines, models = ([each for each in found if isinstance(each, Engines) is wanted] for wanted in (True, False))
    *_, fps, device = how
    if device != "cpu" and engines:
        raise InputError(
            f"--device {device} is for models in torch: the engines here run where their runtime puts them.",
            hint="Measure engines and models by two commands, without --device for the engines.",
        )
    if fps and (named := [each.name for each in models if not isinstance(each, Engines)]):
        raise InputError(
            f"--fps paces engines, and {named[0]} is a model: its passes run back to back.",
            hint="Leave --fps out, or measure an engine made from it.",
        )
    rows = [row for group in _alike(engines) for row in _engines(group, how, progress)]  # type: ignore[arg-type]
    return report(rows, _models(models, how, progress))  # type: ignore[arg-type]  # told apart above


def _named(found: Engines | Model, thing: str) -> Engines | Model:
    """Engines that say what they are from, where their own names do not tell them apart."""
    from ..timing.things import Engines

    if not isinstance(found, Engines):
        return found
    return replace(found, refs=tuple(replace(ref, thing=thing) for ref in found.refs))


def _alike(engines: Sequence[Engines]) -> list[Engines]:
    """Engines that take the same inputs together, so that they are measured in turn."""
    from ..timing.things import Engines

    groups: dict[Any, Engines] = {}
    for each in engines:
        key = tuple((name, array.shape[1:]) for name, array in sorted(each.inputs.items()))
        refs = groups[key].refs if key in groups else ()
        groups[key] = Engines((*refs, *each.refs), groups[key].inputs if key in groups else each.inputs)
    return list(groups.values())


def _engines(group: Engines, how: How, progress: Any) -> list[EngineLatency]:
    """Engines in turn, at every pace; those of one runtime against the first of it, where there is no original."""
    from ..on_device.engine import to_batch
    from ..timing.latency import BASELINE, engine_speedup, measure_engines

    threads, batch, seconds, rounds, fps, _ = how
    inputs = {name: to_batch(array, batch) for name, array in group.inputs.items()}
    found = []
    for pace in [0.0, fps] if fps else [0.0]:
        first: dict[str, EngineLatency] = {}
        for row in measure_engines(
            group.refs, inputs, threads=threads, rounds=rounds, seconds=seconds, fps=pace, progress=progress
        ):
            base = first.setdefault(row.runtime, row)
            known = row is base or row.speedup or row.model == BASELINE
            found.append(row if known else replace(row, speedup=engine_speedup(base, row)))
    return found


def _models(models: Sequence[Model], how: How, progress: Any) -> list[TorchLatency]:
    """Models of one input shape in turn, against the first of them."""
    from ..timing.torch_latency import MIN_ROUNDS, measure_torch, torch_speedup

    threads, batch, _, rounds, _, device = how
    found = []
    for shape in dict.fromkeys(model.input_shape for model in models):
        alike = {model.name: model.module for model in models if model.input_shape == shape}
        rounds = max(rounds, MIN_ROUNDS)
        first, *others = measure_torch(
            alike, shape, batch=batch, rounds=rounds, device=device, threads=threads, progress=progress
        )
        found += [first, *(replace(row, speedup=torch_speedup(first, row)) for row in others)]
    return found


# ---------------------------------------------------------------------------------------------------- printing


def _show(found: LatencyReport) -> None:
    from ..on_device.runner import processor
    from ..on_device.runner_text import latency_notes, latency_words

    typer.echo(
        f"{processor()}; milliseconds, 95 % intervals, one process per engine or model; engines of one runtime in turn"
    )
    for row in found.engines:
        pace = f", {row.fps:g} a second" if row.fps else ""
        thing = f"{row.thing}: " if row.thing else ""
        typer.echo(
            f"\n{thing}{row.model}, {row.runtime} {row.precision}, batch {row.batch}, threads: {row.threads}{pace}"
        )
        words = {**asdict(row), "summary": row.samples.summary}
        _lines(latency_words(words), _ratio(row.speedup), *latency_notes(words))
    for model in found.models:
        typer.echo(f"\n{model.model}, torch on {model.device}, batch {model.batch}, threads: {model.threads}")
        for name, samples in (("forward", model.forward), ("backward", model.backward)):
            low, high = samples.summary["interval_ms"]
            _lines(f"{name} {samples.summary['median_ms']:.4g} [{low:.4g} .. {high:.4g}]")
            _lines(*(f"{name}: {note}" for note in latency_notes({"summary": samples.summary})))
        _lines(_ratio(model.speedup))
        if model.peak_memory_bytes is not None:
            _lines(f"memory: {model.peak_memory_bytes / 2**20:.1f} MB at its highest")


def _lines(*texts: str) -> None:
    for text in texts:
        if text:
            typer.echo(f"  {text}")


def _ratio(found: Speedup | None) -> str:
    if found is None:
        return ""
    known = found.low is not None and found.high is not None
    spread = f" [{found.low:.3g}, {found.high:.3g}]" if known else ""
    noise = " ≈ within the noise" if known and found.low <= 1 <= found.high else ""  # type: ignore[operator]  # known
    return f"{found.ratio:.3g}{spread} times as fast as {found.baseline}{noise}"
