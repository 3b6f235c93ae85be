"""Small networks of three kinds with random weights, their channel graphs, and images for them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from thinet_deploy.data.dataset import ImageSet
from thinet_deploy.data.preprocess import Augment, Preprocess
from thinet_deploy.pruning.calibration import Sample
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.graph import ChannelGraph
from thinet_deploy.pruning.trace import example_inputs

SHAPE = (3, 8, 8)


class Residual(nn.Module):
    """A block with BatchNorm, another with a projection, in-place operations, a depthwise layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.a, self.na = nn.Conv2d(8, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.b, self.nb = nn.Conv2d(10, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.c, self.nc = nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12)
        self.depth = nn.Conv2d(12, 12, 3, stride=2, padding=1, groups=12)
        self.d, self.nd = nn.Conv2d(12, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.project = nn.Conv2d(8, 16, 1, stride=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = F.relu_(self.nb(self.b(F.relu(self.na(self.a(x))))).add_(x))
        z = self.nd(self.d(F.relu6(self.depth(F.relu(self.nc(self.c(y)))))))
        z += self.project(y)
        return self.head(F.relu(z).mean((2, 3)))  # type: ignore[no-any-return]


class Plain(nn.Module):
    """Convolutions with biases, a grouped and a strided one, a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, stride=2, groups=2)
        self.c, self.head = nn.Conv2d(12, 6, 3, bias=False), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        return self.head(F.relu(self.c(x)).flatten(1))  # type: ignore[no-any-return]


class Fire(nn.Module):
    """Two producers side by side, read together, as SqueezeNet has them."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.one, self.three = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 1), nn.Conv2d(6, 8, 3, padding=1)
        self.last = nn.Conv2d(16, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.squeeze(x))
        return self.last(torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)).mean((2, 3))  # type: ignore[no-any-return]


NETWORKS: dict[str, Callable[[], nn.Module]] = {"residual": Residual, "plain": Plain, "fire": Fire}


def network(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = NETWORKS[name]().eval()
    for each in model.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.running_mean.normal_(0, 0.2)  # type: ignore[union-attr]
            each.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            nn.init.uniform_(each.weight, -1.5, 1.5)
            nn.init.normal_(each.bias, 0, 0.3)
        if isinstance(each, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(each.weight)
    return model


def graph_of(model: nn.Module) -> ChannelGraph:
    return channel_graph(model, example_inputs(model, SHAPE))


def images(count: int) -> ImageSet:
    pixels = np.random.default_rng(3).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    preprocess = Preprocess(resize=(8, 8), crop=(8, 8), augment=Augment())
    return ImageSet(np.arange(count) % 5, lambda indices: pixels[indices], preprocess)


def sample(count: int = 48, batch: int = 16, seed: int = 0) -> Sample:
    return Sample(images(count), np.arange(count), batch, seed)
