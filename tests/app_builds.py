"""Builds what a bundle has for apps: with a real compiler against the runtimes' real headers and libraries."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(importlib.util.find_spec("thinet_deploy").origin).with_name("integrations")  # type: ignore[union-attr,arg-type]  # it is a package
# Prints the network's input for an image, as raw float32.
PREPROCESSOR = """
#include <cstdio>
#include <fstream>
#include "model.h"

int main(int, char** words) {
    const thinet::Model model(words[1]);
    std::ifstream stream(words[2], std::ios::binary);
    int width = 0, height = 0, channels = 0;
    stream >> width >> height >> channels;
    stream.get();
    const thinet::Image image{width, height, channels, {std::istreambuf_iterator<char>(stream), {}}};
    const std::vector<float> input = thinet::preprocess(image, model.preprocess());
    std::fwrite(input.data(), sizeof(float), input.size(), stdout);
}
"""


def compiler() -> str:
    """The C++ compiler; skips the test where there is none."""
    found = shutil.which("c++") or shutil.which("g++")
    if found is None:
        pytest.skip("there is no C++ compiler here (apt install g++)")
    return found


def preprocessor(folder: Path) -> Path:
    """A program that does nothing but preprocessing."""
    (folder / "main.cpp").write_text(PREPROCESSOR)
    program = folder / "preprocessor"
    command = [compiler(), "-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-I"]
    subprocess.run([*command, str(SOURCES / "cpp"), "-o", str(program), str(folder / "main.cpp")], check=True)
    return program


def build(runtime: str, sources: Path, folder: Path) -> Path:
    """The program of a runtime, built from a bundle's own sources; skips the test where something is missing."""
    if shutil.which("cmake") is None:
        pytest.skip("there is no cmake here (apt install cmake)")
    options = {"CMAKE_BUILD_TYPE": "Release", "CMAKE_CXX_COMPILER": compiler(), "RUNTIME": runtime}
    options |= {"CMAKE_CXX_FLAGS": "-Wall -Wextra -Werror", **_WHERE[runtime](folder)}
    words = [f"-D{name}={value}" for name, value in options.items()]
    for command in (["cmake", "-S", str(sources), "-B", str(folder), *words], ["cmake", "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / f"thinet-{runtime}"


def missing_for_ncnn() -> str:
    """Why no engine of ncnn can be made here; "" if it can."""
    missing = [module for module in ("ncnn", "pnnx") if importlib.util.find_spec(module) is None]
    return f'{" and ".join(missing)}: not installed (pip install "thinet-deploy[ncnn]")' if missing else ""


def _openvino(_: Path) -> dict[str, str]:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    return {"OpenVINO_DIR": str(Path(openvino.__file__).with_name("cmake"))}


def _onnxruntime(folder: Path) -> dict[str, str]:
    """The headers from Debian or a release; the library of the wheel, under the name that programs look for."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    root = Path(os.environ.get("ONNXRUNTIME_ROOT", "/usr"))
    if not list(root.rglob("include/**/onnxruntime_cxx_api.h")):
        pytest.skip("there are no C++ headers of ONNX Runtime (apt install libonnxruntime-dev, or $ONNXRUNTIME_ROOT)")
    libraries = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    assert libraries, "the wheel of ONNX Runtime has no library"
    (folder / "lib").mkdir(parents=True)
    (folder / "lib" / "libonnxruntime.so.1").symlink_to(libraries[0])
    return {"ONNXRUNTIME_ROOT": str(root), "onnxruntime_LIBRARY": str(folder / "lib" / "libonnxruntime.so.1")}


def _ncnn(_: Path) -> dict[str, str]:
    where = os.environ.get("ncnn_DIR", "")  # noqa: SIM112 - what CMake reads is called so
    if not where:
        pytest.skip("there is no ncnn for C++ (docs/apps.md says how to build one; $ncnn_DIR then names it)")
    return {"ncnn_DIR": where}


_WHERE = {"openvino": _openvino, "onnxruntime": _onnxruntime, "ncnn": _ncnn}
