"""cuda.py on libcuda.c, a driver without a GPU that counts what it gave away; and both against NVIDIA's own headers."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorrt_versions import CACHE, compiler, driver

from thinet_deploy.on_device import cuda
from thinet_deploy.on_device.cuda import Cuda, CudaError
from thinet_deploy.on_device.engine import MissingRuntimeError

# One of JetPack 5's CUDA 11, 6's 12 and 7's 13 each.
HEADERS = ("nvidia-cuda-runtime-cu11==11.7.99", "nvidia-cuda-runtime-cu12==12.6.77", "nvidia-cuda-runtime==13.2.75")
KINDS = ("contexts", "streams", "events", "device memory", "host memory", "graphs", "executable graphs")
SOURCE = Path(__file__).with_name("libcuda.c")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def live(library: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes cuda.py use the driver of the tests; tells what has not been given back."""
    monkeypatch.setattr(cuda, "LIBRARY", str(library))
    count = ctypes.CDLL(str(library)).fake_live
    return lambda: {kind: number for place, kind in enumerate(KINDS) if (number := count(place))}


# --------------------------------------------------------------------------------------------- signatures


@pytest.mark.parametrize("requirement", HEADERS)
def test_names_and_signatures_are_those_of_nvidia(requirement: str, tmp_path: Path) -> None:
    header = with_header(requirement)
    command = [compiler(), "-x", "c", "-fsyntax-only", "-DNVIDIA_HEADER", "-I", str(header.parent)]
    command += ["-Wall", "-Wmissing-prototypes", "-Werror", "-Wno-enum-compare"]
    done = subprocess.run([*command, str(SOURCE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wrong = tmp_path / "wrong.c"
    for right, other in (("cuMemFree_v2", "cuMemFree_v3"), ("CUevent from, CUevent to", "CUevent from")):
        wrong.write_text(SOURCE.read_text().replace(right, other))
        assert subprocess.run([*command, str(wrong)], capture_output=True, check=False).returncode, "it does compare"


def with_header(requirement: str) -> Path:
    """NVIDIA's cuda.h of a version, from the cache, or from the package index once."""
    place = CACHE.with_name("cuda-headers") / requirement.replace("==", "-") / "cuda.h"
    if not place.exists():
        wheels = place.with_name("wheel")
        options = ["--no-deps", "--quiet", "--only-binary=:all:", "--platform", "manylinux2014_x86_64"]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(wheels), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{requirement} cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            headers = [name for name in wheel.namelist() if name.endswith("/include/cuda.h")]
            place.with_suffix(".partial").write_bytes(wheel.read(headers[0]))
        place.with_suffix(".partial").rename(place)
    return place


def test_what_is_called_is_what_was_compared() -> None:
    """Each function of SIGNATURES is in libcuda.c with as many parameters, of the same kinds."""
    kinds = {
        ctypes.c_void_p: "p", ctypes.c_char_p: "p", ctypes.c_int: "4", ctypes.c_uint: "4", ctypes.c_uint64: "8",
        ctypes.c_size_t: "8",
    }  # fmt: skip
    words = {"int": "4", "unsigned int": "4", "CUdevice": "4", "CUdevice_attribute": "4", "CUresult": "4"}
    words |= {"CUdeviceptr": "8", "size_t": "8", "CUcontext": "p", "CUstream": "p", "CUevent": "p", "CUgraph": "p"}
    words |= {"CUgraphExec": "p", "CUstreamCaptureMode": "4", "unsigned long long": "8"}
    text = SOURCE.read_text()
    for name, types in cuda.SIGNATURES.items():
        given = text.partition(f"CUresult {name}(")[2].partition(")")[0].split(", ")
        found = ["p" if "*" in one else words[one.removeprefix("const ").rpartition(" ")[0]] for one in given]
        assert found == ["p" if hasattr(each, "contents") else kinds[each] for each in types], name


# ---------------------------------------------------------------------------------------------- behaviour


def test_all_is_given_back(live: Any) -> None:
    opened = Cuda()
    first, second, buffer = opened.event(), opened.event(), opened.buffer()
    buffer.reserve((2, 3), "f4")
    assert live() == {"contexts": 1, "streams": 1, "events": 2, "device memory": 1, "host memory": 1}
    assert opened.describe() == "A GPU of the tests (compute capability 8.7)"
    opened.record(first)
    opened.record(second)
    with pytest.raises(CudaError, match="cuEventElapsedTime failed: error 600"):
        opened.elapsed_ms(first, second)
    opened.wait()
    assert opened.elapsed_ms(first, second) == 1.0
    opened.close()
    assert live() == {}
    opened.close()


@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from(["f4", "f2", "i1", "?"])), min_size=1, max_size=6))
def test_a_buffer_takes_every_shape_and_grows_only_when_it_must(library: Path, shapes: list[tuple[int, str]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "LIBRARY", str(library))
        opened, largest = Cuda(), 0
        buffer, places = opened.buffer(), set()
        for rows, dtype in shapes:
            buffer.reserve((rows, 2), dtype)
            grown = buffer.array.nbytes > largest
            largest = max(largest, buffer.array.nbytes)
            assert grown or buffer.device in places
            places.add(buffer.device)
            sent = np.arange(rows * 2).reshape(rows, 2).astype(dtype)
            buffer.array[:] = sent
            buffer.upload()
            buffer.array[:] = 0
            buffer.download()
            assert not buffer.array.any(), "copies are made when the stream gets to them"
            opened.wait()
            np.testing.assert_array_equal(buffer.array, sent)
        opened.close()
        count = ctypes.CDLL(str(library)).fake_live
        assert [count(kind) for kind in range(len(KINDS))] == [0] * len(KINDS)


@pytest.mark.parametrize(
    "name", ["cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuStreamCreate", "cuEventCreate"]
)
def test_every_return_code_is_looked_at(name: str, live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_FAKE_FAIL", f"{name}=719")

    def start() -> None:
        with contextlib.closing(Cuda()) as opened:
            opened.event()

    with pytest.raises(CudaError, match=f"^{name} failed: CUDA_ERROR_LAUNCH_FAILED, unspecified launch failure$"):
        start()
    assert live() == {}


def test_full_memory_says_how_much_is_free_and_leaks_nothing(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_FAKE_MEMORY", str(3 << 20))
    opened = Cuda()
    first, second = opened.buffer(), opened.buffer()
    first.reserve((1 << 20,), "i1")
    with pytest.raises(CudaError, match=r"memory is full \(cuMemAlloc_v2, 2 of 3 MiB are free\): close other programs"):
        second.reserve((4 << 20,), "i1")
    second.reserve((1 << 20,), "i1")
    opened.close()
    assert live() == {}


def test_a_graph_is_captured_launched_captured_anew_and_given_back(live: Any, library: Path) -> None:
    opened, ran = Cuda(), list[str]()
    graph, work = opened.graph(), ctypes.CFUNCTYPE(None)
    driver, works = ctypes.CDLL(str(library)), [work(lambda: ran.append("first")), work(lambda: ran.append("second"))]

    def put(function: Any) -> None:
        assert driver.fake_captured(ctypes.c_void_p(opened.stream), function)

    for function, name in zip(works, ("first", "second"), strict=True):
        graph.capture(partial(put, function))
        assert ran.count(name) == 0, "nothing runs while it is captured"
        graph.launch()
        graph.launch()
        assert ran.count(name) == 2
        assert {kind: live()[kind] for kind in live() if "graph" in kind} == {"executable graphs": 1}
    opened.close()
    assert live() == {}


def test_what_cannot_be_captured_leaves_the_stream_usable(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Cuda()
    graph, mark = opened.graph(), opened.event()

    def fails() -> None:
        raise CudaError("TensorRT did not run it")

    with pytest.raises(CudaError, match=r"^cuStreamSynchronize failed: error 900$"):
        graph.capture(opened.wait)
    with pytest.raises(CudaError, match=r"^TensorRT did not run it$"):
        graph.capture(fails)
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_FAKE_FAIL", "cuGraphInstantiateWithFlags=719")
        with pytest.raises(CudaError, match=r"^cuGraphInstantiateWithFlags failed: CUDA_ERROR_LAUNCH_FAILED"):
            graph.capture(lambda: None)
    assert not graph.ready
    opened.record(mark)
    opened.wait()
    assert set(live()) == {"contexts", "streams", "events"}
    opened.close()
    assert live() == {}


def test_a_machine_without_driver_or_gpu_says_so(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda.has_gpu()
    assert (cuda.bus_id(), cuda.bus_id(1)) == ("0000:65:00.0", None)
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_FAKE_FAIL", "cuInit=100")
        assert not cuda.has_gpu()
        assert cuda.bus_id() is None
        with pytest.raises(MissingRuntimeError, match="no NVIDIA GPU here that could be used: CUDA_ERROR_NO_DEVICE"):
            Cuda()
    monkeypatch.setattr(cuda, "LIBRARY", "libno-such-driver.so.1")
    assert not cuda.has_gpu()
    with pytest.raises(MissingRuntimeError, match=r"There is no NVIDIA driver here.*libno-such-driver"):
        Cuda()
