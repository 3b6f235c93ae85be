"""The runtimes that run.py knows, one class each, and how an engine of any of them is opened.

Python 3.8, numpy and the runtime only: a copy lies beside run.py in every bundle.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections import Counter
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Mapping

import numpy as np

from .cuda import bus_id
from .engine import Engine, MissingRuntimeError, RunnerError, in_steps, reason
from .sensors import Nvml
from .tensorrt_engine import TensorRt, TensorRtRtx

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


class _OpenVino(Engine):
    """An OpenVINO IR (.xml beside its .bin) on the CPU."""

    package = "openvino"
    # Left alone, a CPU with AVX512_BF16 or AMX computes in bf16. In an INT8 network the quantised
    # layers stay quantised whatever the hint says; it decides about the remaining ones.
    hints = MappingProxyType({"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "f32"})
    compute_layers = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")

    def __init__(self, runtime: Any, path: str, threads: int, precision: str) -> None:
        core, hint = runtime.Core(), self.hints[precision]
        device, version = str(core.get_property("CPU", "FULL_DEVICE_NAME")), str(runtime.__version__)
        self.about = {"runtime": "openvino", "version": version, "device": device, "precision_asked": hint}
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads}
        self.model = core.compile_model(path, "CPU", options)
        self.request = self.model.create_infer_request()
        self.input_names = [port.get_any_name() for port in self.model.inputs]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        results = self.request.infer(dict(inputs))
        # A tensor can have several names; the one that the ONNX file uses is among them.
        return {name: results[i] for i, port in enumerate(self.model.outputs) for name in port.get_names()}

    def clocks_ms(self) -> dict[str, float]:
        return {"compute": float(self.request.latency)}

    def describe(self) -> dict[str, Any]:
        infos = [layer.get_rt_info() for layer in self.model.get_runtime_model().get_ops()]
        layers = [info for info in infos if info["layerType"].value in self.compute_layers]
        executed = Counter(str(info["runtimePrecision"].value) for info in layers)
        in_use = self.model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        threads = int(self.model.get_property("INFERENCE_NUM_THREADS"))
        return {**self.about, "threads": threads, "precision_in_use": in_use, "executed_layers": dict(executed)}


class _OnnxRuntime(Engine):
    """An ONNX or .ort file on ONNX Runtime's CPU provider. It decides the precision; the runtime does not tell."""

    package = "onnxruntime"

    def __init__(self, runtime: Any, path: str, threads: int, precision: str) -> None:
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3  # errors only; warnings would fill the terminal
        # Threads spin inside a run, as an app gets it by default (without, the best runs took 14 % longer),
        # but not after it: an idle engine must not take the cores from the one being timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.input_names = [port.name for port in self.session.get_inputs()]
        self.output_names = [port.name for port in self.session.get_outputs()]
        about = {"runtime": "onnxruntime", "version": str(runtime.__version__), "device": "CPU", "threads": threads}
        self.about = {**about, "precision_asked": precision, "precision_in_use": None, "executed_layers": {}}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return dict(zip(self.output_names, self.session.run(self.output_names, dict(inputs))))

    def describe(self) -> dict[str, Any]:
        return dict(self.about)


