"""The HTML report: one page that needs no other file, from what a run left; sections without figures are left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import hash_json, read_json, sha256_of
from ..errors import InputError, first_line
from ..on_device import runner_text
from ..timing.layer_times import OTHERS
from . import comparison, contract, html_plots, ledger, texts
from .table import Row, Table

DEVICE = "device.json"  # beside the page: what it says of a device
TEMPLATE = Path(__file__).parents[1] / "assets" / "report.html.j2"


@dataclass(frozen=True)
class Page:
    """One run in the report.

    Attributes:
        folder: the run directory.
        table: its table.
        verdicts: on what was required of it.
        device: what came from a device: see `stages.device.on_device`.
    """

    folder: Path
    table: Table
    verdicts: tuple[contract.Verdict, ...] = ()
    device: Mapping[str, Any] | None = None


def read_device(run: Path) -> dict[str, Any] | None:
    """What a finished build had from its device (see `Page.device`); None where it had none.

    Raises:
        InputError: the file is damaged: the host's figures must not be taken for the device's.
    """
    path = run / "report" / DEVICE
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = read_json(path)
        _device(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is damaged, or of another version: {first_line(error)}.",
            hint=f"Delete the folder {path.parent} and run the same build again: all else is kept.",
        ) from error
    return found


def digest() -> str:
    """Changes when the page would look different for the same run."""
    parts = sorted(Path(__file__).parent.glob("*.py"))
    return hash_json([sha256_of(path) for path in (TEMPLATE, Path(runner_text.__file__), *parts)])


def render(pages: Sequence[Page], against: tuple[str, list[comparison.Against]] | None = None) -> str:
    """The whole page.

    Args:
        pages: the runs, one after the other.
        against: a comparison with a baseline (see `comparison.against`), shown first.
    """
    from jinja2 import Environment, StrictUndefined

    tables, names = [page.table for page in pages], comparison.names_of([page.folder for page in pages])
    columns = texts.figures_of(tables), texts.runtimes_of(tables)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=" · ".join(dict.fromkeys(f"{table.model} → {table.target}" for table in tables)),
        headers=texts.headers(tables),
        runs=[_run(page, name, *columns) for page, name in zip(pages, names, strict=True)],
        against=_against(*against) if against else None,
        unlike=texts.unlike_notes(tables),
    )


def _against(name: str, comparisons: list[comparison.Against]) -> dict[str, Any]:
    header, lines = comparison.header(comparisons), comparison.lines(comparisons)
    return {"name": name, "header": header, "lines": lines, "note": comparison.NOTE}


def _run(page: Page, name: str, figures: Sequence[str], runtimes: Sequence[str]) -> dict[str, Any]:
    """One run, its papers' table with the columns of all runs."""
    from markupsafe import Markup

    table, timing = page.table, _json(page.folder / "latency" / "latency.json") or {}
    labels = {row.name: row.label for row in table.rows}
    engines = [engine for engine in timing.get("engines", []) if engine["model"] in labels]
    percentiles = dict.fromkeys(name for engine in engines for name in engine["samples"]["summary"]["percentiles_ms"])
    hops = (_json(page.folder / "parity" / "parity.json") or {}).get("hops", [])
    return {
        "name": name,
        "table": table,
        "shipped": table.shipped,
        "cards": _cards(table),
        "rows": [
            {"row": row, "cells": texts.cells(row, figures, runtimes), **_mark(table, row.name)} for row in table.rows
        ],
        "figures": texts.figures_of([table]),
        "notes": texts.notes_of(table),
        "verdicts": [{**vars(v), "figures": contract.figures(v), "failed": v.failed} for v in page.verdicts],
        "accuracy": Markup(html_plots.accuracy_plot(table)),  # noqa: S704 - our own SVG, of numbers and runtimes' names
        "latency": Markup(html_plots.latency_plot(table, engines)),  # noqa: S704 - the same
        "engines": [_engine(table, engine, labels) for engine in engines],
        "percentiles": sorted(percentiles, key=lambda name: float(name[1:])),
        "warnings": _warnings(engines, [each for each in timing.get("models", []) if each["model"] in labels], labels),
        "budgets": list(_budgets(page.folder, table)),
        "widths": list(_widths(page.folder, table)),
        "layers": list(_layers(page.folder, table)),
        "hops": [{**hop, "label": label} for name, label in labels.items() for hop in hops if hop["model"] == name],
        "ledger": [_entry(table, entry) for entry in table.ledger],
        "ledger_on": ledger.on_images({entry.images for entry in table.ledger}),
        "environment": list(_flat(timing.get("environment", {}))),
        "device": _device(page.device) if page.device else None,
    }


