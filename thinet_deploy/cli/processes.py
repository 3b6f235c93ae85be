"""Several processes of one command (`torchrun`, `accelerate launch`) speak with one voice."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from rich.console import Console

INTERRUPTED = 130  # the exit code that typer makes of Ctrl-C


def one_voice(console: Console, command: Callable[[], int | None]) -> int | None:
    """Run a command in this process of a launch; only the first one prints.

    When another one fails, it waits before its error is shown: if the first has failed as well, the launcher ends this
    one meanwhile, and the message is there once.

    Args:
        console: where progress goes.
        command: gives the exit code.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return command()
    from ..parallel import PATIENCE_S, leave

    first, code = os.environ.get("RANK", "0") == "0", 1
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere) if not first else nullcontext():
            console.quiet = not first
            code = command() or 0
    finally:
        if code not in {0, INTERRUPTED} and not first:
            time.sleep(PATIENCE_S)
        console.quiet = code == INTERRUPTED and not first  # Ctrl-C reaches all of them
    if not code:
        leave()
    return code
