"""Classification: cross-entropy, top-1 and top-5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from ..interfaces import OUTPUT
from ..intervals import Interval, accuracy_interval, difference_interval
from .base import Accuracy, Arrays, Outputs, Targets
from .distillation import USUAL, Mix, losses

TOP1, TOP5 = "top-1", "top-5"


class Classification:
    """A class for each image; labels (n,), -1 where it is not known."""

    name = "classification"

    def shapes(self, classes: int, image: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """One score per class."""
        return {OUTPUT: (classes,)}

    def losses(
        self, outputs: Outputs, targets: torch.Tensor, taught: Outputs | None = None, mix: Mix = USUAL
    ) -> torch.Tensor:
        """Cross-entropy and the divergence from the teacher: see `distillation.losses`."""
        theirs = taught[0] if taught else None
        return losses(outputs[0], targets, theirs, mix)

    def meter(self) -> Ranking:
        """Counts ranks."""
        return Ranking()

    def bundled(self) -> Mapping[str, bytes]:
        """Nothing: the largest score is the class."""
        return {}


class Ranking:
    """On which place each image's class was ranked, from 0."""

    def __init__(self) -> None:
        self._parts: list[NDArray[np.int64]] = []

    def add(self, outputs: Arrays, targets: Targets) -> None:
        """Scores (n, classes) and labels (n,)."""
        self._parts.append(ranks(outputs[0], targets))

    def judge(self) -> Ranked:
        """On all images so far."""
        return Ranked(np.concatenate(self._parts))


@dataclass(frozen=True)
class Ranked:
    """The place on which each image's class was ranked, from 0, shape (n,)."""

    ranks: NDArray[np.int64]

    @property
    def accuracy(self) -> Accuracy:
        """Share of images whose class is ranked first, and among the first five, with Wilson's intervals."""
        return in_tops(int((self.ranks < 1).sum()), int((self.ranks < 5).sum()), len(self.ranks))

    def behind(self, other: Self) -> Interval:
        """Tango's interval of the difference in top-1, paired image by image."""
        return difference_interval(other.ranks < 1, self.ranks < 1)


def in_tops(first: int, five: int, images: int) -> Accuracy:
    """Accuracy from the numbers of images whose class is ranked first, and among the first five."""
    return Accuracy({TOP1: accuracy_interval(first, images), TOP5: accuracy_interval(five, images)}, images)


def ranks(outputs: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place on which outputs (n, classes) rank each label's class, from 0, shape (n,).

    Ties and NaN count against the label's class: a network whose outputs are all equal has learnt nothing.
    """
    places: NDArray[np.int64] = (~(outputs < np.take_along_axis(outputs, labels[:, None], 1))).sum(1) - 1
    return places


CLASSIFICATION = Classification()
