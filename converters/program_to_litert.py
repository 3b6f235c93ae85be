"""ExportedProgram → LiteRT (.tflite) with a fixed batch: the converter fails on a dynamic one."""

from __future__ import annotations

import json
from pathlib import Path

from ..interfaces import INPUT, Contract, Conversion, Progress
from ..program import input_shape, load_program, output_names

CONTRACT = Contract(
    source="program",
    suffix=".tflite",
    modules=("litert_torch", "ai_edge_litert", "torch"),
    extra="litert",
    batch="fixed",
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
    _write_delegation(path)
    return path


def _write_delegation(path: Path) -> None:
    from ai_edge_litert.compiled_model import CompiledModel

    whole = CompiledModel.from_file(str(path)).is_fully_accelerated()
    record = {"delegate": "XNNPACK", "all": bool(whole)}
    path.with_suffix(".delegation.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
