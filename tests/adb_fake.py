"""A stand-in for adb: what a device's shell would run is run here, below a folder of its own.

It answers as adb 1.0.41 does: with that program's own words where no device is, with the words of others' reports where
one is offline or has not allowed this computer, and with exit code 0 when the device goes away.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ADB = """#!{python} -IS
import json, os, subprocess, sys
from pathlib import Path

folder = Path({folder!r})
state = json.loads((folder / "state.json").read_text())
words = sys.argv[1:]
with open(folder / "calls", "a") as calls:
    calls.write(json.dumps(words) + "\\n")

def fail(message):
    sys.exit("* daemon not running; starting now at tcp:5037\\n* daemon started successfully\\n" + message)

serial = None
if words[0] == "-s":
    serial, words = words[1], words[2:]
if words[:2] != ["shell", "-T"] or len(words) != 3:
    fail(f"adb: unknown command {{words}}")
devices = state["devices"]
if serial is None:
    if len(devices) != 1:
        fail("error: more than one device/emulator" if devices else "error: no devices/emulators found")
    (serial,) = devices
if serial not in devices:
    fail(f"error: device '{{serial}}' not found")
if devices[serial] == "unauthorized":
    fail("error: device unauthorized.\\nThis adb server's $ADB_VENDOR_KEYS is not set\\n"
         "Try 'adb kill-server' if that seems wrong.\\n"
         "Otherwise check for a confirmation dialog on your device.")
if devices[serial] != "device":
    fail(f"error: device {{devices[serial]}}")
line = words[2].replace("/data/local/tmp", {storage!r})
environment = {{"PATH": f"{{folder}}/bin:" + os.environ["PATH"], "HOME": "/"}}
process = subprocess.Popen(["sh", "-c", line], env=environment, cwd=folder, start_new_session=True)
if state["cut"] and state["cut"] in line:
    os.killpg(process.pid, 9)  # the device is gone: adb itself ends well
    sys.exit(0)
sys.exit(process.wait())
"""
_PROPERTIES = {
    "ro.product.manufacturer": "Fairphone",
    "ro.product.model": "FP5",
    "ro.soc.model": "QCM6490",
    "ro.product.cpu.abi": "arm64-v8a",
    "ro.build.version.release": "15",
    "ro.serialno": "SECRET",
}


@dataclass(frozen=True)
class Fake:
    """A device behind a fake adb.

    Attributes:
        folder: has bin/ for the PATH of commands there, calls (one JSON line each), and the storage.
    """

    folder: Path

    @property
    def storage(self) -> Path:
        """What is /data/local/tmp there."""
        return self.folder / "storage"

    @property
    def calls(self) -> list[list[str]]:
        """The words of every call."""
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    def set(self, **changes: Any) -> None:
        """Change which devices there are in which state (`devices`), at what command it goes away (`cut`)."""
        path = self.folder / "state.json"
        state = json.loads(path.read_text()) if path.exists() else {"devices": {"FP5": "device"}, "cut": ""}
        path.write_text(json.dumps({**state, **changes}))

    def thermal(self, *statuses: int | None) -> None:
        """What Android says of its temperature, look by look; None for a system without that service."""
        (self.folder / "thermal").write_text("".join(f"{status}\n" for status in statuses))
        self.command("dumpsys", _DUMPSYS)

    def command(self, name: str, text: str) -> None:
        """Put a program on the device's PATH."""
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)


_GETPROP = r"""#!/bin/sh
[ $# = 0 ] && exec cat properties
sed -n "s/^\[$1\]: \[\(.*\)\]$/\1/p" properties
"""
_DUMPSYS = """#!/bin/sh
read -r status < thermal
rest=$(sed 1d thermal)
[ -n "$rest" ] && printf '%s\\n' "$rest" > thermal
[ "$status" = None ] && exit 1
printf 'IsStatusOverride: false\\nThermal Status: %s\\nCached temperatures:\\n' "$status"
"""


def plug_in(folder: Path) -> Fake:
    """Make a device in an empty folder, and adb in its folder `host`."""
    fake = Fake(folder)
    for name in ("bin", "host", "storage"):
        (folder / name).mkdir()
    fake.set()
    (folder / "calls").touch()
    adb = folder / "host" / "adb"
    adb.write_text(_ADB.format(python=sys.executable, folder=str(folder), storage=str(fake.storage)))
    adb.chmod(0o755)
    lines = "".join(f"[{name}]: [{value}]\n" for name, value in _PROPERTIES.items())
    (folder / "properties").write_text(lines)
    fake.command(
        "getprop",
        '#!/bin/sh\n[ $# = 0 ] && exec cat properties\nsed -n "s/^\\[$1\\]: \\[\\(.*\\)\\]$/\\1/p" properties\n',
    )
    fake.thermal(0)
    return fake


# A program for a runtime: does what main.cpp does for the engine "sum", but in the shell.
PROGRAM = """#!/bin/sh
[ -n "$LD_LIBRARY_PATH" ] || exit 9
[ -f "$2/app/model.properties" ] || {{ echo "error: no bundle" >&2; exit 2; }}
echo "$@" >> "$2/../started"
{act}
case $1 in
outputs)
  cp "$2/app/golden/output.f32" "$5" || {{ echo "error: $5 cannot be written: is the storage full?" >&2; exit 2; }}
  echo '{{"protocol": {protocol}, "version": "1", "same_preprocessing": {same}}}' ;;
time)
  echo '{{"protocol": {protocol}, "version": "1", "load_ms": 5, "first_ms": 3, "finite": true,' \\
  '"peak_bytes": 4096, "samples_ms": [1.5, 1.25, 1.75]}}' ;;
esac
"""


def program(act: str = "", *, protocol: int = 1, same: str = "true") -> str:
    return PROGRAM.format(act=act, protocol=protocol, same=same)


def install(tmp_path: Path, text: str, runtime: str = "onnxruntime") -> Path:
    path = tmp_path / "cache" / "android" / "arm64-v8a" / f"thinet-{runtime}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
