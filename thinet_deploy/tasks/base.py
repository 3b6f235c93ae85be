"""What every task says of itself, and how good a network is in the figures of its task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..interfaces import OUTPUTS
from ..intervals import Interval
from .distillation import USUAL, Mix

Outputs = tuple[torch.Tensor, ...]
Arrays = Sequence[NDArray[np.float32]]
# What is known of each image, batch first: class indices (n,), maps of classes (n, h, w), or boxes (n, m, 6).
Targets = NDArray[Any]


@dataclass(frozen=True)
class Accuracy:
    """How good a network is on a set of images, in the figures of its task.

    Attributes:
        figures: name, such as "top-1" or "mAP@50" → percent with its 95 % interval; the first one decides.
        images: how many were used.
    """

    figures: Mapping[str, Interval]
    images: int

    @property
    def name(self) -> str:
        """What the figure that decides is called."""
        return next(iter(self.figures))

    @property
    def main(self) -> float:
        """The figure that decides, in percent."""
        return self.figures[self.name].value

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Accuracy:
        """The inverse of `asdict`."""
        return cls(read_figures(data["figures"]), data["images"])


def read_figures(data: Mapping[str, Any]) -> dict[str, Interval]:
    """Figures from JSON."""
    return {name: Interval(**figure) for name, figure in data.items()}


class Judgement(Protocol):
    """How good a network is, and how much better another one is on the same images."""

    @property
    def accuracy(self) -> Accuracy:
        """In the figures of the task."""

    def behind(self, other: Self) -> Interval:
        """By how many points `other` is better in the figure that decides, paired by the images."""


class Meter(Protocol):
    """Sees what a network says of images, batch by batch, and judges it in the end."""

    def add(self, outputs: Arrays, targets: Targets) -> None:
        """The outputs for some images, and what is known of them."""

    def judge(self) -> Judgement:
        """On all images so far."""


class Task(Protocol):
    """What a network is for."""

    @property
    def name(self) -> str:
        """Such as "classification"; what a network's attribute `task` may say."""

    def shapes(self, classes: int, image: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """Output → its shape without the batch, for this number of classes and input height and width."""

    def losses(
        self, outputs: Outputs, targets: torch.Tensor, taught: Outputs | None = None, mix: Mix = USUAL
    ) -> torch.Tensor:
        """Loss of each image, shape (n,).

        Args:
            outputs: of the network.
            targets: what is known of the images.
            taught: the teacher's outputs; None without one.
            mix: of labels and teacher.
        """

    def meter(self) -> Meter:
        """Which has seen nothing yet.

        Raises:
            MissingError: what the figures are counted with is not installed.
        """

    def bundled(self) -> Mapping[str, bytes]:
        """File name → content: what an app needs beside the engine to read its outputs."""


def said(model: nn.Module, images: torch.Tensor) -> Outputs:
    """What a network says of images: one tensor or several, in the order of `interfaces.OUTPUTS`."""
    outputs = model(images)
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def named(outputs: Outputs) -> dict[str, NDArray[np.float32]]:
    """Outputs as arrays by their names in the ONNX file and in every engine."""
    return {name: each.cpu().numpy() for name, each in zip(OUTPUTS, outputs, strict=False)}
