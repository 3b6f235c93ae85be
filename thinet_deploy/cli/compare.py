"""`thinet-deploy compare`, and what it shares with `build`: how verdicts on requirements are shown."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from ..errors import InputError, OutputError, first_line
from .options import Json, Require
from .tables import grid

if TYPE_CHECKING:
    from ..reports import comparison
    from ..reports.contract import Verdict
    from ..reports.html import Page
    from ..reports.table import Table

Format = Literal["table", "markdown", "csv", "json", "html"]
BROKEN = 1


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories of finished builds.")],
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Also show everything against this row (original, gap …), run, or RUN/row; as csv only that."
        ),
    ] = None,
    output: Annotated[
        Format, typer.Option("--format", help="How to print it; html is one page that works offline.")
    ] = "table",
    across_machines: Annotated[
        bool, typer.Option("--across-machines", help="Show runs of different machines or threads side by side anyway.")
    ] = False,
    require: Require = None,
    as_json: Json = False,
) -> None:
    """The papers' table of one or more runs, side by side, and differences that are no noise.

    [bold]thinet-deploy compare runs/vgg-50 runs/vgg-30 --format markdown[/bold]
    [bold]thinet-deploy compare runs/vgg-50 runs/vgg-30 --baseline vgg-50 --format html > report.html[/bold]
    [bold]thinet-deploy compare runs/vgg-50 --require "latency<=8ms" --require "top1-drop<=1.0"[/bold]   (exit code 1)
    """
    from ..reports import comparison, contract
    from ..reports.html import Page, read_device
    from ..reports.table import check_machines, with_device

    found = comparison.runs_of(runs)
    devices = [read_device(run.folder) for run in found]
    there = [with_device(run.table, device) for run, device in zip(found, devices, strict=True)]
    if not across_machines:
        check_machines(there)
    everywhere = [replace(run, table=table) for run, table in zip(found, there, strict=True)]
    against = comparison.against(everywhere, baseline) if baseline else None
    pages = [
        Page(run.folder, run.table, tuple(contract.judge(require or (), run.table, device)), device)
        for run, device in zip(found, devices, strict=True)
    ]
    _print("json" if as_json else output, pages, there, against)
    for page in pages:
        if page.verdicts:
            _kept(page)
    exit_on_broken([verdict for page in pages for verdict in page.verdicts])


def _kept(page: Page) -> None:
    """Write the verdicts beside the run; where it cannot be written to, the exit code still says what they are."""
    from ..reports import contract

    try:
        contract.write(page.folder / "compared", page.verdicts)
    except OutputError as error:
        typer.secho(f"The verdicts are not kept: {error.what}", fg=typer.colors.YELLOW, err=True)


Against = tuple[str, list["comparison.Against"]]


def _print(output: Format, pages: Sequence[Page], tables: Sequence[Table], against: Against | None) -> None:
    """On stdout what was asked for; verdicts that have no place in it on stderr.

    Args:
        output: what was asked for.
        pages: of the runs, where times on devices have a section of their own.
        tables: the same, where they have columns.
        against: a comparison with a baseline.
    """
    from ..reports import comparison, contract, texts
    from ..reports import html as html_report

    if output in {"html", "csv", "markdown"} and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # as files have it, whatever the terminal's is
    called = comparison.names_of([page.folder for page in pages])
    names = called if len(pages) > 1 else []
    if output == "json":
        typer.echo(json.dumps(_document(pages, tables, against), indent=1))
    elif output == "html":
        try:
            page = html_report.render(pages, against)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{', '.join(called)}: there is a file that is damaged, or of another version: {first_line(error)}.",
                hint="Run the same build again: what is not whole is made anew.",
            ) from error
        typer.echo(page, nl=False)
    elif output == "csv":
        typer.echo(comparison.to_csv(*against) if against else texts.to_csv(tables, names), nl=False)
    elif output == "markdown":
        parts = [texts.to_markdown(tables, names), comparison.to_markdown(*against) if against else ""]
        parts += [contract.markdown(page.verdicts) for page in pages if page.verdicts]
        typer.echo("\n".join(part for part in parts if part), nl=False)
    else:
        _show(tables, names, against)
    if output in {"table", "csv"}:
        whose = [f"{name}: " for name in names] or [""]
        show_verdicts([(name, each) for name, page in zip(whose, pages, strict=True) for each in page.verdicts])


def _document(pages: Sequence[Page], tables: Sequence[Table], against: Against | None) -> Any:
    """The tables as a list; with a baseline or requirements, an object that also has these."""
    shown = [table.to_json() for table in tables]
    if not (against or any(page.verdicts for page in pages)):
        return shown
    rows = [asdict(each) for each in against[1]] if against else []
    judged = [[asdict(verdict) for verdict in page.verdicts] for page in pages]
    return {"tables": shown, "baseline": against and against[0], "against": rows, "contract": judged}


def _show(tables: Sequence[Any], names: Sequence[str], against: Against | None) -> None:
    from ..reports import comparison, texts

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 180))  # a pipe wide enough that no column is cut
    console.print(texts.render(tables, console.width, names))
    if against:
        name, rows = against
        table = grid(*comparison.header(rows))
        for line in comparison.lines(rows):
            table.add_row(*line)
        console.print(f"Against {name}:", table, comparison.NOTE, highlight=False, markup=False)


def show_verdicts(verdicts: Sequence[tuple[str, Verdict]]) -> None:
    """A line for each on stderr, where it does not disturb a document on stdout."""
    from ..reports.contract import in_words

    colours = {"met": typer.colors.GREEN, "cannot be told apart": typer.colors.YELLOW}
    for name, verdict in verdicts:
        typer.secho(f"{name}{in_words(verdict)}", fg=colours.get(verdict.outcome, typer.colors.RED), err=True)


def exit_on_broken(verdicts: Sequence[Verdict]) -> None:
    """End with exit code 1 when a requirement is broken."""
    if any(verdict.failed for verdict in verdicts):
        raise typer.Exit(BROKEN)
