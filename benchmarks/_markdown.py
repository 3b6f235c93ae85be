"""Tables in Markdown, for the pages that benchmarks write."""

from __future__ import annotations

from typing import Any


def head(first: str, columns: list[str]) -> tuple[str, str]:
    """The two lines above a table's rows."""
    return line(first, columns), "|---|" + "---:|" * len(columns)


def line(first: str, cells: list[str]) -> str:
    """A row."""
    return f"| {first} | " + " | ".join(cells) + " |"


def top1(row: dict[str, Any] | None) -> str:
    """A judged network's accuracy; empty where there is none."""
    return f"{row['top1']['value']:.2f}" if row else ""
