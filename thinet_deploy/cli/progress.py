"""Progress on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn


@contextmanager
def bars(console: Console) -> Iterator[Callable[..., None]]:
    """One line per finished stage; on a terminal also a bar with the time left for each stage in flight.

    Meanwhile what the user's own code prints goes to stderr: stdout is for the result.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),  # as wide as the others leave it
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
    )
    running = Progress(*columns, console=console, disable=not console.is_terminal, redirect_stdout=False)
    tasks: dict[str, TaskID] = {}

    def report(stage: str, done: int, total: int, note: str = "") -> None:
        if done < total:
            if stage not in tasks:
                tasks[stage] = running.add_task(stage, total=total, completed=done, note=note)
            running.update(tasks[stage], completed=done, note=note)
            return
        if stage in tasks:
            running.remove_task(tasks.pop(stage))
        console.print(f"{stage}: done{f' ({note})' if note else ''}", markup=False, highlight=False, soft_wrap=True)

    with running, redirect_stdout(sys.stderr):
        yield report
