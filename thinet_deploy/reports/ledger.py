"""The accuracy ledger: what every step of the way cost or gave, beside the controls."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from ..intervals import Interval
from ..tasks.base import Accuracy, read_figures


@dataclass(frozen=True)
class Entry:
    """The accuracy of a network after a step.

    Attributes:
        step: what had been done.
        images: test images.
        figures: of the task, such as "top-1" → percent with its 95 % interval; the first one decides.
        network: what people read; "" while there is one only.
    """

    step: str
    images: int
    figures: Mapping[str, Interval]
    network: str = ""

    @classmethod
    def of(cls, step: str, accuracy: Accuracy, network: str = "") -> Entry:
        """From a measured accuracy."""
        return cls(step, accuracy.images, accuracy.figures, network)

    @classmethod
    def read(cls, data: dict[str, Any], network: str = "") -> Entry:
        """From a report, for the network of this name."""
        figures, name = read_figures(data["figures"]), network or data["network"]
        return cls(**{**data, "figures": figures, "network": name})

    @property
    def main(self) -> Interval:
        """The figure that decides."""
        return next(iter(self.figures.values()))


def epochs_in_words(number: int) -> str:
    """How steps say how long a training was."""
    return f"{number} epoch" + ("s" if number != 1 else "")


def render_ledger(entries: Sequence[Entry]) -> RenderableType:
    """The ledger, network by network."""
    grid, last, counts = Grid.grid(padding=(0, 2, 0, 0)), "", {entry.images for entry in entries}
    for entry in entries:
        if entry.network != last:
            grid.add_row(Text(headline(entry, counts), style="bold"))
            last = entry.network
        grid.add_row(f"  {entry.step}", *_figures(entry))
    return Group(f"\nAccuracy, step by step{on_images(counts)} (95 % intervals)", grid)


def on_images(counts: Collection[int]) -> str:
    """What a title says of the numbers of test images: nothing where they differ, for then each network does."""
    return f", on {next(iter(counts))} test images" if len(counts) == 1 else ""


def headline(entry: Entry, counts: Collection[int]) -> str:
    """A network's name, with its test images where others have other ones (`counts` of all)."""
    return entry.network if len(counts) == 1 else f"{entry.network}, on {entry.images} test images"


def _figures(entry: Entry) -> tuple[str, ...]:
    return tuple(f"{name} {each.value:.2f} % [{each.low:.2f}, {each.high:.2f}]" for name, each in entry.figures.items())
