"""Rows of finished runs against one of them: differences with their intervals, and which of them are noise."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import read_json
from ..errors import InputError, UnknownNameError
from ..intervals import unpaired_difference
from ..on_device.samples import ratio_interval
from .table import THERE, Row, Table, Time, read_table

_TORCH = "f./b."

# One engine's time, measured again on another day on the same machine, moved by up to so much (VGG-16 and ResNet-50 on
# ONNX Runtime and OpenVINO, 2026-11): what was not measured in turn is known no better.
ANOTHER_TIME = 1.06


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its table, and what it is called among others (see `names_of`)."""

    folder: Path
    table: Table
    name: str


def names_of(folders: Sequence[Path]) -> list[str]:
    """What runs are called: their folders' names, with as many of those above as tell all apart."""
    parts = [folder.resolve().parts for folder in folders]
    ways = [["/".join(each[-count:]).lstrip("/") for each in parts] for count in range(1, max(map(len, parts)) + 1)]
    return next(names for names in ways if len(set(names)) == len(set(parts)))


def runs_of(folders: Sequence[Path]) -> list[Run]:
    """Finished runs, to be compared; a run that is given twice stands there twice.

    Raises:
        InputError: one is not finished.
    """
    return [Run(folder, read_table(folder), name) for folder, name in zip(folders, names_of(folders), strict=True)]


@dataclass(frozen=True)
class Difference:
    """A figure of one row against the baseline's.

    Attributes:
        value: difference or ratio.
        low, high: its 95 % interval; None where there is none.
        same: the value that stands for no difference: 0 of a difference, 1 of a ratio.
        in_turn: whether both were measured in turn (A B A B …), or on the same images.
    """

    value: float
    low: float | None
    high: float | None
    same: float
    in_turn: bool

    @property
    def noise(self) -> bool:
        """Whether no difference is proven."""
        return self.low is None or self.high is None or self.low <= self.same <= self.high


@dataclass(frozen=True)
class Against:
    """One row against the baseline.

    Attributes:
        run: its name.
        row: the row's label.
        accuracy: the figure that decides, in percentage points, positive where better than the baseline; None where
            the two were not judged on the same images, by the data's name and the number of images.
        faster: by runtime, how many times faster than the baseline; forward and backward in torch too.
        smaller: how many times smaller the file is; exact.
    """

    run: str
    row: str
    accuracy: Difference | None
    faster: dict[str, Difference]
    smaller: float


def against(runs: Sequence[Run], name: str) -> tuple[str, list[Against]]:
    """All rows against the one called `name`.

    Args:
        runs: what is compared.
        name: of a row ("original", "gap", "ThiNet-GAP": of the first run that has it), of a run (its shipped row), or
            both: "RUN/gap".

    Returns:
        What the baseline is called, and a comparison for every other row.

    Raises:
        UnknownNameError: there is no such row or run.
    """
    base_run, base = _find(runs, name)
    others = [(run, row) for run in runs for row in run.table.rows if (run, row) != (base_run, base)]
    return f"{base_run.name}/{base.name}", [_against(base_run, base, run, row) for run, row in others]


def _find(runs: Sequence[Run], name: str) -> tuple[Run, Row]:
    known: dict[str, tuple[Run, Row]] = {}
    for run in runs:
        known.setdefault(run.name, (run, run.table.shipped))
        for row in run.table.rows:
            for called in (row.name, row.label, f"{run.name}/{row.name}"):
                known.setdefault(called, (run, row))
    if name not in known:
        raise UnknownNameError("row or run to compare with", name, known)
    return known[name]


def _against(base_run: Run, base: Row, run: Run, row: Row) -> Against:
    runtimes = [_TORCH, *(runtime for runtime in row.engines if runtime in base.engines)]
    faster = {r: found for r in runtimes if (found := _faster(base_run, base, run, row, r))}
    accuracy, smaller = _accuracy(base_run, base, run, row), base.size_bytes / row.size_bytes
    return Against(run.name, row.label, accuracy, faster, smaller)


def _accuracy(base_run: Run, base: Row, run: Run, row: Row) -> Difference | None:
    """Paired where both are judged against the same original on the same images, else from two intervals."""
    ours, theirs = (next(iter(each.figures)) for each in (row, base))
    if ours != theirs:
        raise InputError(
            f"{row.label} is judged by {ours}, and the baseline by {theirs}: there is no difference of these.",
            hint="Compare networks for one task, or leave --baseline out.",
        )
    if (base_run.table.data, base_run.table.images) != (run.table.data, run.table.images):
        return None
    # The paired drop is against the original in fp32, which in other types is not the row that the table shows.
    if base_run == run and base.name == "original" and row.drop and run.table.precision == "fp32":
        return Difference(-row.drop.value, -row.drop.high, -row.drop.low, 0, in_turn=True)
    found = unpaired_difference(row.main, base.main)
    return Difference(found.value, found.low, found.high, 0, in_turn=False)


