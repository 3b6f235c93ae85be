"""TensorRT on a device that is not there: the real bindings' names and signatures over ONNX Runtime and libcuda.c.

`tensorrt` itself, for a process that finds this folder, the bindings and their libraries (see tensorrt_versions.py). An
engine is a header (who built it, for which GPU) and the ONNX file it was built from. It runs that file on "device"
memory at the addresses that it was given, and refuses files in the words of the real one.

    TENSORRT_FAKE_VERSION   the version that builds and reads engines (default: the bindings')
    TENSORRT_FAKE_GPU       the compute capability (default 8.7)
    TENSORRT_FAKE_FLOAT     the node whose layer runs in float32 all the same, by the inspector's word
    TENSORRT_FAKE_UNGRAPHED set: it refuses to run while its stream is being captured, as with a DLA
"""

from __future__ import annotations

import ctypes
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import tensorrt_bindings as trt  # type: ignore[import-not-found]  # see tensorrt_versions.py
from tensorrt_stand_in import WORLD, StandIn, stand_in
from tensorrt_versions import FAKE_GPU, FAKE_HEADER, fake_engine

from thinet_deploy.on_device import cuda

VERSION = os.environ.get("TENSORRT_FAKE_VERSION", trt.__version__)
GPU = os.environ.get("TENSORRT_FAKE_GPU", FAKE_GPU)
MAX_BATCH = 32
PARSED: dict[str, bytes] = {}
_KINDS = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(double)": "FP8"}  # a type that numpy lacks


# ------------------------------------------------------------------------------------------ building


def _parse(parser: StandIn, path: str) -> bool:
    PARSED["source"] = Path(path).read_bytes()
    return True


def _types(source: bytes) -> set[str]:
    model = onnx.load_from_string(source)
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    found = {"HALF"} if onnx.TensorProto.FLOAT16 in kinds else {"FLOAT"}
    return found | ({"INT8"} if any(node.op_type == "QuantizeLinear" for node in model.graph.node) else set())


def _build(builder: StandIn, network: StandIn, config: StandIn) -> StandIn:
    memory = StandIn(trt.IHostMemory)
    memory.own["bytes"] = fake_engine(PARSED["source"], VERSION, GPU)
    return memory


# ------------------------------------------------------------------------------------------ running


def _deserialize(runtime: StandIn, blob: Any) -> StandIn | None:
    data = bytes(blob)
    if complaint := _complaint(data):
        (tell,) = (logger.log for logger in runtime.own["given"])
        tell(trt.ILogger.Severity.ERROR, f"IRuntime::deserializeCudaEngine: Error Code 1: {complaint}")
        return None
    source = data.split(b"\n", 2)[2]
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    engine = StandIn(trt.ICudaEngine)
    ports = {port.name: port for port in (*session.get_inputs(), *session.get_outputs())}
    inputs = {port.name for port in session.get_inputs()}
    engine.own.update(session=session, ports=ports, inputs=inputs, source=source)
    return engine


def _complaint(data: bytes) -> str:
    if not data.startswith(FAKE_HEADER):
        return "Serialization (Serialization assertion magicTagRead == kMAGIC_TAG failed.Magic tag does not match)"
    parts = data.split(b"\n", 2)
    about = json.loads(parts[1])
    if about["version"] != VERSION:
        tags = "Note: Current Version: 239, Serialized Engine Version: 237"
        assertion = "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed."
        return f"Serialization ({assertion}Version tag does not match. {tags})"
    if about["gpu"] != GPU:
        what = "The engine plan file is generated on an incompatible device"
        return f"{what}, expecting compute {GPU} got compute {about['gpu']}, please rebuild."
    if (about["crc"], about["size"]) != (zlib.crc32(parts[2]), len(parts[2])):
        return "Serialization (Serialization assertion sizeRead == static_cast<uint64_t>(mEnd - mCurrent) failed.)"
    return ""


def _shape(port: Any) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else -1 for size in port.shape)


def _profile(engine: StandIn, name: str, profile: int) -> list[tuple[int, ...]]:
    rest = _shape(engine.own["ports"][name])[1:]
    return [(batch, *rest) for batch in (1, 1, MAX_BATCH)]


def _context(engine: StandIn) -> StandIn:
    context = StandIn(trt.IExecutionContext)
    context.own.update(made_from=engine, shapes={}, places={})
    return context


def _set_shape(context: StandIn, name: str, shape: Any) -> bool:
    built, wanted = _shape(context.own["made_from"].own["ports"][name]), tuple(shape)
    fits = len(built) == len(wanted) and all(b in (-1, w) for b, w in zip(built, wanted, strict=True))
    context.own["shapes"][name] = wanted
    context.own["has_run"] = False
    return fits and wanted[0] <= MAX_BATCH


