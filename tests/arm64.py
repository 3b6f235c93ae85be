"""An arm64 Linux to run programs in: Debian's Python in a folder, pip's wheels for it, and qemu to execute them.

Nothing is installed and no kernel support is needed: packages are unpacked, and qemu is called by its name. So programs
cannot start others there, which `run.py verify` does not. Numbers are what an arm64 CPU computes; times mean nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "thinet-deploy" / "arm64"
QEMU = ("qemu-aarch64-static", "qemu-aarch64")
PYTHON = "3.11"  # Debian 12's
PACKAGES = (
    *(f"python{PYTHON}-minimal", f"libpython{PYTHON}-minimal", f"libpython{PYTHON}-stdlib"),
    *("libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libexpat1", "libssl3", "libffi8"),
)
# The ONNX Runtime of constraints.txt, 1.31.1, ends with a segmentation fault under qemu 7.2 when it is imported.
WHEELS = (f"numpy=={version('numpy')}", "onnxruntime==1.27.0")
CPU = "cortex-a76"  # a Raspberry Pi 5's
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")


@dataclass(frozen=True)
class Arm64:
    """The emulated machine.

    Attributes:
        qemu: the program.
        root: its files.
        packages: folder of what pip brought.
    """

    qemu: str
    root: Path
    packages: Path

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """Run its Python."""
        python = self.root / "usr" / "bin" / f"python{PYTHON}"
        given = ["-cpu", CPU, "-L", str(self.root), "-E", f"PYTHONPATH={self.packages}", "-E", "OMP_NUM_THREADS=1"]
        command = [self.qemu, *given, str(python), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)


def arm64() -> Arm64:
    """The machine, from the cache, or from Debian and the package index once; skips the test where it cannot be had."""
    qemu = next((found for name in QEMU if (found := shutil.which(name))), None)
    if qemu is None:
        pytest.skip("there is no qemu for arm64 programs here (apt install qemu-user-static)")
    if shutil.which("dpkg-deb") is None or shutil.which("apt-get") is None:
        pytest.skip("Debian's packages cannot be unpacked here: there is no apt-get or no dpkg-deb")
    root = _once(CACHE / f"python{PYTHON}", _debian)
    return Arm64(qemu, root, _once(CACHE / "-".join(WHEELS).replace("==", "-"), _pip))


def _once(place: Path, fill: Callable[[Path], None]) -> Path:
    """A folder that `fill` makes whole, or not at all."""
    if not place.exists():
        partial = place.with_name(f"{place.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        partial.rename(place)
    return place


def _debian(folder: Path) -> None:
    """Fetch packages of another architecture with lists of their own: this system's apt stays as it is."""
    lists, debs = folder / "lists", folder / "debs"
    (lists / "partial").mkdir(parents=True)
    debs.mkdir()
    options = {"APT::Architecture": "arm64", "APT::Architectures": "arm64", "Dir::State::Lists": lists}
    options |= {"Dir::Cache::pkgcache": "", "Dir::Cache::srcpkgcache": ""}
    apt = ["apt-get", "-q", *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]
    for words in (["update"], ["download", *PACKAGES]):
        done = subprocess.run([*apt, *words], cwd=debs, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"Debian's arm64 packages cannot be had: {done.stderr.strip().splitlines()[-1]}")
    for deb in debs.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(deb), str(folder)], check=True)
    shutil.rmtree(lists)
    shutil.rmtree(debs)


def _pip(folder: Path) -> None:
    platforms = [word for name in _PLATFORMS for word in ("--platform", name)]
    options = ["--no-deps", "--quiet", "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    command = [sys.executable, "-m", "pip", "install", "--target", str(folder), *options, *platforms, *WHEELS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"there are no arm64 wheels to be had: {done.stderr.strip().splitlines()[-1]}")
