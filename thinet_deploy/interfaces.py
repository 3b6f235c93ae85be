"""The few types that the core and the plug-in parts (converters, runners) agree on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Precision = Literal["fp32", "fp16", "bf16", "int8"]
# How filters are chosen, and how the layers that read them make up for those that go.
Selection = Literal["elimination", "thinet", "thinet-omp", "weight-sum", "apoz", "taylor", "random"]
Reconstruction = Literal["full", "scale", "none"]
Array = NDArray[np.generic]


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
        source: the artifact to convert (an ONNX file).
        folder: an existing empty folder that takes what the converter writes.
        precision: the numeric type that the engine must compute in.
    """

    source: Path
    folder: Path
    precision: Precision = "fp32"


class Converter(Protocol):
    """Makes an engine from another artifact: a module in converters/ with these three functions."""

    def check(self) -> None:
        """Raise MissingError when the toolchain is not installed, before any work starts."""

    def made_by(self) -> str:
        """Toolchain and version, such as "openvino 2026.4.1"."""

    def convert(self, job: Conversion) -> Path:
        """Convert and return the engine's main file inside `job.folder`."""


class Progress(Protocol):
    """Called by long stages; the command line draws it, everything else may ignore it."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total` steps of `stage` are finished; `note` is a short state, such as a loss."""


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """The progress callback that shows nothing."""
