"""A contract for CI: what is required of the network that ships, judged by intervals, as JUnit XML and Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree as ET

from ..artifact import write_bytes, write_json
from ..errors import InputError, UnknownNameError
from ..intervals import Interval, unpaired_difference
from ..options import Options
from ..timing.budget import SLACK
from .table import Table, Time

Outcome = Literal["met", "not met", "cannot be told apart", "not measured"]
# Figure → the side it is limited on, its units (the first is the one it is kept in), and what each is worth.
_FIGURES: dict[str, tuple[str, dict[str, float]]] = {
    "latency": ("<=", {"ms": 1, "us": 1e-3, "s": 1e3}),
    "speedup": (">=", {"x": 1, "": 1}),
    "top1": (">=", {"%": 1, "": 1}),
    "top1-drop": ("<=", {"points": 1, "%": 1, "": 1}),
    "accuracy": (">=", {"%": 1, "": 1}),
    "accuracy-drop": ("<=", {"points": 1, "%": 1, "": 1}),
    "size": ("<=", {"MB": 1, "kB": 2**-10, "GB": 2**10}),
}
_FORM = re.compile(r"\s*([a-z0-9-]+)\s*(<=|>=)\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z%]*)\s*")
_EXAMPLES = '--require "latency<=8ms", "speedup>=2", "top1>=75", "top1-drop<=1.0", "size<=5MB".'


@dataclass(frozen=True)
class Requirement:
    """One line of a contract: `figure` has to be at most (<=) or at least (>=) `limit`, in `unit`."""

    text: str
    figure: str
    limit: float
    unit: str


@dataclass(frozen=True)
class Verdict:
    """What became of a requirement.

    Attributes:
        requirement: as it was written.
        outcome: met or not met when the whole 95 % interval says so, else it cannot be told apart.
        value: what was measured, in `unit`; None where nothing was.
        low, high: its interval; equal to `value` where it is exact.
        unit: of all three.
        detail: what it was measured on.
    """

    requirement: str
    outcome: Outcome
    value: float | None
    low: float | None
    high: float | None
    unit: str
    detail: str

    @property
    def failed(self) -> bool:
        """Whether the contract is broken: by what was measured, or because nothing was."""
        return self.outcome in {"not met", "not measured"}


def parse(text: str) -> Requirement:
    """Read "latency<=8ms".

    Raises:
        UnknownNameError: there is no such figure.
        InputError: it is no requirement, its unit is none, or it is limited on the wrong side.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise InputError(f"--require is {text!r}, but FIGURE<=NUMBER was expected.", hint=f"Such as {_EXAMPLES}")
    figure, side, number, unit = found.groups()
    if figure not in _FIGURES:
        raise UnknownNameError("figure to require", figure, _FIGURES)
    right, units = _FIGURES[figure]
    if side != right:
        raise InputError(f"--require is {text!r}, but {figure} is limited by {right}.", hint=f"Such as {_EXAMPLES}")
    if unit not in units:
        known = ", ".join(each for each in units if each)
        raise InputError(f"--require is {text!r}, but {figure} is in {known}.", hint=f"Such as {_EXAMPLES}")
    return Requirement(text.strip(), figure, float(number) * units[unit], next(iter(units)))


def judge(required: Sequence[str], table: Table, device: Mapping[str, Any] | None = None) -> list[Verdict]:
    """Judge the row that ships.

    Args:
        required: the contract's lines.
        table: of the run.
        device: what came from a device, whose latency then decides: see `stages.device.on_device`.

    Raises:
        InputError: a requirement cannot be read.
    """
    return [_verdict(parse(text), table, device) for text in required]


