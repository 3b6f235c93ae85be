"""Segmentation: cross-entropy of every pixel, mean intersection over union."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import MissingError, first_line
from ..interfaces import OUTPUT
from .base import Arrays, Outputs, Targets
from .distillation import USUAL, Mix, losses
from .groups import GROUPS, Grouped, grouped

NOWHERE = -1  # the class of a pixel that counts neither for nor against, such as VOC's borders
MIOU, PIXELS = "mIoU", "pixel acc."


class Segmentation:
    """A class for each pixel; targets (n, height, width), -1 where it does not count."""

    name = "segmentation"

    def shapes(self, classes: int, image: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """One score per class and pixel."""
        return {OUTPUT: (classes, *image)}

    def losses(
        self, outputs: Outputs, targets: torch.Tensor, taught: Outputs | None = None, mix: Mix = USUAL
    ) -> torch.Tensor:
        """Mean over the pixels that count; see `distillation.losses`."""
        theirs = taught[0] if taught else None
        loss_nhw = losses(outputs[0], targets, theirs, mix)
        counts_nhw = targets != NOWHERE
        return (loss_nhw * counts_nhw).sum((1, 2)) / counts_nhw.sum((1, 2)).clamp_min(1)

    def meter(self) -> _Pixels:
        """Counts pixels."""
        return _Pixels()

    def bundled(self) -> Mapping[str, bytes]:
        """Nothing: the largest score of a pixel is its class."""
        return {}


class _Pixels:
    """Pixels by their class and the class that was found, in groups of images."""

    def __init__(self) -> None:
        _torchmetrics()
        self._groups: list[dict[str, Any]] = []
        self._images = 0

    def add(self, outputs: Arrays, targets: Targets) -> None:
        """Logits (n, classes, height, width) and targets."""
        found = outputs[0].argmax(1)
        if not self._groups:
            self._groups = [_metrics(outputs[0].shape[1]) for _ in range(GROUPS)]
        for row, known in zip(found, targets, strict=True):
            if (known != NOWHERE).any():
                for metric in self._groups[self._images % GROUPS].values():
                    metric.update(torch.from_numpy(row)[None], torch.from_numpy(known)[None])
            self._images += 1

    def judge(self) -> Grouped:
        """Mean over the classes that occur of intersection over union, and the share of pixels that are right."""
        used = [group for group in self._groups if group[MIOU].update_called]
        without = [_figures([each for each in used if each is not out]) for out in used if len(used) > 1]
        return grouped((MIOU, PIXELS), _figures(used), np.reshape(without, (-1, 2)), self._images)


def _metrics(classes: int) -> dict[str, Any]:
    library = _torchmetrics()
    how: dict[str, Any] = {"ignore_index": NOWHERE, "validate_args": False}
    iou = library.MulticlassJaccardIndex(classes, **how)
    return {MIOU: iou, PIXELS: library.MulticlassAccuracy(classes, average="micro", **how)}


def _torchmetrics() -> Any:
    try:
        import torchmetrics.classification as library
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision made for another torch
        raise MissingError(
            f"Mean intersection over union needs torchmetrics, which cannot be imported: {first_line(error)}.",
            hint='Do: pip install "thinet-deploy[tasks]". torchmetrics also loads torchvision where it is installed: '
            "remove it, or install the one that was made for your torch.",
        ) from error
    return library


def _figures(groups: list[dict[str, Any]]) -> NDArray[np.float64]:
    """Both figures in percent, of several groups together."""
    return np.array([100 * _together([group[name] for group in groups]) for name in (MIOU, PIXELS)])


def _together(metrics: list[Any]) -> float:
    first, *others = [metric for metric in metrics if metric.update_called]
    merged = copy.deepcopy(first)
    for metric in others:
        merged.merge_state(metric)
    return float(merged.compute())
