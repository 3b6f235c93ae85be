"""The verdicts from torch to the engines, hop by hop, and the golden inputs and outputs that ship with a network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import verify
from ..artifact import write_json
from ..export import OUTPUT
from ..interfaces import Precision
from ..on_device.engines import can_run
from ..precision.accuracy_gate import Judge
from ..tasks.base import named, said
from ..verify import Floats, Said
from .deploy import Files
from .precision import judging, quantises, typed_hops
from .tools import Tools, json_ready

PARITY = "parity.json"
ONNX_IMAGES = 8
ENGINE_IMAGES = 1000
GOLDEN_IMAGES = 8
BATCH = 64
# Numbers of all outputs that are compared at most: a class for every pixel of 1,000 images would fill gigabytes.
OUTPUT_VALUES = 1 << 25
_TOLERANCE, _OUTPUT = "tolerance:", "output:"


@dataclass(frozen=True)
class GoldenFile:
    """What a network says of some images in torch, and how far from it an engine may be, relative to max|output|.

    Attributes:
        inputs: (n, channels, height, width).
        outputs: name → (n, …).
        tolerance: of the float32 ONNX file.
        allowed: precision → of an engine in it.
    """

    inputs: Floats
    outputs: Said
    tolerance: float
    allowed: Mapping[str, float]

    def save(self, path: Path) -> None:
        """Write it as an .npz."""
        arrays: dict[str, Any] = {"input": self.inputs, "tolerance": np.float64(self.tolerance)}
        arrays |= {f"{_OUTPUT}{name}": output for name, output in self.outputs.items()}
        arrays |= {f"{_TOLERANCE}{precision}": np.float64(error) for precision, error in self.allowed.items()}
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> GoldenFile:
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            outputs = {key.removeprefix(_OUTPUT): arrays[key] for key in arrays if key.startswith(_OUTPUT)}
            allowed = {key.removeprefix(_TOLERANCE): float(arrays[key]) for key in arrays if key.startswith(_TOLERANCE)}
            return cls(arrays["input"], outputs, float(arrays["tolerance"]), allowed)


def parity(
    tools: Tools,
    networks: Mapping[str, Path],
    files: Files,
    engines: Mapping[tuple[str, str], Path],
    known: tuple[Sequence[verify.Hop], Sequence[verify.Hop]],
    folder: Path,
) -> None:
    """The verdicts, hop by hop, in parity.json, and a GoldenFile NAME.npz of every network.

    Args:
        tools: of the job.
        networks: name → folder of its stage.
        files: the ONNX files made from them.
        engines: (network, runtime) → engine.
        known: verdicts that stand already: on the way to the networks, and on what the engines execute.
        folder: to write to.
    """
    (before, executed), inputs = known, _inputs(tools)
    own = files.engines == "int8" and any(quantises(runtime) and can_run(runtime) for _, runtime in engines)
    judge = judging(tools.job) if own else None
    hops, steps = list(before), len(before) + len(networks) + len(engines)
    for name, source in networks.items():
        tools.progress("Verifying", len(hops), steps, f"{name}: torch to ONNX")
        network = _Network.of(name, tools.load(source), files, inputs, judge)
        hops += network.hops()
        network.golden().save(folder / f"{name}.npz")
        for (owner, runtime), path in engines.items():
            if owner == name and can_run(runtime):  # the others get a note: nothing runs them here
                tools.progress("Verifying", len(hops), steps, f"{name}: ONNX to {runtime}")
                hops.append(network.engine_hop(runtime, path))
    passed = sum(hop.passed for hop in hops)
    tools.progress("Verifying", len(hops), len(hops), f"{passed} of {len(hops)} hops passed")
    write_json(folder / PARITY, {"hops": [json_ready(hop) for hop in (*hops, *executed)]})


def _said(model: nn.Module, images: Floats) -> Said:
    """A network's outputs in torch, by name."""
    parts = np.array_split(images, math.ceil(len(images) / BATCH))
    with torch.inference_mode():
        runs = [named(said(model, torch.from_numpy(part))) for part in parts]
    return {output: np.concatenate([run[output] for run in runs]) for output in runs[0]}


