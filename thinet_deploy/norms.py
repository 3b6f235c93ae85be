"""BatchNorm statistics as the data has them, measured anew for a network whose weights were changed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .data.dataset import ImageSet
from .interfaces import Progress, silent
from .parallel import join
from .seeds import generator

_STATISTICS = ("running_mean", "running_var")
# Of a batch: the number of values per channel, and their mean and unbiased variance (2, c).
Moments = tuple[int, torch.Tensor]


def reestimate_norms(
    model: nn.Module,
    images: ImageSet,
    *,
    seed: int,
    stage: str,
    batch: int = 256,
    limit: int = 10_000,
    progress: Progress = silent,
) -> None:
    """Replace the running statistics of all BatchNorms by those of training images, without augmentation or dropout.

    Mean and (unbiased) variance are those of all images together, by the law of total variance. The batch size does not
    change them for the first BatchNorm. It does, slightly, behind it, because all are done in one pass, in which each
    normalises with the statistics of its batch, as in training; without this, each BatchNorm would need a pass of its
    own. Large batches make one pass good enough, and 1,000 to 10,000 images suffice (Wu and Johnson, 2021,
    arXiv:2105.07576, section 3). So batches are of nearly equal sizes, without a small last one, and shuffled, for a
    batch of one class would come out normalised like any other.

    Every process of several does the whole of it. The network ends in eval mode on the CPU; without BatchNorm nothing
    else changes.

    Args:
        model: changed in place.
        images: training images; at most `limit` of them are drawn.
        seed: of the draw and the order, together with `stage`.
        stage: what this is called.
        batch: images per batch, at most.
        limit: images that are used, at most.
        progress: to report to.
    """
    model.eval()
    norms = [each for each in model.modules() if isinstance(each, _BatchNorm) and each.running_mean is not None]
    order = generator(seed, stage, "norms").permutation(len(images))[:limit]
    parts, team = np.array_split(order, math.ceil(len(order) / batch)), join()
    with team.holding(model), torch.no_grad(), _collecting(model, norms) as moments:
        for index, part in enumerate(parts if norms else []):
            progress(stage, index, len(parts))
            model(torch.from_numpy(images.inputs(part)).to(team.device))
        for norm, batches in moments.items():
            if batches:
                for name, pooled_c in zip(_STATISTICS, _pooled(batches), strict=True):
                    norm.get_buffer(name).copy_(pooled_c)


@contextmanager
def _collecting(model: nn.Module, norms: Sequence[_BatchNorm]) -> Iterator[Mapping[_BatchNorm, list[Moments]]]:
    """Let some BatchNorms normalise by their batch, as in training, and note its moments; then as they were."""
    moments: dict[_BatchNorm, list[Moments]] = {norm: [] for norm in norms}

    def forget(norm: _BatchNorm, inputs: Any) -> None:
        norm.reset_running_stats()  # so that, with a momentum of 1, a batch leaves its own statistics and no others

    def collect(norm: _BatchNorm, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        mean_var_2c = torch.stack([norm.get_buffer(name) for name in _STATISTICS])
        moments[norm].append((inputs[0].numel() // inputs[0].shape[1], mean_var_2c.to("cpu", torch.float64)))

    with ExitStack() as after:
        after.callback(model.eval)
        for norm in norms:
            after.callback(setattr, norm, "momentum", norm.momentum)
            norm.momentum, norm.training = 1.0, True
            for hook in (norm.register_forward_pre_hook(forget), norm.register_forward_hook(collect)):
                after.callback(hook.remove)
        yield moments


def _pooled(moments: list[Moments]) -> torch.Tensor:
    """Mean and unbiased variance (2, c) of all values, from those of each batch."""
    counts_b1 = torch.tensor([[count] for count, _ in moments], dtype=torch.float64)
    means_bc, variances_bc = torch.stack([mean_var_2c for _, mean_var_2c in moments], 1)
    total = counts_b1.sum()
    mean_c = (counts_b1 * means_bc).sum(0) / total
    squares_c = ((counts_b1 - 1) * variances_bc + counts_b1 * (means_bc - mean_c) ** 2).sum(0)
    return torch.stack([mean_c, squares_c / (total - 1)])
