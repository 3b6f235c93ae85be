"""Engines of TensorRT 8.5 to 11 and of TensorRT-RTX: named tensors, one stream, every batch they were built for.

The first run of a shape is launched kernel by kernel, all others as one CUDA graph where the engine can be one.

No engine of it has ever run where this was written: names and signatures are checked against the real bindings of four
versions, order and memory against a libcuda of the tests' own (tests/test_tensorrt_engine.py).

Python 3.8, numpy and TensorRT only: a copy lies beside run.py in every bundle.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping

import numpy as np

from .cuda import Buffer, Cuda, Graph, has_gpu
from .engine import Engine, RunnerError, in_steps

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

_DTYPES = {"FLOAT": "f4", "HALF": "f2", "INT8": "i1", "UINT8": "u1", "INT32": "i4", "INT64": "i8", "BOOL": "?"}
# The inspector's words for a type ("Half", "Row major linear FP16 format", …), the special before the general.
_TYPES = (("BF16|BFloat16", "bf16"), ("FP16|Half", "fp16"), ("Int8", "int8"), ("FP32|Float", "fp32"))
_MOVING = ("Reformat", "Constant", "NoOp", "Shuffle")  # layers that compute nothing
_AGAIN = "an engine belongs to the device, the TensorRT and the system it was built on, so build it there"
# What TensorRT says when it refuses a file, and what it means.
_REFUSALS = (
    ("[Oo]ut ?[Oo]f ?[Mm]emory|could not be allocated", "the GPU's memory is full: close other programs that use it"),
    ("expecting library version|Version tag does not match", f"it was built by another TensorRT: {_AGAIN}"),
    ("incompatible device|expecting compute", f"it was built for another GPU: {_AGAIN}"),
    ("[Mm]agic ?[Tt]ag|[Ss]erialization", "it is damaged, or no engine: copy it again, or build it again"),
)


class TensorRt(Engine):
    """A TensorRT engine on the first GPU, by a stream of its own; inputs and outputs are copied in every run.

    Attributes:
        graph: the computing as a CUDA graph, for the shapes of the last run.
        no_graph: why it cannot be one; "" where that is not known, or it can.
    """

    package = module = "tensorrt"
    on_gpu = True
    to_get = "on a Jetson: apt install python3-libnvinfer; elsewhere: pip install tensorrt"

    def __init__(self, runtime: Any, path: str, threads: int, precision: str) -> None:
        self.trt, self.logger = runtime, _logger(runtime)
        self.cuda = Cuda()  # before anything of TensorRT, which takes the context that it finds
        try:
            self._load(path)
            self.about = self._about(precision)
        except BaseException:
            with contextlib.suppress(RunnerError):  # what went wrong first is what counts
                self.close()
            raise

    @classmethod
    def can_run(cls) -> bool:
        """Whether there is an NVIDIA GPU."""
        return has_gpu()

    def _load(self, path: str) -> None:
        self.runtime = self.trt.Runtime(self.logger)
        if (core := _dla_core(path)) is not None:
            self.runtime.DLA_core = core
        self.engine = self.runtime.deserialize_cuda_engine(Path(path).read_bytes())
        self.context: Any = self.engine.create_execution_context() if self.engine else None
        if self.context is None:
            raise RunnerError(f"{_meaning(self.logger.lines)}. TensorRT {self.trt.__version__} said: {self._said()}")
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        inputs = self.trt.TensorIOMode.INPUT
        self.input_names = [name for name in names if self.engine.get_tensor_mode(name) == inputs]
        self.output_names = [name for name in names if name not in self.input_names]
        self.dtypes = {name: self._dtype(name) for name in names}
        self.buffers: dict[str, Buffer] = {name: self.cuda.buffer() for name in names}
        self.marks = [self.cuda.event() for _ in range(4)]
        self.batches = self._batches()
        self.shapes: dict[str, Any] = {}
        self.graph: Graph = self.cuda.graph()
        self.has_run, self.no_graph = False, ""
        self.clocks: dict[str, float] = {}
        self.launch_s = 0.0

    def _said(self) -> str:
        return " ".join(self.logger.lines[-3:]) or "nothing"

    def _dtype(self, name: str) -> str:
        kind = self.engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise RunnerError(f"its tensor {name!r} is of type {kind}, which numpy does not have")
        return _DTYPES[kind]

    def _batches(self) -> tuple[int, int]:
        """The smallest and the largest batch that it was built for."""
        name = self.input_names[0]
        batch = self.engine.get_tensor_shape(name)[0]
        if batch != -1:
            return batch, batch
        low, _, high = self.engine.get_tensor_profile_shape(name, 0)
        return low[0], high[0]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Any number of images; what the engine was not built for goes step by step."""
        if missing := [name for name in self.input_names if name not in inputs]:
            raise RunnerError(f"the engine takes {', '.join(missing)}, but was given {', '.join(inputs) or 'nothing'}")
        self.clocks.clear()
        self.launch_s = 0.0
        count, (low, high) = len(inputs[self.input_names[0]]), self.batches
        if low <= count <= high:
            return self._run_batch(inputs)
        return in_steps(inputs, low if count < low else high, self._run_batch)

    def _run_batch(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self._take_shapes({name: inputs[name].shape for name in self.input_names})
        for name in self.input_names:
            np.copyto(self.buffers[name].array, inputs[name], casting="same_kind")
        self._capture()
        start, uploaded, computed, end = self.marks
        self.cuda.record(start)
        for name in self.input_names:
            self.buffers[name].upload()
        self.cuda.record(uploaded)
        self._compute()
        self.cuda.record(computed)
        for name in self.output_names:
            self.buffers[name].download()
        self.cuda.record(end)
        self.cuda.wait()
        self.has_run = True
        parts = {"upload": (start, uploaded), "compute": (uploaded, computed), "download": (computed, end)}
        for part, marks in parts.items():
            self.clocks[part] = self.clocks.get(part, 0.0) + self.cuda.elapsed_ms(*marks)
        return {name: self.buffers[name].array.copy() for name in self.output_names}

    def _compute(self) -> None:
        launched = time.perf_counter()
        if self.graph.ready:
            self.graph.launch()
        else:
            self._launch()
        self.launch_s += time.perf_counter() - launched

    def _launch(self) -> None:
        if not self.context.execute_async_v3(self.cuda.stream):
            raise RunnerError(f"TensorRT did not run it: {self._said()}")

    def _capture(self) -> None:
        """Make it a graph, once it has run in these shapes: TensorRT does in the first run what a graph cannot hold."""
        if self.has_run and not self.graph.ready and not self.no_graph:
            try:
                self.graph.capture(self._launch)
            except RunnerError as error:
                self.no_graph = str(error)

    def _take_shapes(self, shapes: dict[str, Any]) -> None:
        """Tell TensorRT the shapes and where the tensors lie, if they are others than in the run before."""
        if shapes == self.shapes:
            return
        self.shapes, self.has_run = {}, False  # nothing holds until all of it does
        self.graph.free()
        for name, shape in shapes.items():
            if not self.context.set_input_shape(name, shape):
                built = tuple(self.engine.get_tensor_shape(name))
                raise RunnerError(f"input {name!r} has shape {shape}, but the engine was built for {built}")
        for name, buffer in self.buffers.items():
            shape = tuple(self.context.get_tensor_shape(name))
            if min(shape, default=0) < 0:
                raise RunnerError(f"output {name!r} has shape {shape}, which only the data decide")
            buffer.reserve(shape, self.dtypes[name])
            if not self.context.set_tensor_address(name, buffer.device):
                raise RunnerError(f"TensorRT does not take a buffer for {name!r}: {self._said()}")
        self.shapes = shapes

    def clocks_ms(self) -> dict[str, float]:
        """By events on the GPU: the way there, computing, the way back."""
        return dict(self.clocks)

    def launch_ms(self) -> float | None:
        """Of the host, until TensorRT or the graph has put the computing into the stream."""
        return self.launch_s * 1e3

    def _about(self, precision: str) -> dict[str, Any]:
        """What `describe` gives; RunnerError when no layer computes in the type that the engine was built for."""
        executed = executed_types(self.engine.create_engine_inspector(), self.trt)
        known = {kind for _, kind in _TYPES}
        if executed and precision not in executed and set(executed) <= known:
            raise RunnerError(f"it was to compute in {precision}, but all of its layers run in {' or '.join(executed)}")
        about = {"runtime": self.package, "version": str(self.trt.__version__), "device": self.cuda.describe()}
        asked = {"threads": None, "precision_asked": precision, "precision_in_use": None}
        return {**about, **asked, "executed_layers": executed}

    def describe(self) -> dict[str, Any]:
        """The GPU, how many layers compute in which type, by the inspector, and whether it runs as a CUDA graph."""
        graph = "yes" if self.graph.ready else f"no: {self.no_graph}" if self.no_graph else "not yet"
        return {**self.about, "cuda_graph": graph}

    def close(self) -> None:
        """TensorRT's objects go before the memory and the context that they use."""
        cuda = self.cuda
        for name in ("context", "engine", "runtime"):
            self.__dict__.pop(name, None)
        cuda.close()
        super().close()


class TensorRtRtx(TensorRt):
    """An engine of TensorRT-RTX, whose interface is the same."""

    package, module, to_get = "tensorrt-rtx", "tensorrt_rtx", ""


def _dla_core(path: str) -> int | None:
    """The DLA that an engine was built for, as its builder wrote beside it; None for the GPU alone."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        core = json.loads(Path(path).with_suffix(".build.json").read_text(encoding="utf-8")).get("dla_core")
        return core if isinstance(core, int) else None
    return None


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # the base class is only known now
        """Keeps what TensorRT complains about."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            """Called by TensorRT, from any thread."""
            kinds = trt.ILogger.Severity
            if severity in (kinds.INTERNAL_ERROR, kinds.ERROR):
                self.lines.append(message)

    return Logger()


def _meaning(lines: list[str]) -> str:
    """Why TensorRT gave no engine or context, from its own words."""
    words = " ".join(lines)
    for pattern, meaning in _REFUSALS:
        if re.search(pattern, words):
            return meaning
    return "TensorRT makes no engine of it"


def executed_types(inspector: Any, trt: Any) -> dict[str, int]:
    """How many layers read which type; {} for an engine that was built without detailed layer information."""
    found = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    return dict(Counter(kind for _, kind in inspected_layers(found)))


def inspected_layers(information: Mapping[str, Any]) -> list[tuple[set[str], str]]:
    """Of each layer that computes, by the inspector's word: the ONNX nodes in it, and the type that it reads.

    A generated kernel that casts or pads for a layer names its nodes too: it has those that no other layer names.
    """
    layers = [layer for layer in information.get("Layers", []) if isinstance(layer, dict)]
    found = [(layer, _taken(layer)) for layer in layers if layer.get("LayerType") not in _MOVING]
    whole = {node for layer, taken in found if taken and not _is_generated(layer) for node in _nodes_of(layer)}
    return [
        (_nodes_of(layer) - (whole if _is_generated(layer) else set()), _type_of(taken))
        for layer, taken in found
        if taken
    ]


def _is_generated(layer: Mapping[str, Any]) -> bool:
    return layer.get("LayerType") == "kgen"


def _taken(layer: Mapping[str, Any]) -> str:
    """In the inspector's words, the type of what a layer reads; TensorRT 11 tells it apart from the layout."""
    first = (layer.get("Inputs") or layer.get("Outputs") or [{}])[0]
    return str(first.get("Format/Datatype") or first.get("Datatype") or "")


def _nodes_of(layer: Mapping[str, Any]) -> set[str]:
    """From "[ONNX Layer: conv1]…[ONNX Layer: relu1]" of TensorRT 10, and from "conv1 + relu1"."""
    told = re.findall(r"\[ONNX Layer: ([^\]]*)\]", str(layer.get("Metadata", "")))
    return {*told, *re.split(r" \+ | \|\| ", str(layer.get("Name", "")))}


def _type_of(text: str) -> str:
    return next((kind for pattern, kind in _TYPES if re.search(pattern, text)), text)
