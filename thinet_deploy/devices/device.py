"""A machine that engines run on: it runs commands and takes and gives files, whatever way leads there.

What to do with it is said in stages/device.py. Names and paths reach a shell in single quotes only.
"""

from __future__ import annotations

import json
import posixpath
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from ..errors import DeviceError
from ..interfaces import Progress

Line = Callable[[bytes], None]

AGAIN = "Run the same command again: it goes on where it was."
NOT_THERE = -127  # no shell's code: it was a program of this machine
# $1: the file, $2: its folder, $3: its size. A connection that is cut ends `cat` as the end of the file does.
_TAKE = 'mkdir -p -- "$2" && cat > "$1.partial" && [ "$(wc -c < "$1.partial")" -eq "$3" ] && mv -- "$1.partial" "$1"'


@dataclass(frozen=True)
class Done:
    """How a command on a device ended."""

    code: int
    out: bytes
    err: str


class Device(Protocol):
    """A machine that runs commands."""

    place: str

    @property
    def name(self) -> str:
        """What people call it."""

    def run(self, command: Sequence[str], stdin: bytes = b"", on_line: Line | None = None) -> Done:
        """Run a program with arguments, wherever a shell may be in between; `on_line` hears its stdout at once.

        Raises:
            DeviceError: the device cannot be reached, or the connection was cut.
        """

    def push(self, source: Path, target: str) -> None:
        """Copy a file there, whole or not at all, into a folder that need not be there.

        Raises:
            DeviceError: as `run`, or the file cannot be written.
        """

    def pull(self, source: str, target: Path) -> None:
        """Copy a file from there, whole or not at all.

        Raises:
            DeviceError: as `run`, or the file cannot be read.
        """


class Commands(ABC):
    """Files go through commands, whichever way these take.

    Attributes:
        place: where bundles lie there, for people.
    """

    place = "~/.cache/thinet-deploy"

    @property
    @abstractmethod
    def name(self) -> str:
        """See `Device`."""

    @abstractmethod
    def argv(self, command: Sequence[str]) -> list[str]:
        """What is executed on this machine to have `command` executed on the device."""

    @abstractmethod
    def check(self, done: Done) -> Done:
        """How the command ended, without what the way there added; DeviceError when it was the way that failed."""

    def run(self, command: Sequence[str], stdin: bytes = b"", on_line: Line | None = None) -> Done:
        """See `Device`."""
        with tempfile.TemporaryFile() as given:
            given.write(stdin)
            given.seek(0)
            return self._run(command, given, on_line)

    def _run(self, command: Sequence[str], given: IO[bytes], on_line: Line | None = None) -> Done:
        argv, lines = self.argv(command), []
        with tempfile.TemporaryFile() as err:
            try:
                process = subprocess.Popen(argv, stdin=given, stdout=subprocess.PIPE, stderr=err)
            except FileNotFoundError:
                return self.check(Done(NOT_THERE, b"", f"{argv[0]}: not found"))
            with process:
                assert process.stdout is not None
                try:
                    for line in process.stdout:
                        lines.append(line)
                        if on_line:
                            on_line(line)
                except BaseException:
                    process.kill()
                    raise
            err.seek(0)
            done = Done(process.returncode, b"".join(lines), err.read().decode("utf-8", "replace"))
        return self.check(done)

    def push(self, source: Path, target: str) -> None:
        """See `Device`."""
        size, folder = str(source.stat().st_size), posixpath.dirname(target)
        with source.open("rb") as stream:
            done = self._run(["env", "LC_ALL=C", "sh", "-c", _TAKE, "sh", target, folder, size], stream)
        if done.code:
            raise file_error(self, f"{target} could not be written there", done)

    def pull(self, source: str, target: Path) -> None:
        """See `Device`."""
        done = self.run(["env", "LC_ALL=C", "cat", "--", source])
        if done.code:
            raise file_error(self, f"{source} could not be read there", done)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.partial")
        partial.write_bytes(done.out)
        partial.replace(target)


class Local(Commands):
    """This machine."""

    @property
    def name(self) -> str:
        """As people say."""
        return "this machine"

    def argv(self, command: Sequence[str]) -> list[str]:
        """The command itself."""
        return list(command)

    def check(self, done: Done) -> Done:
        """There is no way that could fail."""
        return done


def file_error(device: Device, what: str, done: Done) -> DeviceError:
    """The error for a file that could not be copied."""
    if "No space left on device" in done.err or "Disk quota exceeded" in done.err:
        return full_disk(device)
    said = done.err.strip().splitlines()
    return DeviceError(f"{device.name}: {what}: {said[-1] if said else 'it came only in part'}.", hint=AGAIN)


def full_disk(device: Device) -> DeviceError:
    """The error for a device without room."""
    return DeviceError(
        f"The disk of {device.name} is full.",
        hint=f"Free some space there (older bundles lie in {device.place}) and run the same command again: what is "
        "there is not sent twice.",
    )


def json_lines(text: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects among lines; one that was cut off is none."""
    for line in text.splitlines():
        if line.startswith(b"{"):
            try:
                yield json.loads(line)
            except ValueError:
                continue


def heard(stage: str, progress: Progress) -> Line:
    """Reports what a job says of its progress, {"progress": [done, total, note]}, as that of a stage."""

    def hear(line: bytes) -> None:
        for told in json_lines(line):
            if "progress" in told:
                progress(stage, *told["progress"])

    return hear
