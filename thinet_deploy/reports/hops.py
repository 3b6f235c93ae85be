"""The parity ledger, for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from ..verify import Hop
from .table import Table


def render_hops(hops: Sequence[Hop], table: Table) -> RenderableType:
    """The parity ledger: a verdict on every hop, network by network with the table's names."""
    grid, labels = Grid.grid(padding=(0, 1, 0, 0)), {row.name: row.label for row in table.rows}
    for name, label in labels.items():
        own = [hop for hop in hops if hop.model == name]
        if own:
            grid.add_row(Text(label, style="bold"))
        for hop in own:
            verdict = Text("passed", style="green") if hop.passed else Text("FAILED", style="bold red")
            grid.add_row(f"  {hop.hop}", verdict, _figures(hop))
    return Group(f"\nParity, hop by hop: {sum(hop.passed for hop in hops)} of {len(hops)} passed", grid)


def _figures(hop: Hop) -> str:
    parts = []
    if hop.error is not None and hop.tolerance is not None:
        error = float(hop.error)
        parts.append(f"error {error:.1e} {'≤' if error <= hop.tolerance else '>'} {hop.tolerance:.1e}")
    if hop.agreement is None:
        parts.append(f"{hop.images} images, {hop.detail}" if hop.images else hop.detail)
    else:
        parts.append(f"same top-1 {round(hop.agreement * hop.images / 100)}/{hop.images}")
    return ", ".join(parts)