def _tensor_shape(context: StandIn, name: str) -> tuple[int, ...]:
    own = context.own["made_from"].own
    batch = next(iter(context.own["shapes"].values()))[0]
    return tuple(batch if size == -1 else size for size in _shape(own["ports"][name]))


def _set_address(context: StandIn, name: str, address: int) -> bool:
    context.own["places"][name] = address
    return address != 0


def _execute(context: StandIn, stream: int) -> bool:
    """Now, or, while the stream is being captured, whenever the graph is launched."""
    later = ctypes.CFUNCTYPE(None)(lambda: _compute(context))
    if not ctypes.CDLL(cuda.LIBRARY).fake_captured(ctypes.c_void_p(stream), later):
        _compute(context)
    elif "TENSORRT_FAKE_UNGRAPHED" in os.environ or not context.own.get("has_run"):
        return False
    context.own.setdefault("kept", []).append(later)
    context.own["has_run"] = True
    return stream != 0


def _compute(context: StandIn) -> None:
    own = context.own["made_from"].own
    inputs = {name: _array(context, name).copy() for name in own["inputs"]}
    outputs = [name for name in own["ports"] if name not in own["inputs"]]
    for name, array in zip(outputs, own["session"].run(outputs, inputs), strict=True):
        np.copyto(_array(context, name), array)


def _array(context: StandIn, name: str) -> Any:
    """The tensor as it lies at its address."""
    port, shape = context.own["made_from"].own["ports"][name], _tensor_shape(context, name)
    dtype = np.dtype("f2" if "float16" in port.type else "f4")
    memory = (ctypes.c_byte * (int(np.prod(shape)) * dtype.itemsize)).from_address(context.own["places"][name])
    return np.frombuffer(memoryview(memory), dtype).reshape(shape)


def _inspector(engine: StandIn) -> StandIn:
    inspector = StandIn(trt.EngineInspector)
    inspector.own["source"] = engine.own["source"]
    return inspector


def _information(inspector: StandIn, kind: Any) -> str:
    """A copy in float32, then a layer for each node that computes, named as TensorRT 8 does and as 10 does."""
    key = "Datatype" if VERSION.startswith("11") else "Format/Datatype"
    words = {"HALF": "Half", "INT8": "Row major Int8 format", "FLOAT": "Row major linear FP32"}
    source = inspector.own["source"]
    usual, layers = words[max(_types(source))], []
    for number, node in enumerate(onnx.load_from_string(source).graph.node):
        name = node.name or f"{node.op_type}_{number}"
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            text = words["FLOAT"] if name == os.environ.get("TENSORRT_FAKE_FLOAT") else usual
            old = {"Name": f"{name}.weight + {name} + Relu", "LayerType": "CaskConvolution"}
            new = {
                "Name": f"__myl_Fc_{number}",
                "LayerType": "gemm",
                "Metadata": f"[ONNX Layer: {name}]\x1e[ONNX Layer: r]",
            }
            layers.append({**(old if VERSION.startswith("8") else new), "Inputs": [{key: text}]})
    moved = f"Reformatting CopyNode for Input Tensor 0 to {layers[0]['Name']}"
    copy = {"Name": moved, "LayerType": "Reformat", "Inputs": [{key: words["FLOAT"]}]}
    return json.dumps({"Layers": [copy, *layers, "a name only"]})


WORLD.update(
    {
        "OnnxParser.parse_from_file": _parse,
        "ITensor.dtype": lambda tensor: getattr(trt.DataType, max(_types(PARSED["source"]))),
        "Builder.build_serialized_network": _build,
        "Runtime.deserialize_cuda_engine": _deserialize,
        "ICudaEngine.num_io_tensors": lambda engine: len(engine.own["ports"]),
        "ICudaEngine.get_tensor_name": lambda engine, index: list(engine.own["ports"])[index],
        "ICudaEngine.get_tensor_mode": lambda engine, name: getattr(
            trt.TensorIOMode, "INPUT" if name in engine.own["inputs"] else "OUTPUT"
        ),
        "ICudaEngine.get_tensor_dtype": lambda engine, name: getattr(
            trt.DataType, _KINDS[engine.own["ports"][name].type]
        ),
        "ICudaEngine.get_tensor_shape": lambda engine, name: _shape(engine.own["ports"][name]),
        "ICudaEngine.get_tensor_profile_shape": _profile,
        "ICudaEngine.create_execution_context": _context,
        "ICudaEngine.create_engine_inspector": _inspector,
        "EngineInspector.get_engine_information": _information,
        "IExecutionContext.set_input_shape": _set_shape,
        "IExecutionContext.get_tensor_shape": _tensor_shape,
        "IExecutionContext.set_tensor_address": _set_address,
        "IExecutionContext.execute_async_v3": _execute,
    }
)
globals().update(vars(stand_in()))
__version__ = VERSION
