"""The real bindings of several versions of TensorRT, from the package index, and the libraries that they need here.

The bindings are small and import when the libraries below them exist; what these do is another file's matter:
tensorrt_stand_in.py pretends to be TensorRT, libcuda.c to be the driver.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import pytest

BINDINGS = {
    "8.6": "tensorrt-bindings==8.6.1",
    "10.3": "tensorrt-cu12-bindings==10.3.0",
    "10.16": "tensorrt-cu13-bindings==10.16.1.11",
    "11.4": "tensorrt-cu13-bindings==11.4.0.106",
}
# What the bindings want from TensorRT's libraries when they are imported; none of it is ever called.
SYMBOLS = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL"),
    *("createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getNvOnnxParserVersion"),
    *("getBuilderPluginRegistry", "getPluginRegistry", "initLibNvInferPlugins", "getInferLibVersion"),
    # of 8.6 only
    *("_ZN11nvuffparser15createUffParserEv", "_ZN11nvuffparser8FieldMapC1EPKcPKvNS_9FieldTypeEi"),
    *("_ZN14nvcaffeparser117createCaffeParserEv", "_ZN14nvcaffeparser123shutdownProtobufLibraryEv"),
)
FAKE_HEADER, FAKE_GPU = b"engine of the tests", "8.7"
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser", "nvparsers")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "thinet-deploy" / "tensorrt-bindings"


class Version(NamedTuple):
    name: str
    bindings: Path
    libraries: Path

    @property
    def major(self) -> int:
        return int(self.name.split(".")[0])

    @property
    def exact(self) -> str:
        """What the bindings say of themselves."""
        return BINDINGS[self.name].partition("==")[2]

    def environment(self, *places: Path) -> dict[str, str]:
        """Of a process that finds the bindings, their libraries, and what lies in `places`."""
        paths = [*places, self.bindings, Path(__file__).parent, os.environ.get("PYTHONPATH", "")]
        found = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "LD_LIBRARY_PATH": str(self.libraries)}
        return {**os.environ, **found}


def downloaded(requirement: str) -> Path:
    """A wheel's files, from the cache, or from the package index once."""
    place = CACHE / requirement.replace("==", "-")
    if place.exists():
        return place
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:  # for each its own: tests run in several processes
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder, requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{requirement} cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            wheel.extractall(Path(folder, "files"))
        try:
            Path(folder, "files").rename(place)
        except OSError:
            if not place.exists():  # else another process was faster
                raise
    return place


def fake_engine(source: bytes, version: str, gpu: str = FAKE_GPU) -> bytes:
    """The file of an engine of tensorrt_device.py: who built it, for which GPU, and the ONNX file."""
    about = {"version": version, "gpu": gpu, "crc": zlib.crc32(source), "size": len(source)}
    return b"\n".join((FAKE_HEADER, json.dumps(about).encode(), source))


def as_tensorrt(folder: Path, module: str = "tensorrt") -> Path:
    """A folder in which Python finds tensorrt_device.py as TensorRT."""
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(f"import sys, tensorrt_device\nsys.modules[{module!r}] = tensorrt_device\n")
    return folder


def compiler() -> str:
    """A C compiler; without one the test is skipped."""
    found = shutil.which("cc") or shutil.which("gcc")
    if found is None:
        pytest.skip("there is no C compiler for the libraries of this test")
    return found


def driver(folder: Path) -> Path:
    """libcuda.c as libcuda.so.1."""
    library = folder / "libcuda.so.1"
    source = Path(__file__).with_name("libcuda.c")
    subprocess.run([compiler(), "-w", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return library


def version_of(name: str, libraries: Path) -> Version:
    """The bindings of one version, and empty libraries that let them be imported, beside a driver without a GPU."""
    found = Version(name, downloaded(BINDINGS[name]), libraries)
    source = libraries / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS))
    for library in LIBRARIES:
        file = f"lib{library}.so.{found.major}"
        command = [compiler(), "-shared", "-fPIC", str(source), "-o", str(libraries / file), f"-Wl,-soname,{file}"]
        subprocess.run(command, check=True)
    driver(libraries)
    return found


def with_bindings(version: Version, *command: object) -> subprocess.CompletedProcess[str]:
    """Run Python with the bindings of a version, and tensorrt_stand_in.py."""
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, env=version.environment(), capture_output=True, text=True, check=False)
