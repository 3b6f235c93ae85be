"""ONNX → ncnn (.param and .bin) by pnnx; ncnn takes one image at a time."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from ..errors import ConversionError
from ..interfaces import Contract, Conversion, Progress

CONTRACT = Contract(
    source="onnx",
    suffix=".param",
    modules=("ncnn", "pnnx", "onnx"),
    extra="ncnn",
    batch="one",
    precisions=("fp32", "fp16"),
    without={"int8": "its makers' tools for int8 are not in the packages of ncnn and pnnx"},
)
# What pnnx also writes, and we do not ship: its own formats, and Python files that would be run to read them.
_UNUSED = ("pnnxparam", "pnnxbin", "pnnxpy", "pnnxonnx", "ncnnpy")


def convert(job: Conversion, progress: Progress) -> Path:
    """Convert; fp16 is how weights are stored, how it computes is the runner's choice."""
    import onnx
    import pnnx

    graph = onnx.load(job.source).graph
    sizes = [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim][1:]
    path = job.folder / f"{job.source.stem}.param"
    with tempfile.TemporaryDirectory() as place:  # it writes beside its source
        source = shutil.copyfile(job.source, Path(place) / job.source.name)
        options = [f"inputshape=[{','.join(map(str, [1, *sizes]))}]", f"fp16={int(job.precision == 'fp16')}"]
        options += [
            f"ncnnparam={path}",
            f"ncnnbin={path.with_suffix('.bin')}",
            *(f"{key}=/dev/null" for key in _UNUSED),
        ]
        done = subprocess.run([pnnx.EXEC_PATH, str(source), *options], cwd=place, check=False)
    if done.returncode or not path.exists():
        raise ConversionError(f"pnnx ended with code {done.returncode} and wrote no ncnn network.")
    path.write_text(_renamed(path.read_text(encoding="utf-8"), graph), encoding="utf-8")
    _check(path)
    return path


def _renamed(text: str, graph: object) -> str:
    """Give the ends, which pnnx calls in0, in1 … and out0 …, the names of the ONNX file."""
    for prefix, ends in (("in", graph.input), ("out", graph.output)):  # type: ignore[attr-defined]
        for index, end in enumerate(ends):
            text = re.sub(rf"(?<=\s){prefix}{index}(?=\s)", end.name, text)
    return text


def _check(path: Path) -> None:
    """What pnnx cannot express it writes down all the same, as a layer that ncnn does not have."""
    import ncnn

    net = ncnn.Net()
    if net.load_param(str(path)) or net.load_model(str(path.with_suffix(".bin"))):
        kinds = {line.split()[0] for line in path.read_text(encoding="utf-8").splitlines()[2:] if line}
        strange = sorted(kind for kind in kinds if not kind.isidentifier()) or sorted(kinds)
        raise ConversionError(
            f"ncnn cannot load what pnnx made of {path.stem}: it has no layers for some of {', '.join(strange)}.",
            hint="Change these operations, or use another runtime, such as onnxruntime.",
        )
