"""Boxes from VOC's annotations: read, placed on the canvas, cut and mirrored with their image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, first_line
from ..tasks.detection import BOX, CLASS, DIFFICULT, NONE
from .crops import Window
from .dataset import CutTargets
from .preprocess import Preprocess

Rows = NDArray[np.float32]  # (m, 6): class, left, top, right, bottom in pixels of the canvas, 1 if difficult
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_EXPECTED = "An object has a <name> and a <bndbox> with <xmin>, <ymin>, <xmax> and <ymax> in pixels."


@dataclass(frozen=True)
class Annotation:
    """The objects of an image.

    Attributes:
        path: of the file.
        names: class of each.
        boxes: left, top, right, bottom in pixels of the image file, shape (m, 4).
        difficult: whether each need not be found, shape (m,).
        size: width and height of the image it was made for; zeros where it does not say.
    """

    path: Path
    names: tuple[str, ...]
    boxes: NDArray[np.float64]
    difficult: NDArray[np.bool_]
    size: tuple[int, int]


def read_annotation(path: Path) -> Annotation:
    """Read Annotations/ID.xml.

    Raises:
        DataError: it is no XML, or an object has no name or no box.
    """
    try:
        root = ET.parse(path).getroot()  # noqa: S314 - the user's own files; expat limits what entities grow to
    except (ET.ParseError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as XML: {first_line(error)}.", hint=_EXPECTED) from error
    objects = root.findall("object")
    names = tuple((each.findtext("name") or "").strip() for each in objects)
    if not all(names):
        raise DataError(f"{path}: object {names.index('') + 1} has no name.", hint=_EXPECTED)
    boxes = [_box(path, number, each) for number, each in enumerate(objects, 1)]
    difficult = [(each.findtext("difficult") or "0").strip() == "1" for each in objects]
    sides = np.array(boxes, np.float64).reshape(-1, 4)
    return Annotation(path, names, sides, np.array(difficult, np.bool_), _size(path, root))


def _size(path: Path, root: ET.Element) -> tuple[int, int]:
    width, height = (root.findtext(f"size/{side}") or "0" for side in ("width", "height"))
    try:
        return int(float(width)), int(float(height))
    except ValueError:
        raise DataError(f"{path}: its size is {width} x {height}.", hint=_EXPECTED) from None


def _box(path: Path, number: int, found: ET.Element) -> tuple[float, float, float, float]:
    texts = [found.findtext(f"bndbox/{side}") for side in _SIDES]
    try:
        left, top, right, bottom = (float(text or "") for text in texts)
    except ValueError:
        given = ", ".join(f"{side} {text!r}" for side, text in zip(_SIDES, texts, strict=True))
        raise DataError(f"{path}: object {number} has no box of four numbers: {given}.", hint=_EXPECTED) from None
    # VOC counts pixels from 1, and the last one belongs to the box.
    left, top = left - 1, top - 1
    if not (left < right and top < bottom):
        raise DataError(
            f"{path}: the box of object {number} is empty: from {left + 1:g}, {top + 1:g} to {right:g}, {bottom:g}.",
            hint="xmin and ymin are its left and upper side.",
        )
    return left, top, right, bottom


def place_boxes(
    annotation: Annotation, index: Mapping[str, int], size: tuple[int, int], preprocess: Preprocess
) -> Rows:
    """The objects on the canvas; those whose middle the preprocessing cuts away are left out.

    Args:
        annotation: the objects.
        index: of each class.
        size: width and height of the image file.
        preprocess: how the image comes onto the canvas.

    Raises:
        DataError: a box lies outside of the image, or all were drawn on an image of another size.
    """
    if all(annotation.size) and annotation.size != size:
        width, height = annotation.size
        raise DataError(
            f"{annotation.path} is of an image of {width}x{height} pixels, but the file has {size[0]}x{size[1]}.",
            hint="Annotate it again, or give the image it was made for (not one that was resized or turned).",
        )
    sides = np.clip(annotation.boxes, 0, [*size, *size])
    if (outside := (sides[:, 2:] <= sides[:, :2]).any(1)).any():
        number = int(outside.argmax())
        box = ", ".join(f"{side:g}" for side in annotation.boxes[number])
        raise DataError(
            f"{annotation.path}: object {number + 1} ({box}) lies outside of its image of {size[0]}x{size[1]} pixels.",
            hint="Correct the box, or see whether the image was resized after it was annotated.",
        )
    part, grown, corner = preprocess.placing(size)
    scale = np.array([grown[0] / (part[2] - part[0]), grown[1] / (part[3] - part[1])] * 2)
    rows = np.empty((len(sides), 6), np.float32)
    rows[:, CLASS] = [index[name] for name in annotation.names]
    rows[:, BOX] = (sides - [part[0], part[1]] * 2) * scale - [*corner, *corner]
    rows[:, DIFFICULT] = annotation.difficult
    height, width = preprocess.canvas
    return _within(rows, width, height)


def _within(rows: Rows, width: int, height: int) -> Rows:
    """The rows whose middle is inside, cut at the edges."""
    centre = (rows[:, 1:3] + rows[:, 3:5]) / 2
    inside = ((centre > 0) & (centre < [width, height])).all(1)
    kept = rows[inside].copy()
    kept[:, BOX] = np.clip(kept[:, BOX], 0, [width, height, width, height])
    return kept


def largest(rows: Rows) -> int:
    """The class of the largest object; 0 without any."""
    if not len(rows):
        return 0
    area = (rows[:, 3] - rows[:, 1]) * (rows[:, 4] - rows[:, 2])
    return int(rows[area.argmax(), CLASS])


def box_targets(images: Sequence[Rows], preprocess: Preprocess) -> CutTargets:
    """What is known of the crops of images: see `tasks.detection.Detection`."""
    most = max(1, *(len(rows) for rows in images))

    def cut(indices: NDArray[np.int64], windows: Sequence[Window]) -> Rows:
        targets = np.full((len(indices), most, 6), NONE, np.float32)
        for row, (index, window) in enumerate(zip(indices, windows, strict=True)):
            found = cut_boxes(images[index], window, preprocess.crop)
            targets[row, : len(found)] = found
        return targets

    return cut


def cut_boxes(rows: Rows, window: Window, crop: tuple[int, int]) -> Rows:
    """The objects of a crop, their sides as shares of it; those whose middle is not in it are left out."""
    height, width = crop
    moved = rows.copy()
    moved[:, BOX] -= [window.left, window.top] * 2
    if window.mirrored:
        moved[:, [1, 3]] = width - moved[:, [3, 1]]
    found = _within(moved, width, height)
    found[:, BOX] /= [width, height, width, height]
    return found
