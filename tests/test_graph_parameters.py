"""Parameters that layers share, or that are used directly, and layers of other kinds: found and cut exactly."""

from __future__ import annotations

import pytest
import torch
from channel_cases import ENDS, THREE, Case, net
from nets import Net, conv
from torch import nn
from torch.nn import functional as F


def tied() -> nn.Module:
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.last(m.b(F.relu(m.a(m.first(x))))),
        first=conv(3, 6),
        a=conv(6, 6),
        b=conv(6, 6),
        last=conv(6, 2),
    )
    model.get_submodule("b").weight = model.get_submodule("a").get_parameter("weight")
    return model


class ConvNeXt(nn.Module):
    """A block that is channels-last inside, with LayerScale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = conv(3, 6), conv(6, 6, groups=6)
        self.wide, self.narrow = nn.Linear(6, 12), nn.Linear(12, 6)
        self.gamma, self.head = nn.Parameter(torch.full((6,), 0.1)), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        out = self.depth(x).permute(0, 2, 3, 1)
        out = (self.gamma * self.narrow(F.gelu(self.wide(out)))).permute(0, 3, 1, 2)
        return self.head((x + out).mean((2, 3)))  # type: ignore[no-any-return]


CASES: dict[str, Case] = {
    "tied weights": Case(tied, "first+a"),
    "weight used in both directions": net(
        "first+b b",
        lambda m, x: m.last(F.conv_transpose2d(m.b(F.relu(m.first(x))), m.b.weight)),
        **ENDS,
        b=lambda: conv(6, 4),
    ),
    "shared BatchNorm": net(
        "first+a", lambda m, x: m.last(m.n(m.a(m.n(m.first(x))))), **THREE, n=lambda: nn.BatchNorm2d(6)
    ),
    "parameters used directly": net(
        "first",
        lambda m, x: m.last(m.first(x) * m.gamma.view(1, -1, 1, 1) + m.beta),
        **ENDS,
        gamma=lambda: nn.Parameter(torch.rand(6)),
        beta=lambda: nn.Parameter(torch.rand(1, 6, 1, 1)),
    ),
    "buffers used directly": net(
        "first",
        lambda m, x: m.last((m.first(x) - m.mean[:, None, None]) / m.std[None, :, None, None]),
        **ENDS,
        mean=lambda: torch.rand(6),
        std=lambda: torch.rand(6) + 0.5,
    ),
    "limit per channel": net(
        "first",
        lambda m, x: m.last(torch.clamp(m.first(x), max=m.p)),
        **ENDS,
        p=lambda: nn.Parameter(torch.rand(1, 6, 1, 1)),
    ),
    "functional convolution": net(
        "weight",
        lambda m, x: m.last(F.relu(F.conv2d(x, m.weight, m.bias, padding=1))),
        weight=lambda: nn.Parameter(torch.randn(6, 3, 3, 3)),
        bias=lambda: nn.Parameter(torch.randn(6)),
        last=lambda: conv(6, 2),
    ),
    "functional BatchNorm": net(
        "first",
        lambda m, x: m.last(F.batch_norm(m.first(x), m.mean, m.var, m.gamma)),
        **ENDS,
        mean=lambda: torch.rand(6),
        var=lambda: torch.rand(6) + 0.5,
        gamma=lambda: nn.Parameter(torch.rand(6)),
    ),
    "in place": net(
        "first+a", lambda m, x: (y := m.first(x), y.mul_(0.5).relu_(), y.add_(m.a(y)), m.last(y))[3], **THREE
    ),
    "in-place addition": net(
        "first+a", lambda m, x: m.last(m.first(x).add_(m.a(x)).clamp_(min=0)), **{**THREE, "a": lambda: conv(3, 6)}
    ),
    "channels last": net(
        "first fc",
        lambda m, x: m.last(F.gelu(m.fc(m.first(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)),
        **ENDS,
        fc=lambda: nn.Linear(6, 6),
    ),
    "ConvNeXt without LayerNorm": Case(ConvNeXt, "stem+narrow wide", "head"),
    "memory format": net(
        "first", lambda m, x: m.last(m.first(x.contiguous(memory_format=torch.channels_last)).contiguous()), **ENDS
    ),
    "PReLU": net("first", lambda m, x: m.last(m.p(m.first(x))), **ENDS, p=lambda: nn.PReLU(6)),
    "PReLU with one slope": net("first", lambda m, x: m.last(m.p(m.first(x))), **ENDS, p=nn.PReLU),
    "InstanceNorm": net(
        "first", lambda m, x: m.last(m.n(m.first(x))), **ENDS, n=lambda: nn.InstanceNorm2d(6, affine=True)
    ),
    "LayerScale": net(
        "first+a",
        lambda m, x: m.last((y := m.first(x)) + m.a(y) * m.g),
        **THREE,
        g=lambda: nn.Parameter(torch.rand(6, 1, 1)),
    ),
    "1-D and 3-D": net(
        "a b",
        lambda m, x: m.last(m.b(m.a(x).flatten(2))),
        a=lambda: nn.Conv3d(1, 6, 3),
        b=lambda: nn.Conv1d(6, 4, 3),
        last=lambda: nn.Conv1d(4, 2, 1),
        shapes=((1, 4, 5, 5),),
    ),
    "reflecting padding": net("first", lambda m, x: m.last(F.pad(m.first(x), (1, 1, 1, 1), mode="reflect")), **ENDS),
}


@pytest.mark.parametrize("name", CASES)
def test_all_that_can_go_is_found_and_what_is_left_is_the_same_network(name: str) -> None:
    CASES[name].check()
