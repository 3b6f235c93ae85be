"""A small picture on the terminal: points joined by a line, drawn with characters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

Place = tuple[float, float]


def scatter(
    points: Sequence[Place], marked: Sequence[Place], ticks: Sequence[tuple[float, str]], *, width: int, height: int
) -> list[str]:
    """Lines of text; both axes begin at zero.

    Args:
        points: (x, y), drawn as "o" and joined by dots, in order of x.
        marked: others, drawn as "◆".
        ticks: x, and what to write there; those without room are left out.
        width: columns in all.
        height: rows of the picture, without its lower axis.
    """
    right, top = max(x for x, _ in points), max(y for _, y in (*points, *marked)) or 1.0
    labels = {height - 1: "0 %", (height - 1) // 2: f"{top / 2:.2g} %", 0: f"{top:.3g} %"}
    margin = max(map(len, labels.values())) + 1
    columns = width - margin - 3
    cells = [[" "] * columns for _ in range(height)]

    def put(place: Place, mark: str) -> None:
        x, y = place
        cells[round((1 - y / top) * (height - 1))][round(x / right * (columns - 1))] = mark

    for (x0, y0), (x1, y1) in pairwise(points):
        steps = max(1, round(abs(x1 - x0) / right * columns / 2), round(abs(y1 - y0) / top * height))
        for step in range(1, steps):
            put((x0 + (x1 - x0) * step / steps, y0 + (y1 - y0) * step / steps), "·")
    for place in points:
        put(place, "o")
    for place in marked:
        put(place, "◆")
    lines = [f"{labels.get(row, ''):>{margin}} │{''.join(cell)}".rstrip() for row, cell in enumerate(cells)]
    return [*lines, f"{' ' * margin} └{'─' * columns}", f"{' ' * margin}  {_axis(ticks, right, columns)}".rstrip()]


def _axis(ticks: Sequence[tuple[float, str]], right: float, columns: int) -> str:
    line = [" "] * columns
    for x, text in ticks:
        start = min(max(0, round(x / right * (columns - 1)) - len(text) // 2), columns - len(text))
        around = line[max(0, start - 1) : start + len(text) + 1]
        if not "".join(around).strip():
            line[start : start + len(text)] = text
    return "".join(line)
