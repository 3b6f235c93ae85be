"""Detection as SSD does it: multibox loss with hard negatives, mean average precision."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from ..interfaces import OUTPUTS
from ..on_device import detections
from .base import Arrays, Outputs, Targets
from .coco import average_precisions, check_installed
from .distillation import USUAL, Mix, losses
from .groups import GROUPS, Grouped, grouped
from .matching import encoded, matched

# Columns of what is known of an object, and the class of a row that only fills up an image's.
CLASS, BOX, DIFFICULT = 0, slice(1, 5), 5
NONE = -1
# Default boxes of the background that an image learns from, for each that learns an object: those it gets most wrong.
_NEGATIVES = 3
MAP50, MAP = "mAP@50", "mAP"


@dataclass(frozen=True)
class Detection:
    """Objects in boxes; targets (n, m, 6): class, left, top, right, bottom as shares of the input, 1 if difficult.

    Rows of class -1 fill up. Difficult objects, as VOC calls them, are learnt, but need not be found.

    Attributes:
        default_boxes: of the network: centre x, centre y, width, height as shares of the input, shape (k, 4).
    """

    default_boxes: NDArray[np.float32]
    name: str = field(default="detection", init=False)

    def shapes(self, classes: int, image: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """Class logits and encoded boxes, for each default box."""
        logits, boxes = OUTPUTS
        return {logits: (classes, len(self.default_boxes)), boxes: (4, len(self.default_boxes))}

    def losses(
        self, outputs: Outputs, targets: torch.Tensor, taught: Outputs | None = None, mix: Mix = USUAL
    ) -> torch.Tensor:
        """Multibox loss (the paper's section 2.2), with the teacher's classes and boxes where there is one.

        Divided by the default boxes that learn an object, image by image and not batch by batch: so the loss of an
        image does not depend on the others of its batch.
        """
        (logits_nck, boxes_n4k), default_k4 = outputs, torch.from_numpy(self.default_boxes).to(targets.device)
        object_nk = matched(targets[..., BOX], targets[..., CLASS] != NONE, default_k4)
        positive_nk = object_nk >= 0
        known_nk6 = targets.gather(1, object_nk.clamp_min(0)[..., None].expand(-1, -1, targets.shape[2]))
        label_nk = torch.where(positive_nk, known_nk6[..., CLASS], 0).long()
        theirs = taught[0] if taught else None
        class_nk = losses(logits_nck, label_nk, theirs, mix)
        learnt_nk = positive_nk | _hardest(class_nk, positive_nk)
        # A default box without an object gets itself as its object, whose code is finite.
        corners_nk4 = known_nk6[..., BOX].where(positive_nk[..., None], _corners(default_k4))
        box_nk = F.smooth_l1_loss(boxes_n4k, encoded(corners_nk4, default_k4), reduction="none").sum(1)
        if taught:
            aim_nk = F.smooth_l1_loss(boxes_n4k, taught[1], reduction="none").sum(1)
            box_nk = (1 - mix.share) * box_nk + mix.share * aim_nk
        total_n = (class_nk * learnt_nk + box_nk * positive_nk).sum(1)
        return total_n / positive_nk.sum(1).clamp_min(1)

    def meter(self) -> _Boxes:
        """Collects what is found."""
        return _Boxes(self.default_boxes)

    def bundled(self) -> Mapping[str, bytes]:
        """What finds objects in the outputs, with numpy alone."""
        boxes = io.BytesIO()
        np.save(boxes, self.default_boxes)
        return {"detections.py": Path(detections.__file__).read_bytes(), "default_boxes.npy": boxes.getvalue()}


def _hardest(loss_nk: torch.Tensor, positive_nk: torch.Tensor) -> torch.Tensor:
    """Which default boxes of the background have the largest losses: three for each with an object, or for none."""
    background_nk = loss_nk.detach().masked_fill(positive_nk, -torch.inf)
    place_nk = background_nk.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (place_nk < _NEGATIVES * positive_nk.sum(1, keepdim=True).clamp_min(1)) & ~positive_nk


def _corners(boxes: torch.Tensor) -> torch.Tensor:
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


class _Boxes:
    """What is found in each image, and what is there."""

    def __init__(self, default_boxes: NDArray[np.float32]) -> None:
        check_installed()
        self._default_boxes = default_boxes
        self._found: list[detections.Found] = []
        self._there: list[NDArray[np.float32]] = []

    def add(self, outputs: Arrays, targets: Targets) -> None:
        """Logits, encoded boxes, and targets."""
        self._found += detections.find(outputs[0], outputs[1], self._default_boxes)
        self._there += [rows[rows[:, CLASS] != NONE] for rows in targets]

    def judge(self) -> Grouped:
        """Mean average precision at an overlap of 0.5, as VOC has it, and over overlaps from 0.5 to 0.95, as COCO."""
        left_out = np.arange(len(self._found)) % GROUPS
        whole, without = average_precisions(self._found, self._there, left_out)
        return grouped((MAP50, MAP), whole, without, len(self._found))