def _verdict(asked: Requirement, table: Table, device: Mapping[str, Any] | None) -> Verdict:
    if device and asked.figure == "speedup":
        return Verdict(asked.text, "not measured", None, None, None, asked.unit, "the original is not measured there")
    found, detail = _there(table, device) if device and asked.figure == "latency" else _measured(asked.figure, table)
    outcome: Outcome = "not measured"
    if found:
        outcome = "cannot be told apart"
        if found.low is not None and found.high is not None:
            at_most = _FIGURES[asked.figure][0] == "<="
            best, worst = (found.low, found.high) if at_most else (found.high, found.low)
            holds = [value <= asked.limit if at_most else value >= asked.limit for value in (best, worst)]
            outcome = "met" if all(holds) else "cannot be told apart" if any(holds) else "not met"
    value, low, high = (found.value, found.low, found.high) if found else (None, None, None)
    return Verdict(asked.text, outcome, value, low, high, asked.unit, detail)


def budget_notes(
    options: Options, runtime: str, table: Table, device: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    """What to say where the network that ships is slower than the budget that its widths were chosen for.

    It was met by the widths; after that training, and INT8's accuracy, changed weights and types of layers.

    Args:
        options: have the budget.
        runtime: that it was met on.
        table: of the run.
        device: see `judge`; a speed-up is not measured there.
    """
    if most_ms := options.most_ms:
        asked = Requirement(options.latency or "", "latency", most_ms * (1 + SLACK), "ms")
    elif (faster := options.times_faster) and not device:
        asked = Requirement(f"{faster:g}x faster", "speedup", faster / (1 + SLACK), "x")
    else:
        return ()
    if device:
        engines = [row for row in device["latency"]["engines"] if row["runtime"] == runtime]
        device = {**device, "latency": {**device["latency"], "engines": engines}}
    elif runtime not in table.shipped.engines:
        return ()
    verdict = _verdict(asked, replace(table, runtimes=(runtime,)), device)
    if verdict.outcome != "not met":
        return ()
    why = (
        "Layers that stay in fp32 (above) are the usual reason: allow more with --max-drop, or ask for less time."
        if table.precision == "int8"
        else "Ask for a little less time, or build again while the machine does nothing else."
    )
    return (f"The budget ({asked.text}) was met by the widths, but what ships misses it: {_told(verdict)}. {why}",)


@dataclass(frozen=True)
class _Figure:
    value: float
    low: float | None
    high: float | None


def _measured(figure: str, table: Table) -> tuple[_Figure | None, str]:
    """The figure of the row that ships, and what it was measured on or why it was not."""
    row = table.shipped
    if figure in {"latency", "speedup"}:
        return _timed(figure, table)
    if figure == "size":
        size = row.size_bytes / 2**20
        return _Figure(size, size, size), f"{row.label}, its ONNX file in {table.precision}"
    name = next(iter(row.figures))  # what --require calls "accuracy" is the figure of the task that decides
    images = f"{row.label} in {table.precision}, {name} on {table.images} test images"
    if figure.startswith("top1") and name != "top-1":
        return None, f"{row.label} is judged by {name}: require accuracy or accuracy-drop"
    if not figure.endswith("-drop"):
        return _of(row.main), images
    if row.drop:
        return _of(row.drop), f"{images}, paired with the original's{' in fp32' if table.precision == 'int8' else ''}"
    original = next(each for each in table.rows if each.name == "original")
    return _of(unpaired_difference(original.main, row.main)), images


def _timed(figure: str, table: Table) -> tuple[_Figure | None, str]:
    """Of the first of the target's runtimes that ran here."""
    row = table.shipped
    runtime = next((each for each in (*table.runtimes, *row.engines) if each in row.engines), None)
    if runtime is None:
        return None, f"no engine of {row.label} ran on this machine"
    time: Time = row.engines[runtime]
    detail = f"{row.label}, {runtime}, threads: {table.threads}, {table.processor}"
    if time.invalid:
        return None, f"{detail}: invalid because {time.invalid}"
    detail += ", unstable" if time.unstable else ""
    if figure == "latency":
        return _Figure(time.ms, time.low, time.high), detail
    found = None if time.speedup is None else _Figure(time.speedup, time.speedup_low, time.speedup_high)
    also = f" in {table.precision} too" if table.precision != "fp32" else ""
    return found, f"{detail}, in turn with the original{also}"


def _there(table: Table, device: Mapping[str, Any]) -> tuple[_Figure | None, str]:
    """Milliseconds on the device: of the first of the target's runtimes in the precision asked for, if it ran there."""
    timing = device["latency"]
    ran = [row for row in timing["engines"] if row.get("summary")]
    if not ran:
        return None, f"no engine of {table.shipped.label} ran on the device"
    known = {runtime: place for place, runtime in enumerate(table.runtimes)}
    row = min(ran, key=lambda each: (known.get(each["runtime"], len(known)), each["precision"] != table.precision))
    time = Time.of(row["summary"], None)
    engine = f"{row['runtime']} {row['precision']}"
    detail = f"{table.shipped.label}, {engine}, threads: {timing['threads']}, {timing['processor']} (the device)"
    if time.invalid:
        return None, f"{detail}: invalid because {time.invalid}"
    return _Figure(time.ms, time.low, time.high), detail + (", unstable" if time.unstable else "")


def _of(interval: Interval) -> _Figure:
    return _Figure(interval.value, interval.low, interval.high)


# ------------------------------------------------------------------------------------------------ documents


def in_words(verdict: Verdict) -> str:
    """A verdict in one line."""
    return f"{verdict.requirement}: {verdict.outcome} ({_told(verdict)})"


def _told(verdict: Verdict) -> str:
    return f"{figures(verdict)}; {verdict.detail}"


def figures(verdict: Verdict) -> str:
    """What was measured, with its interval."""
    if verdict.value is None:
        return "–"
    spread = ""
    if verdict.low is not None and verdict.high is not None and verdict.low != verdict.high:
        spread = f" [{verdict.low:.4g}, {verdict.high:.4g}]"
    return f"{verdict.value:.4g}{spread} {verdict.unit}"


def write(folder: Path, verdicts: Sequence[Verdict]) -> None:
    """contract.json, junit.xml and summary.md."""
    write_json(folder / "contract.json", {"verdicts": [asdict(verdict) for verdict in verdicts]})
    write_bytes(folder / "junit.xml", junit(verdicts))
    write_bytes(folder / "summary.md", markdown(verdicts).encode())


def junit(verdicts: Sequence[Verdict]) -> bytes:
    """As CI systems read it: a broken requirement is a failure, one that was not measured an error; what cannot be told
    apart is skipped.
    """
    of = [verdict.outcome for verdict in verdicts]
    counts = {"tests": len(of), "failures": of.count("not met"), "errors": of.count("not measured")}
    counts["skipped"] = of.count("cannot be told apart")
    suite = ET.Element("testsuite", {"name": "thinet-deploy", **{key: str(value) for key, value in counts.items()}})
    kinds = {"not met": "failure", "not measured": "error", "cannot be told apart": "skipped"}
    for verdict in verdicts:
        case = ET.SubElement(suite, "testcase", {"classname": "contract", "name": verdict.requirement})
        if kind := kinds.get(verdict.outcome):
            ET.SubElement(case, kind, {"message": in_words(verdict)})
        else:
            ET.SubElement(case, "system-out").text = in_words(verdict)
    return bytes(ET.tostring(suite, encoding="utf-8", xml_declaration=True))


_MARKS = {"met": "✅", "not met": "❌", "cannot be told apart": "❔", "not measured": "❌"}


def markdown(verdicts: Sequence[Verdict]) -> str:
    """A summary for a pull request or a CI page."""
    broken = sum(verdict.failed for verdict in verdicts)
    said = f"{broken} of {len(verdicts)} requirements broken" if broken else f"none of {len(verdicts)} is broken"
    rows = [f"| `{v.requirement}` | {_MARKS[v.outcome]} {v.outcome} | {figures(v)} | {v.detail} |" for v in verdicts]
    head = ["| required | verdict | measured, 95 % interval | on |", "|---|---|---:|---|"]
    return "\n".join([f"**Contract: {said}**", "", *head, *rows]) + "\n"
