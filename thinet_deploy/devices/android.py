"""A bundle's place on an Android device. It has no Python: programs in C++ from the bundle's app/cpp run engines.

/data/local/tmp/thinet-deploy/ID/bundle/…        the bundle
/data/local/tmp/thinet-deploy/programs/ID/…      thinet-RUNTIME and the libraries that it needs

The programs are built once, with Android's NDK, and lie in $THINET_CACHE/android/ABI on this machine.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import hash_json, sha256_of
from ..bundle import MANIFEST, ONNX, read_manifest
from ..environment import cache_folder
from ..errors import DeviceError, InputError, MissingError
from ..interfaces import Progress
from ..target import TargetProfile
from .adb import PLACE
from .device import AGAIN, Device, Done
from .site import check_probes, copy

PROTOCOL = 1
"""Of the JSON lines of main.cpp; another one in a program means that it was built from another version."""
_PROGRAM = "thinet-"
_MODEL, _ABI = "ro.product.model", "ro.product.cpu.abi"
_PROPERTY = re.compile(r"^\[(.+?)\]: \[(.*)\]$", re.MULTILINE)
_THERMAL = re.compile(r"^Thermal Status: (\d+)", re.MULTILINE)
_SHOWN = ("ro.product.manufacturer", _MODEL, "ro.soc.model", _ABI, "ro.build.version.release", "ro.build.fingerprint")
_SUMS = 'cd -- "$1" 2>/dev/null && find . -type f -exec sha256sum {} +'
_PROPERTIES = "app/model.properties"
_READ = (_PROPERTIES, "app/golden/", "engines/", "labels.txt", ONNX)
_MODES = 'chmod 755 -- "$1"/*'


@dataclass(frozen=True)
class Phone:
    """An Android device and what was found on it.

    Attributes:
        device: the way there.
        facts: properties: of Android; kernel, cores, memory_bytes; files, commands: what the target's probes read.
    """

    device: Device
    facts: dict[str, Any]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides how engines run there: hardware and system; no serial."""
        properties = self.facts["properties"]
        return {
            **{key: self.facts[key] for key in ("kernel", "cores", "memory_bytes")},
            "machine": self.abi,
            "system": f"Android {properties.get('ro.build.version.release', '?')}",
            "properties": {key: properties[key] for key in _SHOWN if key in properties},
            "jetson": None,
        }

    @property
    def identity(self) -> str:
        """Changes when what was measured there before no longer holds."""
        return hash_json([self.fingerprint, self.programs and sha256_of(self.folder)])

    @property
    def abi(self) -> str:
        """What its programs are built for, such as arm64-v8a."""
        return str(self.facts["properties"].get(_ABI, ""))

    @property
    def processor(self) -> str:
        """The device in its maker's words."""
        properties = self.facts["properties"]
        words = (properties.get("ro.product.manufacturer"), properties.get(_MODEL), properties.get("ro.soc.model"))
        return " ".join(word for word in words if word) or self.abi

    @property
    def folder(self) -> Path:
        """Where the programs for it are, on this machine."""
        return cache_folder() / "android" / self.abi

    @property
    def programs(self) -> dict[str, Path]:
        """The program of each runtime."""
        return {path.name.removeprefix(_PROGRAM): path for path in sorted(self.folder.glob(f"{_PROGRAM}*"))}

    def words_of(self, command: Sequence[str]) -> str:
        """What a command there prints; "" when it is not there or fails."""
        done = self.device.run(command)
        return "" if done.code else done.out.decode("utf-8", "replace").strip()

    def thermal_status(self) -> int | None:
        """0 while nothing is slowed down, up to 6 (Android's PowerManager.THERMAL_STATUS_…); None before Android 10."""
        found = _THERMAL.search(self.words_of(["dumpsys", "thermalservice"]))
        return int(found[1]) if found else None


def reach(device: Device, target: TargetProfile | None = None) -> Phone:
    """Look at a device, before anything is sent there.

    Raises:
        DeviceError: it cannot be reached.
        TargetError: it is not what the target's profile says.
        MissingError: no program for it was built.
    """
    probes = target.detect if target else ()
    bare = Phone(device, {})
    properties = dict(_PROPERTY.findall(bare.words_of(["getprop"]).replace("\r", "")))
    memory = re.search(r"MemTotal:\s+(\d+) kB", bare.words_of(["cat", "/proc/meminfo"]))
    facts = {
        "properties": properties,
        "kernel": bare.words_of(["uname", "-r"]),
        "cores": int(bare.words_of(["nproc"]) or 0),
        "memory_bytes": int(memory[1]) * 1024 if memory else None,
        "files": {probe.file: bare.words_of(["cat", "--", probe.file]) for probe in probes if probe.file},
        "commands": {" ".join(probe.command): bare.words_of(probe.command) for probe in probes if probe.command},
    }
    phone = Phone(device, facts)
    if target:
        check_probes(device.name, target, facts, phone.processor)
    if not phone.programs:
        raise MissingError(
            f"{device.name} needs a program that runs engines there, and {phone.folder} has none.",
            hint="Build it once with Android's NDK, from the source code in any bundle for Android (a build without "
            "--device makes one): app/README.md in it says how.",
        )
    return phone


