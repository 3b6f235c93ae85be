"""Mean average precision by pycocotools, the reference implementation.

torchmetrics' MeanAveragePrecision calls it too, but refuses to start without torchvision.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MissingError
from ..on_device.detections import Found

_EVERY_SIZE = (0.0, 1e10)
# An area out of range: such an object counts neither way, and is overlapped like any other. pycocotools' crowds would
# take in whatever lies inside them.
_IGNORED = 2 * _EVERY_SIZE[1]
_MOST = 100  # of the surest objects of an image and class, as COCO has it


def average_precisions(
    found: Sequence[Found], there: Sequence[NDArray[np.float32]], group: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean over the classes that occur of the average precision, in percent.

    Args:
        found: in each image.
        there: objects of each image, (m, 6): class, left, top, right, bottom, 1 if difficult. What is found of a
            difficult one counts neither for nor against.
        group: of each image, shape (n,).

    Returns:
        At an overlap of 0.5, and averaged over overlaps from 0.5 to 0.95: on all images, shape (2,); and without
        each group, shape (groups, 2).
    """
    known = [
        _entry(number, row[1:5], int(row[0]), iscrowd=0, **({"area": _IGNORED} if row[5] else {}))
        for number, rows in enumerate(there)
        for row in rows
    ]
    seen = [
        _entry(number, box, int(label), score=float(score), iscrowd=0)
        for number, each in enumerate(found)
        for box, label, score in zip(each.boxes, each.classes, each.scores, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # it tells what it does
        judge = _judge(_dataset(known, len(found)), _dataset(seen, len(found)))
        whole = _averages(judge)
        matches, left = judge.evalImgs, []
        for out in np.unique(group):
            judge.evalImgs = [None if each and group[each["image_id"]] == out else each for each in matches]
            left.append(_averages(judge))
    return whole, np.array(left)


def _entry(image: int, box: NDArray[np.float32], label: int, **more: float) -> dict[str, Any]:
    left, top, right, bottom = (float(side) for side in box)
    bbox = [left, top, right - left, bottom - top]
    return {"image_id": image, "category_id": label, "bbox": bbox, "area": bbox[2] * bbox[3], **more}


def check_installed() -> None:
    """Raise MissingError where pycocotools cannot be imported."""
    try:
        import pycocotools.cocoeval  # noqa: F401 - only whether it can be
    except ImportError as error:
        raise MissingError(
            f"Mean average precision needs pycocotools, which cannot be imported: {error}.",
            hint='Do: pip install "thinet-deploy[tasks]".',
        ) from error


def _dataset(entries: Sequence[dict[str, Any]], images: int) -> Any:
    from pycocotools.coco import COCO

    data = COCO()
    labels = sorted({entry["category_id"] for entry in entries})
    data.dataset = {
        "images": [{"id": number} for number in range(images)],
        "categories": [{"id": label} for label in labels],
        "annotations": [{"id": number, **entry} for number, entry in enumerate(entries, 1)],  # 0 would be no match
    }
    data.createIndex()
    return data


def _judge(known: Any, seen: Any) -> Any:
    from pycocotools.cocoeval import COCOeval

    judge = COCOeval(known, seen, "bbox")
    judge.params.areaRng, judge.params.areaRngLbl, judge.params.maxDets = [_EVERY_SIZE], ["all"], [_MOST]
    judge.evaluate()
    return judge


def _averages(judge: Any) -> NDArray[np.float64]:
    """At the first overlap and over all; classes without an object are -1."""
    judge.accumulate()
    precision = judge.eval["precision"]  # (overlaps, recalls, classes, sizes, numbers)
    return np.array([100 * _mean(precision[:1]), 100 * _mean(precision)])


def _mean(precision: NDArray[np.float64]) -> float:
    there = precision[precision > -1]
    return float(there.mean()) if there.size else 0.0
