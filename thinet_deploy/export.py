"""Module → ONNX, then reopened and checked: the exporter has silent failures (deployment.md)."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
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

from . import interfaces
from .artifact import write_bytes
from .errors import ModelError, TargetError, first_line
from .interfaces import TensorSpec
from .precision.downgrade import to_opset_17
from .tasks.base import said

INPUT, OUTPUT, OUTPUTS = interfaces.INPUT, interfaces.OUTPUT, interfaces.OUTPUTS
# torch's exporter writes opset 18 or later (and 18 where less is asked for, without a word); 17 is a pass of our own.
MIN_OPSET = 17
_WRITTEN = 18
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
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
            f"The target accepts ONNX up to opset {opset}, but {MIN_OPSET} is the oldest that can be written.",
            hint="Choose a target with a newer stack (JetPack 5.1 or later for Jetsons).",
        )
    proto = _export(model.eval(), input_shape, opset)
    _strip(proto)
    proto.ir_version = ir_version
    if proto.ByteSize() > _MAX_BYTES:
        raise ModelError(f"The network takes {proto.ByteSize()} bytes, but one ONNX file holds at most 2 GiB.")
    write_bytes(path, proto.SerializeToString(deterministic=True))
    try:
        return _as_asked(path, input_shape, opset, ir_version)
    except ModelError:
        path.unlink()
        raise


def _as_asked(path: Path, input_shape: tuple[int, int, int], opset: int, ir_version: int) -> Exported:
    """Reopen the file and compare it with what was asked for."""
    exported = inspect(path)
    if (exported.opset, exported.ir_version) != (opset, ir_version):
        raise ModelError(
            f"{path.name} has opset {exported.opset} and IR {exported.ir_version}, "
            f"but opset {opset} and IR {ir_version} were asked for."
        )
    _check_batch(exported.inputs[0], exported.outputs)
    return exported


def check_exportable(model: nn.Module, input_shape: tuple[int, int, int], *, opset: int) -> None:
    """Raise what `export_onnx` would raise for this network, without writing a file."""
    graph = _export(model.eval(), input_shape, opset).graph
    _check_batch(_spec(graph.input[0]), [_spec(output) for output in graph.output])


def _check_batch(taken: TensorSpec, given: Sequence[TensorSpec]) -> None:
    if any(tensor.shape[0] != "batch" for tensor in (taken, *given)):
        shapes = " → ".join("x".join(map(str, tensor.shape)) for tensor in (taken, *given))
        raise ModelError(
            f"The batch size is frozen in the exported network: it is {shapes}, but any batch size was expected.",
            hint="forward() must give one row per image, and not turn the batch size into a Python number, "
            "as int(x.shape[0]) and loops over images do.",
        )


def export_program(model: nn.Module, input_shape: tuple[int, int, int], path: Path) -> None:
    """Write a network as an ExportedProgram (.pt2) with a dynamic batch, for users without its source.

    Paths of this machine and real images are not in it. Load only such files of your own: the archive can ask for
    unpickling.
    """
    example = (torch.zeros(2, *input_shape),)
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    try:
        program = torch.export.export(model.eval(), example, dynamic_shapes=dynamic)
    except Exception:  # noqa: BLE001 - a forward() with a fixed batch; export_onnx refuses it where it matters
        program = torch.export.export(model.eval(), example)
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            for local in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node"):
                node.meta.pop(local, None)
    archive = io.BytesIO()
    torch.export.save(program, archive)
    write_bytes(path, archive.getvalue())


def _export(model: nn.Module, input_shape: tuple[int, int, int], opset: int) -> onnx.ModelProto:
    example = torch.zeros(2, *input_shape)  # batch 2: batch 1 would be taken for a constant
    hint = "forward() must take one image batch, whose size may vary, with operations that torch exports."
    with _explained("The network cannot be exported to ONNX", hint), _quiet(), _exact():
        with torch.inference_mode():
            ends = len(said(model, example))
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            opset_version=max(opset, _WRITTEN),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=[INPUT],
            output_names=list(OUTPUTS[:ends]),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    return program.model_proto if opset >= _WRITTEN else to_opset_17(program.model_proto)


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """Without onnxscript's rules for x + 0 and the like: they take 1e-8 for 0, and an empty image is divided by it."""
    from onnxscript import rewriter
    from onnxscript.rewriter.rules.common import _no_op

    rules = rewriter._DEFAULT_REWRITE_RULES  # noqa: SLF001 - the exporter takes no other ones
    exact = tuple(rule for rule in rules if not any(rule is each for each in _no_op.rules))
    rewriter._DEFAULT_REWRITE_RULES = exact  # noqa: SLF001
    try:
        yield
    finally:
        rewriter._DEFAULT_REWRITE_RULES = rules  # noqa: SLF001


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints, warns and logs; what matters of it ends up in an exception."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _strip(proto: onnx.ModelProto) -> None:
    """Remove what tells about the machine it was written on: stack traces with local paths, doc strings."""
    for item in _noted(proto):
        item.doc_string = ""
        del item.metadata_props[:]


def _noted(proto: onnx.ModelProto) -> Iterator[Any]:
    """All parts of a file that can hold notes, those of loops' and branches' own graphs too."""
    yield proto
    parts = [proto.graph, *proto.functions]
    for part in parts:  # grows as it goes
        yield from (part, *part.node, *part.value_info)
        if isinstance(part, onnx.GraphProto):
            yield from (*part.initializer, *part.input, *part.output)
        for each in (each for node in part.node for each in node.attribute):
            parts += [*([each.g] if each.HasField("g") else []), *each.graphs]


def inspect(path: Path) -> Exported:
    """Open an ONNX file and check it: by ONNX's checker, for external data, for local paths.

    Raises:
        ModelError: the file is not sound or not self-contained.
    """
    with _explained(f"{path.name} is no sound ONNX file"):
        proto = onnx.load(path, load_external_data=False)
    graph = proto.graph
    if any(uses_external_data(tensor) for tensor in graph.initializer):
        raise ModelError(f"{path.name} keeps weights in another file, but one self-contained file was expected.")
    with _explained(f"{path.name} is no sound ONNX file"):
        onnx.checker.check_model(proto, full_check=True)
    if any(each.metadata_props or each.doc_string for each in _noted(proto)):
        raise ModelError(f"{path.name} holds notes of the exporter, which may have local paths in them.")
    operators: dict[str, int] = {}
    for node in graph.node:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    opset = next(item.version for item in proto.opset_import if item.domain in ("", "ai.onnx"))
    inputs, outputs = tuple(map(_spec, graph.input)), tuple(map(_spec, graph.output))
    return Exported(opset, proto.ir_version, inputs, outputs, operators)


@contextlib.contextmanager
def _explained(what: str, hint: str = "") -> Iterator[None]:
    """Exporter, protobuf and checker raise errors of many kinds: one line of them is for the user."""
    try:
        yield
    except Exception as error:
        first: BaseException = error
        while first.__cause__ is not None:  # the exporter's own words around it say how far it got
            first = first.__cause__
        raise ModelError(f"{what}: {_COLOURS.sub('', first_line(first))}", hint=hint) from error


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return TensorSpec(value.name, shape, str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)))


def run_onnx(path: Path, inputs: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Execute an ONNX file by the standard's own reference implementation, which shares no code with any engine.

    Returns:
        Output → values.
    """
    judge = ReferenceEvaluator(str(path))
    outputs: Sequence[Any] = judge.run(None, {INPUT: inputs})  # type: ignore[assignment]
    return {name: np.asarray(each, dtype=np.float32) for name, each in zip(judge.output_names, outputs, strict=True)}
