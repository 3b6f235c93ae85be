"""Random networks out of all covered operations: pruned = cut, in float64 (issue 3: over 500 of them, slowly)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from channel_cases import choose
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.proof import cut, prove, randomised
from thinet_deploy.pruning.retrace import settled_plan
from thinet_deploy.pruning.surgery import apply

Step = Callable[[torch.Tensor], torch.Tensor]
GROUPS = (2, 3, 4)


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function: Step) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class Branches(nn.Module):
    """Several networks on one input, joined by a sum, a product with a gate, or a concatenation."""

    def __init__(self, join: str, *branches: nn.Module) -> None:
        super().__init__()
        self.join, self.branches = join, nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: list[torch.Tensor] = [branch(x) for branch in self.branches]
        if self.join == "cat":
            return torch.cat(outputs, 1)
        return outputs[0] + outputs[1] if self.join == "add" else outputs[0] * torch.sigmoid(outputs[1])


class Parts(nn.Module):
    """Equal parts of the channels, some of them through a network of their own, then together again."""

    def __init__(self, how: str, *inner: nn.Module) -> None:
        super().__init__()
        self.how, self.inner = how, nn.ModuleList(inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count, width = len(self.inner), x.shape[1] // len(self.inner)
        if self.how == "chunk":
            parts = list(x.chunk(count, 1))
        elif self.how == "split":
            parts = list(torch.split(x, width, 1))
        else:
            parts = [x[:, index * width : (index + 1) * width] for index in range(count)]
        return torch.cat([inner(part) for inner, part in zip(self.inner, parts, strict=True)], 1)


def shuffle(groups: int) -> Step:
    def run(x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        return x.reshape(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)

    return run


class Draw:
    """Draws parts of a network; every method gives a module and the channels that leave it."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw

    def pick(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def conv(self, inputs: int) -> tuple[nn.Module, int]:
        outputs, kernel = self.pick(4, 6, 8, 12), self.pick(1, 3)
        if self.pick(*[False] * 5, True):
            return nn.ConvTranspose2d(inputs, outputs, 3, padding=1), outputs
        return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=self.pick(True, False)), outputs

    def grouped(self, inputs: int) -> tuple[nn.Module, int]:
        fitting = [groups for groups in GROUPS if inputs % groups == 0]
        if not fitting:
            return self.conv(inputs)
        groups = self.pick(*fitting)
        outputs = groups * self.pick(2, 3, 4)
        return nn.Conv2d(inputs, outputs, 1, groups=groups), outputs

    def depthwise(self, inputs: int) -> tuple[nn.Module, int]:
        multiplier = self.pick(1, 1, 2) if inputs < 12 else 1
        return nn.Conv2d(inputs, inputs * multiplier, 3, padding=1, groups=inputs), inputs * multiplier

    def pointwise(self, inputs: int) -> tuple[nn.Module, int]:
        norms = (nn.BatchNorm2d(inputs), nn.InstanceNorm2d(inputs, affine=True), nn.GroupNorm(inputs, inputs))
        acts = (nn.ReLU(), nn.SiLU(), nn.PReLU(inputs), nn.Hardswish(), nn.Dropout())
        maps = (nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.Upsample(scale_factor=1.5), nn.ReflectionPad2d(1))
        return self.pick(*norms, norms[0], *acts, acts[0], *maps, Lambda(lambda x: x * 0.5 + 1)), inputs

    def shuffled(self, inputs: int) -> tuple[nn.Module, int]:
        fitting = [groups for groups in GROUPS if inputs % groups == 0]
        return (Lambda(shuffle(self.pick(*fitting))) if fitting else nn.Identity()), inputs

    def residual(self, inputs: int) -> tuple[nn.Module, int]:
        first, inner = self.conv(inputs) if self.pick(True, False) else self.grouped(inputs)
        body = nn.Sequential(first, nn.ReLU(), nn.Conv2d(inner, inputs, 1), nn.BatchNorm2d(inputs))
        if self.pick(True, True, False):
            return Branches("add", nn.Identity(), same(body)), inputs
        return Branches("add", nn.Conv2d(inputs, inputs, 1), same(body)), inputs

    def excited(self, inputs: int) -> tuple[nn.Module, int]:
        gate = (nn.AdaptiveAvgPool2d(1), nn.Conv2d(inputs, 4, 1), nn.ReLU(), nn.Conv2d(4, inputs, 1))
        return Branches("gate", nn.Identity(), nn.Sequential(*gate)), inputs

    def concatenated(self, inputs: int) -> tuple[nn.Module, int]:
        if inputs > 16:
            return nn.Conv2d(inputs, 6, 1), 6
        other, outputs = self.conv(inputs)
        if self.pick(True, False):
            return Branches("cat", nn.Identity(), same(other)), inputs + outputs
        second, more = self.grouped(inputs)
        return Branches("cat", same(other), same(second)), outputs + more

    def parted(self, inputs: int) -> tuple[nn.Module, int]:
        fitting = [parts for parts in (2, 3) if inputs % parts == 0 and inputs > parts]
        if not fitting:
            return nn.Identity(), inputs
        count = self.pick(*fitting)
        inner: list[nn.Module] = [nn.Identity()]
        outputs = inputs // count
        for _ in range(count - 1):
            part, width = self.pick(self.conv, self.depthwise, self.pointwise)(inputs // count)
            inner.append(same(part))
            outputs += width
        return Parts(self.pick("chunk", "split", "slice"), *inner), outputs

    def network(self) -> nn.Module:
        torch.manual_seed(self.draw(st.integers(0, 2**31)))
        step, width = self.conv(3)
        layers: list[nn.Module] = [step]
        kinds = (self.conv, self.conv, self.grouped, self.grouped, self.depthwise, self.pointwise, self.pointwise)
        more = (self.shuffled, self.shuffled, self.residual, self.excited, self.concatenated, self.parted)
        for _ in range(self.draw(st.integers(2, 7))):
            step, width = self.pick(*kinds, *more)(width)
            layers.append(same(step) if not isinstance(step, nn.Upsample | nn.ReflectionPad2d) else step)
        head = self.pick("conv", "pool", "flatten")
        if head == "conv":
            return nn.Sequential(*layers, nn.Conv2d(width, 2, 1))
        size = 1 if head == "pool" else 2
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(size), nn.Flatten(), nn.Linear(width * size * size, 3))


