"""Structures that are covered exactly: what can go is found, and what is left is the same network (design.md, D1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.graph import ChannelGraph
from thinet_deploy.pruning.proof import prove
from thinet_deploy.pruning.retrace import settled_plan

Forward = Callable[..., Any]
SHAPE = (3, 8, 8)


class Net(nn.Module):
    """A network from its forward function and its parts."""

    def __init__(self, forward: Forward, **parts: Any) -> None:
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self._forward(self, *inputs)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **{"padding": kernel // 2, **options})


@dataclass(frozen=True)
class Case:
    """A network and what can go in it.

    Attributes:
        build: the network.
        groups: what goes together, as "a+b c": a with b, and c.
        whole: producers that stay, as "d e".
        shapes: of the inputs.
    """

    build: Callable[[], nn.Module]
    groups: str
    whole: str = "last"
    shapes: tuple[tuple[int, ...], ...] = (SHAPE,)


def net(groups: str, forward: Forward, *, whole: str = "last", shapes: Any = (SHAPE,), **parts: Any) -> Case:
    """A network whose parts are made anew, so that cases share nothing."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Net(forward, **{name: make() for name, make in parts.items()})

    return Case(build, groups, whole, shapes)


def shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


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


def dense(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = m.first(x)
    x = torch.cat([x, m.a(F.relu(m.na(x)))], 1)
    x = torch.cat([x, m.b(F.relu(m.nb(x)))], 1)
    return m.last(F.relu(m.nc(x)))  # type: ignore[no-any-return]


def unet(m: Any, x: torch.Tensor) -> torch.Tensor:
    one = F.relu(m.down1(x))
    two = F.relu(m.down2(F.max_pool2d(one, 2)))
    three = F.relu(m.down3(F.max_pool2d(two, 2)))
    up = F.relu(m.up2(torch.cat([F.interpolate(three, scale_factor=2, mode="bilinear"), two], 1)))
    return m.last(torch.cat([F.interpolate(up, scale_factor=2.0), one], 1))  # type: ignore[no-any-return]


def shortcut_of_zeros(m: Any, x: torch.Tensor) -> torch.Tensor:
    """ResNet's option A."""
    x = F.relu(m.first(x))
    wide = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
    return m.last(F.relu(m.b(F.relu(m.a(x))) + wide))  # type: ignore[no-any-return]


def inverted(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = m.first(x)
    x = x + m.project(F.relu6(m.nd(m.depth(F.hardswish(m.ne(m.expand(x)))))))
    return m.head(x.mean((2, 3)))  # type: ignore[no-any-return]


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


def sequential() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(inplace=True), conv(6, 8, stride=2, bias=False), nn.BatchNorm2d(8)),
        *(nn.SiLU(), nn.MaxPool2d(2), conv(8, 6, dilation=2, padding=2), nn.Dropout(), nn.Flatten(), nn.Linear(24, 5)),
    )


ENDS: dict[str, Any] = {"first": lambda: conv(3, 6), "last": lambda: conv(6, 2)}
THREE: dict[str, Any] = {**ENDS, "a": lambda: conv(6, 6)}

