"""What run.py found, as people read it. Python 3.8 alone: a copy lies beside run.py in every bundle."""

from __future__ import annotations

from typing import Any, Iterable, Mapping

from .self_test import PASSED


def _engine_lines(row: Mapping[str, Any], text: str, notes: Iterable[str]) -> list[str]:
    name = f"{row['runtime']} {row['precision']}"
    return [f"{name:<18}{text}".rstrip(), *(f"{'':<18}{note}" for note in notes if note)]


def verify_text(report: Mapping[str, Any]) -> str:
    """The report of `verify` as people read it."""
    files, rows = report["files"], report["engines"]
    good = files["listed"] - len(files["missing"]) - len(files["changed"])
    lines = [f"{report['model']} for {report['target']}, made by {report['created_by']}"]
    lines += [f"{good} of {files['listed']} files are as the manifest says"]
    lines += [f"  {kind}: {', '.join(files[kind])}" for kind in ("missing", "changed", "extra") if files[kind]]
    for row in rows:
        figures = (
            [f"error {row['max_relative_error']:.1e} of scale (allowed {row['tolerance']:g})"]
            if "max_relative_error" in row
            else []
        )
        figures += [f"top-1 agrees in {row['top1_agreement']:.0%}"] if "top1_agreement" in row else []
        executed = row.get("describe", {}).get("executed_layers", {})
        figures += [f"layers run in {kind}: {count}" for kind, count in sorted(executed.items())]
        lines += _engine_lines(row, f"{row['verdict']:<9}{', '.join(figures)}", [row["reason"]])
    passed = sum(row["verdict"] == PASSED for row in rows)
    verdicts = {
        0: f"PASSED: {passed} of {len(rows)} engines ran here and gave the golden outputs.",
        1: "FAILED: do not ship this bundle. Copy it again, or build it again.",
        3: f"NOT VERIFIED: the files are whole, but none of {len(rows)} engines could run here.",
    }
    return "\n".join([*lines, *(f"note: {note}" for note in report["notes"]), verdicts[report["exit_code"]]])


def latency_text(report: Mapping[str, Any]) -> str:
    """The report of `latency` as people read it."""
    pace = "{fps:g} a second".format(**report) if report["fps"] else "back to back"
    lines = ["{model} on {processor}, batch {batch}, threads {threads}".format(**report)]
    lines += [f"milliseconds per run; 95 % interval; engines in turn, one process each, runs {pace}"]
    for row in report["engines"]:
        text, notes = row["verdict"], [row["reason"]]
        if row["verdict"] == PASSED:
            text, notes = latency_words(row), latency_notes(row)
        lines += _engine_lines(row, text, notes)
    return "\n".join(lines)


def latency_words(row: Mapping[str, Any]) -> str:
    """One engine's figures in a line: median, interval, percentiles, load, first run, parts, memory, energy."""
    summary, memory = row["summary"], row["memory"]
    known = {"min": summary["min_ms"], **summary["percentiles_ms"], "load": row["load_ms"], "first": row["first_ms"]}
    known.update(row["clocks_ms"])
    text = f"median {summary['median_ms']:.4g}"
    if summary["interval_ms"]:
        text += " [{:.4g} .. {:.4g}]".format(*summary["interval_ms"])
    text += "".join(f"  {name} {value:.4g}" for name, value in known.items()) + f"  ({summary['n']} runs)"
    if memory["engine_bytes"] is not None:
        text += f"  memory {memory['engine_bytes'] / 2**20:.1f} MB"
    joules = row["energy"]["joules_per_run"] if row["energy"] else {}
    return text + "".join(f"  {sensor} {1000 * energy:.4g} mJ" for sensor, energy in joules.items())


def latency_notes(row: Mapping[str, Any]) -> list[str]:
    """What has to be known beside an engine's figures."""
    summary, graph = row["summary"], row.get("describe", {}).get("cuda_graph", "")
    slower = [f"launched kernel by kernel, for it is no CUDA graph: {graph[4:]}"] if graph.startswith("no: ") else []
    return [*(f"INVALID because {reason}" for reason in summary["invalid"]), *summary["warnings"], *slower]
