"""The papers' table, from stage results to rows, and as terminal text, Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from .artifact import read_json
from .errors import InputError, first_line
from .intervals import Interval
from .ledger import Entry
from .store import open_run
from .tasks.base import Accuracy, read_figures

_SCHEMA = {"schema": "thinet-deploy/table", "version": 2}
_BAR = 32


@dataclass(frozen=True)
class Time:
    """A measured time.

    Attributes:
        ms: median in milliseconds.
        low: lower end of its 95 % interval; None with too few samples.
        high: upper end.
        speedup: the original's time divided by this one, measured in turn; None for the original.
        speedup_low: lower end of its 95 % interval.
        speedup_high: upper end.
        invalid: why it does not hold, such as a machine that throttled; "" where it does. It has no speed-up then.
    """

    ms: float
    low: float | None
    high: float | None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    invalid: str = ""

    @classmethod
    def of(cls, summary: dict[str, Any], speedup: dict[str, Any] | None) -> Time:
        """From a summary of samples and a speed-up as latency.json has them."""
        low, high = summary["interval_ms"] or (None, None)
        invalid = "; ".join(summary["invalid"])
        if invalid or speedup is None:
            return cls(summary["median_ms"], low, high, invalid=invalid)
        return cls(summary["median_ms"], low, high, speedup["ratio"], speedup["low"], speedup["high"])


@dataclass(frozen=True)
class Row:
    """One network of the papers' table.

    Attributes:
        name: of the network in the run: "original", "conv", "gap" …
        label: what people read.
        figures: of the task on the test images, such as "top-1" → percent with its 95 % interval; the first decides.
        parameters: #Param by the papers' rule.
        flops: #FLOPs by the papers' rule.
        forward: milliseconds per batch in torch.
        backward: milliseconds per batch in torch.
        engines: runtime → milliseconds per image.
        size_bytes: of the ONNX file.
        note: shown under the table; such a row has the times of another, of the same architecture.
        drop: of the figure that decides against the original on the same images, in percentage points; None where it
            was not judged.
    """

    name: str
    label: str
    figures: Mapping[str, Interval]
    parameters: int
    flops: int
    forward: Time
    backward: Time
    engines: dict[str, Time]
    size_bytes: int
    note: str = ""
    drop: Interval | None = None

    @classmethod
    def make(
        cls, name: str, label: str, accuracy: Accuracy, counted: dict[str, int], size: int, timing: dict[str, Any]
    ) -> Row:
        """From a stage's accuracy and count, and latency.json."""
        torch_row = next(row for row in timing["models"] if row["model"] == name)
        engines = {
            row["runtime"]: Time.of(row["samples"]["summary"], row["speedup"])
            for row in timing["engines"]
            if row["model"] == name
        }
        return cls(
            name=name,
            label=label,
            figures=accuracy.figures,
            parameters=counted["parameters"],
            flops=counted["flops"],
            forward=Time.of(torch_row["forward"]["summary"], torch_row["speedup"]),
            backward=Time.of(torch_row["backward"]["summary"], None),
            engines=engines,
            size_bytes=size,
        )

    def with_weights(self, name: str, label: str, accuracy: Accuracy, note: str) -> Row:
        """The same architecture with other weights: its times and size are this row's."""
        return replace(self, name=name, label=label, figures=accuracy.figures, note=note, drop=None)

    @property
    def main(self) -> Interval:
        """The figure that decides."""
        return next(iter(self.figures.values()))


@dataclass(frozen=True)
class Table:
    """The papers' table of one run.

    Attributes:
        target: id of the target profile.
        model: the network's name.
        data: the data's name.
        images: number of test images.
        machine: id of the machine that was measured on.
        processor: its name.
        threads: of the engines.
        cores: usable on the machine; torch uses all.
        batch: of forward and backward.
        runtimes: the target's; what was not run here is shown as such.
        rows: the networks.
        ledger: accuracy, step by step.
        precision: that the engines were asked for.
        ships: name of the row that goes into the bundle.
    """

    target: str
    model: str
    data: str
    images: int
    machine: str
    processor: str
    threads: int
    cores: int
    batch: int
    runtimes: tuple[str, ...]
    rows: tuple[Row, ...]
    ledger: tuple[Entry, ...]
    precision: str = "fp32"
    ships: str = ""

    @property
    def shipped(self) -> Row:
        """The row that goes into the bundle; of a table that does not say, the last network that was made for it."""
        made = [row for row in self.rows if not row.note]
        return next((row for row in self.rows if row.name == self.ships), made[-1])

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {**_SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Table:
        """The inverse of `to_json`."""
        values = {key: value for key, value in data.items() if key not in (*_SCHEMA, "rows", "runtimes", "ledger")}
        rows, ledger = tuple(map(_row, data["rows"])), tuple(map(Entry.read, data["ledger"]))
        return cls(**values, runtimes=tuple(data["runtimes"]), rows=rows, ledger=ledger)


def _row(data: dict[str, Any]) -> Row:
    engines = {runtime: Time(**time) for runtime, time in data["engines"].items()}
    times = {"forward": Time(**data["forward"]), "backward": Time(**data["backward"]), "engines": engines}
    drop = Interval(**data["drop"]) if data.get("drop") else None
    return Row(**{**data, **times, "figures": read_figures(data["figures"]), "drop": drop})


def read_table(run: Path) -> Table:
    """The table of a finished run.

    Raises:
        InputError: the run is not finished.
    """
    path = open_run(run) / "report" / "table.json"
    if not path.exists():
        raise InputError(
            f"{run} has no table yet: its build is not finished.", hint="Run the same build again to finish it."
        )
    try:
        return Table.from_json(read_json(path))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is damaged, or of another version: {first_line(error)}.",
            hint=f"Delete the folder {path.parent} and run the same build again: all else is kept.",
        ) from error


