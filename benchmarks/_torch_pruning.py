"""Torch-Pruning's pruners as functions, on networks whose shortcuts it can follow; for the benchmarks.

`pip install torch-pruning==1.6.1 --no-deps`. It runs with its defaults but for the criterion and what may go; its ratio
is searched so that the network just keeps within the budget. What may go:

- *inner*: the first convolution of every block of a ResNet;
- *all*: everything but the classes, which is its default; of a ResNet the residual streams too. There it takes the
  padding of the shortcuts for an elementwise operation, so channels behind it no longer meet their own: `fault`
  measures that;
- *all, 1×1*: the same with the shortcuts written as 1×1 convolutions of ones and zeros, which it follows rightly;
  afterwards they become selections of channels again, so they are not counted for anyone.

Each with the ratio in every layer (its default), or *global*: with one ranking over all layers.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from thinet_deploy.counting import count
from thinet_deploy.data.dataset import Dataset, ImageSet
from thinet_deploy.models.resnet_cifar import Block, Padding

Contender = Callable[[nn.Module, Dataset, int], nn.Module]

TAYLOR_IMAGES = 2000
HALVINGS = 10  # of the ratio: finer than one filter of the widest layer
CRITERIA = ("L1", "BN scale", "FPGM", "Taylor")


def torch_pruning(criterion: str, scope: str) -> Contender:
    """Torch-Pruning with a criterion and what may go."""

    def prune(model: nn.Module, data: Dataset, macs: int) -> nn.Module:
        model = with_convolutions(model) if "1×1" in scope else model
        gradients = _gradients(model, data.train) if criterion == "Taylor" else {}
        attempt = functools.partial(_attempt, model, criterion, scope, gradients)
        low, high = 0.0, 0.95
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            fits = count(attempt(middle), data.preprocess.input_shape).macs <= macs
            low, high = (low, middle) if fits else (middle, high)
        return attempt(high)

    return prune


def _attempt(
    model: nn.Module, criterion: str, scope: str, gradients: dict[str, torch.Tensor], ratio: float
) -> nn.Module:
    """A copy without `ratio` of the filters that may go."""
    tp, thin = importlib.import_module("torch_pruning"), copy.deepcopy(model)
    for name, parameter in thin.named_parameters():
        parameter.grad = gradients.get(name)
    importance, pruner = {
        "L1": (tp.importance.MagnitudeImportance(p=1), tp.pruner.MagnitudePruner),
        "BN scale": (tp.importance.BNScaleImportance(), tp.pruner.BNScalePruner),
        "FPGM": (tp.importance.FPGMImportance(), tp.pruner.MagnitudePruner),
        "Taylor": (tp.importance.TaylorImportance(), tp.pruner.MagnitudePruner),
    }[criterion]
    stays = [module for name, module in thin.named_modules() if _stays(name, scope)]
    example = torch.zeros(1, *cast("tuple[int, int, int]", model.input_shape))
    pruner(
        thin,
        example,
        importance=importance,
        pruning_ratio=ratio,
        global_pruning="global" in scope,
        ignored_layers=stays,
    ).step()
    thin.zero_grad()
    return with_selections(thin).eval()


def _stays(name: str, scope: str) -> bool:
    """Whether a layer is kept whole: the classes, and for *inner* what writes to a residual stream."""
    last = name in {"linear", "classifier.6"}
    return last or (scope.startswith("inner") and (name == "conv1" or name.endswith("conv2")))


def _gradients(model: nn.Module, images: ImageSet) -> dict[str, torch.Tensor]:
    """Of the mean loss over calibration images, in eval mode; name → gradient."""
    chosen = images.sample(TAYLOR_IMAGES, seed=0, stage="taylor")
    model = copy.deepcopy(model).eval()
    for rows in np.array_split(chosen, max(1, len(chosen) // 250)):
        scores, labels = model(torch.from_numpy(images.inputs(rows))), torch.from_numpy(images.labels[rows])
        loss = F.cross_entropy(scores, labels, reduction="sum") / len(chosen)
        loss.backward()  # type: ignore[no-untyped-call]
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


# --- shortcuts that Torch-Pruning follows ----------------------------------------------------------------------------


class Selection(nn.Module):
    """A shortcut whose every output channel is one of the input's, or zero.

    Args:
        source: input channel of each output channel, -1 for zeros; shape (channels,).
        stride: takes every `stride`-th pixel.
    """

    source: torch.Tensor

    def __init__(self, source: torch.Tensor, stride: int) -> None:
        super().__init__()
        self.register_buffer("source", source)
        self.stride = stride

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        """Shape (n, before, h, w) → (n, channels, h / stride, w / stride)."""
        sparse = x_nchw[:, :, :: self.stride, :: self.stride]
        return sparse[:, self.source.clamp(min=0)] * (self.source >= 0)[:, None, None]


def with_convolutions(model: nn.Module) -> nn.Module:
    """The same function, with 1×1 convolutions where shortcuts pad."""
    model = copy.deepcopy(model)
    for block in _blocks(model):
        if isinstance(block.shortcut, Padding):
            before, sides = block.conv1.in_channels, [block.shortcut.more // 2] * 2
            convolution = nn.Conv2d(before, before + sum(sides), 1, block.shortcut.stride, bias=False)
            identity = torch.eye(before)[:, :, None, None]
            convolution.weight = nn.Parameter(F.pad(identity, (0, 0, 0, 0, 0, 0, *sides)))
            block.shortcut = convolution
    return model.eval()


def with_selections(model: nn.Module) -> nn.Module:
    """The same function, with selections where `with_convolutions` has put convolutions; in place."""
    for block in _blocks(model):
        if isinstance(block.shortcut, nn.Conv2d):
            weight = block.shortcut.weight.detach()[:, :, 0, 0]
            block.shortcut = Selection(torch.where(weight.any(1), weight.argmax(1), -1), block.shortcut.stride[0])
    return model


def _blocks(model: nn.Module) -> list[Block]:
    return [each for each in model.modules() if isinstance(each, Block)]


def fault(model: nn.Module) -> float:
    """How far Torch-Pruning's network is from the original with the same channels cut, relative to the largest output.

    Channels 0, 3, 5 and 11 of the first stream go, and what it takes along. The original is cut at every consumer, once
    with the channels of the later streams that it has removed and once with those that the shortcuts lead to; the
    smaller difference counts. Rounding errors are below 1e-5.
    """
    tp, thin, gone = importlib.import_module("torch_pruning"), copy.deepcopy(model), torch.tensor([0, 3, 5, 11])
    example = torch.zeros(1, *cast("tuple[int, int, int]", model.input_shape))
    graph = tp.DependencyGraph().build_dependency(thin, example_inputs=example)
    graph.get_pruning_group(thin.conv1, tp.prune_conv_out_channels, idxs=gone.tolist()).prune()
    images = torch.randn(8, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    along = thin.linear.in_features < model.linear.in_features  # type: ignore[operator,union-attr]
    cuts = [(gone, gone), (gone + 8, gone + 24)] if along else [(gone[:0], gone[:0])]
    with torch.inference_mode():
        expected, found = [_cut(model, gone, *later)(images) for later in cuts], thin(images)
    return min(float((found - each).abs().max() / each.abs().max()) for each in expected)


def _cut(model: nn.Module, first: torch.Tensor, second: torch.Tensor, third: torch.Tensor) -> nn.Module:
    """A copy whose consumers do not see these channels of the three residual streams."""
    model = copy.deepcopy(model)
    readers: list[tuple[nn.Module, torch.Tensor]] = [(cast("nn.Module", model.linear), third)]
    for number, gone in enumerate((first, second, third), 1):
        blocks = list(cast("nn.Sequential", getattr(model, f"layer{number}")))
        after = list(cast("nn.Sequential", getattr(model, f"layer{number + 1}", [])))[:1]
        for index, block in enumerate(cast("list[Block]", blocks + after)):
            if index or number == 1:  # the first block of a later stage reads the stream before
                readers.append((block.conv1, gone))
        readers += [(each.shortcut, gone) for each in after if isinstance(each.shortcut, nn.Conv2d)]
    with torch.no_grad():
        for reader, gone in readers:
            cast("torch.Tensor", reader.weight)[:, gone] = 0
    return model.eval()