def _faster(base_run: Run, base: Row, run: Run, row: Row, runtime: str) -> Difference | None:
    ours, theirs = _time(row, runtime), _time(base, runtime)
    if ours is None or theirs is None or ours.invalid or theirs.invalid:
        return None
    timed, base_timed = _timed(run.table, row), _timed(base_run.table, base)
    if base_run == run and (rounds := _rounds(run, runtime)) and {timed, base_timed} <= set(rounds):
        return Difference(*ratio_interval(rounds[base_timed], rounds[timed]), 1, in_turn=True)
    elsewhere = len({_where(each.table, runtime) for each in (base_run, run)}) > 1
    if elsewhere or None in (ours.low, ours.high, theirs.low, theirs.high):
        return Difference(theirs.ms / ours.ms, None, None, 1, in_turn=False)
    low, high = theirs.low / ours.high, theirs.high / ours.low  # type: ignore[operator]  # None is dealt with above
    return Difference(theirs.ms / ours.ms, low / ANOTHER_TIME, high * ANOTHER_TIME, 1, in_turn=False)


def _time(row: Row, runtime: str) -> Time | None:
    """Of an engine, or of forward and backward together."""
    if runtime != _TORCH:
        return row.engines[runtime]
    if row.forward is None or row.backward is None:
        return None
    both = row.forward, row.backward
    low, high = (None if None in (ends := [getattr(e, end) for e in both]) else sum(ends) for end in ("low", "high"))
    return Time(row.forward.ms + row.backward.ms, low, high, invalid="; ".join(e.invalid for e in both if e.invalid))


def _where(table: Table, runtime: str) -> tuple[str, int]:
    """Which machine a time is of, and with how many threads; a device's words have these too."""
    if runtime.endswith(THERE):
        return table.device, 0
    return table.machine, table.torch_threads if runtime == _TORCH else table.threads


def _timed(table: Table, row: Row) -> str:
    """The network that was timed: a control has the times of the network of its architecture."""
    return next((each.name for each in table.rows if not each.note and _here(each) == _here(row)), row.name)


def _here(row: Row) -> tuple[dict[str, Time], Time | None]:
    return {name: time for name, time in row.engines.items() if not name.endswith(THERE)}, row.forward


def _rounds(run: Run, runtime: str) -> dict[str, list[list[float]]]:
    """The raw samples of a runtime's engines, or of passes in torch, by network; {} where they are not there."""
    try:
        timing: dict[str, list[dict[str, Any]]] = read_json(run.folder / "latency" / "latency.json")
        if runtime == _TORCH:
            return {each["model"]: _passes_ms(each["forward"], each["backward"]) for each in timing["models"]}
        return {e["model"]: e["samples"]["rounds_ms"] for e in timing["engines"] if e["runtime"] == runtime}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _passes_ms(forward: Mapping[str, Any], backward: Mapping[str, Any]) -> list[list[float]]:
    """Rounds of forward and backward together."""
    both = zip(forward["rounds_ms"], backward["rounds_ms"], strict=True)
    return [[ahead + back] for (ahead,), (back,) in both]


def header(comparisons: Sequence[Against]) -> list[str]:
    """Column names."""
    return [
        "run",
        "model",
        "accuracy (points)",
        *(f"{runtime} (× faster)" for runtime in _runtimes(comparisons)),
        "× smaller",
    ]


def lines(comparisons: Sequence[Against]) -> list[list[str]]:
    """A line of texts for each; ≈ marks what is within the noise, * what was not measured in turn."""
    runtimes = _runtimes(comparisons)
    return [
        [
            each.run,
            each.row,
            _words(each.accuracy, "{:+.2f}") if each.accuracy else "–",
            *(_words(each.faster[runtime], "{:.2f}") if runtime in each.faster else "–" for runtime in runtimes),
            f"{each.smaller:.2f}",
        ]
        for each in comparisons
    ]


NOTE = (
    "[ ] 95 % interval. ≈: within the noise, no difference is proven. *: not measured in turn, or not known image by "
    "image, so the interval is wider, and a machine that differed between two measurements shows in it; none across "
    "machines, or with other threads. –: not measured, or judged on other images."
)


def to_markdown(name: str, comparisons: Sequence[Against]) -> str:
    """The comparison as a Markdown table."""
    names = header(comparisons)
    rows = ["| " + " | ".join(line) + " |" for line in [names, *lines(comparisons)]]
    rows.insert(1, "|---|---|" + "---:|" * (len(names) - 2))
    return "\n".join([f"Against {name}:", "", *rows, "", f"- {NOTE}"]) + "\n"


def to_csv(name: str, comparisons: Sequence[Against]) -> str:
    """The comparison as CSV with full figures, one line for each figure."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["baseline", "run", "model", "figure", "value", "low", "high", "within_noise", "in_turn"])
    for each in comparisons:
        figures = {"accuracy_points": each.accuracy} if each.accuracy else {}
        figures |= {f"{runtime}_times_faster": found for runtime, found in each.faster.items()}
        for figure, found in figures.items():
            values = [found.value, found.low, found.high, found.noise, found.in_turn]
            writer.writerow([name, each.run, each.row, figure, *values])
    return stream.getvalue()


def _runtimes(comparisons: Sequence[Against]) -> list[str]:
    return list(dict.fromkeys(runtime for each in comparisons for runtime in each.faster))


def _words(found: Difference, form: str) -> str:
    text = form.format(found.value)
    if found.low is not None and found.high is not None:
        text += f" [{form.format(found.low)}, {form.format(found.high)}]"
    return text + ("" if found.in_turn else "*") + (" ≈" if found.noise else "")
