"""What an engine really computes in, layer by layer, read back from the runtime after it has optimised the network.

Of mobile engines, whose runtimes do not tell, it is what their files hold: see held.py.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from ..errors import MissingError, ThinetDeployError
from ..interfaces import Precision
from ..on_device.engine import MissingRuntimeError
from ..on_device.engines import import_runtime, open_engine
from .graph import COMPUTING, layers, readers
from .held import READERS, UNREAD, Kernel, held

FOLDED = "folded"
_OF_OPENVINO = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "u8": "int8", "i8": "int8"}
_OF_ONNXRUNTIME = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "uint8": "int8", "int8": "int8"}
# How ONNX Runtime marks the nodes that its optimiser made.
_MARKS = re.compile(r"^fused |(_token_\d+|_nchwc)+$")


@dataclass(frozen=True)
class Executed:
    """One layer as an engine runs it.

    Attributes:
        layer: what people call it.
        macs: multiply-accumulates for one image.
        asked: what the network's file says.
        got: what the runtime reports; "folded" where it runs no such layer, having merged it into others.
    """

    layer: str
    macs: int
    asked: Precision
    got: str


@dataclass(frozen=True)
class Proof:
    """What an engine runs in which type.

    Attributes:
        runtime: that was asked.
        layers: of the network, in its order.
    """

    runtime: str
    layers: tuple[Executed, ...]

    @property
    def shares(self) -> dict[str, float]:
        """Type → share of the multiply-accumulates, in percent, the largest first."""
        total = sum(each.macs for each in self.layers) or 1
        sums: dict[str, int] = {}
        for each in self.layers:
            sums[each.got] = sums.get(each.got, 0) + each.macs
        return {kind: 100 * macs / total for kind, macs in sorted(sums.items(), key=lambda item: -item[1])}

    @property
    def wrong(self) -> tuple[Executed, ...]:
        """Layers that run in another type than was asked for, as far as that can be told."""
        return tuple(each for each in self.layers if each.got not in (each.asked, FOLDED, UNREAD))

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {"runtime": self.runtime, "shares": self.shares, "layers": [asdict(each) for each in self.layers]}

    def describe(self) -> str:
        """In one line, with the layers that are not as asked."""
        text = ", ".join(f"{kind} {share:.1f} %" for kind, share in self.shares.items()) + " of the MACs"
        parts = [f"{each.layer} was to be {each.asked} and is {each.got}" for each in self.wrong]
        return "; ".join([text, *parts[:8], *([f"and {len(parts) - 8} more"] if len(parts) > 8 else [])])


def prove_precision(
    runtime: str, path: Path, source: ModelProto, precision: Precision, *, keep: Iterable[str] = ()
) -> Proof:
    """Read back what an engine runs in which type.

    Args:
        runtime: "openvino", "onnxruntime", "ort", or one of `held.READERS`.
        path: the engine's main file.
        source: the float32 network that it goes back to, whose nodes have names.
        precision: that was asked for.
        keep: nodes that were to stay in float32.

    Raises:
        MissingError: the runtime is not installed.
        ThinetDeployError: the engine cannot be opened.
    """
    if runtime in READERS:
        kernels = held(runtime, path, [each.node for each in layers(source)])
    else:
        kernels = _READERS[runtime](path, precision)
    found = _matched(source, kernels)
    stay = set(keep)
    return Proof(
        runtime,
        tuple(
            Executed(each.name, each.macs, "fp32" if each.node in stay else precision, found[each.node])
            for each in layers(source)
        ),
    )


def types_in(runtime: str, path: Path, precision: Precision) -> frozenset[str]:
    """The types of an engine's convolutions and linear layers; none where nothing here can tell.

    Args:
        runtime: of the engine.
        path: the engine's main file.
        precision: that it is asked to compute in, where that is not in the file.
    """
    try:
        if runtime in READERS:
            found = frozenset(READERS[runtime](path))
            return frozenset() if UNREAD in found else found
        kernels = _READERS[runtime](path, precision) if runtime in _READERS else []
        return frozenset(kernel.kind for kernel in kernels)
    except Exception:  # noqa: BLE001 - what is wrong with it, its runtime says when it is opened to be timed
        return frozenset()


def _openvino(path: Path, precision: Precision) -> list[Kernel]:
    """From the runtime model: it names the layers that went into each executed one."""
    engine = _opened("openvino", path, precision)
    found = []
    for layer in engine.model.get_runtime_model().get_ops():
        info = layer.get_rt_info()
        if str(info["layerType"].value) in engine.compute_layers:
            kind = str(info["runtimePrecision"].value)
            names = str(info["originalLayersNames"].value).split(",")
            found.append(Kernel(tuple(map(plain_name, names)), _OF_OPENVINO.get(kind, kind)))
    engine.close()
    return found


def _opened(runtime: str, path: Path, precision: Precision) -> Any:
    try:
        return open_engine(runtime, str(path), 1, precision)
    except MissingRuntimeError as error:
        raise MissingError(str(error), hint="`thinet-deploy doctor` shows what is installed.") from error
    except Exception as error:
        raise ThinetDeployError(
            f"What {path} runs in cannot be read back: {error}", hint="Convert it again; the file may be damaged."
        ) from error


def _onnxruntime(path: Path, precision: Precision) -> list[Kernel]:
    """From the profile of one run: it has the element types that every kernel was given."""
    runtime = import_runtime("onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        options = runtime.SessionOptions()
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder, "run"))
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        session.run(None, {port.name: _blank(port) for port in session.get_inputs()})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    found = []
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            shapes = event["args"].get("input_type_shape") or [{}]
            kind = next(iter(shapes[0]), "")
            name = plain_name(event["name"].removesuffix("_kernel_time"))
            if any(op in event["args"]["op_name"] for op in COMPUTING):  # QLinearConv, FusedConv, QGemm …
                found.append(Kernel((name,), _OF_ONNXRUNTIME.get(kind, kind)))
    return found


def _blank(port: Any) -> Any:
    sizes = [size if isinstance(size, int) else 1 for size in port.shape]
    return np.zeros(sizes, np.float16 if "float16" in port.type else np.float32)


_READERS = {"openvino": _openvino, "onnxruntime": _onnxruntime, "ort": _onnxruntime}


def _matched(source: ModelProto, kernels: list[Kernel]) -> dict[str, str]:
    """Node of the source → type. A runtime names a kernel after its nodes, their outputs, or what stands behind them.

    Kernels that go by other names stand for the layers that are not found otherwise. Where there are more of these, the
    rest has been folded into others: what every kernel runs in is known all the same.
    """
    owners, found, rest = owners_of(source), dict[str, str](), list[Kernel]()
    for kernel in kernels:
        sure = [owners[name][0] for name in kernel.names if len(owners.get(name, ())) == 1]
        found.update(dict.fromkeys((node for node in sure if node not in found), kernel.kind))
        rest += [] if sure else [kernel]
    unnamed = set[str]()
    for kernel in rest:
        maybe = [node for name in kernel.names for node in owners.get(name, ()) if node not in found]
        if maybe:
            found[maybe[0]] = kernel.kind
        elif not any(name in owners for name in kernel.names):
            unnamed.add(kernel.kind)
    missing = [each.node for each in layers(source) if each.node not in found]
    return found | dict.fromkeys(missing, " or ".join(sorted(unnamed)) or FOLDED)


def plain_name(name: str) -> str:
    """What a runtime calls a kernel, without the marks of its optimiser."""
    return _MARKS.sub("", name).split("/")[0]


def owners_of(source: ModelProto) -> Mapping[str, tuple[str, ...]]:
    """Name of a node or tensor → the computing nodes that a runtime may call by it."""
    read_by = readers(source)
    owners: dict[str, tuple[str, ...]] = {}
    for node in source.graph.node:
        if node.op_type not in COMPUTING:
            continue
        owners[node.name] = owners[node.output[0]] = (node.name,)
        tensor = node.output[0]
        while len(users := read_by.get(tensor, [])) == 1 and users[0].op_type in _FUSED:
            tensor = users[0].output[0]
            for name in (users[0].name, tensor):
                owners[name] = (*owners.get(name, ()), node.name)
    return owners


_FUSED = (
    "Relu",
    "Clip",
    "Add",
    "BatchNormalization",
    "Sigmoid",
    "Tanh",
    "LeakyRelu",
    "HardSigmoid",
    "HardSwish",
    "Mul",
)
