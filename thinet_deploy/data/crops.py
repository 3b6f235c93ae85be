"""Crops of resized images, and where each was cut, so that boxes and masks are cut alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .preprocess import Preprocess


class Window(NamedTuple):
    """Where a crop was cut from its image.

    Attributes:
        top: of the crop on the canvas, in pixels; negative where it reaches into the padding.
        left: the same from the left.
        mirrored: whether it was flipped left and right afterwards.
    """

    top: int
    left: int
    mirrored: bool = False


def centre_window(preprocess: Preprocess) -> Window:
    """Of the crop that testing, calibration and the device use."""
    (height, width), (tall, wide) = preprocess.crop, preprocess.canvas
    return Window((tall - height) // 2, (wide - width) // 2)


def drawn(numbers: NDArray[np.int64], preprocess: Preprocess, key: int) -> list[Window]:
    """A random window for each image; its choice depends on (key, number) only."""
    augment, pad = preprocess.augment, preprocess.augment.pad
    (height, width), (tall, wide) = preprocess.crop, preprocess.canvas
    windows = []
    for number in numbers:
        top, left, flip = np.random.Generator(np.random.Philox(key=[key, int(number)])).random(3)
        y, x = int(top * (tall + 2 * pad - height + 1)) - pad, int(left * (wide + 2 * pad - width + 1)) - pad
        windows.append(Window(y, x, bool(augment.mirror and flip < 0.5)))
    return windows


def cut(
    images: NDArray[np.uint8], windows: Sequence[Window], crop: tuple[int, int], fill: int = 0
) -> NDArray[np.uint8]:
    """Crops (n, height, width, …) of images (n, …); what reaches over the edge is `fill`."""
    height, width = crop
    pad = max(
        0,
        *(-min(window.top, window.left) for window in windows),
        *(window.top + height - images.shape[1] for window in windows),
        *(window.left + width - images.shape[2] for window in windows),
    )
    sides = ((0, 0), (pad, pad), (pad, pad), *((0, 0),) * (images.ndim - 3))
    padded = np.pad(images, sides, constant_values=fill) if pad else images
    crops = np.empty((len(images), height, width, *images.shape[3:]), np.uint8)
    for row, (top, left, mirrored) in enumerate(windows):
        found = padded[row, pad + top : pad + top + height, pad + left : pad + left + width]
        crops[row] = found[:, ::-1] if mirrored else found
    return crops
