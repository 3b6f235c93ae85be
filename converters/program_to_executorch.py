"""ExportedProgram → ExecuTorch (.pte), lowered to XNNPACK, with a fixed batch.

With a dynamic one memory is planned for the largest batch, and more operators stay outside of XNNPACK. INT8 is
quantised as ExecuTorch's makers do it: symmetric weights, a step per filter, limits from calibration images.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..interfaces import INPUT, Contract, Conversion, Progress
from ..program import load_program, output_names

CONTRACT = Contract(
    source="program",
    suffix=".pte",
    modules=("executorch", "torch"),
    extra="executorch",
    batch="fixed",
    precisions=("fp32", "int8"),
    without={"fp16": "XNNPACK would need the network's input and output in it too"},
)
# Ways to reach another one's results; they compute nothing.
_PLUMBING = {"getitem", "Total"}


def convert(job: Conversion, progress: Progress) -> Path:
    """Convert; NAME.delegation.json counts the operators that XNNPACK takes, and names those left to slow kernels."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = load_program(job.source, job.batch or 1)
    if job.calibration:
        program = _quantised(program, job.calibration)
    # The format knows no names; constant methods take them along.
    names: dict[str, Any] = {"input_names": INPUT, "output_names": ",".join(output_names(program))}
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods=names)
    path = job.folder / f"{job.source.stem}.pte"
    _write_delegation(lowered.exported_program().graph_module, path)
    path.write_bytes(lowered.to_executorch().buffer)
    return path


def _quantised(program: Any, calibration: Path) -> Any:
    import numpy as np
    import torch
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared, example = prepare_pt2e(program.module(), quantizer), program.example_inputs[0]
    images, size = torch.from_numpy(np.load(calibration)), len(example[0])
    with torch.inference_mode():
        for start in range(0, len(images), size):  # the last batch is filled up with the first images
            prepared(images[torch.arange(start, start + size) % len(images)])
    return torch.export.export(convert_pt2e(prepared), example)


def _write_delegation(graph_module: Any, path: Path) -> None:
    from executorch.devtools.backend_debug import get_delegation_info

    table = get_delegation_info(graph_module).get_operator_delegation_dataframe().to_dict("records")
    rows = [row for row in table if row["op_type"] not in _PLUMBING]
    left = {row["op_type"]: int(n) for row in rows if (n := row["occurrences_in_non_delegated_graphs"])}
    taken = sum(int(row["occurrences_in_delegated_graphs"]) for row in rows)
    record = {"delegate": "XNNPACK", "all": not left, "operators": taken + sum(left.values()), "left": left}
    path.with_suffix(".delegation.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
