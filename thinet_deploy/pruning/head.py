"""A new last layer in closed form, so that a network whose head was replaced works before it is trained."""

from __future__ import annotations

import torch
from torch import nn

from ..interfaces import Progress, silent
from .calibration import Sample, total

RIDGE = 1e-3


def fit_head(
    model: nn.Module, head: nn.Linear, teacher: nn.Module, sample: Sample, progress: Progress = silent
) -> None:
    """Least squares from what the new last layer reads to what the original says.

    Args:
        model: with the head; in eval mode, as it stays.
        head: its last layer, whose weight and bias are set.
        teacher: the original, with as many outputs; in eval mode.
        sample: calibration images; labels are not used.
        progress: to report to.
    """
    seen: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double()))
    size = head.in_features + 1  # with a column of ones, for the bias
    squares, cross = torch.zeros(size, size).double(), torch.zeros(size, head.out_features).double()
    try:
        with torch.inference_mode():
            for images, part in sample.batches():
                progress("Fitting the new head", images.start, len(sample.chosen))
                inputs = sample.inputs(part)
                model(inputs)
                read = torch.cat([seen.pop(), torch.ones(len(inputs), 1).double()], 1)
                squares.addmm_(read.T, read)
                cross.addmm_(read.T, teacher(inputs).double())
    finally:
        hook.remove()
    total(squares), total(cross)
    squares.diagonal()[:-1] += RIDGE * squares.diagonal()[:-1].mean()
    solved = torch.linalg.lstsq(squares, cross, driver="gelsd").solution  # dead inputs do not make it fail
    with torch.no_grad():
        head.weight.copy_(solved[:-1].T)
        assert head.bias is not None
        head.bias.copy_(solved[-1])
    progress("Fitting the new head", len(sample.chosen), len(sample.chosen))
