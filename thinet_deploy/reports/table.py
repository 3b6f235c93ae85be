"""The papers' table of one run as data: networks, their figures and times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..artifact import read_json
from ..errors import InputError, first_line
from ..intervals import Interval
from ..store import open_run
from ..tasks.base import Accuracy, read_figures
from .ledger import Entry

THERE = ", device"  # ends the name of an engine that was timed on a device
_SCHEMA = {"schema": "thinet-deploy/table", "version": 3}


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
        unstable: whether something disturbed the measurement, so that another one may find something else.
    """

    ms: float
    low: float | None
    high: float | None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    invalid: str = ""
    unstable: bool = False

    @classmethod
    def of(cls, summary: dict[str, Any], speedup: dict[str, Any] | None) -> Time:
        """From a summary of samples and a speed-up as latency.json has them."""
        low, high = summary["interval_ms"] or (None, None)
        unstable = any(warning.startswith("unstable") for warning in summary["warnings"])
        time = cls(summary["median_ms"], low, high, invalid="; ".join(summary["invalid"]), unstable=unstable)
        if time.invalid or speedup is None:
            return time
        return replace(time, speedup=speedup["ratio"], speedup_low=speedup["low"], speedup_high=speedup["high"])


@dataclass(frozen=True)
class Row:
    """One network of the papers' table.

    Attributes:
        name: of the network in the run: "original", "conv", "gap" …
        label: what people read.
        figures: of the task on the test images, such as "top-1" → percent with its 95 % interval; the first decides.
        parameters: #Param by the papers' rule.
        flops: #FLOPs by the papers' rule.
        forward: milliseconds per batch in torch, with the speed-up of forward and backward together; None where a
            network cannot be timed there.
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
    forward: Time | None
    backward: Time | None
    engines: dict[str, Time]
    size_bytes: int
    note: str = ""
    drop: Interval | None = None

    @classmethod
    def make(
        cls, name: str, label: str, accuracy: Accuracy, counted: dict[str, int], size: int, timing: dict[str, Any]
    ) -> Row:
        """From a stage's accuracy and count, and latency.json."""
        torch_row = next((row for row in timing["models"] if row["model"] == name), None)
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
            forward=torch_row and Time.of(torch_row["forward"]["summary"], torch_row["speedup"]),
            backward=torch_row and Time.of(torch_row["backward"]["summary"], None),
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
        torch_threads: of forward and backward in torch.
        batch: of forward and backward.
        runtimes: the target's; what was not run here is shown as such.
        rows: the networks.
        ledger: accuracy, step by step.
        precision: that the engines were asked for.
        ships: name of the row that goes into the bundle.
        device: what the engines that end in `THERE` were timed on, and how: see `with_device`.
        setting: what else decides times here and may be another one next time: clocks, versions; see `setting_of`.
    """

    target: str
    model: str
    data: str
    images: int
    machine: str
    processor: str
    threads: int
    torch_threads: int
    batch: int
    runtimes: tuple[str, ...]
    rows: tuple[Row, ...]
    ledger: tuple[Entry, ...]
    precision: str = "fp32"
    ships: str = ""
    device: str = ""
    setting: Mapping[str, str] = field(default_factory=dict)

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
        if not rows:
            raise ValueError("it has no rows")
        return cls(**values, runtimes=tuple(data["runtimes"]), rows=rows, ledger=ledger)


def _row(data: dict[str, Any]) -> Row:
    engines = {runtime: Time(**time) for runtime, time in data["engines"].items()}
    torch = {part: data[part] and Time(**data[part]) for part in ("forward", "backward")}
    drop = Interval(**data["drop"]) if data.get("drop") else None
    return Row(**{**data, **torch, "engines": engines, "figures": read_figures(data["figures"]), "drop": drop})


def read_table(run: Path) -> Table:
    """The table of a finished run.

    Raises:
        InputError: the run is not finished.
    """
    path = open_run(Path(run)) / "report" / "table.json"
    if not path.exists():
        raise InputError(
            f"{run} has no table yet: its build is not finished.", hint="Run the same build again to finish it."
        )
    try:
        return Table.from_json(read_json(path))
    except (AttributeError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is damaged, or of another version: {first_line(error)}.",
            hint=f"Delete the folder {path.parent} and run the same build again: all else is kept.",
        ) from error


def with_device(table: Table, found: Mapping[str, Any] | None) -> Table:
    """The table with the times of the network that ships on a device, beside those of this machine.

    Args:
        table: of a run.
        found: what came from its device, see `stages.device.on_device`; None where it had none.
    """
    if not found:
        return table
    timing, jetson = found["latency"], found["facts"].get("jetson") or {}
    times = {_named(row): row for row in timing["engines"] if row.get("summary")}
    engines = {name: Time.of(row["summary"], None) for name, row in times.items()}
    rows = [replace(row, engines={**row.engines, **engines}) if row == table.shipped else row for row in table.rows]
    words = [timing["processor"], found["facts"]["machine"], jetson.get("power_mode"), f"threads: {timing['threads']}"]
    device = ", ".join(filter(None, words))
    return replace(table, rows=tuple(rows), runtimes=(*table.runtimes, *engines), device=device)


def _named(timed: Mapping[str, Any]) -> str:
    pace = f" at {timed['fps']:g} a second" if timed.get("fps") else ""
    return f"{timed['runtime']} {timed['precision']}{pace}{THERE}"


def setting_of(environment: Mapping[str, Any], runtimes: Sequence[str]) -> dict[str, str]:
    """How a machine was set when it was measured, beyond its id: of `environment.fingerprint`."""
    cpu, packages = environment.get("cpu", {}), environment.get("packages", {})
    clocks = {"governor": cpu.get("governor"), "turbo": {True: "on", False: "off"}.get(cpu.get("turbo"))}
    versions = {name: packages.get(name) for name in ("torch", *runtimes)}
    return {name: value for name, value in {**clocks, **versions}.items() if value}


def unlike(tables: Sequence[Table]) -> dict[str, list[str]]:
    """What the machine was set to, where that differs between tables, in their order."""
    names = dict.fromkeys(name for table in tables for name in table.setting)
    found = {name: list(dict.fromkeys(table.setting.get(name, "") for table in tables)) for name in names}
    known = {name: [value for value in values if value] for name, values in found.items()}
    return {name: values for name, values in known.items() if len(values) > 1}


def check_machines(tables: Sequence[Table]) -> None:
    """Raise InputError when the tables were measured on different machines, or with different numbers of threads."""
    devices = dict.fromkeys(table.device for table in tables if table.device)
    if len(devices) > 1:
        raise InputError(
            f"The runs were measured on different devices: {'; '.join(devices)}. Their milliseconds do not compare.",
            hint="Measure them on one device, or give --across-machines to see them side by side all the same.",
        )
    machines = {table.machine: table.processor for table in tables}
    if len(machines) > 1:
        named = ", ".join(f"{processor} ({machine})" for machine, processor in machines.items())
        raise InputError(
            f"The runs were measured on different machines: {named}. Their milliseconds do not compare.",
            hint="Measure them on one machine, or give --across-machines to see them side by side all the same.",
        )
    threads = {(table.threads, table.torch_threads): None for table in tables}
    if len(threads) > 1:
        named = ", ".join(f"{engines} (and {torch} in torch)" for engines, torch in threads)
        raise InputError(
            f"The runs were measured with different numbers of threads: {named}. Their milliseconds do not compare.",
            hint="Measure them with the same --threads (torch's are set by OMP_NUM_THREADS), or give --across-machines "
            "to see them side by side all the same.",
        )
