"""A network with an odd one of everything that types in the ONNX graph have to get right."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from thinet_deploy.export import export_onnx
from thinet_deploy.precision.calibration import Values, limits

Floats = NDArray[np.float32]
SHAPE = (3, 17, 17)


class Mixed(nn.Module):
    """Odd widths, shortcut, concatenation, depthwise, ceil-mode pool, ReLU6, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 13, 3, padding=1, bias=False), nn.BatchNorm2d(13)
        self.conv = nn.Conv2d(13, 13, 3, padding=1)
        self.left, self.right = nn.Conv2d(13, 5, 1), nn.Conv2d(13, 6, 3, padding=1)
        self.depth = nn.Conv2d(11, 11, 3, padding=1, groups=11)
        self.hidden, self.linear = nn.Linear(11, 9), nn.Linear(9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(x + self.conv(x))
        x = F.max_pool2d(torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1), 3, 2, ceil_mode=True)
        x = F.relu6(self.depth(x)).mean((2, 3))
        scores: torch.Tensor = self.linear(torch.relu(self.hidden(x)))
        return scores


def export_mixed(file: Path) -> Path:
    """Write such a network, with a BatchNorm that does something."""
    torch.manual_seed(0)
    net = Mixed()
    nn.init.normal_(net.bn.bias)
    assert net.bn.running_var is not None
    nn.init.uniform_(net.bn.running_var, 0.5, 2)
    export_onnx(net, SHAPE, file, opset=18, ir_version=8)
    return file


def some_images() -> Floats:
    """Inputs to calibrate with and to compare on."""
    return np.random.default_rng(0).standard_normal((96, *SHAPE)).astype(np.float32)


def bounds(values: dict[str, Values]) -> dict[str, tuple[float, float]]:
    """The limits of all tensors, without cutting anything off."""
    return {name: limits(each, "min-max") for name, each in values.items()}


def distance(exact: Floats, got: Floats) -> float:
    """Largest difference, relative to the largest value."""
    return float(np.abs(exact - got).max() / np.abs(exact).max())
