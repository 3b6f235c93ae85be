"""`thinet-deploy targets` and `doctor`: what can be built for, and what works on this machine."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from .options import Json
from .tables import grid, print_json, stdout


def targets(
    name: Annotated[str | None, typer.Argument(help="Show everything about one target.")] = None,
    as_json: Json = False,
) -> None:
    """The targets that --target knows, and what is known about them, with sources.

    [bold]thinet-deploy targets jetson[/bold] prints everything about one of them as JSON.
    """
    from ..target import load_profile, profile_names

    if name:
        print_json(load_profile(name).model_dump(mode="json", exclude_none=True))
        return
    profiles = [load_profile(each) for each in profile_names()]
    if as_json:
        print_json([profile.model_dump(mode="json", exclude_none=True) for profile in profiles])
        return
    table = grid("target", "also called", "engines", "runtimes, in order", "precision", wrap=("runtimes, in order",))
    for profile in profiles:
        where = "on device" if profile.builds_on_device else "made here"
        runtimes, precision = ", ".join(profile.runtimes), profile.precisions.recommended
        table.add_row(profile.id, "\n".join(profile.aliases), where, runtimes, precision)
    stdout().print(table)


def doctor(as_json: Json = False) -> None:
    """What works on this machine, what is missing, and how to get it.

    [bold]thinet-deploy doctor --json[/bold] prints it for a program.
    """
    from ..environment import doctor as examine

    checks = examine()
    if as_json:
        print_json([vars(check) for check in checks])
        return
    table = grid("", "what", "found", "what to do", wrap=("found", "what to do"))
    marks = {"ok": "[green]✓[/green]", "missing": "[yellow]–[/yellow]", "note": " "}
    for check in checks:
        table.add_row(marks[check.status], check.name, escape(check.found), escape(check.advice))
    stdout().print(table)
