"""ExportedProgram → Core ML, an ML program (.mlpackage) for iOS 16 or later; only Apple's systems can run it."""

from __future__ import annotations

from pathlib import Path

from ..interfaces import INPUT, Contract, Conversion, Progress
from ..program import input_shape, load_program, output_names

CONTRACT = Contract(
    source="program",
    suffix=".mlpackage",
    modules=("coremltools", "torch"),
    extra="coreml",
    precisions=("fp32", "fp16"),
    without={"int8": "calibrating it takes Core ML itself, on one of Apple's systems"},
)
_DATE = "com.github.apple.coremltools.conversion_date"


def convert(job: Conversion, progress: Progress) -> Path:
    """Convert by way of torch.export (tracing would lose the names); fp16 is Core ML's own default."""
    import coremltools

    program = load_program(job.source, job.batch, job.max_batch)
    precision = coremltools.precision
    batch = job.batch or coremltools.RangeDim(1, job.max_batch, 1)
    model = coremltools.convert(
        program.run_decompositions({}),
        inputs=[coremltools.TensorType(name=INPUT, shape=(batch, *input_shape(program)))],
        outputs=[coremltools.TensorType(name=name) for name in output_names(program)],
        convert_to="mlprogram",
        minimum_deployment_target=coremltools.target.iOS16,
        compute_precision=precision.FLOAT16 if job.precision == "fp16" else precision.FLOAT32,
        skip_model_load=True,  # there is nothing on Linux that could load it
    )
    del model.user_defined_metadata[_DATE]  # the same network gives the same file on another day
    path = job.folder / f"{job.source.stem}.mlpackage"
    model.save(str(path))
    (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)  # for debugging by another tool
    return path