def check_machines(tables: Sequence[Table]) -> None:
    """Raise InputError when the tables were measured on different machines."""
    machines = {table.machine: table.processor for table in tables}
    if len(machines) > 1:
        named = ", ".join(f"{processor} ({machine})" for machine, processor in machines.items())
        raise InputError(
            f"The runs were measured on different machines: {named}. Their milliseconds do not compare.",
            hint="Measure them on one machine, or give --across-machines to see them side by side all the same.",
        )


_COUNTED = ("#Param", "#FLOPs")
_TORCH = "f./b. (ms)"


def cells(row: Row, figures: Sequence[str], runtimes: Sequence[str]) -> list[str]:
    """A row as the papers print it: M and B for millions and billions, ms with the speed-up and its interval."""
    times = [_engine(row.engines.get(runtime)) for runtime in runtimes]
    return [
        row.label,
        *(f"{row.figures[name].value:.2f}" if name in row.figures else "–" for name in figures),
        short_count(row.parameters),
        short_count(row.flops),
        "invalid" if row.forward.invalid else f"{_ms(row.forward.ms)}/{_ms(row.backward.ms)}",
        *times,
        f"{row.size_bytes / 2**20:.2f} MB",
    ]


def short_count(number: int) -> str:
    """Millions and billions as the papers print them: 7.91M, 9.34B."""
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.2f}M"