@dataclass(frozen=True)
class Place:
    """A bundle on an Android device, and the programs that run its engines.

    Attributes:
        phone: where.
        folder: the folder there that holds the bundle.
        programs: the folder there that holds the programs.
    """

    phone: Phone
    folder: str
    programs: str

    @property
    def bundle(self) -> str:
        """The bundle's folder there."""
        return f"{self.folder}/bundle"

    def run(self, runtime: str, command: str, *words: str) -> tuple[dict[str, Any], str]:
        """Run a program there: its line of JSON, or {} and why there is none.

        Raises:
            DeviceError: the connection was cut.
            MissingError: the program is of another version.
        """
        program = f"{self.programs}/{_PROGRAM}{runtime}"
        done = self.phone.device.run(["env", f"LD_LIBRARY_PATH={self.programs}", program, command, self.bundle, *words])
        if done.code:
            return {}, _why(done)
        try:
            answer: dict[str, Any] = json.loads(done.out)
        except ValueError:
            return {}, "it did not answer in JSON"
        if answer.get("protocol") != PROTOCOL:
            raise MissingError(
                f"{self.phone.programs[runtime]} was built from another version of thinet-deploy.",
                hint="Build it again from a bundle that this version made: app/README.md in it says how.",
            )
        return answer, ""


def _why(done: Done) -> str:
    if done.code < 0 and -done.code in set(signal.Signals):
        return f"it was ended by {signal.Signals(-done.code).name}"
    said = done.err.strip().splitlines()
    return said[-1].removeprefix("error: ") if said else f"it ended with code {done.code}"


def send(phone: Phone, bundle: Path, progress: Progress) -> Place:
    """Copy what the programs read of a bundle, and the programs, to a device, as far as it is not there yet.

    Raises:
        BundleError: the bundle is damaged.
        InputError: it is of no classifier.
        DeviceError: the connection was cut, or the storage there is full.
    """
    manifest = read_manifest(bundle)
    if _PROPERTIES not in manifest.files:
        raise InputError(
            f"{bundle} has no {_PROPERTIES}: the programs for Android run classifiers only so far.",
            hint="`thinet-deploy verify BUNDLE` checks it on this machine.",
        )
    folder = f"{PLACE}/{sha256_of(bundle / MANIFEST)[:16]}"
    wanted = {name: digest for name, digest in manifest.files.items() if name.startswith(_READ)}
    _send(phone, bundle, f"{folder}/bundle", wanted, progress)
    return Place(phone, folder, _send_programs(phone, progress))


def _send_programs(phone: Phone, progress: Progress) -> str:
    own = {path.name: sha256_of(path) for path in sorted(phone.folder.iterdir()) if path.is_file()}
    folder = f"{PLACE}/programs/{hash_json(own)[:16]}"
    _send(phone, phone.folder, folder, own, progress)
    if (done := phone.device.run(["sh", "-c", _MODES, "sh", folder])).code:
        raise DeviceError(f"{phone.device.name}: programs may not be run in {folder}: {_why(done)}.", hint=AGAIN)
    return folder


def _send(phone: Phone, source: Path, target: str, wanted: dict[str, str], progress: Progress) -> None:
    """Copy files, and look at what arrived."""
    there = _sums(phone.device, target)
    missing = {name: digest for name, digest in wanted.items() if there.get(name) != digest}
    copy(phone.device, source, target, missing, progress)
    there = _sums(phone.device, target) if missing else there
    if damaged := [name for name, digest in wanted.items() if there.get(name) != digest]:
        raise DeviceError(f"{damaged[0]} changed while it was copied to {phone.device.name}.", hint=AGAIN)


def _sums(device: Device, folder: str) -> dict[str, str]:
    """SHA-256 of every file below a folder there, by relative path."""
    done = device.run(["sh", "-c", _SUMS, "sh", folder])
    lines = (line.partition("  ./") for line in done.out.decode("utf-8", "surrogateescape").splitlines())
    return {name: digest for digest, _, name in lines}
