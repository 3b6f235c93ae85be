"""Machines that engines run on: this one, or one that the system's OpenSSH reaches.

A device runs commands and takes and gives files; what to do with it is said in device_stage.py. Names and paths reach a
remote shell in single quotes only, and ssh behind `--`. Host keys are checked as the user's own configuration says.
"""

from __future__ import annotations

import atexit
import posixpath
import re
import shlex
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Protocol

from .errors import DeviceError, InputError, MissingError

Line = Callable[[bytes], None]

AGAIN = "Run the same command again: it goes on where it was."
# No questions, which nobody could answer: keys and known hosts have to be there. A dead line is noticed after 30 s.
_SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
# One connection carries all commands, and closes some seconds after the last.
_SHARED = ("-o", "ControlMaster=auto", "-o", "ControlPersist=10")
_LONGEST_FOLDER = 40  # a socket's whole path has 104 characters at most; ssh adds 58
_ALIVE = ("-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3")
_SSH_FAILED = 255
NOT_THERE = -127  # no shell's code: it was a program of this machine
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_ADDRESS = re.compile(rf"ssh://(?:({_NAME})@)?(?:({_NAME})|\[([0-9A-Fa-f:.]+)\])(?::([0-9]{{1,5}}))?/?")
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


class _Commands(ABC):
    """Files go through commands, whichever way these take."""

    @property
    @abstractmethod
    def name(self) -> str:
        """See `Device`."""

    @abstractmethod
    def argv(self, command: Sequence[str]) -> list[str]:
        """What is executed on this machine to have `command` executed on the device."""

    @abstractmethod
    def check(self, done: Done) -> None:
        """Raise DeviceError when it was the way there that failed."""

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
                done = Done(NOT_THERE, b"", f"{argv[0]}: not found")
                self.check(done)
                return done
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
        self.check(done)
        return done

    def push(self, source: Path, target: str) -> None:
        """See `Device`."""
        size, folder = str(source.stat().st_size), posixpath.dirname(target)
        with source.open("rb") as stream:
            done = self._run(["env", "LC_ALL=C", "sh", "-c", _TAKE, "sh", target, folder, size], stream)
        if done.code:
            raise _file_error(self.name, f"{target} could not be written there", done)

    def pull(self, source: str, target: Path) -> None:
        """See `Device`."""
        done = self.run(["env", "LC_ALL=C", "cat", "--", source])
        if done.code:
            raise _file_error(self.name, f"{source} could not be read there", done)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.partial")
        partial.write_bytes(done.out)
        partial.replace(target)


class Local(_Commands):
    """This machine."""

    @property
    def name(self) -> str:
        """As people say."""
        return "this machine"

    def argv(self, command: Sequence[str]) -> list[str]:
        """The command itself."""
        return list(command)

    def check(self, done: Done) -> None:
        """There is no way that could fail."""


@cache
def _sockets() -> str:
    """A folder for the sockets of connections, which only this user may enter; it goes with this process."""
    folder = tempfile.TemporaryDirectory(prefix="thinet-deploy-")
    atexit.register(folder.cleanup)
    return folder.name


@dataclass(frozen=True)
class Ssh(_Commands):
    """A machine that the system's ssh reaches, as the user's ~/.ssh/config says.

    Attributes:
        host: name or address, or a Host of that file.
        user: to log in as; "" for what that file says.
        port: 0 for what that file says.
    """

    host: str
    user: str = ""
    port: int = 0

    @property
    def name(self) -> str:
        """Its address."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ssh://{self.user}{'@' if self.user else ''}{host}{f':{self.port}' if self.port else ''}"

    def argv(self, command: Sequence[str]) -> list[str]:
        """Ssh, with the command quoted for the shell behind it."""
        shared = [*_SHARED, "-o", f"ControlPath={_sockets()}/%C"] if len(_sockets()) <= _LONGEST_FOLDER else []
        return [*_SSH, *_ALIVE, *shared, *self._where(), shlex.join(command)]

    def _where(self) -> list[str]:
        user, port = ["-l", self.user] if self.user else [], ["-p", str(self.port)] if self.port else []
        return [*user, *port, "--", self.host]

    def check(self, done: Done) -> None:
        """Ssh itself ends with 255; why, it says in words."""
        if done.code == NOT_THERE:
            raise MissingError("There is no ssh on this machine.", hint="Install it: apt install openssh-client")
        if done.code == _SSH_FAILED:
            raise self._explained(done.err)

    def _explained(self, words: str) -> DeviceError:
        hand = " ".join(["ssh", *self._where()]).replace(" -- ", " ")
        said = [line for line in words.splitlines() if line.strip()] or ["ssh gave no reason"]
        for pattern, what, hint in _REASONS:
            if re.search(pattern, words):
                return DeviceError(what.format(name=self.name, said=said[-1]), hint=hint.format(hand=hand))
        return DeviceError(f"The connection to {self.name} was cut: {said[-1].strip()}", hint=AGAIN)


_REASONS = (
    (
        "IDENTIFICATION HAS CHANGED",
        "{name} shows another host key than the one that is known for it, so nothing was sent there.",
        (
            "Either it was set up anew, or it is another machine. Compare its fingerprint at the device itself; if it "
            "is right, remove the old one with `ssh-keygen -R` and connect once by hand: {hand}"
        ),
    ),
    (
        "Host key verification failed",
        "The host key of {name} is not known here, so nothing was sent there.",
        "Connect once by hand, and compare the fingerprint with the device's own: {hand}",
    ),
    (
        "Permission denied|Too many authentication failures",
        "{name} does not let this user in with a key: {said}",
        (
            "Passwords are not asked for. Check the user's name, and that this works by hand without one: {hand} "
            "(`ssh-copy-id` brings your key there)."
        ),
    ),
    (
        "Could not resolve hostname",
        "There is no host of that name: {said}",
        "Check the name in --device, or give the address instead.",
    ),
    (
        "Connection refused|No route to host|[Tt]imed out|Network is unreachable|Connection closed by .* port",
        "{name} cannot be reached: {said}",
        "Check that it is switched on, in the same network, and that its ssh server listens on that port: {hand}",
    ),
)


def _file_error(name: str, what: str, done: Done) -> DeviceError:
    if "No space left on device" in done.err or "Disk quota exceeded" in done.err:
        return full_disk(name)
    said = done.err.strip().splitlines()
    return DeviceError(f"{name}: {what}: {said[-1] if said else 'it came only in part'}.", hint=AGAIN)


def full_disk(name: str) -> DeviceError:
    """The error for a device without room."""
    return DeviceError(
        f"The disk of {name} is full.",
        hint="Free some space there (older bundles lie in ~/.cache/thinet-deploy) and run the same command again: what "
        "is there is not sent twice.",
    )


def find_device(address: str) -> Device:
    """The device of an address: "local" or "ssh://user@host:port".

    Raises:
        InputError: it is no such thing.
    """
    if address == "local":
        return Local()
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match[4] or 1) not in range(1, 65536):
        raise InputError(
            f"--device is {address!r}, but ssh://user@host:port was expected.",
            hint="User and port may be left out; no password and no path belong there. For another key or a jump host: "
            "a Host in ~/.ssh/config, and --device ssh://HOST.",
        )
    return Ssh(match[2] or match[3], match[1] or "", int(match[4] or 0))
