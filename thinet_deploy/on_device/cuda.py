"""What run.py needs of CUDA: the GPU's context, a stream, buffers, clocks and graphs, by ctypes on the driver.

The driver (libcuda.so.1), not the runtime library (libcudart): it is on every machine that can run an engine, Jetson or
desktop, under one name from CUDA 11 to 13, while the name of libcudart has CUDA's version in it, pip hides it in a
folder of its own, and TensorRT may have it linked in. Both share the primary context: streams and pointers mean the
same to TensorRT.
Names and signatures are those of cuda.h; test_cuda.py compiles them against NVIDIA's own.

Python 3.8 and numpy only: a copy lies beside run.py in every bundle.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import TYPE_CHECKING, Any, Callable, Sequence

import numpy as np

from .engine import MissingRuntimeError, RunnerError

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

LIBRARY = "libcuda.so.1"
# CUdeviceptr is a number of 64 bits; contexts, streams and events are pointers.
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetPCIBusId": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemAllocHost_v2": (POINTER(c_void_p), c_size_t),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
    "cuEventDestroy_v2": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_uint64),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
}
_OUT_OF_MEMORY = 2
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: it does not wait for the default stream
_THIS_THREAD = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: what other threads do is no part of a capture
_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


class CudaError(RunnerError):
    """A call of the driver failed; the message has its name and the driver's own words."""


def load_driver() -> Any:
    """The driver with its signatures, started; MissingRuntimeError where there is none, or no GPU."""
    try:
        driver = ctypes.CDLL(LIBRARY)
        for name, types in SIGNATURES.items():
            getattr(driver, name).argtypes = types
    except (OSError, AttributeError) as error:
        raise MissingRuntimeError(f"There is no NVIDIA driver here that could be used: {error}.") from error
    if code := driver.cuInit(0):
        raise MissingRuntimeError(f"There is no NVIDIA GPU here that could be used: {words_of(driver, code)}.")
    return driver


def has_gpu() -> bool:
    """Whether an NVIDIA GPU can be used here."""
    with contextlib.suppress(MissingRuntimeError):
        load_driver()
        return True
    return False


def bus_id(ordinal: int = 0) -> str | None:
    """PCI address, such as "0000:65:00.0", of one of the GPUs that this process may see; None where it is unknown."""
    with contextlib.suppress(MissingRuntimeError):
        driver, device, text = load_driver(), c_int(), ctypes.create_string_buffer(32)
        if not driver.cuDeviceGet(byref(device), ordinal) and not driver.cuDeviceGetPCIBusId(text, len(text), device):
            return text.value.decode("ascii", "replace")
    return None


def words_of(driver: Any, code: int) -> str:
    """An error of the driver by name and in words."""
    texts = []
    for function in (driver.cuGetErrorName, driver.cuGetErrorString):
        text = c_char_p()
        if function(code, byref(text)) == 0 and text.value:
            texts.append(text.value.decode("utf-8", "replace"))
    return ", ".join(texts) or f"error {code}"


class Cuda:
    """The first GPU that this process may see (CUDA_VISIBLE_DEVICES), with one stream; close it.

    Attributes:
        stream: its handle.
    """

    def __init__(self) -> None:
        self._driver, self._undo = load_driver(), contextlib.ExitStack()
        try:
            self._device, context = c_int(), c_void_p()
            self.call("cuDeviceGet", byref(self._device), 0)
            self.call("cuDevicePrimaryCtxRetain", byref(context), self._device)
            self._undo.callback(self.call, "cuDevicePrimaryCtxRelease_v2", self._device)
            self.call("cuCtxSetCurrent", context)
            stream = c_void_p()
            self.call("cuStreamCreate", byref(stream), _NON_BLOCKING)
            self._undo.callback(self.call, "cuStreamDestroy_v2", stream)
        except BaseException:
            self.close()
            raise
        self.stream = int(stream.value or 0)

    def call(self, name: str, *arguments: Any) -> None:
        """Call the driver; CudaError says what failed."""
        code = getattr(self._driver, name)(*arguments)
        if code == _OUT_OF_MEMORY:
            raise CudaError(f"the GPU's memory is full ({name}{self._memory()}): close other programs that use it")
        if code:
            raise CudaError(f"{name} failed: {words_of(self._driver, code)}")

    def _memory(self) -> str:
        free, total = c_size_t(), c_size_t()
        if self._driver.cuMemGetInfo_v2(byref(free), byref(total)):
            return ""
        return f", {free.value >> 20} of {total.value >> 20} MiB are free"

    def describe(self) -> str:
        """Name and compute capability of the GPU."""
        name, numbers = ctypes.create_string_buffer(256), []
        self.call("cuDeviceGetName", name, len(name), self._device)
        for attribute in _CAPABILITY:
            number = c_int()
            self.call("cuDeviceGetAttribute", byref(number), attribute, self._device)
            numbers.append(number.value)
        return "{} (compute capability {}.{})".format(name.value.decode("utf-8", "replace"), *numbers)

    def event(self) -> c_void_p:
        """A mark in the stream; see `record` and `elapsed_ms`."""
        event = c_void_p()
        self.call("cuEventCreate", byref(event), 0)
        self._undo.callback(self.call, "cuEventDestroy_v2", event)
        return event

    def buffer(self) -> Buffer:
        """Memory for one tensor, freed with the rest."""
        buffer = Buffer(self)
        self._undo.callback(buffer.free)
        return buffer

    def graph(self) -> Graph:
        """Room for one graph, freed with the rest."""
        graph = Graph(self)
        self._undo.callback(graph.free)
        return graph

    def record(self, event: c_void_p) -> None:
        """Put a mark into the stream."""
        self.call("cuEventRecord", event, self.stream)

    def elapsed_ms(self, start: c_void_p, end: c_void_p) -> float:
        """Milliseconds on the GPU between two marks that have been reached."""
        elapsed = c_float()
        self.call("cuEventElapsedTime", byref(elapsed), start, end)
        return elapsed.value

    def wait(self) -> None:
        """Until everything in the stream is done; errors of earlier calls can show up here."""
        self.call("cuStreamSynchronize", self.stream)

    def close(self) -> None:
        """Give everything back, in the opposite order."""
        self._undo.close()


