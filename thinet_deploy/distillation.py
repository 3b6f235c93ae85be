"""What a network learns from: the labels, and the outputs of a teacher such as the dense network."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def losses(
    outputs_nk: torch.Tensor,
    labels_n: torch.Tensor,
    taught_nk: torch.Tensor | None = None,
    *,
    share: float = 0.9,
    temperature: float = 4.0,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Loss of each image, shape (n,): cross-entropy with its label, mixed with the divergence from the teacher.

    The divergence is multiplied by T², so that its gradient does not shrink with the temperature T (Hinton et al.,
    2015, arXiv:1503.02531, section 2). It is zero where both agree; the cross-entropy of the paper has the same
    gradient, but ends at the teacher's entropy.

    Args:
        outputs_nk: the network's outputs before softmax.
        labels_n: class indices; -1 for an image without a label, whose loss is the teacher's alone.
        taught_nk: the teacher's outputs; None without one.
        share: the teacher's part of the loss of an image with a label, from 0 to 1.
        temperature: by which both sides' outputs are divided.
        smoothing: share of each label that is spread evenly over all classes.
    """
    hard_n = F.cross_entropy(outputs_nk, labels_n, ignore_index=-1, reduction="none", label_smoothing=smoothing)
    if taught_nk is None:
        return hard_n
    softened_nk, target_nk = (F.log_softmax(part / temperature, 1) for part in (outputs_nk, taught_nk))
    soft_n = temperature**2 * F.kl_div(softened_nk, target_nk, reduction="none", log_target=True).sum(1)
    share_n = torch.where(labels_n < 0, 1.0, share)
    return share_n * soft_n + (1 - share_n) * hard_n
