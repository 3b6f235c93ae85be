"""The papers' table as terminal text, Markdown or CSV, and what has to stand beside its figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from .table import Row, Table, Time, unlike

_BAR = 32
_COUNTED = ("#Param", "#FLOPs")
_TORCH = "f./b. (ms)"
_FASTER = ("speedup", "speedup_low", "speedup_high")


def cells(row: Row, figures: Sequence[str], runtimes: Sequence[str]) -> list[str]:
    """A row as the papers print it: M and B for millions and billions, ms with the speed-up and its interval."""
    times = [_engine(row.engines.get(runtime)) for runtime in runtimes]
    return [
        row.label,
        *(f"{row.figures[name].value:.2f}" if name in row.figures else "–" for name in figures),
        short_count(row.parameters),
        short_count(row.flops),
        _passes(row.forward, row.backward),
        *times,
        short_size(row.size_bytes),
    ]


def short_count(number: int) -> str:
    """Millions and billions as the papers print them: 7.91M, 9.34B; thousands of small networks."""
    if number < 1e5:
        return f"{number / 1e3:.2f}k"
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.2f}M"


def short_size(number: float) -> str:
    """Bytes in the papers' MB, 2^20 of them, or in kB where that says nothing."""
    return f"{number / 2**20:.2f} MB" if number >= 2**20 / 10 else f"{number / 2**10:.2f} kB"


