"""Module → ONNX, then reopened and checked: the exporter has silent failures (deployment.md)."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx.external_data_helper import uses_external_data
from onnx.reference import ReferenceEvaluator
from torch import nn

from .artifact import write_bytes
from .errors import ModelError, TargetError
from .interfaces import TensorSpec

INPUT, OUTPUT = "input", "logits"
# torch's exporter writes opset 18 or later; older ones need a downgrade pass.
MIN_OPSET = 18
_MAX_BYTES = (2 << 30) - 1


@dataclass(frozen=True)
class Exported:
    """What a reopened ONNX file turned out to hold.

    Attributes:
        opset: of the default domain.
        ir_version: of the file.
        inputs: with "batch" as the first size.
        outputs: with "batch" as the first size.
        operators: operator type → how many nodes.
    """

    opset: int
    ir_version: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    operators: dict[str, int]


def export_onnx(
    model: nn.Module, input_shape: tuple[int, int, int], path: Path, *, opset: int, ir_version: int
) -> Exported:
    """Export a network with a dynamic batch as one self-contained file, and check the file.

    Args:
        model: in float32 on the CPU.
        input_shape: channels, height and width.
        path: of the .onnx file.
        opset: that the target accepts; the file has exactly this one.
        ir_version: that the target accepts.

    Raises:
        TargetError: the opset cannot be written.
        ModelError: the network cannot be exported, or the file is not what was asked for.
    """
    if opset < MIN_OPSET:
        raise TargetError(
            f"The target accepts ONNX up to opset {opset}, but the exporter writes {MIN_OPSET} or later.",
            hint="Choose a target with a newer stack (JetPack 6.1 or later for Jetsons).",
        )
    proto = _export(model.eval(), input_shape, opset)
    _strip(proto)
    proto.ir_version = ir_version
    if proto.ByteSize() > _MAX_BYTES:
        raise ModelError(f"The network takes {proto.ByteSize()} bytes, but one ONNX file holds at most 2 GiB.")
    write_bytes(path, proto.SerializeToString(deterministic=True))
    exported = inspect(path)
    if (exported.opset, exported.ir_version) != (opset, ir_version):
        raise ModelError(
            f"{path.name} has opset {exported.opset} and IR {exported.ir_version}, "
            f"but opset {opset} and IR {ir_version} were asked for."
        )
    if exported.inputs[0].shape != ("batch", *input_shape):
        raise ModelError(
            f"{path.name} has the input {exported.inputs[0].shape}, but ('batch', {input_shape}) was expected.",
            hint="forward() must not turn the batch size into a Python number, as int(x.shape[0]) does.",
        )
    return exported


def _export(model: nn.Module, input_shape: tuple[int, int, int], opset: int) -> onnx.ModelProto:
    example = torch.zeros(2, *input_shape)  # batch 2: batch 1 would be taken for a constant
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=[INPUT],
                output_names=[OUTPUT],
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises many kinds of error for a network it cannot write
        raise ModelError(
            f"The network cannot be exported to ONNX: {str(error).strip().splitlines()[0]}",
            hint="forward() must take one image batch, whose size may vary.",
        ) from error
    finally:
        quiet.setLevel(level)
    assert program is not None
    return program.model_proto


def _strip(proto: onnx.ModelProto) -> None:
    """Remove what tells about the machine it was written on: stack traces with local paths, doc strings."""
    graph = proto.graph
    for item in (proto, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        item.doc_string = ""
        del item.metadata_props[:]
    for function in proto.functions:
        for part in (function, *function.node):
            part.doc_string = ""
            del part.metadata_props[:]


def inspect(path: Path) -> Exported:
    """Open an ONNX file and check it: by ONNX's checker, for external data, for local paths.

    Raises:
        ModelError: the file is not sound or not self-contained.
    """
    try:
        proto = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # protobuf and the checker raise their own kinds
        raise ModelError(f"{path.name} is no sound ONNX file: {str(error).strip().splitlines()[0]}") from error
    graph = proto.graph
    if any(uses_external_data(tensor) for tensor in graph.initializer):
        raise ModelError(f"{path.name} keeps weights in another file, but one self-contained file was expected.")
    if any(node.metadata_props or node.doc_string for node in graph.node):
        raise ModelError(f"{path.name} holds notes of the exporter, which may have local paths in them.")
    operators: dict[str, int] = {}
    for node in graph.node:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    opset = next(item.version for item in proto.opset_import if item.domain in ("", "ai.onnx"))
    inputs, outputs = tuple(map(_spec, graph.input)), tuple(map(_spec, graph.output))
    return Exported(opset, proto.ir_version, inputs, outputs, operators)


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return TensorSpec(value.name, shape, str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)))


def run_onnx(path: Path, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Execute an ONNX file by the standard's own reference implementation, which shares no code with any engine."""
    outputs: Sequence[Any] = ReferenceEvaluator(str(path)).run(None, {INPUT: inputs})  # type: ignore[assignment]
    return np.asarray(outputs[0], dtype=np.float32)