def _inputs(tools: Tools) -> Floats:
    """Test images, evenly from the first to the last: no more than outputs can be kept of."""
    job, images = tools.job, tools.job.data.test
    shapes = job.data.task.shapes(len(job.data.classes), job.input_shape[1:])
    values = sum(math.prod(shape) for shape in shapes.values())
    most = min(len(images), ENGINE_IMAGES, max(ONNX_IMAGES, OUTPUT_VALUES // values))
    return images.inputs(np.linspace(0, len(images) - 1, most).astype(np.int64))


@dataclass(frozen=True)
class _Network:
    """What a network says in torch and in its typed files, which its engines are held to.

    Attributes:
        name: of the network.
        files: the ONNX files of the build.
        inputs: (n, channels, height, width).
        outputs: in torch: name → (n, …).
        noise: of rounding in float32 (see `verify.rounding_noise`).
        typed: precision → the verdict on that file, and what it says, (n, classes); only networks with one output have
            typed files so far (see `precision_stage.planned`).
        held: for engines that were quantised by the runtime's own tools, held-out images, and what the network says of
            them in torch, (m, classes); None where there are no such engines.
    """

    name: str
    files: Files
    inputs: Floats
    outputs: Said
    noise: float
    typed: Mapping[Precision, tuple[verify.Hop, Floats]]
    held: tuple[Judge, Floats] | None

    @classmethod
    def of(cls, name: str, model: nn.Module, files: Files, inputs: Floats, judge: Judge | None) -> _Network:
        """Run a network, and its typed files."""
        noise, outputs = verify.rounding_noise(model, inputs[:ONNX_IMAGES]), _said(model, inputs)
        hops = typed_hops(name, files.report, files.typed, inputs, outputs[OUTPUT], noise)
        typed = {precision: (hop, got) for precision, hop, got in hops}
        held = (judge, _said(model, judge.images)[OUTPUT]) if judge else None
        return cls(name, files, inputs, outputs, noise, typed, held)

    def hops(self) -> list[verify.Hop]:
        """The verdicts on the ONNX file and on the typed ones."""
        few = {output: each[:ONNX_IMAGES] for output, each in self.outputs.items()}
        path = self.files.onnx / f"{self.name}.onnx"
        onnx = verify.onnx_hop(self.name, path, self.inputs[:ONNX_IMAGES], few, verify.tolerance(self.noise, "fp32"))
        return [onnx, *(hop for hop, _ in self.typed.values())]

    def engine_hop(self, runtime: str, path: Path) -> verify.Hop:
        """The verdict on an engine.

        An INT8 engine has to do what its file says; what the file changes has a verdict of its own. What the runtime's
        own tools quantised has no file to go by: it is judged as our file is, by top-1 on held-out images.
        """
        precision, expected = self.files.engines, self.outputs
        if precision == "int8" and quantises(runtime):
            return self._own_int8(runtime, path)
        if precision == "int8" and precision in self.typed:
            expected = {OUTPUT: self.typed[precision][1]}
        allowed = self._allowed(precision)
        return verify.engine_hop(self.name, runtime, path, self.inputs, expected, allowed, precision=precision)

    def _own_int8(self, runtime: str, path: Path) -> verify.Hop:
        assert self.held is not None, "`parity` sees to it"
        judge, exact = self.held
        images = np.concatenate([self.inputs, judge.images])
        every = verify.engine_outputs(runtime, path, images, threads=1, precision="int8")[OUTPUT]
        got, held = np.split(every, [len(self.inputs)])
        classes = exact.argmax(1) if judge.labels is None else judge.labels
        most = self.files.typed_as(self.name)["max_drop"]
        return verify.own_int8_hop(self.name, runtime, self.outputs[OUTPUT], got, (exact, held, classes), most)

    def golden(self) -> GoldenFile:
        """What ships with the network: the first images, and how far engines may be from torch."""
        return GoldenFile(
            self.inputs[:GOLDEN_IMAGES],
            {output: each[:GOLDEN_IMAGES] for output, each in self.outputs.items()},
            verify.tolerance(self.noise, "fp32"),
            {each: self._allowed(each) + self._moved(each) for each in (self.files.engines, *self.typed)},
        )

    def _allowed(self, precision: Precision) -> float:
        """Allowed error of an engine against what it was made from."""
        return verify.engine_tolerance(precision, self.noise, self._moved(precision))

    def _moved(self, precision: Precision) -> float:
        """How far quantising moved the outputs; nothing in other types, where all is rounding."""
        if precision != "int8" or precision not in self.typed:
            return 0.0
        return verify.distance(self.outputs[OUTPUT], self.typed[precision][1])
