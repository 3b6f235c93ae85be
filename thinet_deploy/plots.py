"""Pictures for reports: SVG files that need no fonts, scripts or other files, the same bytes for the same figures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifact import write_bytes
from .pruning.sweep import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


def _write(figure: Figure, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="svg", metadata={"Date": None})
    write_bytes(path, picture.getvalue())
