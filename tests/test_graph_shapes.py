"""Chains, shortcuts and concatenations: what can go is found, and what is left is the same network (design.md, D1)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from channel_cases import ENDS, SHAPE, THREE, Case, net
from nets import conv
from torch import nn
from torch.nn import functional as F


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


def sequential() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(inplace=True), conv(6, 8, stride=2, bias=False), nn.BatchNorm2d(8)),
        *(nn.SiLU(), nn.MaxPool2d(2), conv(8, 6, dilation=2, padding=2), nn.Dropout(), nn.Flatten(), nn.Linear(24, 5)),
    )


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
    "called twice": net("first+a", lambda m, x: m.last(m.a(F.relu(m.a(m.first(x))))), **THREE),
    "called twice side by side": net(
        "first a",
        lambda m, x: m.last(torch.cat([m.a(y := m.first(x)), m.a(F.max_pool2d(y, 3, 1, 1))], 1)),
        **{**THREE, "a": lambda: conv(6, 4), "last": lambda: conv(8, 2)},
    ),
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


@pytest.mark.parametrize("name", CASES)
def test_all_that_can_go_is_found_and_what_is_left_is_the_same_network(name: str) -> None:
    CASES[name].check()


@pytest.mark.parametrize("name", ["dense block", "residual projection"])
def test_every_group_can_go_alone(name: str) -> None:
    CASES[name].check_alone()