class Same(nn.Module):
    """Resizes what a module gives to the size of its input, so that branches fit together."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return y if y.shape[2:] == x.shape[2:] else F.interpolate(y, size=x.shape[2:])


def same(inner: nn.Module) -> nn.Module:
    return Same(inner) if any(isinstance(each, nn.Upsample | nn.ReflectionPad2d) for each in inner.modules()) else inner


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    return Draw(draw).network().eval()


def check(model: nn.Module, data: st.DataObject) -> None:
    inputs = (torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)),)
    graph = channel_graph(model, inputs)
    kept = choose(graph, data.draw(st.integers(0, 2**31), label="choice"))
    if not graph.leaves_filters(kept):
        return
    plan = settled_plan(model, graph, kept, inputs)
    assert prove(model, graph, plan, inputs, seed=0).passed
    for base in (model.double(), randomised(model, 1)):
        with torch.inference_mode():
            expected, got = (each(inputs[0].double()) for each in (cut(base, graph, plan), apply(plan, base)))
        assert float((expected - got).abs().max()) <= 1e-10 * max(float(expected.abs().max()), 1e-30)


CHECKS = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)


@settings(max_examples=15, deadline=None, suppress_health_check=CHECKS)
@given(networks(), st.data())
def test_a_pruned_random_network_is_the_cut_one(model: nn.Module, data: st.DataObject) -> None:
    check(model, data)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, suppress_health_check=CHECKS)
@given(networks(), st.data())
def test_500_pruned_random_networks_are_the_cut_ones(model: nn.Module, data: st.DataObject) -> None:
    check(model, data)


@pytest.mark.parametrize("seed", range(8))
def test_a_later_layer_makes_its_filters_in_the_shuffled_order(seed: int) -> None:
    torch.manual_seed(seed)
    added = Branches("add", nn.Identity(), nn.Sequential(nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12)))
    model = nn.Sequential(nn.Conv2d(3, 12, 1), Lambda(shuffle(2)), added, nn.Conv2d(12, 2, 1)).eval()
    inputs = (torch.randn(2, 3, 6, 6),)
    graph = channel_graph(model, inputs)
    (group,) = graph.groups
    kept = np.zeros(graph.channels, dtype=bool)
    for cell in (0, 1):
        kept[np.random.default_rng(seed).permutation(group.channels[group.cells == cell])[:3]] = True
    assert prove(model, graph, settled_plan(model, graph, kept, inputs), inputs, seed=0).passed


def test_most_layers_of_random_networks_can_go() -> None:
    """Freezing everything would be no success."""
    free, whole = 0, 0

    @settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=CHECKS)
    @given(networks())
    def count(model: nn.Module) -> None:
        nonlocal free, whole
        graph = channel_graph(model, (torch.zeros(2, 3, 6, 6),))
        free += len({producer for group in graph.groups for producer in group.producers} - set(graph.whole))
        whole += sum("outputs of the network" not in why for why in graph.whole.values())

    count()
    assert free > 2 * whole, (free, whole)