def _device(found: Mapping[str, Any]) -> dict[str, Any]:
    """What was verified and measured on a device, and what it is."""
    verdicts = {(row["runtime"], row["precision"]): row for row in found["verify"]["engines"]}
    built = {("tensorrt", kind): texts.built_notes(executed) for kind, executed in found["precision"].items()}
    timing = found["latency"]
    keys = [(row["runtime"], row["precision"]) for row in timing["engines"]]
    rows = [
        _on_device(row, verdicts[key], built.get(key, [])) for key, row in zip(keys, timing["engines"], strict=True)
    ]
    how = f"batch {timing['batch']}, threads {timing['threads']}"
    return {"processor": timing["processor"], "how": how, "rows": rows, "facts": list(_flat(found["facts"]))}


def _on_device(timed: Mapping[str, Any], verified: Mapping[str, Any], built: Sequence[str]) -> dict[str, Any]:
    summary, notes = timed.get("summary"), [verified["reason"] or timed["reason"], *built]
    row = {
        "name": f"{timed['runtime']} {timed['precision']}",
        "verdict": verified["verdict"],
        "median": "–",
        "runs": "–",
    }
    if summary:
        row["median"] = f"{summary['median_ms']:.4g}"
        if spread := summary["interval_ms"]:
            row["median"] += f" [{spread[0]:.4g}, {spread[1]:.4g}]"
        row["runs"] = str(summary["n"])
        notes += runner_text.latency_notes(timed)
    return {**row, "error": verified.get("max_relative_error"), "notes": "; ".join(filter(None, notes))}


