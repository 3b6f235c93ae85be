"""How a command that failed says so: what happened and what to do, never a traceback for a mistake of the user's."""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import InputError, ThinetDeployError, UnknownNameError
from .tables import print_json


def show_error(console: Console, error: ThinetDeployError) -> int:
    """What happened and what to do on stderr, and with --json also as the one document on stdout; the exit code."""
    if "--json" in sys.argv:
        print_json({"error": error.what, "hint": error.hint, "exit_code": error.exit_code})
    # Without emoji: rich would read "adb:X:" as a cross.
    console.print(f"[bold red]Error:[/bold red] {escape(error.what)}", soft_wrap=True, highlight=False, emoji=False)
    if error.hint:
        console.print(error.hint, soft_wrap=True, highlight=False, markup=False, emoji=False)
    return error.exit_code


def usage_error(error: typer.TyperException) -> ThinetDeployError:
    """Typer's own complaint about a command line, in our form; for an unknown option with the nearest name."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "thinet-deploy"
    if context and hasattr(error, "possibilities"):  # typer's NoSuchOption, a private class
        options = [name for param in context.command.params for name in param.opts if name.startswith("--")]
        return UnknownNameError(f"option of `{command}`", str(getattr(error, "option_name", "")), options)
    return InputError(error.format_message().replace("Value error, ", ""), hint=f"See `{command} --help`.")