def _ms(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _engine(time: Time | None) -> str:
    if time is None:
        return "not run"
    if time.invalid:
        return "invalid"
    if time.speedup is None:
        return _ms(time.ms)
    interval = "" if time.speedup_low is None else f" [{time.speedup_low:.2f}, {time.speedup_high:.2f}]"
    return f"{_ms(time.ms)}  {time.speedup:.2f}×{interval}{' ≈' if within_noise(time) else ''}"


def within_noise(time: Time) -> bool:
    """Whether a speed-up cannot be told from none."""
    return time.speedup_low is not None and time.speedup_high is not None and time.speedup_low <= 1 <= time.speedup_high


def runtimes_of(tables: Sequence[Table]) -> list[str]:
    """The runtimes of all targets, in order of appearance."""
    return list(dict.fromkeys(runtime for table in tables for runtime in table.runtimes))


def figures_of(tables: Sequence[Table]) -> list[str]:
    """The names of the figures of all networks, in order of appearance."""
    return list(dict.fromkeys(name for table in tables for row in table.rows for name in row.figures))


def headers(tables: Sequence[Table]) -> list[str]:
    """The column names for tables side by side."""
    times = [f"{runtime} (ms)" for runtime in runtimes_of(tables)]
    return ["model", *figures_of(tables), *_COUNTED, _TORCH, *times, "size"]


def notes_of(table: Table) -> list[str]:
    """What has to stand under a table for its figures to mean something."""
    counted = "#Param and #FLOPs by the papers' rule (weights without biases; 2 × multiply-accumulates)"
    torch = f"f./b.: forward alone / backward alone in torch, batch {table.batch}, {table.cores} threads"
    engines = f"Engines: {table.precision}, batch 1, threads: {table.threads}"
    ratio = "× = original's time / this one's, measured in turn, with its 95 % interval"
    notes = [
        f"{table.model} on {table.data}: accuracy on {table.images} test images. {counted}.",
        f"{torch}. {engines}; {ratio}.",
        f"Measured on {table.processor} ({table.machine}).",
    ]
    if any(within_noise(time) for row in table.rows for time in row.engines.values()):
        notes.append("≈: within the noise, no difference from the original is proven.")
    notes += [
        f"{row.label} on {runtime}: invalid because {time.invalid}; measure again."
        for row in table.rows
        for runtime, time in row.engines.items()
        if time.invalid and not row.note
    ]
    return notes + [f"{row.label}: {row.note}." for row in table.rows if row.note]


def built_notes(executed: Mapping[str, Any]) -> list[str]:
    """What an engine that a device built computes in, and what of it runs elsewhere; see `device_stage.on_device`."""
    notes, left = [f"runs {executed['text']}"] if "text" in executed else [], executed["gpu_fallback"]
    return notes if left is None else [*notes, f"the DLA left to the GPU: {', '.join(left) or 'nothing'}"]


def render(tables: Sequence[Table], width: int) -> RenderableType:
    """The table, then the picture, then the small print, for a console of this width."""
    runtimes, parts = runtimes_of(tables), list[RenderableType](_grids(tables, width))
    parts += [_bars(tables, runtime) for runtime in runtimes]
    parts += [Text(note, style="dim") for table in tables for note in notes_of(table)]
    return Group("ThiNet: the thin networks beside the original", *parts)


def _grids(tables: Sequence[Table], width: int) -> list[Grid]:
    """The table; where it is wider than the console, its columns go into several tables below each other."""
    names, figures, runtimes = headers(tables), figures_of(tables), runtimes_of(tables)
    rows = [[cells(row, figures, runtimes) for row in table.rows] for table in tables]
    widths = [max(map(len, column)) + 2 for column in zip(names, *chain(*rows), strict=True)]  # blanks on both sides
    order = list(range(1, len(names)))
    if sum(widths) > width:  # the size, which stands last, goes with the other figures that are no times
        order.insert(names.index(_TORCH) - 1, order.pop())
    parts = [[0]]
    for index in order:
        if len(parts[-1]) > 1 and sum(widths[i] for i in parts[-1]) + widths[index] > width:
            parts.append([0])
        parts[-1].append(index)
    return [_grid(tables, names, rows, part) for part in parts]


def _grid(tables: Sequence[Table], names: list[str], rows: list[list[list[str]]], columns: list[int]) -> Grid:
    grid = Grid(box=SIMPLE_HEAD, show_edge=False)
    for index in columns:
        grid.add_column(names[index], justify="right" if index else "left", no_wrap=index > 0)
    for table, lines in zip(tables, rows, strict=True):
        if len(tables) > 1:
            grid.add_row(Text(f"{table.model} on {table.data} → {table.target}", style="bold"))
        for line in lines:
            grid.add_row(*(line[index] for index in columns))
        grid.add_row()
    return grid


def _bars(tables: Sequence[Table], runtime: str) -> RenderableType:
    """Latency as bars, one per network."""
    every = [row for table in tables for row in table.rows if runtime in row.engines and not row.note]
    rows = [row for row in every if not row.engines[runtime].invalid]
    longest = max((row.engines[runtime].ms for row in rows), default=1.0)
    picture = Grid.grid(padding=(0, 1))
    for row in rows:
        ms = row.engines[runtime].ms
        bar = Text("█" * max(1, round(_BAR * ms / longest)), style="red" if row.name == "original" else "green")
        picture.add_row(f"{runtime:>12}", row.label, bar, f"{_ms(ms)} ms")
    return picture


def to_markdown(tables: Sequence[Table]) -> str:
    """The table and its small print as Markdown."""
    names, figures, runtimes = headers(tables), figures_of(tables), runtimes_of(tables)
    lines = ["| " + " | ".join(names) + " |", "|---|" + "---:|" * (len(names) - 1)]
    lines += ["| " + " | ".join(cells(row, figures, runtimes)) + " |" for table in tables for row in table.rows]
    notes = [f"- {note}" for table in tables for note in notes_of(table)]
    return "\n".join([*lines, "", *notes]) + "\n"


def to_csv(tables: Sequence[Table]) -> str:
    """The rows as CSV with full figures; times in milliseconds, sizes in bytes."""
    runtimes, stream = runtimes_of(tables), io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    figures = figures_of(tables)
    fixed = ["target", "data", "model", *(name.replace("-", "") for name in figures)]
    fixed += ["parameters", "flops", "forward_ms", "backward_ms", "size_bytes"]
    measured = [
        f"{runtime}_{part}" for runtime in runtimes for part in ("ms", "speedup", "speedup_low", "speedup_high")
    ]
    writer.writerow([*fixed, *measured])
    for table in tables:
        for row in table.rows:
            values: list[object] = [table.target, table.data, row.label]
            values += [row.figures[name].value if name in row.figures else None for name in figures]
            values += [row.parameters, row.flops, row.forward.ms, row.backward.ms, row.size_bytes]
            for runtime in runtimes:
                time = row.engines.get(runtime)
                values += [time.ms, time.speedup, time.speedup_low, time.speedup_high] if time else [None] * 4
            writer.writerow(values)
    return stream.getvalue()
