"""Four small networks with what conversions get wrong: see tests/test_engines.py and engines.py."""

import torch
from torch import nn

from thinet_deploy.models.vgg import VGG

INPUT_SHAPE, CLASSES = (3, 32, 32), 10


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class OddBlock(nn.Module):
    """A bottleneck as pruning leaves it: the inner widths are whatever was kept."""

    def __init__(self, inputs: int, inner: tuple[int, int], outputs: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            *(_conv(inputs, inner[0], 1), nn.ReLU(), _conv(inner[0], inner[1], 3, stride), nn.ReLU()),
            _conv(inner[1], outputs, 1),
        )
        self.shortcut = _conv(inputs, outputs, 1, stride) if (stride, inputs) != (1, outputs) else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.inner(x) + self.shortcut(x))


class ShuffleBlock(nn.Module):
    """Grouped convolutions with a channel shuffle between them, depthwise in the middle."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.first, self.depthwise = _conv(width, width, 1, groups=groups), _conv(width, width, 3, groups=width)
        self.second = _conv(width, width, 1, groups=groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first(x))
        batch, channels, height, width = y.shape
        y = y.view(batch, self.groups, channels // self.groups, height, width).transpose(1, 2)
        y = self.depthwise(y.reshape(batch, channels, height, width))
        return torch.relu(x + self.second(y))


class Fire(nn.Module):
    """SqueezeNet's module: one squeeze, two expansions side by side."""

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.left, self.right = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.squeeze(x))
        return torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)


def _head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]


class RunningSum(nn.Module):
    """An operation that the mobile delegates do not have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cumsum(x, 3)


def undelegated() -> nn.Module:
    """A network with one operation that is left to slow kernels on phones."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), RunningSum(), *_head(8)).eval()


def _squeezenet() -> nn.Module:
    """Both pools look beyond the border: 16 → 8 → 4."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(16, 5, 12)),
        *(nn.MaxPool2d(3, 2, ceil_mode=True), Fire(24, 6, 16), nn.Conv2d(32, CLASSES, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def networks() -> dict[str, nn.Module]:
    """The networks by name, each with fixed random weights and BatchNorms that do something."""
    torch.manual_seed(0)
    made = {
        "vgg-gap": nn.Sequential(
            VGG(((8, 13), (21, 16)), (), input_shape=INPUT_SHAPE, num_classes=CLASSES, norm=True).features, *_head(16)
        ),
        "resnet-odd": nn.Sequential(
            *(_conv(3, 16), nn.ReLU(), OddBlock(16, (7, 11), 24, 1), OddBlock(24, (5, 9), 24, 2)), *_head(24)
        ),
        "shuffle": nn.Sequential(_conv(3, 24), nn.ReLU(), ShuffleBlock(24, 4), ShuffleBlock(24, 3), *_head(24)),
        "squeezenet": _squeezenet(),
    }
    for module in (module for network in made.values() for module in network.modules()):
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return {name: network.eval() for name, network in made.items()}
