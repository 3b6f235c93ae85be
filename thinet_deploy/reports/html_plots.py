"""Pictures of the HTML report: inline SVG whose colours are the page's own, so that they follow light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from .table import Row, Table
from .texts import figures_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib wants colours of its own; these, which nothing else uses, become the page's variables.
_VARIABLES = {"#ab0001": "--ink", "#ab0002": "--muted", "#ab0003": "--line"}
_NETWORKS = 8
_VARIABLES |= {f"#ab00c{index}": f"--network-{index}" for index in range(_NETWORKS)}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 11,
    "text.color": "#ab0001",
    "axes.labelcolor": "#ab0002",
    "axes.edgecolor": "#ab0003",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlecolor": "#ab0001",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ab0003",
    "grid.linewidth": 0.6,
    "xtick.color": "#ab0002",
    "ytick.color": "#ab0002",
}
_QUANTILES = 240


def colour(table: Table, name: str) -> int:
    """Number of a network's colour: its place in the table."""
    return [row.name for row in table.rows].index(name) % _NETWORKS


def accuracy_plot(table: Table) -> str:
    """Top-1 against milliseconds, a panel for each runtime that ran; "" where none did.

    Controls have the times of the network of their architecture, and wider, hollow marks, which go around its own.
    """
    runtimes = [r for r in table.runtimes if any(_valid(row, r) for row in table.rows)]
    if not runtimes:
        return ""
    import matplotlib as mpl

    with mpl.rc_context({**_STYLE, "svg.hashsalt": "accuracy"}):
        figure, panels = _panels(1, len(runtimes), 3.5)
        for axes, runtime in zip(panels[0], runtimes, strict=True):
            rows = [row for row in table.rows if _valid(row, runtime)]
            for row in rows:
                _point(axes, table, row, runtime)
            shares = [row.main for row in rows]
            low, high = min(share.low for share in shares), max(share.high for share in shares)
            axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
            axes.set_xlim(0, 1.12 * max(row.engines[runtime].high or row.engines[runtime].ms for row in rows))
            axes.set_title(runtime)
            axes.set_xlabel("milliseconds per image (95 % intervals)")
        panels[0][0].set_ylabel(f"{figures_of([table])[0]} (%)")
        return _svg(figure, "Accuracy against latency")


def _valid(row: Row, runtime: str) -> bool:
    return runtime in row.engines and not row.engines[runtime].invalid


def _point(axes: Axes, table: Table, row: Row, runtime: str) -> None:
    time, share = row.engines[runtime], row.main
    known = time.low is not None and time.high is not None
    across = [[time.ms - time.low], [time.high - time.ms]] if known else None  # type: ignore[operator]  # known
    ink = f"#ab00c{colour(table, row.name)}"
    # A control has the time of another network, and may have its accuracy: a ring and bands behind that one's mark.
    wide: dict[str, Any] = {"markersize": 14, "markeredgewidth": 1.8, "markerfacecolor": "none"}
    wide |= {"ecolor": (ink, 0.3), "elinewidth": 7}
    fine: dict[str, Any] = {"markersize": 8, "elinewidth": 1.2, "capsize": 3, "zorder": 3}
    axes.errorbar(
        [time.ms],
        [share.value],
        xerr=across,
        yerr=[[share.value - share.low], [share.high - share.value]],
        fmt="o",
        color=ink,
        **(wide if row.note else fine),
    )


def latency_plot(table: Table, engines: Sequence[Mapping[str, Any]]) -> str:
    """Of every runtime the distribution of all runs, and the rounds' medians in order; "" without any.

    Args:
        table: for the colours.
        engines: as latency.json has them.
    """
    runtimes = list(dict.fromkeys(engine["runtime"] for engine in engines))
    if not runtimes:
        return ""
    import matplotlib as mpl

    with mpl.rc_context({**_STYLE, "svg.hashsalt": "latency"}):
        figure, panels = _panels(len(runtimes), 2, 3.1)
        for (left, right), runtime in zip(panels, runtimes, strict=True):
            for engine in (each for each in engines if each["runtime"] == runtime):
                _series(left, right, engine["samples"]["rounds_ms"], f"#ab00c{colour(table, engine['model'])}")
            left.set_title(f"{runtime}: all runs")
            left.set_ylabel("share of runs (%)")
            left.set_xlabel("took at most … milliseconds")
            left.set_xscale("log")
            _plain_ticks(left)
            right.set_title(f"{runtime}: median of each round")
            right.set_ylim(bottom=0)
            right.set_xlabel("round")
            right.set_ylabel("milliseconds")
        return _svg(figure, "Distributions of latency, and its course")


def _series(left: Axes, right: Axes, rounds_ms: Sequence[Sequence[float]], ink: str) -> None:
    ordered = np.sort(np.concatenate([np.asarray(part) for part in rounds_ms]))
    shares = np.linspace(0, 1, min(len(ordered), _QUANTILES))
    left.plot(np.quantile(ordered, shares), 100 * shares, color=ink, linewidth=2)
    right.plot(range(1, len(rounds_ms) + 1), [median(part) for part in rounds_ms], "o-", color=ink, markersize=4)


def _plain_ticks(axes: Axes) -> None:
    """Few numbers on a scale of powers, written as people write them."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _panels(rows: int, columns: int, height: float) -> tuple[Figure, list[list[Axes]]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, height * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)  # type: ignore[union-attr, call-arg]  # the one just set
    found = figure.subplots(rows, columns, squeeze=False)
    return figure, [list(row) for row in found]


def _svg(figure: Figure, title: str) -> str:
    """The picture as an element of the page: its size is the page's affair, its colours are variables."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # numbered alike in every picture
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{title}"', text, count=1)
    text = re.sub(r"font: ([0-9.]+px|bold [0-9.]+px|[0-9. a-z]+px) [^;\"]*", r"font: \1 var(--font)", text)
    for hexadecimal, variable in _VARIABLES.items():
        text = text.replace(hexadecimal, f"var({variable})")
    return text
