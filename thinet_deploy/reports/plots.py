"""Pictures for reports: SVG files that need no fonts, scripts or other files, the same bytes for the same figures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact import write_bytes
from ..pruning.sweep import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..timing.stairs import Side, Stairs

_LAYERS = 6  # drawn of a staircase
_LINE, _MARK, _GREY = "#2a5d9f", "#c8501e", "#666666"
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "thinet-deploy",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def feasibility_plot(path: Path, points: Sequence[Point], asked: Point | None, title: str) -> None:
    """Draw predicted error against multiply-accumulates.

    Args:
        path: the SVG file.
        points: networks that could be had, the most multiply-accumulates first.
        asked: one to be marked.
        title: the network's name.
    """
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        _write(_feasibility(points, asked, title), path)


def _feasibility(points: Sequence[Point], asked: Point | None, title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    scale, unit = (1e9, "G") if points[0].macs >= 1e9 else (1e6, "M")
    xs, ys = [each.macs / scale for each in points], [100 * each.error for each in points]
    axes.plot(xs, ys, "o-", color=_LINE, markersize=4.5, linewidth=1.6, zorder=3)
    if asked:
        x, y = asked.macs / scale, 100 * asked.error
        axes.plot([x], [y], "D", color=_MARK, markersize=7, zorder=4, label=f"{asked.budget}: {y:.2f} %")
        axes.plot([x, x, 0], [0, y, y], ":", color=_MARK, linewidth=1, zorder=2)
        axes.legend(frameon=False, loc="upper right")
    axes.set_xlim(0, 1.04 * xs[0])
    axes.set_ylim(0, 1.06 * max(*ys, 1e-3))
    axes.set_xlabel(f"multiply-accumulates ({unit})")
    axes.set_ylabel("predicted error (%), before fine-tuning")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_title(f"{title}: what a budget would cost", loc="left", fontsize=11, pad=12)
    _times_fewer(axes, xs, points)
    return figure


def _times_fewer(axes: Axes, xs: Sequence[float], points: Sequence[Point]) -> None:
    """A scale at the top, with as many of the budgets as have room."""
    top, room = axes.twiny(), 0.055 * xs[0]
    top.set_xlim(axes.get_xlim())
    shown: list[int] = []
    for index, x in enumerate(xs):
        if not shown or xs[shown[-1]] - x > room:
            shown.append(index)
    names = [each.budget.replace("x", "×") if each.budget[0].isdigit() else f"{each.fewer:.2g}×" for each in points]
    top.set_xticks([xs[index] for index in shown], [names[index] for index in shown], color=_GREY)
    top.set_xlabel("times fewer", color=_GREY, fontsize=9)
    top.tick_params(length=3, color=_GREY)


def staircase_plot(path: Path, rows: Sequence[Stairs], title: str) -> None:
    """Draw the times of the dearest layers against their widths: the stairs of either side, and the surface of both.

    Args:
        path: the SVG file.
        rows: the dearest first; layers whose widths cannot change are left out.
        title: network and engine.
    """
    import matplotlib as mpl

    drawn = [row for row in rows if len(row.along_ins.widths) + len(row.along_outs.widths) > 2][:_LAYERS]
    with mpl.rc_context(_STYLE):
        _write(_staircases(drawn, title), path)


def _staircases(rows: Sequence[Stairs], title: str) -> Figure:
    from matplotlib.figure import Figure

    columns = min(2, max(1, len(rows)))
    lines = max(1, -(-len(rows) // columns))
    figure = Figure(figsize=(6.8 * columns, 2.7 * lines + 0.5), layout="constrained")
    rings = "rings: a channel more makes a channel dearer; dots on surfaces: measured"
    figure.suptitle(f"{title}: milliseconds against channels ({rings})", x=0.01, ha="left", fontsize=11)
    for number, row in enumerate(rows):
        _stairs(figure.add_subplot(lines, 2 * columns, 2 * number + 1), row)
        if len(row.surface.ins) > 1 and len(row.surface.outs) > 1:
            _surface(figure, figure.add_subplot(lines, 2 * columns, 2 * number + 2), row)
    return figure


def _stairs(axes: Axes, row: Stairs) -> None:
    axes.set_title(f"{row.names[0]}, {row.shape}", loc="left", fontsize=8)
    for side, name, colour in ((row.along_outs, "outputs", _LINE), (row.along_ins, "inputs", _MARK)):
        if len(side.widths) > 1:
            _steps(axes, side, name, colour)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False, fontsize=7, loc="upper left")


def _surface(figure: Figure, axes: Axes, row: Stairs) -> None:
    """Time over both sides in shades, with the points that it comes from."""
    shades = axes.contourf(row.surface.ins, row.surface.outs, row.surface.ms, levels=12, cmap="viridis")
    figure.colorbar(shades, ax=axes, label="ms", pad=0.02)
    points = [(spot.ins, spot.outs) for spot in row.measured]
    axes.plot(*zip(*points, strict=True), "o", color="white", markeredgecolor="black", markersize=3, clip_on=False)
    axes.set_xlabel("inputs", fontsize=8)
    axes.set_ylabel("outputs", fontsize=8)


def _steps(axes: Axes, side: Side, name: str, colour: str) -> None:
    """The measured points, what the time would be if it went with the channels, and a ring around fast widths."""
    axes.plot(side.widths, side.ms, "o-", color=colour, markersize=2.5, linewidth=1.2, label=name, zorder=3)
    axes.plot([0, side.widths[-1]], [0, side.ms[-1]], ":", color=_GREY, linewidth=0.9, zorder=2)
    fast = [(width, ms) for width, ms in zip(side.widths, side.ms, strict=True) if width in side.fast]
    if fast:
        axes.plot(*zip(*fast, strict=True), "o", color=colour, markersize=6, fillstyle="none", zorder=4)


def _write(figure: Figure, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="svg", metadata={"Date": None})
    write_bytes(path, picture.getvalue())
