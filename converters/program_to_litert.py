"""ExportedProgram → LiteRT (.tflite) with a fixed batch: the converter fails on a dynamic one.

FP16 is how weights are stored; what the phone computes in is its delegate's choice. Inputs and outputs stay float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..interfaces import INPUT, Contract, Conversion, Progress
from ..program import input_shape, load_program, output_names

CONTRACT = Contract(
    source="program",
    suffix=".tflite",
    modules=("litert_torch", "ai_edge_litert", "ai_edge_quantizer", "torch"),
    extra="litert",
    batch="fixed",
    precisions=("fp32", "fp16", "int8"),
)


def convert(job: Conversion, progress: Progress) -> Path:
    """Convert, with the names and the layout (NCHW) of the others; NAME.delegation.json: does XNNPACK take it all?"""
    import litert_torch
    import torch

    program = load_program(job.source, job.batch or 1)
    names = output_names(program)

    class Named(torch.nn.Module):
        """The network with its outputs under the names that every engine has."""

        def __init__(self) -> None:
            super().__init__()
            self.network = program.module()

        def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            outputs = self.network(inputs[INPUT])
            return dict(zip(names, outputs if isinstance(outputs, tuple | list) else (outputs,), strict=True))

    example = torch.zeros(job.batch or 1, *input_shape(program))
    path = job.folder / f"{job.source.stem}.tflite"
    litert_torch.convert(Named(), sample_kwargs={INPUT: example}, strict_export=False).export(str(path))
    if job.precision != "fp32":
        _shorten(path, job)
    _write_delegation(path)
    return path


def _shorten(path: Path, job: Conversion) -> None:
    """Bring a float32 file to fp16 or int8 in its place, by the quantiser of LiteRT's makers."""
    from ai_edge_quantizer.quantizer import Quantizer

    tool = Quantizer(str(path))
    if job.precision == "fp16":
        _ask_for_fp16(tool)
        result = tool.quantize()
    else:
        assert job.calibration, "registry.convert sees to it"
        _ask_for_int8(tool)
        result = tool.quantize(_limits(tool, path, job.calibration, job.batch or 1))
    path.write_bytes(result.quantized_model)


def _ask_for_fp16(tool: Any) -> None:
    from ai_edge_quantizer import algorithm_manager, qtyping

    weights = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
    tool.update_quantization_recipe(
        regex=".*",
        operation_name=qtyping.TFLOperationName.ALL_SUPPORTED,
        op_config=qtyping.OpQuantizationConfig(
            weight_tensor_config=weights, compute_precision=qtyping.ComputePrecision.FLOAT
        ),
        algorithm_key=algorithm_manager.AlgorithmName.FLOAT_CASTING,
    )


def _ask_for_int8(tool: Any) -> None:
    """Everything but the ends, which stay float32."""
    from ai_edge_quantizer import algorithm_manager, qtyping, recipe

    tool.load_quantization_recipe(recipe.static_wi8_ai8())
    for end in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
        tool.update_quantization_recipe(
            regex=".*", operation_name=end, algorithm_key=algorithm_manager.AlgorithmName.NO_QUANTIZE
        )


def _limits(tool: Any, path: Path, calibration: Path, size: int) -> dict[str, dict[str, Any]]:
    """Tensor → its smallest and largest value, "min" and "max", over all calibration images.

    Batch by batch: over several the tool takes moving averages of what each has, which clips one value in many.
    """
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter

    ((signature, ports),) = Interpreter(str(path)).get_signature_list().items()
    (name,) = ports["inputs"]
    images, found = np.load(calibration), dict[str, dict[str, Any]]()
    for start in range(0, len(images), size):  # the last batch is filled up with the first images
        batch = {signature: [{name: images[np.arange(start, start + size) % len(images)]}]}
        for tensor, seen in tool.calibrate(batch, num_threads=1).items():
            known = found.setdefault(tensor, seen)
            known |= {"min": np.minimum(known["min"], seen["min"]), "max": np.maximum(known["max"], seen["max"])}
    return found


def _write_delegation(path: Path) -> None:
    from ai_edge_litert.compiled_model import CompiledModel

    whole = CompiledModel.from_file(str(path)).is_fully_accelerated()
    record = {"delegate": "XNNPACK", "all": bool(whole)}
    path.with_suffix(".delegation.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
