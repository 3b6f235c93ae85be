"""What pruning over the model zoos shows: two sentences, a table on the screen, docs/zoo.md."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from typing import Any

from _zoo_nets import FAMILIES
from rich.console import Console
from rich.table import Table


def sentence(rows: dict[str, Any]) -> str:
    """The whole in two sentences."""
    verdicts = Counter(row["verdict"] for row in rows.values())
    told = sum(row.get("unexplained") == [] for row in rows.values())
    free = sorted(row["macs_free_share"] for row in rows.values() if "macs_free_share" in row)
    untouched = sum(row.get("groups") == 0 for row in rows.values())
    saved = [row["macs_before"] / row["macs_after"] for row in rows.values() if "macs_after" in row]
    return (
        f"{len(rows)} architectures at keep 0.5: the proof passed on {verdicts['passed']} ({untouched} of these have "
        f"nothing that can go), was wrong on {verdicts['wrong']}; {verdicts['refused']} refused. On {told} of them "
        f"({told / len(rows):.0%}) every layer is free or kept whole for a stated reason. The median share of "
        f"multiply-accumulates in free groups is {statistics.median(free):.1%} (a tenth of the networks have less than "
        f"{free[len(free) // 10]:.0%}); multiply-accumulates fell by a median of {statistics.median(saved):.2f}×."
    )


def cells(name: str, row: dict[str, Any]) -> list[str]:
    """A row of the table as text."""
    size = "×".join(map(str, row["input"][1:]))
    seconds = row.get("graph_seconds", 0) + row.get("surgery_seconds", 0)
    counts = [""] * 3
    if "filters" in row:
        after = f"{row['macs_after'] / 1e6:.0f}" if "macs_after" in row else "–"
        counts = [
            f"{row['filters_free'] / max(1, row['filters']):.0%}",
            f"{row['macs_before'] / 1e6:.0f} → {after}",
            f"{row['macs_free_share']:.0%}",
        ]
    error = f"{row['error']:.0e} ≤ {row['tolerance']:.0e}" if "error" in row else "–"
    if row["verdict"] == "wrong":
        error = error.replace("≤", ">") + f" at {row['place']}"
    return [name, size, row["verdict"], *counts, error, f"{seconds:.1f}", why(row)]


def why(row: dict[str, Any]) -> str:
    """The commonest reasons for whole layers, in short."""
    if "why" in row:
        return f"{row['why']} {row.get('line', '')}".strip()
    parts = [f"{count}× {reason}" for reason, count in list(row["reasons"].items())[:3]]
    return "; ".join(parts) + ("; …" if len(row["reasons"]) > 3 else "")


_HEAD = ["network", "input", "proof", "filters free", "MMAC", "MACs in free groups"]
_HEAD += ["error ≤ tolerance", "s", "layers kept whole"]
_LEGEND = """
Random weights; every group keeps half of its filters, chosen at random, residual streams too (a group that can only
lose certain shares, for instance thirds, keeps the next smaller one).

- *filters free*: of all convolutions and linear layers except the output layers; depthwise ones go with
  their inputs.
- *MMAC*: millions of multiply-accumulates before → after.
- *MACs in free groups*: of weights in the rows and columns of which channels may go.
- *error*: the pruned network against the original with the removed channels cut at the consumers, in float64, on the
  weights and on random ones, at two batch sizes; relative to the largest value at the place where it is closest to its
  tolerance.
- *s*: finding the graph, pruning, checking the second trace; on a CPU that other work shared.

Inputs are small because channels do not depend on their size and the proof is quicker.
"""


def page(rows: dict[str, Any]) -> str:
    """docs/zoo.md."""
    versions = Counter(row["version"] for row in rows.values())
    lines = [
        "# What can go, over the model zoos",
        "",
        "Made by `python benchmarks/zoo.py` from benchmarks/results/zoo.json; do not edit.",
        "",
        sentence(rows),
        "",
        _LEGEND.strip(),
        "",
        f"Code versions behind the rows: {', '.join(f'{key} ({count})' for key, count in versions.most_common())}.",
    ]
    failed = {key: row for key, row in rows.items() if row["verdict"] != "passed" or row.get("unexplained")}
    if failed:
        lines += ["", "## Not proved, or not explained", "", *_markdown(failed)]
    for family, names in FAMILIES.items():
        mine = {key: rows[key] for key in names.split() if key in rows}
        if mine:
            lines += ["", f"## {family}", "", *_markdown(mine)]
    return "\n".join(lines) + "\n"


def _markdown(rows: dict[str, Any]) -> Iterable[str]:
    yield "| " + " | ".join(_HEAD) + " |"
    yield "|" + "---|" * len(_HEAD)
    for name, row in rows.items():
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells(name, row)) + " |"


def show(rows: dict[str, Any]) -> None:
    """A short table on the screen, least free first; docs/zoo.md has the rest."""
    shown = [0, 2, 3, 4, 5, 7]
    table = Table(*(_HEAD[index] for index in shown))
    for name, row in sorted(rows.items(), key=lambda item: item[1].get("macs_free_share", -1)):
        texts = cells(name, row)
        table.add_row(*(texts[index] for index in shown), style="" if row["verdict"] == "passed" else "bold red")
    Console().print(table)
