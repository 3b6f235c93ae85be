"""`thinet-deploy staircase`: what widths bring on the target's engine, layer by layer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import InputError
from .device import DEFAULT_PYTHON
from .options import DevicePython, InputShape, Json, TimedOn
from .progress import bars
from .scatter import scatter
from .tables import grid, print_json, stdout, to_the_right

if TYPE_CHECKING:
    from ..stages.staircase import Staircase
    from ..timing.stairs import Side, Stairs

_WIDEST, _HEIGHT = 96, 12  # of the picture, in characters


def staircase(  # noqa: PLR0913, PLR0917 - one argument per option
    model: Annotated[str, typer.Option(help="vgg16, resnet50, … or your own file.py:factory.")],
    target: Annotated[str, typer.Option("--target", "-t", help="Whose engine is timed: see `targets`.")] = "cpu",
    input_shape: InputShape = None,
    classes: Annotated[
        int | None, typer.Option(min=1, help="Number of outputs of your own network.  \\[default: 1000]")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the engine.")] = 1,
    round_to: Annotated[
        int, typer.Option(min=1, help="Look at multiples of this number only: fewer points, and no odd widths.")
    ] = 1,
    precision: Annotated[Literal["fp32", "bf16", "int8"], typer.Option(help="That the engine computes in.")] = "fp32",
    device: TimedOn = None,
    device_python: DevicePython = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write staircase.json and staircase.svg into this folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Does pruning pay here? Times every layer of a network at the widths it could have, on the engine itself.

    Layers are measured in turn, at few points, more where the time is not a straight line; what was measured is kept
    for this machine, or for the device, and version of the runtime.

    [bold]thinet-deploy staircase --model resnet50[/bold]
    [bold]thinet-deploy staircase --model net.py:make --target cpu --out stairs[/bold]
    [bold]thinet-deploy staircase --model resnet50 --target raspberry-pi-5 --device ssh://user@host[/bold]
    """
    from ..artifact import write_json
    from ..options import parse_shape
    from ..reports.plots import staircase_plot
    from ..stages.device import reach_to_time
    from ..stages.latency import engine_for
    from ..stages.staircase import climb
    from ..target import load_profile
    from ..timing.things import Model, find

    with bars(Console(stderr=True)) as progress:
        thing = find(model, parse_shape(input_shape) if input_shape else None, "fp32", classes)
        if not isinstance(thing, Model):
            raise InputError(
                f"{model} is an engine, but a network was expected.", hint="Give vgg16, or file.py:factory."
            )
        profile, machine = load_profile(target), None
        if device:
            machine, profile = reach_to_time(device, device_python or DEFAULT_PYTHON, profile)
        engine = engine_for(profile, threads, precision, machine)
        found = climb(
            thing.module,
            thing.name,
            thing.input_shape,
            profile,
            engine,
            grid=round_to,
            progress=progress,
        )
    if out:
        write_json(out / "staircase.json", asdict(found))
        staircase_plot(out / "staircase.svg", found.layers, f"{found.model} on {_engine(found)}")
    if as_json:
        print_json(asdict(found))
        return
    _show(stdout(), found)
    if out:
        typer.echo(f"Picture: {out / 'staircase.svg'}")


def _show(console: Console, found: Staircase) -> None:
    table = grid("layers", "what", "channels", "ms", "share", "half of them", "fast inputs", "fast outputs")
    for row in found.layers:
        half = f"{row.half_faster:.2f}x of {row.half_fewer:.2f}x" if row.half_fewer > 1 else "stays whole"
        more = f" and {len(row.names) - 1} more" if len(row.names) > 1 else ""
        figures = (f"{row.ms:.4g}", f"{row.share:.1%}", half, _fast(row.along_ins), _fast(row.along_outs))
        table.add_row(escape(row.names[0]) + more, row.shape, f"{row.ins} → {row.outs}", *figures)
    to_the_right(table)
    console.print(table)
    _picture(console, found.layers)
    typer.echo(
        f"\n{_engine(found)} in {found.precision}, threads: {found.threads}. All layers together {found.layers_ms:.4g} "
        f"ms, the whole network {found.whole_ms:.4g} ms: budgets multiply layer times by {found.factor:.3g}.\n"
        "Half of them: how many times faster with half of the channels that can go, of as many times fewer "
        "multiply-accumulates."
    )
    for warning in found.warnings:
        typer.echo(f"Times: {warning}.")
    for name, why in found.unpaid.items():
        typer.echo(f"Does not pay: {name}: {why}")


def _engine(found: Staircase) -> str:
    return f"{found.engine} on {found.device}" if found.device else found.engine


def _fast(side: Side) -> str:
    if side.multiple:
        return f"multiples of {side.multiple}"
    return ", ".join(map(str, side.fast)) or "–"


def _picture(console: Console, rows: tuple[Stairs, ...]) -> None:
    """The dearest layer that can become narrower."""
    row = next((row for row in rows if len(row.along_ins.widths) + len(row.along_outs.widths) > 2), None)
    if row is None:
        return
    name, side = ("outputs", row.along_outs) if len(row.along_outs.widths) > 1 else ("inputs", row.along_ins)
    points = [(width, 100 * ms / row.ms) for width, ms in zip(side.widths, side.ms, strict=True)]
    ticks = [(width, str(width)) for width in reversed(side.widths)]
    typer.echo(f"\n{row.names[0]} ({row.shape}): time at so many {name}, in % of the whole layer's {row.ms:.4g} ms:")
    for line in scatter(points, [], ticks, width=min(console.width, _WIDEST), height=_HEIGHT):
        typer.echo(line)
