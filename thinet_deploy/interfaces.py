"""The few types that the core and the plug-in parts (converters, runners) agree on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Precision = Literal["fp32", "fp16", "bf16", "int8"]
# How filters are chosen, and how the layers that read them make up for those that go.
Selection = Literal["elimination", "thinet", "thinet-omp", "weight-sum", "apoz", "taylor", "random"]
Reconstruction = Literal["full", "scale", "none"]
Array = NDArray[np.generic]

INPUT, OUTPUT = "input", "logits"
"""What the ends of every network are called, in the ONNX file and in every engine."""
OUTPUTS = (OUTPUT, "boxes")
"""The ends of a network that has several, in the order in which it returns them: a detector's."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a network.

    Attributes:
        name: its name in the ONNX file and in every engine.
        shape: sizes; a string stands for a dynamic size, such as "batch".
        dtype: numpy name, such as "float32".
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class Conversion:
    """One conversion to do.

    Attributes:
        source: the artifact to convert: what the converter's `Contract.source` says.
        folder: an existing empty folder that takes what the converter writes.
        precision: the numeric type that the engine must compute in.
        batch: the only batch size the engine has to take; None for any (see `Contract.batch`).
        max_batch: the largest batch of an engine for any, where the format wants to know it.
        target: id or file of the target profile, for limits such as the builder's memory; "" for none.
        dla_core: which of a Jetson's DLAs takes the layers that it can; None for the GPU.
        cache: a folder that outlives the conversion, for what makes the next one quicker; None for none.
        calibration: a .npy file of inputs (n, channels, height, width), float32, that int8 is calibrated with; only for
            a source in float32, and None for all others.
    """

    source: Path
    folder: Path
    precision: Precision = "fp32"
    batch: int | None = None
    max_batch: int = 32
    target: str = ""
    dla_core: int | None = None
    cache: Path | None = None
    calibration: Path | None = None


@dataclass(frozen=True)
class Contract:
    """What a converter requires and what it ensures.

    Attributes:
        source: what it converts: an ONNX file, or an ExportedProgram of torch (.pt2).
        suffix: of the engine's main file (or folder), such as ".xml".
        modules: that must be installed; the first one's version goes into the provenance.
        extra: the extra of thinet-deploy that installs them.
        batch: "any": the engine takes any batch, unless one is fixed; "fixed": it has one size, 1 unless another is
            asked for; "one": it takes single images.
        precisions: that it can be asked for.
        without: the others → why not, for the user.
    """

    source: Literal["onnx", "program"]
    suffix: str
    modules: tuple[str, ...]
    extra: str
    batch: Literal["any", "fixed", "one"] = "any"
    precisions: tuple[Precision, ...] = ("fp32",)
    without: Mapping[Precision, str] = field(default_factory=dict)

    def why_not(self, precision: Precision) -> str:
        """The end of a message that refuses a precision; "" where there is no more to say."""
        return f": {self.without[precision]}" if precision in self.without else ""


class Progress(Protocol):
    """Called by long stages; the command line draws it, everything else may ignore it."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total` steps of `stage` are finished; `note` is a short state, such as a loss."""


class Converter(Protocol):
    """Makes an engine from another artifact: a module in converters/ with this constant and this function."""

    CONTRACT: Contract

    def convert(self, job: Conversion, progress: Progress) -> Path:
        """Convert and return the engine's main file inside `job.folder`; runs in a process of its own."""


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """The progress callback that shows nothing."""