def _json(path: Path) -> Any:
    """A stage's file; None where the run has none, or one that is damaged."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _mark(table: Table, name: str) -> dict[str, Any]:
    row = next(row for row in table.rows if row.name == name)
    return {"colour": html_plots.colour(table, name), "hollow": bool(row.note)}


def _cards(table: Table) -> list[dict[str, str]]:
    """What the network that ships comes to, in a few figures."""
    ship, original = table.shipped, next((row for row in table.rows if row.name == "original"), None)
    in_fp32 = " in fp32" if table.precision != "fp32" else ""
    cards = [
        {"what": next(iter(ship.figures)), "value": f"{ship.main.value:.2f} %", "note": _drop(ship, original, in_fp32)}
    ]
    for runtime, time in ship.engines.items():
        if time.speedup is not None:
            spread = f"[{time.speedup_low:.2f}, {time.speedup_high:.2f}]" if time.speedup_low is not None else ""
            note = f"{time.ms:.3g} ms; × {spread}{'; unstable, measure again' if time.unstable else ''}"
            cards.append({"what": runtime, "value": f"{time.speedup:.2f}× faster", "note": note})
    if original and original is not ship:
        fewer, smaller = original.flops / ship.flops, original.size_bytes / ship.size_bytes
        cards.append({"what": "#FLOPs", "value": f"{fewer:.2f}× fewer", "note": f"{ship.flops / 1e6:.1f}M"})
        note = texts.short_size(ship.size_bytes)
        cards.append({"what": "size", "value": f"{smaller:.2f}× smaller", "note": note})
    return cards


def _drop(ship: Row, original: Row | None, in_fp32: str) -> str:
    if ship.drop:
        # Signs turned: people read a gain as positive; and nothing has no sign.
        gain, low, high = (round(0 - each, 2) + 0.0 for each in (ship.drop.value, ship.drop.high, ship.drop.low))
        return f"{gain:+.2f} points [{low:+.2f}, {high:+.2f}] against the original{in_fp32}"
    return f"original: {original.main.value:.2f} %" if original and original is not ship else ""


def _engine(table: Table, engine: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    """A line of the latency section; figures that a run of an older version lacks stay blank."""
    summary, memory = engine["samples"]["summary"], engine.get("memory") or {}
    interval, grown = summary["interval_ms"], memory.get("engine_bytes")
    joules = (engine.get("energy") or {}).get("joules_per_run", {})
    return {
        "label": labels[engine["model"]],
        **_mark(table, engine["model"]),
        "runtime": f"{engine['runtime']} {engine['precision']}",
        "median": f"{summary['median_ms']:.4g}",
        "interval": f"[{interval[0]:.4g}, {interval[1]:.4g}]" if interval else "no interval",
        "percentiles": {name: _percentile(summary, name) for name in summary["percentiles_ms"]},
        "runs": summary["n"],
        "load": f"{engine['load_ms']:.4g}",
        "first": f"{engine['first_ms']:.4g}",
        "parts": [f"{name} {value:.4g}" for name, value in (engine.get("clocks_ms") or {}).items()],
        "memory": f"{grown / 2**20:.1f} MB" if grown is not None else "–",
        "energy": [f"{sensor} {1000 * energy:.4g} mJ" for sensor, energy in joules.items()],
    }


def _percentile(summary: Mapping[str, Any], name: str) -> tuple[str, str]:
    """A percentile, and its interval as far as it is known."""
    ends = summary.get("percentile_intervals_ms", {}).get(name) or (None, None)
    low, high = ("…" if end is None else f"{end:.4g}" for end in ends)
    return f"{summary['percentiles_ms'][name]:.4g}", f"[{low}, {high}]" if ends != (None, None) else ""


def _warnings(
    engines: Sequence[Mapping[str, Any]], models: Sequence[Mapping[str, Any]], labels: Mapping[str, str]
) -> dict[str, list[str]]:
    """What is to be known about times, and of which engines, or of which passes in torch."""
    timed = [(each, each["runtime"], each["samples"]["summary"]) for each in engines]
    timed += [(each, f"torch, {part}", each[part]["summary"]) for each in models for part in ("forward", "backward")]
    found: dict[str, list[str]] = {}
    for each, where, summary in timed:
        invalid = [f"invalid because {reason}" for reason in summary.get("invalid", [])]
        for note in [*invalid, *summary["warnings"]]:
            found.setdefault(note, []).append(f"{labels[each['model']]} on {where}")
    return found


def _prunings(folder: Path, table: Table) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of every pruning that the table has rows of which one it is, if there are several, and its report."""
    rows = {row.name for row in table.rows}
    for path in sorted(folder.glob("prune*/report.json")):
        method = path.parent.name.removeprefix("prune").removesuffix("-there")
        there = path.parent.name.endswith("-there")
        if (method and f"conv{method}" not in rows and not there) or (there and "pruned-there" not in rows):
            continue  # of an earlier build in the same folder
        yield _pruning(path.parent.name), _json(path) or {}


def _budgets(folder: Path, table: Table) -> Iterator[dict[str, Any]]:
    """Of every pruning for a budget of time: what was asked for, and what was tried for it."""
    for title, pruned in _prunings(folder, table):
        if not (found := pruned.get("timing")):
            continue
        where = f"{found['runtime']} in {found['precision']}, threads: {found['threads']}"
        asked = found["latency"] or f"{found['speedup']} faster"
        if "device" in found:
            where += ", on the device"
        rows = [
            {
                "what": "all filters" if not number else f"trial {number}",
                "predicted": f"{trial['predicted_ms']:.4g}",
                "ms": f"{trial['ms']:.4g}",
                "original": f"{trial['original_ms']:.4g}",
                "faster": _ratio(trial["speedup"], trial["low"], trial["high"]),
                "notes": "; ".join((*trial.get("warnings", ()), *(() if number else found.get("doubts", ())))),
                "best": trial == found["best"],
            }
            for number, trial in enumerate(found["trials"])
        ]
        yield {"title": title, "asked": asked, "where": where, "rows": rows}


