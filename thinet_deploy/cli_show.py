"""How the command line shows results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Grid

_NAMES_SHOWN = 4  # report.json has them all


def show_pruned(folder: Path, report: dict[str, Any]) -> None:
    """The layers that were pruned, what stayed whole and why, and what comes next."""
    titles = {"error": "error", "error_scaled": "with ŵ", "top1_pruned": "top-1 pruned", "top1_tuned": "fine-tuned"}
    shown = {key: title for key, title in titles.items() if any(key in layer for layer in report["layers"])}
    grid = grid_of("layer", "filters", "kept", *shown.values())
    for layer in report["layers"]:
        figures = (f"{float(layer[key]):.{2 if key.startswith('top1') else 4}f}" for key in shown)
        first, *others = layer["producer"].split(", ")
        name = f"{first} and {len(others)} more" if others else first
        grid.add_row(name, str(layer["before"]), str(layer["after"]), *figures)
    stdout().print(grid)
    _show_methods(report["methods"])
    for reason in dict.fromkeys(report["whole"].values()):
        names = [name for name, why in report["whole"].items() if why == reason]
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        typer.echo(f"Whole: {', '.join(names[:_NAMES_SHOWN])}{more}: {reason}")
    before, after = report["macs"]["before"], report["macs"]["after"]
    typer.echo(f"Multiply-accumulates: {before / 1e6:.2f}M before, {after / 1e6:.2f}M now, {before / after:.2f}x fewer")
    proof = report["proof"]
    typer.echo(f"Pruned = original minus filters: proved, error {proof['error']:.1e}, allowed {proof['tolerance']:.1e}")
    typer.echo(f"Thin network: {folder}. Train it, then: thinet-deploy build --from {folder.parent} --weights FILE")


def _show_methods(methods: dict[str, Any]) -> None:
    """Accuracy after each step without training, for every method that was asked for."""
    grid = grid_of("method", "step", "top-1", "95 %", "top-5", "multiply-accumulates")
    for method, report in methods.items():
        macs = f"{report['macs']['after'] / 1e6:.2f}M"
        for entry in report["ledger"]:
            span = f"{entry['top1_low']:.2f} to {entry['top1_high']:.2f}"
            grid.add_row(method, entry["step"], f"{entry['top1']:.2f} %", span, f"{entry['top5']:.2f} %", macs)
    stdout().print(grid)


def stdout() -> Console:
    """A terminal as it is; a pipe wide enough that no column is cut."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 180))


def grid_of(*headers: str, wrap: tuple[str, ...] = ()) -> Grid:
    """A table in which only the columns named in `wrap` may break lines: names and figures are never cut."""
    grid = Grid(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for header in headers:
        grid.add_column(header, no_wrap=header not in wrap)
    return grid
