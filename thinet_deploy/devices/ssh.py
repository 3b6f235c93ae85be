"""A machine that the system's OpenSSH reaches. Host keys are checked as the user's own configuration says.

ssh gets an address behind `--`, and the words of a command quoted for the shell on the other side.
"""

from __future__ import annotations

import atexit
import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from ..errors import DeviceError, InputError, MissingError
from .device import AGAIN, NOT_THERE, Commands, Done

# No questions, which nobody could answer: keys and known hosts have to be there. A dead line is noticed after 30 s.
_SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
# One connection carries all commands, and closes some seconds after the last.
_SHARED = ("-o", "ControlMaster=auto", "-o", "ControlPersist=10")
_LONGEST_FOLDER = 40  # a socket's whole path has 104 characters at most; ssh adds 58
_ALIVE = ("-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3")
_SSH_FAILED = 255
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_ADDRESS = re.compile(rf"ssh://(?:({_NAME})@)?(?:({_NAME})|\[([0-9A-Fa-f:.]+)\])(?::([0-9]{{1,5}}))?/?")


@cache
def _sockets() -> str:
    """A folder for the sockets of connections, which only this user may enter; it goes with this process."""
    folder = tempfile.TemporaryDirectory(prefix="thinet-deploy-")
    atexit.register(folder.cleanup)
    return folder.name


@dataclass(frozen=True)
class Ssh(Commands):
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

    def check(self, done: Done) -> Done:
        """Ssh itself ends with 255; why, it says in words."""
        if done.code == NOT_THERE:
            raise MissingError("There is no ssh on this machine.", hint="Install it: apt install openssh-client")
        if done.code == _SSH_FAILED:
            raise self._explained(done.err)
        return done

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


def ssh_device(address: str) -> Ssh:
    """The device of an address ssh://user@host:port.

    Raises:
        InputError: it is no such thing.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match[4] or 1) not in range(1, 65536):
        raise InputError(
            f"--device is {address!r}, but ssh://user@host:port or adb:SERIAL was expected.",
            hint="User and port may be left out; no password and no path belong there. For another key or a jump host: "
            "a Host in ~/.ssh/config, and --device ssh://HOST.",
        )
    return Ssh(match[2] or match[3], match[1] or "", int(match[4] or 0))
