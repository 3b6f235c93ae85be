"""A bundle's place on a device: what is there, files to it, jobs in it. Everything can be done again after a cut.

~/.cache/thinet-deploy/tensorrt/timing.cache     for all bundles
~/.cache/thinet-deploy/ID/bundle/…      the bundle, and the engines that were built from it there
~/.cache/thinet-deploy/ID/kit/run.py …   our own, which judges the bundle
~/.cache/thinet-deploy/ID/jobs/JOB/…    out, err and code of every command (see agent.py)
"""

from __future__ import annotations

import errno
import json
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import hash_json, sha256_of
from ..bundle import KIT, MANIFEST, Manifest, read_manifest
from ..environment import JETSON_COMMANDS, JETSON_FILES, cpu_facts, jetson_facts, ram_class
from ..errors import BundleError, DeviceError, MissingError, TargetError
from ..interfaces import Progress
from ..on_device import agent
from ..on_device.engines import ENGINES
from ..target import Stack, TargetProfile
from .device import AGAIN, NOT_THERE, Device, Done, Line, full_disk

SCRIPT = Path(agent.__file__)
_CRASHES = {signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV}
OLDEST_PYTHON = (3, 8)  # JetPack 5
_NOT_FOUND = (126, 127, NOT_THERE)
_NO_ROOM_BYTES = 1 << 20
# What Python imports, by runtime.
_MODULES = {name: engine.module or engine.package for name, engine in ENGINES.items()}


