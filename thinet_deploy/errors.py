"""Every error a user can meet, and the exit code it ends with.

    ThinetDeployError
    ├── InputError             exit 2   what the user gave is wrong
    │   ├── DataError                   images, folders, preprocessing
    │   ├── ModelError                  a network that cannot be built or pruned as asked
    │   ├── WeightsError                a weights file that does not fit, or is not safe to read
    │   ├── TargetError                 a target profile that does not hold, or a build it cannot take
    │   ├── BundleError                 a bundle that is damaged or is none
    │   ├── ConversionError             a network that a toolchain cannot turn into an engine
    │   ├── OutputError                 an output folder that cannot be written, or a full disk
    │   └── UnknownNameError            no such model, target, option …: the nearest name is offered
    ├── GateError              exit 1   a parity, precision or budget gate failed
    ├── MissingError           exit 3   the environment lacks a runtime or tool
    └── DeviceError            exit 3   a device that cannot be reached, went away, or has no room

A message says what happened and what was expected; `hint` says what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What to do about a network that computes NaN or infinity, wherever that shows.
NOT_FINITE = "The weights are damaged, or training diverged: check --weights, or lower --lr."


def first_line(error: BaseException) -> str:
    """What an exception of a library or of the user's code says, in one line; its type where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class ThinetDeployError(Exception):
    """Base of all errors meant for the user; shown as one message, never as a traceback.

    Args:
        what: what happened and what was expected, in whole sentences.
        hint: what to do next.
    """

    exit_code = 2

    def __init__(self, what: str, *, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}\n{self.hint}" if self.hint else self.what


class InputError(ThinetDeployError):
    """What the user gave is wrong."""


class DataError(InputError):
    """Images, folders or preprocessing that cannot be used."""


class ModelError(InputError):
    """A network that cannot be built, or not be pruned as asked."""


class WeightsError(InputError):
    """A weights file that does not fit the network, or is not safe to read."""


class TargetError(InputError):
    """A target profile that does not hold, or a build that the target cannot take."""


class BundleError(InputError):
    """A bundle that is damaged, incomplete or none at all."""


class ConversionError(InputError):
    """A toolchain refused the network, crashed on it or took too long; the hint names the log."""


class OutputError(InputError):
    """An output folder that cannot be written, or a full disk."""


class UnknownNameError(InputError):
    """A name that is not known; the nearest known one is offered.

    Args:
        kind: what the name stands for, such as "model" or "target".
        name: what was given.
        known: the names that exist.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        super().__init__(
            f"There is no {kind} called {name!r}.",
            hint=(f"Did you mean {near[0]!r}? " if near else "") + f"Known: {', '.join(names)}.",
        )


class DivergedError(ThinetDeployError):
    """Training that left the finite numbers; the last checkpoint is not touched."""


class GateError(ThinetDeployError):
    """A parity, precision or budget gate failed; the results are kept, the build is not passed."""

    exit_code = 1


class MissingError(ThinetDeployError):
    """The environment lacks a runtime or a tool; the hint says how to get it."""

    exit_code = 3


class DeviceError(ThinetDeployError):
    """A device that cannot be reached, went away or has no room; what it has finished is kept there."""

    exit_code = 3
