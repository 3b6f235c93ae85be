"""From the outputs of a detector to objects. One file that needs only Python 3.8 and numpy.

thinet_deploy tests detectors with it, and the bundle of one carries it: what was measured while building and what an
app finds went through the same code.

    import numpy as np, detections
    found = detections.find(logits, boxes, np.load("default_boxes.npy"))   # outputs of any engine in the bundle
    found[0].boxes, found[0].classes, found[0].scores                      # of the first image
"""

from __future__ import annotations

from typing import Any, List, NamedTuple

import numpy as np

Array = Any  # numpy.ndarray; its types say more only from numpy 1.21 on, which not every device has

# By which encoded centres and sizes are multiplied (the paper's code; the paper does not mention them).
CENTRE, SIZE = 0.1, 0.2
# Larger logarithms of sizes than this would overflow; no box is e^8 times as large as a default box.
_LARGEST = 8.0


class Found(NamedTuple):
    """The objects found in one image, the surest first.

    Attributes:
        boxes: left, top, right, bottom as shares of the network's input, shape (k, 4).
        classes: index of each one's class, shape (k,); the background is 0 and never found.
        scores: probability of that class, shape (k,).
    """

    boxes: Array
    classes: Array
    scores: Array


def find(
    logits: Array,
    boxes: Array,
    default_boxes: Array,
    least: float = 0.01,
    overlap: float = 0.45,
    candidates: int = 400,
    most: int = 200,
) -> List[Found]:
    """The objects in each image.

    Args:
        logits: of the classes, (n, classes, k).
        boxes: encoded, (n, 4, k).
        default_boxes: centre x, centre y, width, height, (k, 4).
        least: probability of a class below which a box is left out.
        overlap: intersection over union above which the less sure of two boxes of one class goes.
        candidates: boxes of a class that are looked at, the surest.
        most: objects of an image, the surest.
    """
    corners = decode(boxes, default_boxes)
    return [_in_image(softmax(each), mine, least, overlap, candidates, most) for each, mine in zip(logits, corners)]


def _in_image(shares: Array, corners: Array, least: float, overlap: float, candidates: int, most: int) -> Found:
    places, classes = [], []
    for index in range(1, len(shares)):
        own = np.flatnonzero(shares[index] >= least)
        own = own[np.argsort(-shares[index, own], kind="stable")[:candidates]]
        own = own[keep(corners[own], overlap)]
        places.append(own)
        classes.append(np.full(len(own), index))
    place, label = np.concatenate(places), np.concatenate(classes)
    score = shares[label, place]
    best = np.argsort(-score, kind="stable")[:most]
    return Found(corners[place[best]], label[best], score[best])


def softmax(logits: Array) -> Array:
    """Probabilities of logits (classes, k), over the classes."""
    powers = np.exp(logits - logits.max(axis=0, keepdims=True))
    return powers / powers.sum(axis=0, keepdims=True)


def decode(boxes: Array, default_boxes: Array) -> Array:
    """Corners (n, k, 4) of encoded boxes (n, 4, k): left, top, right, bottom as shares of the input."""
    coded = np.moveaxis(boxes, 1, 2)
    centre = default_boxes[:, :2] + CENTRE * coded[..., :2] * default_boxes[:, 2:]
    size = default_boxes[:, 2:] * np.exp(np.minimum(SIZE * coded[..., 2:], _LARGEST))
    return np.concatenate([centre - size / 2, centre + size / 2], axis=-1)


def intersection_over_union(one: Array, other: Array) -> Array:
    """Of each of one's boxes (…, a, 4) with each of the other's (…, b, 4): (…, a, b); 0 where both are empty."""
    one, other = one[..., :, None, :], other[..., None, :, :]
    sides = np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2])
    common = np.maximum(sides, 0).prod(axis=-1)
    either = _area(one) + _area(other) - common
    return common / np.where(either > 0, either, 1)


def _area(boxes: Array) -> Array:
    return np.maximum(boxes[..., 2:] - boxes[..., :2], 0).prod(axis=-1)


def keep(corners: Array, overlap: float) -> Array:
    """Indices of the boxes (k, 4), the surest first, that no surer one overlaps by more than `overlap`."""
    close, alive = intersection_over_union(corners, corners) > overlap, np.ones(len(corners), dtype=bool)
    for index in range(len(corners)):
        if alive[index]:
            alive[index + 1 :] &= ~close[index, index + 1 :]
    return np.flatnonzero(alive)