@dataclass(frozen=True)
class Machine:
    """A device and what was found on it.

    Attributes:
        device: the way there.
        python: the Python there, with numpy and a runtime.
        facts: see `agent.look`.
    """

    device: Device
    python: str
    facts: dict[str, Any]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides how engines run there: hardware, system, versions; no name of host or user."""
        files, commands = self.facts["files"], self.facts["commands"]
        return {
            **{key: self.facts[key] for key in ("machine", "kernel", "python", "cores", "memory_bytes")},
            "cpu": self.cpu["model"],
            "board": files["/proc/device-tree/model"],
            "modules": {name: version for name, version in self.facts["modules"].items() if version is not None},
            "jetson": jetson_facts(lambda path: str(files[path]), lambda *command: str(commands[" ".join(command)])),
        }

    @property
    def cpu(self) -> dict[str, Any]:
        """Model and flags of its CPU."""
        return cpu_facts(self.facts["files"]["/proc/cpuinfo"], self.facts["machine"])

    @property
    def speed(self) -> str:
        """12 hex digits over what decides how fast it is, versions of software aside: see `environment.machine_id`."""
        jetson = self.fingerprint["jetson"] or {}
        board = self.facts["files"]["/proc/device-tree/model"]
        found = {key: self.facts[key] for key in ("machine", "cores")}
        found |= {"cpu": self.cpu, "ram": ram_class(self.facts["memory_bytes"]), "board": board}
        return hash_json({**found, "jetson": jetson.get("power_mode")})[:12]

    @property
    def identity(self) -> str:
        """Changes when what was built or measured there before no longer holds."""
        return hash_json(self.fingerprint)

    def version(self, runtime: str) -> str | None:
        """Of a runtime there, "" where it does not tell; None where it is not installed."""
        found: str | None = self.facts["modules"].get(_MODULES.get(runtime, ""))
        return found

    def has(self, runtime: str) -> bool:
        """Whether a runtime is installed there."""
        return self.version(runtime) is not None


def reach(device: Device, python: str, target: TargetProfile | None = None) -> Machine:
    """Look at a device, before anything is sent there.

    Args:
        device: the way there.
        python: the name or path of its Python.
        target: that it should be.

    Raises:
        DeviceError: it cannot be reached.
        MissingError: it has no such Python, or that has no numpy.
    """
    probes = target.detect if target else ()
    request = {
        "modules": sorted({"numpy", *_MODULES.values()}),
        "files": [*JETSON_FILES, "/proc/cpuinfo", *(probe.file for probe in probes if probe.file)],
        "commands": [*JETSON_COMMANDS, *(probe.command for probe in probes if probe.command)],
    }
    done = device.run([python, "-", "look", json.dumps(request)], SCRIPT.read_bytes())
    if done.code in _NOT_FOUND:
        raise MissingError(
            f"There is no {python} on {device.name}.",
            hint="Install Python 3.8 or later there (apt install python3), or name its Python with --device-python.",
        )
    if "SyntaxError" in done.err or "importlib.metadata" in done.err:  # it does not get as far as to say its version
        raise _too_old(device, python, "an older one")
    machine = Machine(device, python, _answer(device, done))
    _check_python(machine)
    return machine


def _too_old(device: Device, python: str, version: str) -> MissingError:
    return MissingError(
        f"{python} on {device.name} is {version}, but Python 3.8 or later is needed.",
        hint="Name another one with --device-python.",
    )


def _check_python(machine: Machine) -> None:
    version = machine.facts["python"]
    if tuple(map(int, version.split(".")[:2])) < OLDEST_PYTHON:
        raise _too_old(machine.device, machine.python, version)
    if machine.facts["modules"]["numpy"] is None:
        raise MissingError(
            f"numpy is not installed for {machine.python} on {machine.device.name}.",
            hint=f"There: {machine.python} -m pip install numpy (or apt install python3-numpy); or name the Python of "
            "an environment that has it with --device-python.",
        )


def _answer(device: Device, done: Done) -> dict[str, Any]:
    """The JSON in the last line; DeviceError when there is none, or it tells of an error."""
    try:
        answer: dict[str, Any] = json.loads(b"{" + done.out.rpartition(b"\n{")[2])
    except ValueError:
        said = (done.err.strip() or done.out.decode("utf-8", "replace").strip()).splitlines()
        words = said[-1][:300] if said else "nothing"
        raise DeviceError(f"{device.name} did not answer as expected, it said: {words}", hint=AGAIN) from None
    if "error" in answer:
        if answer["errno"] in (errno.ENOSPC, errno.EDQUOT):
            raise full_disk(device)
        raise DeviceError(f"{device.name}: {answer['error']}", hint=AGAIN)
    return answer


# ------------------------------------------------------------------------------------------ what fits


def check_target(machine: Machine, target: TargetProfile) -> TargetProfile:
    """The target on the stack that the device has, before any work starts.

    Raises:
        TargetError: the device is another one, or its TensorRT is not what its stack brings.
        MissingError: a runtime that it needs is not installed there.
    """
    name = machine.device.name
    jetson = machine.fingerprint["jetson"]
    check_probes(name, target, machine.facts, jetson["model"] if jetson else machine.facts["machine"])
    if _builds(target):
        check_runtimes(machine, [], ["tensorrt"])
    check_runtimes(machine, [name for name in target.runtimes if name in ENGINES])  # that run.py can open
    stack = _stack(machine, target)
    return target.on_stack(stack.name) if stack else target


def check_probes(name: str, target: TargetProfile, facts: Mapping[str, Any], what: str) -> None:
    """Raise TargetError where a device is not what the target's profile says.

    Args:
        name: of the device.
        target: that it should be.
        facts: what was found: `files` and `commands` have the target's probes.
        what: it is instead, for people.
    """
    for probe in target.detect:
        text = facts["files"][probe.file] if probe.file else facts["commands"][" ".join(probe.command)]
        if re.search(probe.pattern, text, re.MULTILINE) is None:
            raise TargetError(
                f"{name} is no {target.id}, as far as can be seen: it is {what or 'another machine'}.",
                hint="Give the --target that it is, or a profile of your own: `thinet-deploy targets` lists them.",
            )


def _builds(target: TargetProfile) -> bool:
    return target.builds_on_device and "tensorrt" in target.runtimes


def check_runtimes(machine: Machine, runtimes: Sequence[str], needed: Sequence[str] = ()) -> None:
    """Raise MissingError when a needed runtime is not there; where none is needed, when there is none of `runtimes`."""
    missing = [name for name in needed if not machine.has(name)]
    if not missing and (needed or any(machine.has(name) for name in runtimes)):
        return
    missing = missing or [name for name in runtimes if name in _MODULES]
    which = " and ".join(missing) if needed else f"none of {', '.join(missing)}"
    ways = "; ".join(_way_to_get(machine, name) for name in missing)
    raise MissingError(
        f"{machine.device.name} lacks a runtime: {machine.python} there finds {'no ' if needed else ''}{which}.",
        hint=f"There: {ways}. Or name the Python of an environment that has it with --device-python.",
    )


def _way_to_get(machine: Machine, runtime: str) -> str:
    if runtime != "tensorrt":
        return f"{machine.python} -m pip install {ENGINES[runtime].package}"
    if machine.fingerprint["jetson"]:
        return "apt install python3-libnvinfer (environments need --system-site-packages to see it)"
    return f"{machine.python} -m pip install tensorrt"


def _stack(machine: Machine, target: TargetProfile) -> Stack | None:
    """Which of the target's stacks the device has; None where that cannot be told, or makes no difference."""
    jetson, installed = machine.fingerprint["jetson"] or {}, machine.facts["modules"].get("tensorrt") or ""
    l4t = jetson.get("l4t") or ""
    of_version = (stack for stack in target.stacks if f"{installed}.".startswith(f"{stack.tensorrt}."))
    found = target.stack_of(l4t) or next(of_version, None)
    expected = found or target.stack
    if not _builds(target) or expected is None or _same_major(installed, expected.tensorrt):
        return found
    if found is None:
        known = ", ".join(f"{stack.name} ({stack.tensorrt})" for stack in target.stacks)
        raise TargetError(
            f"{machine.device.name} has TensorRT {installed}{f' and L4T {l4t}' if l4t else ''}, which is no stack that "
            f"target {target.id} knows: {known}.",
            hint="Update it, or give a --target of your own: a .toml file that extends this one, with that stack.",
        )
    raise TargetError(
        f"{machine.device.name} has TensorRT {installed}, but L4T {l4t} ({found.name}) brings {found.tensorrt}: "
        "engines of one do not run with the other.",
        hint="Remove the one that was installed beside JetPack's own (pip uninstall tensorrt), or name JetPack's "
        "Python with --device-python.",
    )