def _ms(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _passes(forward: Time | None, backward: Time | None) -> str:
    if forward is None or backward is None:
        return "not run"
    if forward.invalid or backward.invalid:
        return "invalid"
    return f"{_ms(forward.ms)}/{_ms(backward.ms)}{' ≈' if within_noise(forward) else ''}"


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
    torch = f"f./b.: forward alone / backward alone in torch, batch {table.batch}, threads: {table.torch_threads}"
    engines = f"Engines: {table.precision}, batch 1, threads: {table.threads}"
    typed = f", both in {table.precision}" if table.precision != "fp32" else ""
    ratio = f"× = original's time / this one's{typed}, measured in turn, with its 95 % interval"
    notes = [
        f"{table.model} on {table.data}: accuracy on {table.images} test images. {counted}.",
        f"{torch}. {engines}; {ratio}.",
        f"Measured on {table.processor} ({table.machine}).",
    ]
    if table.device:
        notes.append(f"Device: the network that ships, measured on {table.device}.")
    if table.precision == "int8":
        notes.append(
            "Accuracy and size are of the INT8 files, the original's too unless a device builds the engines; losses "
            "are told from it in fp32."
        )
    if any(within_noise(time) for row in table.rows for _, time in _times(row)):
        notes.append("≈: within the noise, no difference from the original is proven.")
    timed = [(row.label, where, time) for row in table.rows if not row.note for where, time in _times(row)]
    invalid = [(who, where, time.invalid) for who, where, time in timed if time.invalid]
    notes += [f"{who} on {where}: invalid because {why}; measure again." for who, where, why in dict.fromkeys(invalid)]
    unstable: dict[str, dict[str, None]] = {}
    for who, where, time in timed:
        if time.unstable and not time.invalid:
            unstable.setdefault(where, {})[who] = None
    if unstable:
        every = len({who for who, _, _ in timed})
        named = {where: ", ".join(who) if len(who) < every else "all" for where, who in unstable.items()}
        names = "; ".join(f"{who} on {where}" for where, who in named.items())
        notes.append(f"Unstable, so that another measurement may differ by more than the intervals say: {names}.")
    return notes + [f"{row.label}: {row.note}." for row in table.rows if row.note]


def _times(row: Row) -> Iterator[tuple[str, Time]]:
    """All of its times, and where each was measured."""
    yield from (("torch", time) for time in (row.forward, row.backward) if time)
    yield from row.engines.items()


def built_notes(executed: Mapping[str, Any]) -> list[str]:
    """What an engine that a device built computes in, and what of it runs elsewhere; see `stages.device.on_device`."""
    notes, left = [f"runs {executed['text']}"] if "text" in executed else [], executed["gpu_fallback"]
    return notes if left is None else [*notes, f"the DLA left to the GPU: {', '.join(left) or 'nothing'}"]


def render(tables: Sequence[Table], width: int, names: Sequence[str] = ()) -> RenderableType:
    """The table, then the picture, then the small print, for a console of this width.

    Args:
        tables: one or several.
        width: of the console, in characters.
        names: of several tables, such as their runs' folders.
    """
    runtimes, parts = runtimes_of(tables), list[RenderableType](_grids(tables, width, names))
    side = max(12, *(len(runtime) for runtime in runtimes)) if runtimes else 0
    parts += [_bars(_called(tables, names), runtime, side) for runtime in runtimes]
    parts += [Text(note, style="dim") for note in _notes(tables, names)]
    return Group("ThiNet: the thin networks beside the original", *parts)


def _called(tables: Sequence[Table], names: Sequence[str]) -> list[tuple[str, Table]]:
    """Each table with what stands before what is of it: its name, or nothing."""
    return list(zip([f"{name}: " for name in names] or [""] * len(tables), tables, strict=True))


def _notes(tables: Sequence[Table], names: Sequence[str]) -> list[str]:
    """The small print; what is not said of all of several tables says of which."""
    each = [notes_of(table) for table in tables]
    if not names:
        return [note for notes in each for note in notes]
    order = dict.fromkeys(chain(*each))
    whose = {note: [name for name, notes in zip(names, each, strict=True) if note in notes] for note in order}
    notes = [note if len(who) == len(names) else f"{', '.join(who)}: {note}" for note, who in whose.items()]
    return notes + unlike_notes(tables)


def unlike_notes(tables: Sequence[Table]) -> list[str]:
    """What was set otherwise on the machine when one of them was measured."""
    return [
        f"Measured with {name} {' and '.join(values)}: times may differ by that alone."
        for name, values in unlike(tables).items()
    ]


def _grids(tables: Sequence[Table], width: int, names_of: Sequence[str]) -> list[Grid]:
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
    heads = [
        f"{of}{table.model} on {table.data} → {table.target}, {table.precision}" if len(tables) > 1 else ""
        for of, table in _called(tables, names_of)
    ]
    return [_grid(heads, names, rows, part) for part in parts]


def _grid(heads: list[str], names: list[str], rows: list[list[list[str]]], columns: list[int]) -> Grid:
    grid = Grid(box=SIMPLE_HEAD, show_edge=False)
    for index in columns:
        grid.add_column(names[index], justify="right" if index else "left", no_wrap=index > 0)
    for head, lines in zip(heads, rows, strict=True):
        if head:
            grid.add_row(Text(head, style="bold"))
        for line in lines:
            grid.add_row(*(line[index] for index in columns))
        grid.add_row()
    return grid


def _bars(tables: Sequence[tuple[str, Table]], runtime: str, side: int) -> RenderableType:
    """Latency as bars, one per network; its name takes `side` characters, as the others' do."""
    every = [(of, row) for of, table in tables for row in table.rows if runtime in row.engines]
    rows = [(of, row) for of, row in every if not row.note and not row.engines[runtime].invalid]
    longest = max((row.engines[runtime].ms for _, row in rows), default=1.0)
    picture = Grid.grid(padding=(0, 1))
    for of, row in rows:
        ms = row.engines[runtime].ms
        bar = Text("█" * max(1, round(_BAR * ms / longest)), style="red" if row.name == "original" else "green")
        picture.add_row(f"{runtime:>{side}}", of + row.label, bar, f"{_ms(ms)} ms")
    return picture


def to_markdown(tables: Sequence[Table], names: Sequence[str] = ()) -> str:
    """The table and its small print as Markdown; names, such as their runs' folders, tell several tables apart."""
    columns, figures, runtimes = headers(tables), figures_of(tables), runtimes_of(tables)
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    for of, table in _called(tables, names):
        lines += [f"| {of}" + " | ".join(cells(row, figures, runtimes)) + " |" for row in table.rows]
    notes = [f"- {note}" for note in _notes(tables, names)]
    return "\n".join([*lines, "", *notes]) + "\n"


def to_csv(tables: Sequence[Table], names: Sequence[str] = ()) -> str:
    """The rows as CSV with full figures; times in milliseconds, empty where they are invalid; sizes in bytes.

    With names of the tables, such as their runs' folders, these are the last column.
    """
    runtimes, stream = runtimes_of(tables), io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    figures = figures_of(tables)
    fixed = ["target", "data", "model", *(name.replace("-", "") for name in figures)]
    fixed += ["parameters", "flops", "forward_ms", "backward_ms", *(f"torch_{part}" for part in _FASTER), "size_bytes"]
    measured = [f"{runtime}_{part}" for runtime in runtimes for part in ("ms", *_FASTER)]
    writer.writerow([*fixed, *measured, *(["run"] if names else [])])
    for number, table in enumerate(tables):
        for row in table.rows:
            values: list[object] = [table.target, table.data, row.label]
            values += [row.figures[name].value if name in row.figures else None for name in figures]
            values += [row.parameters, row.flops, _valid_ms(row.forward), _valid_ms(row.backward)]
            values += [*_faster(row.forward), row.size_bytes]
            for runtime in runtimes:
                time = row.engines.get(runtime)
                values += [_valid_ms(time), *_faster(time)]
            writer.writerow([*values, *names[number : number + 1]])
    return stream.getvalue()


def _faster(time: Time | None) -> list[float | None]:
    return [getattr(time, part, None) for part in _FASTER]


def _valid_ms(time: Time | None) -> float | None:
    return None if time is None or time.invalid else time.ms
