"""The command `count`: what a network weighs and costs, before anything is trained or pruned."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import InputError, ModelError, ThinetDeployError, first_line
from .options import InputShape, Json
from .tables import grid, print_json, stdout, to_the_right

if TYPE_CHECKING:
    from torch import nn

    from ..counting import LayerCount

Rule = Literal["paper", "multiply-accumulate"]
# Rule → the columns of the table and the fields of `LayerCount` that they show.
_COLUMNS = {
    "paper": ("#Param", "parameters", "#FLOPs", "flops"),
    "multiply-accumulate": ("#Param", "learned", "#MACs", "macs"),
}


def count(
    model: Annotated[
        str | None, typer.Option(help="vgg16, resnet50, squeezenet, alexnet, … or your own file.py:factory.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Of the papers: thinet-conv, thinet-gap, thinet-tiny, thinet-70, thinet-50, thinet-30."),
    ] = None,
    gcos: Annotated[
        bool, typer.Option("--gcos", help="Group convolutions with channel shuffle: 2 groups in conv4_x, 4 in conv5_x.")
    ] = False,
    classes: Annotated[
        int | None, typer.Option(min=1, help="Number of outputs.  \\[default: the network's own, mostly 1000]")
    ] = None,
    input_shape: InputShape = None,
    rule: Annotated[
        Rule,
        typer.Option(
            help="paper: weights without biases, 2 FLOPs per multiply-accumulate, fully connected layers and BatchNorm "
            "as the papers count them. multiply-accumulate: all that is learned, and multiply-accumulates."
        ),
    ] = "paper",
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="A row for every layer, in the order they run.")
    ] = False,
    as_json: Json = False,
) -> None:
    """#Param, size and #FLOPs of a network; nothing is trained, and ours take no memory.

    [bold]thinet-deploy count --model vgg16 --preset thinet-tiny --gcos[/bold]
    [bold]thinet-deploy count --model resnet50 --rule multiply-accumulate --per-layer[/bold]
    """
    from ..options import parse_shape

    shape = parse_shape(input_shape) if input_shape else None
    with redirect_stdout(sys.stderr):  # what the user's own code prints
        network = _network(model, preset, shape, classes, gcos=gcos)
        shape, layers = _counted(network, model or str(preset), shape)
    total = {name: sum(getattr(each, name) for each in layers) for name in ("parameters", "learned", "flops", "macs")}
    if as_json:
        asked = {"model": model, "preset": preset, "gcos": gcos, "input_shape": shape, "rule": rule}
        size = {"size_bytes": 4 * total[_COLUMNS[rule][1]]}
        print_json({**asked, **total, **size, "layers": [asdict(each) for each in layers] if per_layer else None})
        return
    name = ", ".join(part for part in (model, preset, "gcos" if gcos else None) if part)
    console = stdout()
    if per_layer:
        _show_layers(console, layers, rule)
    _show_total(console, name, total, rule)


def _network(
    model: str | None, preset: str | None, shape: tuple[int, int, int] | None, classes: int | None, *, gcos: bool
) -> nn.Module:
    """The network asked for; on the meta device if it is one of ours, for a user's code may need real numbers."""
    import torch

    from ..models.loading import MODELS, build_model
    from ..models.presets import PRESETS, build_preset, build_table

    if model is None and preset is None:
        raise InputError("Which network is to be counted?", hint="Give --model vgg16, or --preset thinet-tiny.")
    if preset is None and model in PRESETS:
        model, preset = None, model
    with torch.device("meta" if model is None or model in MODELS else "cpu"):
        if preset:
            return build_preset(preset, shape, classes, network=model, gcos=gcos)
        if gcos:
            return build_table(str(model), shape, classes, gcos=True)
        return build_model(str(model), input_shape=shape, num_classes=classes, seed=0)


def _counted(
    network: nn.Module, name: str, shape: tuple[int, int, int] | None
) -> tuple[tuple[int, int, int], tuple[LayerCount, ...]]:
    """The input's shape, and the counts of the layers."""
    from ..counting import count_layers
    from ..models.loading import input_shape_of

    shape = shape or input_shape_of(network)
    if shape is None:
        raise InputError(f"{name} does not say which images it takes.", hint="Give --input-shape 3x224x224.")
    try:
        return shape, count_layers(network, shape)
    except ThinetDeployError:
        raise
    except Exception as error:  # the user's own forward() may raise anything
        raise ModelError(
            f"{name} cannot take an image of {'x'.join(map(str, shape))}: {first_line(error)}",
            hint="Check --input-shape: channels x height x width.",
        ) from error


def _show_total(console: Console, name: str, total: dict[str, int], rule: Rule) -> None:
    from ..reports.texts import short_count, short_size

    parameters, weights, work, done = _COLUMNS[rule]
    table = grid("network", parameters, "size", work)
    to_the_right(table)
    size = short_size(4 * total[weights])
    table.add_row(escape(name), short_count(total[weights]), size, short_count(total[done]))
    console.print(table)


def _show_layers(console: Console, layers: tuple[LayerCount, ...], rule: Rule) -> None:
    """Exact figures: rounded ones of small layers would all be 0.00M."""
    parameters, weights, work, done = _COLUMNS[rule]
    table = grid("layer", "kind", "output", parameters, work, "share")
    to_the_right(table)
    whole = max(1, sum(getattr(each, done) for each in layers))
    for each in layers:
        figures = getattr(each, weights), getattr(each, done)
        output = "x".join(map(str, each.output))
        table.add_row(escape(each.name), each.kind, output, *(f"{n:,}" for n in figures), f"{figures[1] / whole:.1%}")
    console.print(table)