def _same_major(one: str, other: str | None) -> bool:
    """Whether two versions have the same first number; unknown ones have."""
    return not one or not other or one.partition(".")[0] == other.partition(".")[0]


# ------------------------------------------------------------------------------------------ a bundle there


@dataclass(frozen=True)
class Site:
    """A bundle on a device.

    Attributes:
        machine: where.
        folder: the folder there that holds it and its jobs.
    """

    machine: Machine
    folder: str

    @property
    def bundle(self) -> str:
        """The bundle's folder there."""
        return f"{self.folder}/bundle"

    @property
    def kit(self) -> str:
        """The folder there with our own run.py: what judges a bundle must not come from it."""
        return f"{self.folder}/kit"

    @property
    def cache(self) -> str:
        """Folder of TensorRT's timing cache there, which all bundles share."""
        return f"{self.machine.facts['root']}/tensorrt"

    def tell(self, *words: str, on_line: Line | None = None) -> tuple[dict[str, Any], Done]:
        """Run agent.py there."""
        device = self.machine.device
        done = device.run([self.machine.python, f"{self.folder}/agent.py", *words], on_line=on_line)
        return _answer(device, done), done

    def place(self, job: str, command: Sequence[str]) -> str:
        """The folder of a job there; another one for another command, and when the machine has changed."""
        return f"{self.folder}/jobs/{job}-{hash_json([list(command), self.machine.identity])[:8]}"

    def job(self, name: str, command: Sequence[str], on_line: Line | None = None, made: str = "") -> tuple[int, Done]:
        """Run a Python file there to its end, through any number of connections.

        Args:
            name: for people.
            command: the file and its arguments.
            on_line: hears what it prints.
            made: folder of the files that it makes there: it runs again when they are not as it left them.

        Returns:
            Its exit code and what it said.

        Raises:
            DeviceError: the connection was cut, the device died, or too little memory ended the job.
        """
        python = self.machine.facts["executable"]  # a job runs in a folder of its own: a relative path leads nowhere
        answer, done = self.tell("job", self.place(name, command), made, python, *command, on_line=on_line)
        code, device = answer["code"], self.machine.device.name
        if (code is None or code != 0) and answer["free_bytes"] < _NO_ROOM_BYTES:
            raise full_disk(self.machine.device)
        if code is None:
            raise DeviceError(f"{name} on {device} ended without a result: was the device restarted?", hint=AGAIN)
        if code == -signal.SIGKILL:
            raise DeviceError(
                f"{name} on {device} was ended by SIGKILL: too little memory is the usual reason.",
                hint=f"Close other programs there. {AGAIN}",
            )
        if code < 0:
            crashed = -code in _CRASHES
            raise DeviceError(
                f"{name} on {device} was ended by {signal.Signals(-code).name}.",
                hint="Another version of the runtime there may help: one that was made for another processor ends so."
                if crashed
                else AGAIN,
            )
        return code, Done(code, done.out.rpartition(b"\n{")[0], answer["err"])


