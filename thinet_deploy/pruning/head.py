"""A new last layer in closed form, so that a network whose head was replaced works before it is trained."""

from __future__ import annotations

import torch
from torch import nn

from ..interfaces import Progress, silent
from ..tasks.base import said
from .calibration import Sample, together
from .moments import centred
from .reconstruction import Solver
from .sums import Sums

RIDGE = 1e-3


def fit_head(
    model: nn.Module, head: nn.Linear, teacher: nn.Module, sample: Sample, progress: Progress = silent
) -> bool:
    """Least squares from what the new last layer reads to what the original says.

    Args:
        model: with the head; in eval mode, as it stays.
        head: its last layer, whose weight and bias are set.
        teacher: the original, with as many outputs; in eval mode.
        sample: calibration images; labels are not used.
        progress: to report to.

    Returns:
        Whether it was fitted. One that runs along positions, whose outputs are put together afterwards, is left alone.
    """
    sums = Sums(1, head.in_features, head.out_features)
    seen: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        with torch.inference_mode():
            for images, part in sample.batches():
                progress("Fitting the new head", images.start, len(sample.chosen))
                inputs = sample.inputs(part)
                model(inputs)
                if seen[0].dim() != 2:
                    return False
                sums.add(seen.pop()[:, None], said(teacher, inputs)[0])
    finally:
        hook.remove()
    stats = centred(together({"head": sums.moments()})["head"])
    solver = Solver(stats.covariance, torch.ones(1, head.in_features, dtype=torch.bool), RIDGE)
    weight = solver(stats.cross, torch.zeros_like(stats.cross))  # of fresh weights nothing is worth keeping
    with torch.no_grad():
        head.weight.copy_(weight[0])
        assert head.bias is not None
        head.bias.copy_(stats.target[0] - weight[0] @ stats.mean[0])
    progress("Fitting the new head", len(sample.chosen), len(sample.chosen), f"{len(sample.chosen)} images")
    return True
