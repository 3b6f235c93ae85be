"""Which default box learns which object: SSD's matching and encoding (Liu et al., ECCV 2016, section 2.2)."""

from __future__ import annotations

import torch

from ..on_device.detections import CENTRE, SIZE

# From this intersection over union on a default box learns an object.
_OVERLAP = 0.5


def matched(boxes_nm4: torch.Tensor, there_nm: torch.Tensor, default_k4: torch.Tensor) -> torch.Tensor:
    """The object that each default box learns, shape (n, k); -1 for the background.

    A default box learns the object that it overlaps most, if that is by half or more; besides, every object is learnt
    by the default box that overlaps it most.

    Args:
        boxes_nm4: corners of each image's objects: left, top, right, bottom.
        there_nm: which of them are objects; the others fill up the rows.
        default_k4: centre x, centre y, width, height of the default boxes.
    """
    corners_k4 = torch.cat([default_k4[:, :2] - default_k4[:, 2:] / 2, default_k4[:, :2] + default_k4[:, 2:] / 2], 1)
    overlap_nkm = intersection_over_union(corners_k4.expand(len(boxes_nm4), -1, -1), boxes_nm4)
    overlap_nkm = overlap_nkm.masked_fill(~there_nm[:, None], -1)
    most_nk, object_nk = overlap_nkm.max(2)
    object_nk = object_nk.masked_fill(most_nk < _OVERLAP, -1)
    best_nm = overlap_nkm.argmax(1)
    rows = torch.arange(len(boxes_nm4), device=boxes_nm4.device)
    for index in range(boxes_nm4.shape[1]):  # one after the other: two objects may have the same best default box
        own = there_nm[:, index]
        object_nk[rows[own], best_nm[own, index]] = index
    return object_nk


def encoded(corners_nk4: torch.Tensor, default_k4: torch.Tensor) -> torch.Tensor:
    """Boxes (n, 4, k) as the network has to give them, for corners whose sides are longer than 0.

    The inverse of `detections.decode`.
    """
    centre, size = (corners_nk4[..., :2] + corners_nk4[..., 2:]) / 2, corners_nk4[..., 2:] - corners_nk4[..., :2]
    moved = (centre - default_k4[:, :2]) / default_k4[:, 2:] / CENTRE
    return torch.cat([moved, (size / default_k4[:, 2:]).log() / SIZE], 2).mT


def intersection_over_union(one_na4: torch.Tensor, other_nb4: torch.Tensor) -> torch.Tensor:
    """Of each of one's boxes with each of the other's, as corners: (n, a, b); 0 where both are empty."""
    one, other = one_na4[:, :, None], other_nb4[:, None]
    sides = (torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])).clamp_min(0)
    common = sides.prod(3)
    either = _area(one) + _area(other) - common
    return common / either.where(either > 0, 1.0)


def _area(boxes: torch.Tensor) -> torch.Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp_min(0).prod(-1)