def manifests(bundle: Path) -> list[Manifest]:
    """A bundle's, and where it lies in a run whose device has built engines from it, the one that lies there."""
    built = bundle.parent / "device"
    return [read_manifest(folder) for folder in (bundle, built) if folder == bundle or (folder / MANIFEST).is_file()]


def send(machine: Machine, bundle: Path, progress: Progress) -> Site:
    """Copy a bundle to a device, and the files that run it: what is not there yet, or not as it should be.

    Engines that the device has built from this bundle stay part of it there.

    Raises:
        BundleError: the bundle is damaged.
        DeviceError: the connection was cut, or the disk there is full.
    """
    manifest, device = read_manifest(bundle), machine.device
    wanted = {**manifest.files, MANIFEST: sha256_of(bundle / MANIFEST)}
    site = Site(machine, f"{machine.facts['root']}/{wanted[MANIFEST][:16]}")
    device.push(SCRIPT, f"{site.folder}/agent.py")
    there, _ = site.tell("sums", site.bundle)
    missing = {name: digest for name, digest in wanted.items() if there.get(name) != digest}
    built = bundle.parent / "device" / MANIFEST
    if built.is_file() and there.get(MANIFEST) == sha256_of(built):
        missing.pop(MANIFEST, None)
    copy(device, bundle, site.bundle, missing, progress)
    kit, _ = site.tell("sums", site.kit)
    for name, path in KIT.items():
        if kit.get(name) != sha256_of(path):
            device.push(path, f"{site.kit}/{name}")
    return site


def copy(device: Device, bundle: Path, target: str, wanted: Mapping[str, str], progress: Progress) -> None:
    """Copy files of a bundle, each with the checksum that it is to have.

    Raises:
        BundleError: one has another.
        DeviceError: the connection was cut, or the disk there is full.
    """
    for number, (name, digest) in enumerate(wanted.items()):
        progress("Copying to the device", number, len(wanted), name)
        if not _inside(bundle, name) or sha256_of(bundle / name) != digest:
            raise BundleError(
                f"{bundle} is damaged: {name} is not as the manifest says.",
                hint="Build it again; `thinet-deploy verify` shows everything.",
            )
        device.push(bundle / name, f"{target}/{name}")
    progress("Copying to the device", len(wanted), len(wanted))


def _inside(bundle: Path, name: str) -> bool:
    path = bundle / name
    return path.is_file() and path.resolve().is_relative_to(bundle.resolve())


def fetch(site: Site, source: str, target: Path, names: Callable[[str], bool], progress: Progress) -> dict[str, str]:
    """Copy the files of a folder there whose names are wanted; their SHA-256, which the copies have."""
    found, _ = site.tell("sums", source)
    wanted = {name: digest for name, digest in found.items() if names(name)}
    for number, (name, digest) in enumerate(wanted.items()):
        progress("Copying from the device", number, len(wanted), name)
        local = target / name
        if not local.resolve().is_relative_to(target.resolve()):
            raise DeviceError(f"{site.machine.device.name} has a file {name!r}, which leads out of its folder.")
        site.machine.device.pull(f"{source}/{name}", local)
        if sha256_of(local) != digest:
            raise DeviceError(f"{name} changed while it was copied from {site.machine.device.name}.", hint=AGAIN)
    progress("Copying from the device", len(wanted), len(wanted))
    return wanted
