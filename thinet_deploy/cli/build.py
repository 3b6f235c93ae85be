"""What `thinet-deploy build` prints: the table, the way there, the verdicts, and where everything is."""

from __future__ import annotations

from shlex import quote
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from .compare import exit_on_broken, show_verdicts
from .device import show_device, without_samples
from .tables import print_json

if TYPE_CHECKING:
    from ..stages.deployment import Build


def show_build(console: Console, done: Build, *, as_json: bool) -> None:
    """What a build left, for people or as one JSON document; ends with 1 where a requirement is not met."""
    if as_json:
        _print_json(done)
    else:
        _show(console, done)
    exit_on_broken(done.verdicts)


def _print_json(done: Build) -> None:
    print_json(
        {
            "run": str(done.run),
            "bundle": str(done.bundle),
            "table": done.table.to_json(),
            "parity": [vars(hop) for hop in done.hops],
            "notes": list(done.notes),
            "contract": [vars(verdict) for verdict in done.verdicts],
            **({"device": without_samples(done.device)} if done.device else {}),
        }
    )


def _show(console: Console, done: Build) -> None:
    from ..reports.hops import render_hops
    from ..reports.ledger import render_ledger
    from ..reports.texts import render

    console.print(render([done.table], console.width))
    console.print(render_ledger(done.table.ledger))
    console.print(render_hops(done.hops, done.table))
    typer.echo(f"\nBundle: {done.bundle}   (check it anywhere: python {quote(f'{done.bundle}/run.py')})")
    typer.echo(f"Report: {done.run / 'report' / 'report.html'}")
    if done.device:
        show_device(done.device)
    for note in done.notes:
        typer.echo(note)
    show_verdicts([("", verdict) for verdict in done.verdicts])
