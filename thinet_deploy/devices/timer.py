"""Networks timed on a device that ssh reaches: what it lacks goes there in one archive, one command times them all.

~/.cache/thinet-deploy/trials/ID/bundle/…   run.py, and the networks that it times
~/.cache/thinet-deploy/trials/ID/jobs/…     of its commands, see devices/site.py

ID comes from the networks and from who asks. A command goes on when the connection is cut: who asks for the same again
follows it.
"""

from __future__ import annotations

import platform
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import hash_json, sha256_of, write_json
from ..bundle import KIT
from ..errors import GateError, MissingError, ThinetDeployError
from ..interfaces import Array, Progress
from ..timing.latency import COOL_IT, EngineLatency, EngineRef, latencies
from ..timing.timers import LAYERS
from .device import heard, json_lines
from .site import SCRIPT, Machine, Site

_REQUEST, _INPUTS, _ARCHIVE = "request.json", "inputs.npz", "files.zip"
_RUNTIME_MISSING, _THROTTLED = 3, 4
# A version comes from the device, and gets into the name of a file here.
_STRANGE = re.compile(r"[^A-Za-z0-9.+_-]")


@dataclass(frozen=True)
class DeviceTimer:
    """A device that has been looked at. See `timers.Timer`.

    Attributes:
        found: the device.
    """

    found: Machine

    @property
    def device(self) -> str:
        """Its board or processor."""
        return str(self.found.facts["files"]["/proc/device-tree/model"] or self.found.cpu["model"])

    @property
    def machine(self) -> str:
        """See `Machine.speed`."""
        return self.found.speed

    def version(self, runtime: str) -> str:
        """As installed there."""
        return f"{runtime} {_STRANGE.sub('_', self.found.version(runtime) or 'unknown')}"

    def layers(self, folder: Path, asked: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        """In one command; nothing of it stays there."""
        write_json(folder / _REQUEST, {"layers": asked})
        names = [*(each["path"] for each in asked["networks"].values()), _REQUEST]
        files = {name: folder / name for name in names}
        site = self._site(_digest(files.values()))
        _send(site, files, progress)
        found: dict[str, Any] = _ask(site, _REQUEST, LAYERS, progress)
        site.tell("remove", site.folder)
        return found

    def engines(
        self, refs: Sequence[EngineRef], inputs: Mapping[str, Array], how: Mapping[str, Any], progress: Progress
    ) -> list[EngineLatency]:
        """In one command; the first one stays there until it is forgotten, so that it is sent once."""
        batch, threads = len(next(iter(inputs.values()))), how["threads"]
        # Folders there are called by what is in them.
        called = {ref: _digest(_parts(ref)) for ref in refs}
        site = self._site(called[refs[0]])
        engines = [
            {"runtime": ref.runtime, "path": f"{called[ref]}/{ref.path.name}", "precision": ref.precision}
            | {"inputs": _INPUTS, "batch": batch, "threads": threads}
            for ref in refs
        ]
        with tempfile.TemporaryDirectory() as folder:
            arrays: dict[str, Any] = {f"input:{name}": array for name, array in inputs.items()}
            image, request = Path(folder, _INPUTS), Path(folder, _REQUEST)
            np.savez(image, **arrays)
            write_json(request, {"engines": engines, "rounds": how["rounds"], "seconds": how["seconds"]})
            asked = f"{_digest([image, request])}.json"  # another request is another command there
            files = {f"{called[ref]}/{path.name}": path for ref in refs for path in _parts(ref)}
            _send(site, {**files, _INPUTS: image, asked: request}, progress)
        rows = _ask(site, asked, "Measuring engines", progress)
        done = {asked, *called.values()} - {called[refs[0]]}
        site.tell("remove", f"{site.folder}/jobs", *(f"{site.bundle}/{name}" for name in sorted(done)))
        return latencies(refs, rows, batch, threads)

    def forget(self, ref: EngineRef) -> None:
        """Nothing stays there."""
        site = self._site(_digest(_parts(ref)))
        site.tell("remove", site.folder)

    def _site(self, called: str) -> Site:
        # The same command goes on with what it began, and removes it in the end; others have a folder of their own.
        who = [platform.node(), str(Path.cwd()), *sys.argv]
        return Site(self.found, f"{self.found.facts['root']}/trials/{hash_json([called, who])[:16]}")


def _parts(ref: EngineRef) -> list[Path]:
    """An engine's files."""
    return sorted(ref.path.parent.glob(f"{ref.path.stem}.*"))


def _digest(paths: Iterable[Path]) -> str:
    return hash_json([sha256_of(path) for path in paths])[:16]


def _send(site: Site, files: Mapping[str, Path], progress: Progress) -> None:
    """Copy files there, and what runs them: what is not there yet, in one archive."""
    device = site.machine.device
    progress("Copying to the device", 0, 1)
    device.push(SCRIPT, f"{site.folder}/agent.py")
    there, _ = site.tell("sums", site.bundle)
    wanted = {**KIT, **files}
    missing = {name: path for name, path in wanted.items() if there.get(name) != sha256_of(path)}
    if missing:
        with tempfile.TemporaryDirectory() as folder:
            archive = Path(folder, _ARCHIVE)
            with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
                for name, path in missing.items():
                    packed.write(path, name)
            device.push(archive, f"{site.folder}/{_ARCHIVE}")
        site.tell("unpack", f"{site.folder}/{_ARCHIVE}", site.bundle)
    progress("Copying to the device", 1, 1)


def _ask(site: Site, request: str, stage: str, progress: Progress) -> Any:
    """Run `run.py trial` there; what it found.

    Raises:
        MissingError: the runtime is not installed there.
        GateError: the device throttled in every attempt.
        ThinetDeployError: the runtime cannot run a network.
        DeviceError: the connection was cut.
    """
    command = [f"{site.bundle}/run.py", "trial", f"{site.bundle}/{request}"]
    code, done = site.job("trial", command, heard(f"{stage} on the device", progress))
    report = [{}, *json_lines(done.out)][-1]
    if "found" in report:
        return report["found"]
    device, last = site.machine.device.name, (done.err.strip().splitlines() or ["it said nothing"])[-1]
    words = report.get("error") or f"run.py ended with code {code}: {last}"
    if code == _RUNTIME_MISSING:
        raise MissingError(f"{device}: {words}", hint="--device-python names the Python of an environment there.")
    if code == _THROTTLED:
        raise GateError(f"{device}: {words}", hint=COOL_IT)
    raise ThinetDeployError(
        f"Networks cannot be timed on {device}: {words}",
        hint="A runtime there that is older than the one here may not know an operator: update it there.",
    )
