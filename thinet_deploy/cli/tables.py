"""What the commands about pruning print: tables, and what the user has to know about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Grid

from .scatter import scatter

_NAMES_SHOWN = 4  # report.json has them all
_WIDEST, _HEIGHT = 96, 12  # of a picture, in characters


def grid(*headers: str, wrap: tuple[str, ...] = ()) -> Grid:
    """A table in which only the columns named in `wrap` may break lines: names and figures are never cut."""
    table = Grid(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for header in headers:
        table.add_column(header, no_wrap=header not in wrap)
    return table


def stdout() -> Console:
    """A terminal as it is; a pipe wide enough that no column is cut."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 180))


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(data, indent=1, default=str))


def show_pruned(console: Console, folder: Path, report: dict[str, Any]) -> None:
    """The layers that were pruned, what stayed whole and why, and what comes next."""
    titles = {
        "error": "error",
        "error_share": "error / narrowest's",
        "error_scaled": "with ŵ",
        "accuracy_pruned": "pruned (%)",
        "accuracy_tuned": "fine-tuned (%)",
    }
    shown = {key: title for key, title in titles.items() if any(key in layer for layer in report["layers"])}
    table = grid("layer", "filters", "kept", *shown.values())
    for layer in report["layers"]:
        figures = (f"{float(layer[key]):.{2 if key.startswith('accuracy') else 4}f}" for key in shown)
        name = _shortened(layer["producer"].split(", "))
        table.add_row(name, str(layer["before"]), str(layer["after"]), *figures)
    console.print(table)
    if "error_share" in shown:
        _say(console, "Error: predicted for the layer, as a share of what its narrowest width would cost.")
    _show_methods(console, report["methods"])
    for reason in dict.fromkeys(report["whole"].values()):
        names = [name for name, why in report["whole"].items() if why == reason]
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        _say(console, f"Whole: {', '.join(names[:_NAMES_SHOWN])}{more}: {reason}")
    before, after = report["macs"]["before"], report["macs"]["after"]
    _say(
        console,
        f"Multiply-accumulates: {before / 1e6:.2f}M before, {after / 1e6:.2f}M now, {before / after:.2f}x fewer",
    )
    if timing := report.get("timing"):
        _say(console, _timing_words(timing))
        for doubt in timing["doubts"]:
            _say(console, f"Times of layers: {doubt}")
        for doubt in timing["best"]["warnings"]:
            _say(console, f"Times of networks: {doubt}")
    proof = report["proof"]
    _say(
        console,
        f"Pruned = original minus filters: proved, error {proof['error']:.1e}, allowed {proof['tolerance']:.1e}",
    )
    for note in report["notes"]:
        _say(console, note)
    _say(console, f"Thin network: {folder}. Train it, then: thinet-deploy build --from {folder.parent} --weights FILE")


def _timing_words(timing: dict[str, Any]) -> str:
    """How a budget of time was met."""
    best, rounds, there = timing["best"], len(timing["trials"]) - 1, " on the device" if "device" in timing else ""
    spread = f" [{best['low']:.3g}, {best['high']:.3g}]" if best["low"] is not None else ""
    return (
        f"Time on {timing['runtime']}{there}: {best['original_ms']:.4g} ms before, {best['ms']:.4g} ms now, "
        f"{best['speedup']:.3g}x faster{spread}; {rounds} network{'s' if rounds > 1 else ''} measured for it"
    )


def _show_methods(console: Console, methods: dict[str, Any]) -> None:
    """Accuracy without or before the training at the end, step by step, for every method that was asked for."""
    names = list(next(iter(methods.values()))["ledger"][0]["figures"])
    table = grid("method", "step", names[0], "95 %", *names[1:], "multiply-accumulates")
    for method, report in methods.items():
        last = report["ledger"][-1]
        for entry in report["ledger"]:
            # Layer by layer, those on the way have more of them.
            macs = f"{report['macs']['after'] / 1e6:.2f}M" if entry is last else ""
            first, *others = entry["figures"].values()
            figures = [f"{first['value']:.2f} %", f"{first['low']:.2f} to {first['high']:.2f}"]
            figures += [f"{other['value']:.2f} %" for other in others]
            table.add_row(method, entry["step"], *figures, macs)
    console.print(table)


def show_feasibility(console: Console, picture: Path, report: dict[str, Any]) -> None:
    """What budgets would cost, as a table and as a picture, and the widths of the one that was asked for."""
    from ..reports.texts import short_size

    points, asked = report["points"], report["asked"]
    marked = [asked] if asked else []
    rows = [*marked, *(each for each in points if not asked or each["widths"] != asked["widths"])]
    table = grid("budget", "multiply-accumulates", "fewer", "weights", "predicted error")
    to_the_right(table)
    for each in sorted(rows, key=lambda each: -each["macs"]):
        figures = (f"{each['macs'] / 1e6:.2f}M", f"{each['fewer']:.2f}x", short_size(each["size_bytes"]))
        mark, style = (" ◆", "bold") if each is asked else ("", "")
        table.add_row(each["budget"] + mark, *figures, f"{100 * each['error']:.2f} %", style=style)
    console.print(table)
    drawn = points[: report["drawn"]]
    curve, marks = ([(each["macs"], 100 * each["error"]) for each in some] for some in (drawn, marked))
    ticks = [(each["macs"], _times(each)) for each in drawn]
    _say(console, "\nPredicted error against multiply-accumulates (times fewer than the original's):")
    for line in scatter(curve, marks, ticks, width=min(console.width, _WIDEST), height=_HEIGHT):
        _say(console, line)
    if asked:
        _show_widths(console, report)
    console.print(
        f"\nPredicted error: how much the refitted layers say wrong, of all that they say ({report['images']} images). "
        "It ranks budgets; it is no accuracy, and fine-tuning makes up for much of it."
        + (" The curve has widths of any number, ◆ those of the target's grid (--round-to)." if asked else ""),
        highlight=False,
    )
    _say(console, f"Picture: {picture}")


def _show_widths(console: Console, report: dict[str, Any]) -> None:
    whole, asked = report["points"][0], report["asked"]
    table = grid("layer", "filters", f"kept with {asked['budget']}")
    to_the_right(table)
    for name, producers in report["producers"].items():
        table.add_row(_shortened(producers), str(whole["widths"][name]), str(asked["widths"][name]))
    console.print()
    console.print(table)


def to_the_right(table: Grid) -> None:
    """All columns but the first: figures."""
    for column in table.columns[1:]:
        column.justify = "right"


def _times(point: dict[str, Any]) -> str:
    """How many times fewer: as it was asked for, where it was."""
    return point["budget"] if point["budget"].endswith("x") else f"{point['fewer']:.2g}x"


def _shortened(names: list[str]) -> str:
    first, *others = names
    return f"{first} and {len(others)} more" if others else first


def _say(console: Console, text: str) -> None:
    """A line as it is: no markup, no breaks."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
