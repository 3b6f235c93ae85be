"""The command line: one file per command, and what they share. It prints; what lies below does not."""

from .app import main

__all__ = ["main"]