def _ratio(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.3g}" if low is None or high is None else f"{value:.3g} [{low:.3g}, {high:.3g}]"


def _widths(folder: Path, table: Table) -> Iterator[dict[str, Any]]:
    """Of every pruning its layers, with filters before and after as shares of the widest layer."""
    for title, found in _prunings(folder, table):
        layers = found.get("layers", [])
        widest = max((layer["before"] for layer in layers), default=1)
        rows = [
            {
                "name": layer["producer"],
                "before": layer["before"],
                "after": layer["after"],
                "share": f"{100 * layer['after'] / layer['before']:.0f} %",
                "wide": 100 * layer["before"] / widest,
                "kept": 100 * layer["after"] / layer["before"],
            }
            for layer in layers
        ]
        if rows:
            yield {"title": title, "rows": rows, "whole": dict(found.get("whole", {}))}


def _pruning(stage: str) -> str:
    """Which of several prunings a stage is: by another method, or on the images that were transferred to."""
    method = stage.removesuffix("-there").partition("-")[2]
    return ", ".join([f"by {method}"] * bool(method) + ["FT & prune"] * stage.endswith("-there"))


def _layers(folder: Path, table: Table) -> Iterator[dict[str, Any]]:
    """For each runtime the layers' times in the original and in the network that ships, as shares of the longest."""
    ship = table.shipped
    marks = [_mark(table, name) for name in ("original", ship.name)] if ship.name != "original" else []
    for runtime, found in (_json(folder / "latency" / "layers.json") or {}).items():
        dense, thin = (found.get(name, {}) for name in ("original", ship.name))
        if not (dense and thin and marks):
            continue
        if _has_new_head(folder, ship.name):
            thin = {name + ", new head" * name.startswith("classifier."): ms for name, ms in thin.items()}
        longest = max(*dense.values(), *thin.values())
        names = sorted(dict.fromkeys([*dense, *thin]), key=lambda name: name == OTHERS)
        rows = [_layer(name, dense.get(name), thin.get(name), longest) for name in names]
        yield {"runtime": runtime, "rows": rows, "labels": ["Original", ship.label], "marks": marks}


def _has_new_head(folder: Path, network: str) -> bool:
    """Whether a network's `classifier` is not the original's (ThiNet-GAP): their layers share no more than names."""
    stage = "thin-there" if network == "transferred" else network  # all others stand in folders of their own names
    return bool((_json(folder / stage / "plan.json") or {}).get("head"))


def _layer(name: str, dense: float | None, thin: float | None, longest: float) -> dict[str, Any]:
    """A line; a dash where the one network has no such layer."""
    faster = f"{dense / thin:.2f}×" if dense and thin else "–"
    shown = [f"{ms:.4f}" if ms else "–" for ms in (dense, thin)]
    return {"name": name, "ms": shown, "faster": faster, "bars": [100 * (ms or 0) / longest for ms in (dense, thin)]}


def _entry(table: Table, entry: Any) -> dict[str, Any]:
    """A line of the ledger with its interval's place on a scale that all lines share."""
    lowest, main = min(each.main.low for each in table.ledger), entry.main
    floor = max(0.0, lowest - 0.05 * (100 - lowest) - 0.5)
    at, left, right = (100 * (each - floor) / (100 - floor) for each in (main.value, main.low, main.high))
    title = ledger.headline(entry, {each.images for each in table.ledger})
    return {**vars(entry), "headline": title, "main": main, "at": at, "left": left, "width": right - left}


def _flat(data: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """A fingerprint as lines: nested names with dots, lists with commas; what is not known is left out."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _flat(value, f"{name}.{key}" if name else key)
    elif isinstance(data, list):
        if data and isinstance(data[0], dict):
            for index, value in enumerate(data):
                yield from _flat(value, f"{name}.{index}")
        elif data:
            yield name, ", ".join(map(str, data))
    elif data is not None:
        yield name, str(data)
