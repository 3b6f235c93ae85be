"""Which task a network is for: what it says itself, or else what its images are for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..errors import DataError, ModelError
from .base import Task
from .detection import Detection
from .segmentation import Segmentation


def task_of(model: nn.Module, name: str, found: Sequence[str], root: Path) -> Task:
    """The task of a network on images in VOC's layout.

    Args:
        model: it may have an attribute `task`; a detector has `default_boxes`.
        name: what people call it.
        found: tasks that the folder has images for.
        root: the folder.

    Raises:
        DataError: the folder has no images for the network's task, or for several, and the network does not say which.
        ModelError: a detector without default boxes.
    """
    mine = getattr(model, "task", None)
    if mine is None and len(found) > 1:
        raise DataError(
            f"{root} has images for {' and for '.join(found)}, and {name} does not say which of them it is for.",
            hint='Give the network an attribute: self.task = "detection" or self.task = "segmentation".',
        )
    mine = mine or found[0]
    if mine not in found:
        raise DataError(
            f"{name} is for {mine}, but {root} has images for {' and '.join(found)} only.",
            hint="See the top of thinet_deploy/data/voc.py for where lists and annotations belong, or give another "
            "--model: ssd300-… detects, fcn8s-… segments.",
        )
    return Segmentation() if mine == Segmentation.name else Detection(_default_boxes(model, name))


def _default_boxes(model: nn.Module, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    found = getattr(model, "default_boxes", ())
    try:
        given = np.asarray(found.detach().cpu() if isinstance(found, torch.Tensor) else found, np.float32)
    except (TypeError, ValueError):
        given = np.empty(0, np.float32)
    if given.ndim != 2 or given.shape[1] != 4 or not (given[:, 2:] > 0).all():
        raise ModelError(
            f"{name} has no default boxes that its outputs are relative to: an attribute default_boxes of shape (k, 4) "
            "was expected: centre x, centre y, width and height as shares of the image.",
            hint="See thinet_deploy.models.ssd.",
        )
    return given
