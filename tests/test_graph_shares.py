"""Channels in equal shares - groups, shuffles, halves - and those that one number scales: found and cut exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from channel_cases import ENDS, Case, net
from nets import conv
from torch import nn
from torch.nn import functional as F


def shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def inverted(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = m.first(x)
    x = x + m.project(F.relu6(m.nd(m.depth(F.hardswish(m.ne(m.expand(x)))))))
    return m.head(x.mean((2, 3)))  # type: ignore[no-any-return]


CASES: dict[str, Case] = {
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
    "GroupNorm with one channel per group": net(
        "first", lambda m, x: m.last(m.n(m.first(x))), **ENDS, n=lambda: nn.GroupNorm(6, 6)
    ),
    "gate of one channel": net(
        "first",
        lambda m, x: m.last((y := m.first(x)) * torch.sigmoid(m.gate(y))),
        **ENDS,
        gate=lambda: conv(6, 1),
        whole="gate last",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_all_that_can_go_is_found_and_what_is_left_is_the_same_network(name: str) -> None:
    CASES[name].check()


@pytest.mark.parametrize("name", ["shuffle", "ShuffleNet v1", "chunk", "grouped"])
def test_every_group_can_go_alone(name: str) -> None:
    CASES[name].check_alone()
