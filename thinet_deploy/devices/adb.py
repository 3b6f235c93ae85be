"""An Android device that the system's adb reaches, over USB or the network.

adb gets the serial as a word of its own, and the words of a command quoted for the shell on the device. When a device
is unplugged, adb ends as if the command had ended well; so every command says at its end that it has.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import DeviceError, InputError, MissingError
from .device import AGAIN, NOT_THERE, Commands, Done

PREFIX = "adb:"
PLACE = "/data/local/tmp/thinet-deploy"
"""Where the shell of any Android device may write and run programs."""
_SERIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")
# Of the command's own words none are on this line: it is the last one.
_END = "thinet-deploy: ended with "
_ENDED = re.compile(rf"(?:\A|\n){_END}(\d+)\r?\n\Z")
_BY_SIGNAL = 128  # and above: what a shell makes of a signal


@dataclass(frozen=True)
class Adb(Commands):
    """An Android device.

    Attributes:
        serial: as `adb devices` has it; "" for the only one.
    """

    place = PLACE
    serial: str = ""

    @property
    def name(self) -> str:
        """Its address."""
        return PREFIX + self.serial

    def argv(self, command: Sequence[str]) -> list[str]:
        """Adb, with the command quoted for the device's shell; -T: bytes go through as they are."""
        which = ["-s", self.serial] if self.serial else []
        return ["adb", *which, "shell", "-T", f"{shlex.join(command)}; echo '\n{_END}'$? >&2"]

    def check(self, done: Done) -> Done:
        """The command's own code and words; without its end it was adb that failed, or the cable."""
        if done.code == NOT_THERE:
            raise MissingError(
                "There is no adb on this machine.",
                hint="Install it: apt install adb, or the platform tools of Android's SDK.",
            )
        if ended := _ENDED.search(done.err):
            code = int(ended[1])
            code = code if code <= _BY_SIGNAL else _BY_SIGNAL - code
            return replace(done, code=code, err=done.err[: ended.start()])
        raise self._explained(done.err)

    def _explained(self, words: str) -> DeviceError | InputError:
        said = [line.strip() for line in words.splitlines() if line.strip() and not line.startswith("*")]
        for pattern, kind, what, hint in _REASONS:
            if re.search(pattern, words):
                return kind(what.format(name=self.name, said=(said or [""])[0]), hint=hint)
        return DeviceError(
            f"The connection to {self.name} was cut: {said[-1] if said else 'adb gave no reason'}",
            hint=f"Check the cable, and that `adb devices` lists it. {AGAIN}",
        )


_REASONS: tuple[tuple[str, type[DeviceError | InputError], str, str], ...] = (
    (
        "unauthorized|still authorizing",
        DeviceError,
        "{name} has not allowed this computer to debug it.",
        "Unlock its screen and confirm the question there. If there is none: `adb kill-server`, and connect it again.",
    ),
    (
        "no permissions|insufficient permissions",
        DeviceError,
        "This user may not use the USB device of {name}: {said}",
        "Install the rules for Android devices (apt install android-sdk-platform-tools-common), and connect it again.",
    ),
    (
        "device offline",
        DeviceError,
        "{name} is offline.",
        "Connect it again, or restart it; `adb devices` should then say `device` behind it.",
    ),
    (
        "more than one device",
        InputError,
        "Several Android devices are connected, and adb: does not say which.",
        "`adb devices` lists their serials: --device adb:SERIAL.",
    ),
    (
        "no devices",
        DeviceError,
        "No Android device is connected.",
        "Switch on USB debugging in its developer options and connect it; `adb devices` should list it.",
    ),
    (
        r"device '[^\n]*' not found|unknown host service",
        DeviceError,
        "{name} is not connected.",
        "`adb devices` lists those that are. A device in the network first needs `adb connect ADDRESS`.",
    ),
    (
        "cannot connect to daemon|failed to start daemon|failed to check server version",
        DeviceError,
        "adb does not start its server: {said}",
        "`adb start-server` by hand says more.",
    ),
    (
        "doesn't support PTY|unknown option -T|shell_v2",
        DeviceError,
        "{name} is too old for this: {said}",
        "Android 8 or later is needed.",
    ),
)


def adb_device(address: str) -> Adb:
    """The device of an address adb:SERIAL, or adb: for the only one.

    Raises:
        InputError: it is no such thing.
    """
    serial = address.removeprefix(PREFIX)
    if serial and not _SERIAL.fullmatch(serial):
        raise InputError(
            f"--device is {address!r}, but adb:SERIAL was expected.",
            hint="`adb devices` lists the serials: letters, digits, dots, colons and dashes. adb: alone stands for the "
            "only device.",
        )
    return Adb(serial)
