"""What --device may be: this machine, one that ssh reaches, or one that adb does."""

from __future__ import annotations

from .adb import PREFIX, adb_device
from .device import Device, Local
from .ssh import ssh_device


def find_device(address: str) -> Device:
    """The device of an address: "local", "ssh://user@host:port" or "adb:SERIAL".

    Raises:
        InputError: it is no such thing.
    """
    if address == "local":
        return Local()
    return adb_device(address) if address.startswith(PREFIX) else ssh_device(address)
