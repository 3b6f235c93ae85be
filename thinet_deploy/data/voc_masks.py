"""Masks in VOC's layout: a PNG whose pixels are class indices; 255 where a pixel does not count."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import DataError, first_line
from ..tasks.segmentation import NOWHERE
from .crops import Window, cut
from .dataset import MEMORY_BYTES, CutTargets
from .image_files import size_of
from .preprocess import Preprocess

BORDER = 255
_INDEXED = ("P", "L", "1")
_EXPECTED = "A mask is a PNG with a palette, or in grey, whose pixels are class indices, as VOC's are."


@dataclass(frozen=True)
class Masks:
    """The masks of a list of images.

    Attributes:
        labels: the class with most pixels in each, other than the background if there is one, shape (n,).
        highest: index in all of them.
        highest_in: the mask that has it.
        targets: see `ImageSet.targets`.
    """

    labels: NDArray[np.int64]
    highest: int
    highest_in: Path
    targets: CutTargets


def read_masks(masks: Sequence[Path], images: Sequence[Path], preprocess: Preprocess, *, together: int) -> Masks:
    """Read all masks: they are kept on the canvas where `together` of them fit in memory, else read again when needed.

    Raises:
        DataError: a mask is damaged, has colours instead of indices, or another size than its image.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        seen = list(pool.map(_counts, masks, images))
    highest = [int(np.flatnonzero(counts).max(initial=0)) for counts in seen]
    worst = int(np.argmax(highest))
    labels = np.array([int(counts[1:].argmax()) + 1 if counts[1:].any() else 0 for counts in seen])
    height, width = preprocess.canvas
    fits = together * height * width <= MEMORY_BYTES
    kept = np.stack([_placed(path, preprocess) for path in masks]) if fits else None

    def read(indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        return np.stack([_placed(masks[index], preprocess) for index in indices]) if kept is None else kept[indices]

    return Masks(labels, highest[worst], masks[worst], mask_targets(read, preprocess))


def mask_targets(read: Callable[[NDArray[np.int64]], NDArray[np.uint8]], preprocess: Preprocess) -> CutTargets:
    """What is known of the crops of images: the class of each pixel, -1 where it does not count."""

    def known(indices: NDArray[np.int64], windows: Sequence[Window]) -> NDArray[np.int64]:
        crops = cut(read(indices), windows, preprocess.crop, fill=BORDER)
        return np.where(crops == BORDER, NOWHERE, crops.astype(np.int64))

    return known


def _counts(mask: Path, image: Path) -> NDArray[np.int64]:
    """Pixels of each index, the border left out, shape (255,)."""
    found, size = _open(mask), size_of(image)
    if found.size != size:
        sizes = " and ".join(f"{width}x{height}" for width, height in (found.size, size))
        raise DataError(
            f"{mask} and its image {image.name} have different sizes: {sizes} pixels.",
            hint="Both have to show the same; resize neither, --preprocess does it.",
        )
    return np.bincount(np.asarray(found, np.uint8).ravel(), minlength=256)[:BORDER]


def _placed(mask: Path, preprocess: Preprocess) -> NDArray[np.uint8]:
    return preprocess.read_classes(_open(mask))


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # a damaged file makes Pillow raise anything
        raise DataError(f"{path} cannot be read as a mask: {first_line(error).rstrip('.')}.", hint=_EXPECTED) from error
    if image.mode not in _INDEXED:
        raise DataError(f"{path} has colours ({image.mode}), but class indices were expected.", hint=_EXPECTED)
    return image