class Buffer:
    """Memory for one tensor on both sides; here it is page-locked, so that copies run beside everything else.

    Attributes:
        device: address on the GPU; 0 before the first `reserve`.
        array: what lies on this side.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self._host, self._device, self._size = cuda, c_void_p(), c_uint64(), 0
        self.array: Array = np.empty(0)

    @property
    def device(self) -> int:
        """The address on the GPU."""
        return int(self._device.value)

    def reserve(self, shape: Sequence[int], dtype: str) -> None:
        """Make room for such a tensor; larger room from before is kept."""
        count = math.prod(shape)
        size = max(1, count * np.dtype(dtype).itemsize)
        if size > self._size:
            self.free()
            self._cuda.call("cuMemAllocHost_v2", byref(self._host), size)
            self._cuda.call("cuMemAlloc_v2", byref(self._device), size)
            self._size = size
        memory = (ctypes.c_byte * self._size).from_address(self._host.value or 0)
        self.array = np.frombuffer(memoryview(memory), dtype, count).reshape(shape)

    def upload(self) -> None:
        """Put the copy to the GPU into the stream."""
        self._cuda.call("cuMemcpyHtoDAsync_v2", self._device, self._host, self.array.nbytes, self._cuda.stream)

    def download(self) -> None:
        """Put the copy from the GPU into the stream."""
        self._cuda.call("cuMemcpyDtoHAsync_v2", self._host, self._device, self.array.nbytes, self._cuda.stream)

    def free(self) -> None:
        """Give back both sides; `array` must not be read any more."""
        self._size, self.array = 0, np.empty(0)
        host, device, self._host, self._device = self._host, self._device, c_void_p(), c_uint64()
        if device.value:
            self._cuda.call("cuMemFree_v2", device)
        if host.value:
            self._cuda.call("cuMemFreeHost", host)


class Graph:
    """Work that was put into the stream once, to be put there again by one call in place of one for each kernel."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self._ready = cuda, c_void_p()

    @property
    def ready(self) -> bool:
        """Whether there is anything to launch."""
        return bool(self._ready.value)

    def capture(self, put: Callable[[], None]) -> None:
        """Take what `put` puts into the stream, of which nothing runs yet, in place of what was captured before.

        Raises:
            RunnerError: something in it cannot be captured, or `put` failed; the stream is as it was before.
        """
        self.free()
        call, graph = self._cuda.call, c_void_p()
        call("cuStreamBeginCapture_v2", self._cuda.stream, _THIS_THREAD)
        try:
            put()
        except BaseException:
            with contextlib.suppress(CudaError):  # what went wrong first is what counts
                self._end(graph)
                call("cuGraphDestroy", graph)
            raise
        self._end(graph)
        try:
            call("cuGraphInstantiateWithFlags", byref(self._ready), graph, 0)
        finally:
            call("cuGraphDestroy", graph)

    def _end(self, graph: c_void_p) -> None:
        """Also after an error: until then the stream takes nothing else."""
        self._cuda.call("cuStreamEndCapture", self._cuda.stream, byref(graph))

    def launch(self) -> None:
        """Put all of it into the stream."""
        self._cuda.call("cuGraphLaunch", self._ready, self._cuda.stream)

    def free(self) -> None:
        """Forget what was captured."""
        ready, self._ready = self._ready, c_void_p()
        if ready.value:
            self._cuda.call("cuGraphExecDestroy", ready)
