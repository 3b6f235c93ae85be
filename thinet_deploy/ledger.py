"""The accuracy ledger: what every step of the way cost or gave, beside the controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from .intervals import accuracy_interval
from .training import Accuracy


@dataclass(frozen=True)
class Entry:
    """The accuracy of a network after a step; percent, with 95 % Wilson intervals.

    Attributes:
        step: what had been done.
        images: test images.
        top1: share of images whose class is ranked first.
        top1_low: lower end of its interval.
        top1_high: upper end.
        top5: share of images whose class is among the first five.
        top5_low: lower end of its interval.
        top5_high: upper end.
        network: what people read; "" while there is one only.
    """

    step: str
    images: int
    top1: float
    top1_low: float
    top1_high: float
    top5: float
    top5_low: float
    top5_high: float
    network: str = ""

    @classmethod
    def of(cls, step: str, accuracy: Accuracy, network: str = "") -> Entry:
        """From a measured accuracy."""
        first, five = (
            accuracy_interval(round(share * accuracy.images / 100), accuracy.images)
            for share in (accuracy.top1, accuracy.top5)
        )
        return cls(
            step,
            accuracy.images,
            accuracy.top1,
            first.low,
            first.high,
            accuracy.top5,
            five.low,
            five.high,
            network,
        )

    @classmethod
    def read(cls, data: dict[str, Any], network: str = "") -> Entry:
        """From a report, for the network of this name."""
        return cls(**{**data, "network": network or data["network"]})


def render_ledger(entries: Sequence[Entry]) -> RenderableType:
    """The ledger, network by network."""
    grid, last = Grid.grid(padding=(0, 2, 0, 0)), ""
    for entry in entries:
        if entry.network != last:
            grid.add_row(Text(entry.network, style="bold"))
            last = entry.network
        grid.add_row(f"  {entry.step}", *_figures(entry))
    images = entries[0].images if entries else 0
    return Group(f"\nAccuracy, step by step, on {images} test images (95 % intervals)", grid)


def _figures(entry: Entry) -> tuple[str, str]:
    return (
        f"top-1 {entry.top1:.2f} % [{entry.top1_low:.2f}, {entry.top1_high:.2f}]",
        f"top-5 {entry.top5:.2f} % [{entry.top5_low:.2f}, {entry.top5_high:.2f}]",
    )