CASES: dict[str, Case] = {
    "sequential": Case(sequential, "0 3 7", "10"),
    "linear layers": net(
        "a b fc",
        lambda m, x: m.last(F.relu(m.fc(F.adaptive_avg_pool2d(m.b(F.relu(m.a(x))), 1).flatten(1)))),
        a=lambda: conv(3, 6),
        b=lambda: conv(6, 8),
        fc=lambda: nn.Linear(8, 7),
        last=lambda: nn.Linear(7, 3),
    ),
    "flatten": net("a", lambda m, x: m.last(m.a(x).flatten(1)), a=lambda: conv(3, 6), last=lambda: nn.Linear(384, 3)),
    "view": net(
        "a", lambda m, x: m.last(m.a(x).view(x.size(0), -1)), a=lambda: conv(3, 6), last=lambda: nn.Linear(384, 3)
    ),
    "BatchNorm after flatten": net(
        "a",
        lambda m, x: m.last(m.n(F.max_pool2d(m.a(x), 4).flatten(1))),
        a=lambda: conv(3, 6),
        n=lambda: nn.BatchNorm1d(24),
        last=lambda: nn.Linear(24, 3),
    ),
    "residual identity": net(
        "first+b a", lambda m, x: m.last((y := m.first(x)) + m.b(F.relu(m.a(y)))), **THREE, b=lambda: conv(6, 6)
    ),
    "residual projection": net(
        "first a b+p",
        lambda m, x: m.last(F.relu(m.nb(m.b(F.relu(m.a(y := m.first(x))))) + m.p(y))),
        first=lambda: conv(3, 6),
        a=lambda: conv(6, 6),
        b=lambda: conv(6, 8, stride=2),
        nb=lambda: nn.BatchNorm2d(8),
        p=lambda: conv(6, 8, 1, stride=2),
        last=lambda: conv(8, 2),
    ),
    "residual with zeros": net(
        "first+b a",
        shortcut_of_zeros,
        **{**THREE, "b": lambda: conv(6, 10, stride=2), "last": lambda: conv(10, 2)},
        whole="b last",  # four of b's ten filters meet zeros and stay
    ),
    "concatenation": net(
        "a b c",
        lambda m, x: m.last(torch.cat([m.a(x), m.b(y := m.c(x)), y], 1)),
        a=lambda: conv(3, 4),
        c=lambda: conv(3, 5),
        b=lambda: conv(5, 6),
        last=lambda: conv(15, 2),
    ),
    "dense block": net(
        "first a b",
        dense,
        first=lambda: conv(3, 6),
        na=lambda: nn.BatchNorm2d(6),
        a=lambda: conv(6, 4),
        nb=lambda: nn.BatchNorm2d(10),
        b=lambda: conv(10, 4),
        nc=lambda: nn.BatchNorm2d(14),
        last=lambda: conv(14, 2),
    ),
    "concatenation with zeros of a linear layer": net(
        "a b",
        lambda m, x: m.last(torch.cat([m.a(x), m.b(x)], 1).flatten(1)),
        a=lambda: conv(3, 2),
        b=lambda: conv(3, 4),
        last=lambda: nn.Linear(384, 3),
    ),
    "chunk": net(
        "a b c",
        lambda m, x: (p := m.a(x).chunk(2, 1), m.last(torch.cat([m.b(p[0]), m.c(p[1])], 1)))[1],
        a=lambda: conv(3, 8),
        b=lambda: conv(4, 4),
        c=lambda: conv(4, 4),
        last=lambda: conv(8, 2),
    ),
    "gated halves": net(
        "a",
        lambda m, x: (p := m.a(x).chunk(2, 1), m.last(p[0] * torch.sigmoid(p[1])))[1],
        a=lambda: conv(3, 8),
        last=lambda: conv(4, 2),
    ),
    "GLU": net(
        "a",
        lambda m, x: (y := m.a(x), m.last(y[:, : y.shape[1] // 2] * y[:, y.shape[1] // 2 :].tanh()))[1],
        a=lambda: conv(3, 8),
        last=lambda: conv(4, 2),
    ),
    "split of shares": net(
        "a b",
        lambda m, x: (y := m.a(x), p := y.split(y.shape[1] // 3, 1), m.last(torch.cat([p[0], m.b(p[1]), p[2]], 1)))[2],
        a=lambda: conv(3, 9),
        b=lambda: conv(3, 4),
        last=lambda: conv(10, 2),
    ),
    "slice of a share": net(
        "a b",
        lambda m, x: (y := m.a(x), c := y.size(1) // 4, m.last(torch.cat([m.b(y[:, :c]), y[:, c:]], 1)))[2],
        a=lambda: conv(3, 12),
        b=lambda: conv(3, 4),
        last=lambda: conv(13, 2),
    ),
    "squeeze and excite": net(
        "first+e s",
        lambda m, x: m.last((y := F.relu(m.first(x))) * torch.sigmoid(m.e(F.relu(m.s(y.mean((2, 3), keepdim=True)))))),
        **{**ENDS, "s": lambda: conv(6, 4, 1), "e": lambda: conv(4, 6, 1)},
    ),
    "squeeze and excite with linear layers": net(
        "first+e s",
        lambda m, x: m.last(
            (y := m.first(x)) * m.e(F.relu(m.s(F.adaptive_avg_pool2d(y, 1).flatten(1))))[:, :, None, None].sigmoid()
        ),
        **{**ENDS, "s": lambda: nn.Linear(6, 4), "e": lambda: nn.Linear(4, 6)},
    ),
    "depthwise": net(
        "first+project expand",
        inverted,
        first=lambda: conv(3, 6),
        expand=lambda: conv(6, 12, 1),
        ne=lambda: nn.BatchNorm2d(12),
        depth=lambda: conv(12, 12, groups=12),
        nd=lambda: nn.BatchNorm2d(12),
        project=lambda: conv(12, 6, 1),
        head=lambda: nn.Linear(6, 3),
        whole="head",
    ),
    "depthwise with multiplier": net(
        "first",
        lambda m, x: m.last(m.n(m.d(m.first(x)))),
        **{**ENDS, "d": lambda: conv(6, 12, groups=6), "n": lambda: nn.BatchNorm2d(12), "last": lambda: conv(12, 2)},
    ),
    "depthwise, transposed": net(
        "first", lambda m, x: m.last(m.d(m.first(x))), **ENDS, d=lambda: nn.ConvTranspose2d(6, 6, 2, 2, groups=6)
    ),
    "grouped": net(
        "first b",
        lambda m, x: m.last(F.relu(m.b(F.relu(m.first(x))))),
        first=lambda: conv(3, 8),
        b=lambda: conv(8, 12, groups=4),
        last=lambda: conv(12, 2),
    ),
    "grouped one after another": net(
        "first a b",
        lambda m, x: m.last(m.b(m.a(m.first(x)))),
        first=lambda: conv(3, 12),
        a=lambda: conv(12, 12, groups=2),
        b=lambda: conv(12, 12, groups=3),
        last=lambda: conv(12, 2),
    ),
    "grouped with a shortcut": net(
        "first+b",
        lambda m, x: m.last((y := m.first(x)) + m.b(y)),
        first=lambda: conv(3, 8),
        b=lambda: conv(8, 8, groups=4),
        last=lambda: conv(8, 2),
    ),
    "shuffle": net(
        "first a b",
        lambda m, x: m.last(F.relu(m.b(shuffle(F.relu(m.a(m.first(x))), 3)))),
        first=lambda: conv(3, 6),
        a=lambda: conv(6, 18, 1, groups=3),
        b=lambda: conv(18, 12, 1, groups=3),
        last=lambda: conv(12, 2),
    ),
    "ShuffleNet v1": net(
        "first+b a",
        lambda m, x: m.last(F.relu((y := m.first(x)) + m.b(m.d(shuffle(F.relu(m.a(y)), 2))))),
        first=lambda: conv(3, 12),
        a=lambda: conv(12, 16, 1, groups=2),
        d=lambda: conv(16, 16, groups=16),
        b=lambda: conv(16, 12, 1, groups=2),
        last=lambda: conv(12, 2),
    ),
    "ShuffleNet v2": net(
        "first+b",
        lambda m, x: (p := m.first(x).chunk(2, 1), m.last(shuffle(torch.cat([p[0], F.relu(m.b(p[1]))], 1), 2)))[1],
        first=lambda: conv(3, 8),
        b=lambda: conv(4, 4),
        last=lambda: conv(8, 2),
    ),
    "nn.ChannelShuffle": net(
        "first a b",
        lambda m, x: m.last(m.b(m.s(m.a(m.first(x))))),
        first=lambda: conv(3, 8),
        a=lambda: conv(8, 32, 1, groups=4),
        s=lambda: nn.ChannelShuffle(4),
        b=lambda: conv(32, 8, 1, groups=4),
        last=lambda: conv(8, 2),
    ),
    "pixel shuffle": net(
        "first a",
        lambda m, x: m.last(F.pixel_shuffle(m.a(m.first(x)), 2)),
        first=lambda: conv(3, 6),
        a=lambda: conv(6, 16),
        last=lambda: conv(4, 2),
    ),
    "pixel unshuffle": net(
        "first",
        lambda m, x: m.last(F.pixel_unshuffle(m.first(x), 2)),
        first=lambda: conv(3, 6),
        last=lambda: conv(24, 2),
    ),
    "space to depth by slices": net(
        "first",
        lambda m, x: (y := m.first(x), m.last(torch.cat([y[..., ::2, ::2], y[..., 1::2, ::2], y[..., ::2, 1::2]], 1)))[
            1
        ],
        first=lambda: conv(3, 6),
        last=lambda: conv(18, 2),
    ),
    "transposed": net(
        "first up",
        lambda m, x: m.last(F.relu(m.n(m.up(F.relu(m.first(x)))))),
        first=lambda: conv(3, 6),
        up=lambda: nn.ConvTranspose2d(6, 8, 3, 2, 1, 1),
        n=lambda: nn.BatchNorm2d(8),
        last=lambda: conv(8, 2),
    ),
    "U-Net": net(
        "down1 down2 down3 up2",
        unet,
        down1=lambda: conv(3, 4),
        down2=lambda: conv(4, 6),
        down3=lambda: conv(6, 8),
        up2=lambda: conv(14, 6),
        last=lambda: conv(10, 2),
    ),
    "several branches": net(
        "a b c d",
        lambda m, x: m.last(torch.cat([m.a(x), m.c(F.relu(m.b(x))), m.d(F.max_pool2d(x, 3, 1, 1))], 1)),
        a=lambda: conv(3, 4, 1),
        b=lambda: conv(3, 4),
        c=lambda: conv(4, 6),
        d=lambda: conv(3, 2, 1),
        last=lambda: conv(12, 2),
    ),
    "several inputs and outputs": net(
        "a b c",
        lambda m, x, y: {"one": m.last(z := F.relu(m.a(x) * 2 + 1)), "two": [m.other(torch.cat([z, m.c(m.b(y))], 1))]},
        a=lambda: conv(3, 6),
        b=lambda: conv(1, 4),
        c=lambda: conv(4, 4),
        last=lambda: conv(6, 2),
        other=lambda: conv(10, 3),
        whole="last other",
        shapes=(SHAPE, (1, 8, 8)),
    ),
    "tied weights": Case(tied, "first+a"),
    "weight used in both directions": net(
        "first+b b",
        lambda m, x: m.last(F.conv_transpose2d(m.b(F.relu(m.first(x))), m.b.weight)),
        **ENDS,
        b=lambda: conv(6, 4),
    ),
    "called twice": net("first+a", lambda m, x: m.last(m.a(F.relu(m.a(m.first(x))))), **THREE),
    "called twice side by side": net(
        "first a",
        lambda m, x: m.last(torch.cat([m.a(y := m.first(x)), m.a(F.max_pool2d(y, 3, 1, 1))], 1)),
        **{**THREE, "a": lambda: conv(6, 4), "last": lambda: conv(8, 2)},
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
    "GroupNorm with one channel per group": net(
        "first", lambda m, x: m.last(m.n(m.first(x))), **ENDS, n=lambda: nn.GroupNorm(6, 6)
    ),
    "InstanceNorm": net(
        "first", lambda m, x: m.last(m.n(m.first(x))), **ENDS, n=lambda: nn.InstanceNorm2d(6, affine=True)
    ),
    "LayerScale": net(
        "first+a",
        lambda m, x: m.last((y := m.first(x)) + m.a(y) * m.g),
        **THREE,
        g=lambda: nn.Parameter(torch.rand(6, 1, 1)),
    ),
    "gate of one channel": net(
        "first",
        lambda m, x: m.last((y := m.first(x)) * torch.sigmoid(m.gate(y))),
        **ENDS,
        gate=lambda: conv(6, 1),
        whole="gate last",
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
    "stack and sum": net(
        "first+a", lambda m, x: m.last(torch.stack([m.first(x), m.a(x)]).sum(0)), **{**THREE, "a": lambda: conv(3, 6)}
    ),
    "maximum of two": net(
        "first+a", lambda m, x: m.last(torch.maximum(m.first(x), m.a(x))), **{**THREE, "a": lambda: conv(3, 6)}
    ),
    "repeated": net(
        "first", lambda m, x: m.last(m.first(x).repeat(1, 2, 1, 1)), **{**ENDS, "last": lambda: conv(12, 2)}
    ),
}


def real(case: Case) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, *shape, generator=rng) for shape in case.shapes)


def together(graph: ChannelGraph) -> set[frozenset[str]]:
    return {frozenset(group.producers) for group in graph.groups}


def choose(graph: ChannelGraph, seed: int) -> NDArray[np.bool_]:
    """Any width in every group, other channels in every cell."""
    rng, kept = np.random.default_rng(seed), np.zeros(graph.channels, dtype=bool)
    for group in graph.groups:
        share = int(rng.integers(1, group.steps + 1)) / group.steps
        for cell in np.unique(group.cells):
            mine = rng.permutation(group.channels[group.cells == cell])
            kept[mine[: round(len(mine) * share)]] = True
    return kept


@pytest.mark.parametrize("name", CASES)
def test_all_that_can_go_is_found_and_what_is_left_is_the_same_network(name: str) -> None:
    case = CASES[name]
    model, inputs = case.build().eval(), real(case)
    graph = channel_graph(model, inputs)
    assert together(graph) == {frozenset(part.split("+")) for part in case.groups.split()}, graph.whole
    assert set(graph.whole) == set(case.whole.split())
    for seed in range(4):
        kept = choose(graph, seed)
        if not graph.leaves_filters(kept):
            continue
        plan = settled_plan(model, graph, kept, inputs)
        assert kept.all() or plan.keep
        result = prove(model, graph, plan, inputs, seed=seed)
        assert result.passed, result


@pytest.mark.parametrize(
    "name",
    ["dense block", "shuffle", "ShuffleNet v1", "chunk", "residual projection", "grouped"],
)
def test_every_group_can_go_alone(name: str) -> None:
    case = CASES[name]
    model, inputs = case.build().eval(), real(case)
    graph = channel_graph(model, inputs)
    for group in graph.groups:
        kept, others = choose(graph, 0), ~np.isin(np.arange(graph.channels), group.channels)
        plan = settled_plan(model, graph, kept | others, inputs)
        assert prove(model, graph, plan, inputs, seed=0).passed