class _Ncnn(Engine):
    """An ncnn network (.param beside its .bin) on the CPU."""

    package = "ncnn"
    environment = MappingProxyType({"OMP_WAIT_POLICY": "passive"})  # threads that spin cost up to 250 ms a run

    def __init__(self, runtime: Any, path: str, threads: int, precision: str) -> None:
        self.net, half, brain = runtime.Net(), precision == "fp16", precision == "bf16"
        options = self.net.opt
        options.num_threads = threads
        # Left alone, it would store and compute in fp16 wherever the CPU can.
        options.use_fp16_packed = options.use_fp16_storage = options.use_fp16_arithmetic = half
        options.use_bf16_packed = options.use_bf16_storage = brain
        if self.net.load_param(path) or self.net.load_model(str(Path(path).with_suffix(".bin"))):
            raise RunnerError("it, or the .bin beside it, cannot be read")
        self.input_names, self.output_names = list(self.net.input_names()), list(self.net.output_names())
        self.array, about = runtime.Mat, {"runtime": "ncnn", "version": str(runtime.__version__), "device": "CPU"}
        asked = {"threads": threads, "precision_asked": precision, "precision_in_use": None, "executed_layers": {}}
        self.about = {**about, **asked}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return in_steps(inputs, 1, self._run_one)  # it knows no batch

    def _run_one(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        extractor = self.net.create_extractor()
        for name, array in inputs.items():
            extractor.input(name, self.array(array[0]).clone())
        return {name: np.array(extractor.extract(name)[1])[None] for name in self.output_names}

    def describe(self) -> dict[str, Any]:
        return dict(self.about)


class _LiteRt(Engine):
    """A LiteRT flatbuffer (.tflite) on the CPU, by XNNPACK; it has one batch size."""

    package, module = "ai-edge-litert", "ai_edge_litert.interpreter"

    def __init__(self, runtime: Any, path: str, threads: int, precision: str) -> None:
        self.interpreter = runtime.Interpreter(path, num_threads=threads)
        self.signature = self.interpreter.get_signature_runner()
        details = self.signature.get_input_details()
        self.input_names, self.batch = list(details), int(next(iter(details.values()))["shape"][0])
        about = {"runtime": "litert", "version": _version(self.package), "device": "CPU", "threads": threads}
        self.about = {**about, "precision_asked": precision, "precision_in_use": None, "executed_layers": {}}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return in_steps(inputs, self.batch, lambda part: dict(self.signature(**part)))

    def describe(self) -> dict[str, Any]:
        return dict(self.about)


class _ExecuTorch(Engine):
    """An ExecuTorch program (.pte) on the CPU; it has one batch size, and its names in constant methods."""

    package, module = "executorch", "executorch.runtime"

    def __init__(self, runtime: Any, path: str, threads: int, precision: str) -> None:
        program = runtime.Runtime.get().load_program(path)
        self.method, self.tensor = program.load_method("forward"), importlib.import_module("torch").from_numpy
        read = {name: program.load_method(name).execute([]) for name in ("input_names", "output_names")}
        self.input_names, self.output_names = read["input_names"], read["output_names"][0].split(",")
        self.batch = int(self.method.metadata.input_tensor_meta(0).sizes()[0])
        about = {"runtime": "executorch", "version": _version(self.package), "device": "CPU"}
        # Its Python interface cannot set the threads: it takes one for each core.
        self.about = {**about, "threads": None, "precision_asked": precision, "precision_in_use": None}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return in_steps(inputs, self.batch, self._run_batch)

    def _run_batch(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        results = self.method.execute([self.tensor(inputs[name]) for name in self.input_names])
        return {name: result.numpy().copy() for name, result in zip(self.output_names, results)}

    def describe(self) -> dict[str, Any]:
        return dict(self.about)


def _version(package: str) -> str:
    return importlib.metadata.version(package)


ENGINES: dict[str, type[Engine]] = {
    "openvino": _OpenVino,
    "onnxruntime": _OnnxRuntime,
    "ort": _OnnxRuntime,  # its own format, and the same runtime
    "ncnn": _Ncnn,
    "litert": _LiteRt,
    "executorch": _ExecuTorch,
    "tensorrt": TensorRt,
    "tensorrt-rtx": TensorRtRtx,
}


def can_run(runtime: str) -> bool:
    """Whether engines of this kind can run on this machine, if the runtime is installed."""
    return runtime in ENGINES and ENGINES[runtime].can_run()


def gpus_of(*runtimes: str) -> Nvml | None:
    """What to ask about GPUs while engines of these kinds run; None where they run on the CPU."""
    return Nvml(bus_id()) if any(ENGINES[runtime].on_gpu for runtime in runtimes) else None


def import_runtime(runtime: str) -> Any:
    """The runtime's module; MissingRuntimeError says what to install."""
    if runtime not in ENGINES:
        raise MissingRuntimeError(f"This runner has no runtime called {runtime!r}. It knows: {', '.join(ENGINES)}.")
    engine = ENGINES[runtime]
    for name, value in engine.environment.items():
        os.environ.setdefault(name, value)
    try:
        # OpenVINO reports to its maker when it is imported, from a process of its own; without this module it does not.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # absent
        return importlib.import_module(engine.module or engine.package)
    except ImportError as error:
        raise MissingRuntimeError(
            f"{runtime} cannot be imported: {error}. Do: {engine.to_get or f'pip install {engine.package}'}"
        ) from error


def open_engine(runtime: str, path: str, threads: int, precision: str = "fp32") -> Engine:
    """Load an engine.

    Args:
        runtime: one of ENGINES.
        path: its main file (.xml, .onnx …).
        threads: CPU threads that one inference may use.
        precision: "fp32", "fp16", "bf16" or "int8": what the engine has to compute in.

    Raises:
        MissingRuntimeError: the runtime is unknown or not installed, or the GPU that it needs is not there.
        RunnerError: the file is missing, or the runtime refuses it.
    """
    module, known = import_runtime(runtime), ", ".join(_OpenVino.hints)
    if precision not in _OpenVino.hints:
        raise RunnerError(f"There is no precision {precision!r}; one of {known} was expected.")
    if not Path(path).exists():
        raise RunnerError(f"There is no engine at {path}.")
    try:
        return ENGINES[runtime](module, path, threads, precision)
    except MissingRuntimeError:
        raise
    except Exception as error:  # runtimes raise types of their own
        raise RunnerError(f"{runtime} refuses {path}: {reason(error)}") from error
