"""Images of coloured shapes in VOC's layout, with boxes and masks: small, but as real as VOC's files are."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASSES = ("disc", "square")
# Networks of a user's own file: ThiNet-Tiny as the backbone, at half of its widths, with BatchNorm to learn quickly.
NETWORKS = """
from thinet_deploy.models.fcn import fcn8s
from thinet_deploy.models.presets import TINY
from thinet_deploy.models.ssd import ssd300

HALF = tuple(tuple(width // 2 for width in stage) for stage in TINY)
NARROW = tuple(tuple(width // 4 for width in stage) for stage in TINY)


def detector(num_classes=3, input_shape=(3, 64, 64), stages=HALF):
    return ssd300(input_shape, num_classes, stages=stages, norm=True)


def segmenter(num_classes=3, input_shape=(3, 64, 64), stages=HALF):
    return fcn8s(input_shape, num_classes, stages=stages, hidden=(), norm=True)


def narrow_detector(num_classes=3, input_shape=(3, 32, 32)):
    return detector(num_classes, input_shape, NARROW)


def narrow_segmenter(num_classes=3, input_shape=(3, 32, 32)):
    return segmenter(num_classes, input_shape, NARROW)
"""
_PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0, *[0] * (252 * 3), 224, 224, 192]


def write_voc(root: Path, train: int, test: int, side: int = 64) -> Path:
    """A folder with `train` and `test` images of `side` pixels."""
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Main", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for split, count in (("train", train), ("val", test)):
        ids = [f"{split}_{number:05}" for number in range(count)]
        for number, name in enumerate(ids):
            _write_image(root, name, np.random.default_rng([split == "val", number]), side)
        for task in ("Main", "Segmentation"):
            (root / "ImageSets" / task / f"{split}.txt").write_text("".join(f"{name}\n" for name in ids))
    return root


def _write_image(root: Path, name: str, random: np.random.Generator, side: int) -> None:
    pixels = random.integers(60, 130, (side, side, 3))
    mask = np.zeros((side, side), np.uint8)
    document = ET.Element("annotation")
    for left, top, size in _places(random, side):
        label = int(random.integers(len(CLASSES)))
        shape = _shape(side, left, top, size, disc=label == 0)
        pixels[shape] = random.integers(150, 250, 3) if label else random.integers(0, 50, 3)
        mask[shape] = label + 1
        _add_object(document, CLASSES[label], left, top, size)
    mask[0] = 255  # a row that does not count
    Image.fromarray(pixels.astype(np.uint8)).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
    picture = Image.fromarray(mask, mode="P")
    picture.putpalette(_PALETTE)
    picture.save(root / "SegmentationClass" / f"{name}.png")
    ET.ElementTree(document).write(root / "Annotations" / f"{name}.xml")


def _places(random: np.random.Generator, side: int) -> list[tuple[int, int, int]]:
    """Left, top and size of one or two shapes, in the left and the right half, which so do not cover each other."""
    halves = [0, side // 2] if random.random() < 0.5 else [int(random.integers(2)) * side // 2]
    places = []
    for half in halves:
        size = int(random.integers(side // 4, side // 2))
        places.append((half + int(random.integers(side // 2 - size + 1)), int(random.integers(1, side - size)), size))
    return places


def _shape(side: int, left: int, top: int, size: int, *, disc: bool) -> NDArray[np.bool_]:
    y, x = np.mgrid[:side, :side] + 0.5
    if disc:
        return np.asarray(np.hypot(x - left - size / 2, y - top - size / 2) < size / 2)
    return np.asarray((x > left) & (x < left + size) & (y > top) & (y < top + size))


def _add_object(document: ET.Element, name: str, left: int, top: int, size: int) -> None:
    element = ET.SubElement(document, "object")
    ET.SubElement(element, "name").text = name
    ET.SubElement(element, "difficult").text = "0"
    box = ET.SubElement(element, "bndbox")
    for side, value in zip(("xmin", "ymin", "xmax", "ymax"), (left + 1, top + 1, left + size, top + size), strict=True):
        ET.SubElement(box, side).text = str(value)
