"""Channel groups of all kinds of networks; what is not understood stays whole and says why (design.md, D1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from thinet_deploy.errors import ModelError
from thinet_deploy.models.vgg import vgg16, vgg_small
from thinet_deploy.pruning.graph import ChannelGraph, channel_graph
from thinet_deploy.pruning.layerwise import prunable
from thinet_deploy.pruning.plan import plan_group
from thinet_deploy.pruning.proof import prove

SHAPE = (3, 12, 12)
Forward = Callable[[Any, torch.Tensor], torch.Tensor]


class Net(nn.Module):
    """A network from its forward function and its parts."""

    def __init__(self, forward: Forward, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward(self, x)


def conv(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, **{"padding": 1, **options})


class Bottleneck(nn.Module):
    """ResNet's block: a shortcut around three convolutions."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = conv(inner, inner, stride=stride, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        whole = (inputs, stride) == (outputs, 1)
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.downsample = nn.Identity() if whole else shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        out += self.downsample(x)
        return self.relu(out)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Case:
    """A network and what is to be found in it.

    Attributes:
        build: the network.
        groups: producer → (consumer, inputs of it per channel), in order.
        norms: producer → BatchNorms in between.
        whole: convolution → a part of the reason.
    """

    build: Callable[[], nn.Module]
    groups: dict[str, tuple[str, int]] = field(default_factory=dict)
    norms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)


def sequence(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


def two(forward: Forward, **parts: nn.Module | nn.Parameter) -> Callable[[], nn.Module]:
    """Parts a: 3 → 6 and b: 6 → 4 channels, and others."""
    return lambda: Net(forward, **{"a": conv(3, 6), "b": conv(6, 4), **parts})


def tied(forward: Forward) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        net = Net(forward, first=conv(3, 6), a=conv(6, 6), b=conv(6, 6), last=conv(6, 4))
        net.get_submodule("b").weight = net.get_submodule("a").get_parameter("weight")
        return net

    return build


RESIDUAL = (Bottleneck(6, 4, 10, 2), Bottleneck(10, 5, 10, 1))
PLAIN = {"a": ("b", 1)}
OUTPUT = {"b": "outputs of the network"}


def simple(build: Callable[[], nn.Module], *norms: str) -> Case:
    """a's filters are read by b alone."""
    return Case(build, PLAIN, {"a": norms} if norms else {}, OUTPUT)


CASES: dict[str, Case] = {
    # What stands between producer and consumer and keeps channels apart.
    "relu": simple(two(lambda m, x: m.b(F.relu(m.a(x))))),
    "nothing": simple(two(lambda m, x: m.b(m.a(x)))),
    "functions": simple(two(lambda m, x: m.b(F.max_pool2d(F.dropout(F.silu(m.a(x)), 0.5, m.training), 2)))),
    "in place": simple(two(lambda m, x: m.b(F.relu_(m.a(x))))),
    "pooling": simple(two(lambda m, x: m.b(F.avg_pool2d(F.adaptive_avg_pool2d(torch.relu(m.a(x)), 6), 2)))),
    "padding": simple(two(lambda m, x: m.b(F.pad(m.a(x), (1, 2, 0, 1), value=0.5)))),
    "reflection": simple(two(lambda m, x: m.b(m.a(x)), b=conv(6, 4, padding_mode="reflect"))),
    "same": simple(two(lambda m, x: m.b(m.a(x)), b=nn.Conv2d(6, 4, 2, padding="same"))),
    "BatchNorm": simple(two(lambda m, x: m.b(F.relu(m.n(m.a(x)))), n=nn.BatchNorm2d(6)), "n"),
    "BatchNorm after pool": Case(
        sequence(conv(3, 6), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(6), nn.GELU(), nn.BatchNorm2d(6), conv(6, 4)),
        {"0": ("6", 1)},
        {"0": ("3", "5")},
        {"6": "outputs of the network"},
    ),
    # Into a linear layer.
    "flatten": Case(
        sequence(conv(3, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(294, 5)), {"0": ("4", 49)}
    ),
    "dropout after flatten": Case(
        sequence(conv(3, 6), nn.MaxPool2d((4, 3)), nn.Flatten(), nn.ReLU(), nn.Dropout(), nn.Linear(72, 5)),
        {"0": ("5", 12)},
    ),
    "global pooling": Case(
        two(lambda m, x: m.fc(F.adaptive_avg_pool2d(m.b(m.a(x)), 1).flatten(1)), fc=nn.Linear(4, 5)),
        {"a": ("b", 1), "b": ("fc", 1)},
    ),
    "view": Case(
        two(lambda m, x: m.fc(m.b(m.a(x)).view(x.size(0), -1)), fc=nn.Linear(576, 5)), {"a": ("b", 1), "b": ("fc", 144)}
    ),
    "view of a fixed size": Case(
        two(lambda m, x: m.fc(m.b(m.a(x)).view(-1, 576)), fc=nn.Linear(576, 5)), PLAIN, whole={"b": "fixed number"}
    ),
    "BatchNorm after flatten": Case(
        sequence(conv(3, 6), nn.Flatten(), nn.BatchNorm1d(864), nn.Linear(864, 5)), whole={"0": "batch_norm"}
    ),
    "linear on the columns": Case(
        two(lambda m, x: m.b(m.f(m.a(x))), f=nn.Linear(12, 12)), whole={**OUTPUT, "a": "not applied"}
    ),
    "flatten of the map only": Case(
        two(lambda m, x: m.f(m.b(m.a(x)).flatten(2)), f=nn.Linear(144, 5)), PLAIN, whole={"b": "flatten"}
    ),
    # Branches.
    "residual blocks": Case(
        sequence(
            conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), *RESIDUAL, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 5)
        ),
        {
            "3.conv1": ("3.conv2", 1),
            "3.conv2": ("3.conv3", 1),
            "4.conv1": ("4.conv2", 1),
            "4.conv2": ("4.conv3", 1),
        },
        {"3.conv1": ("3.bn1",), "3.conv2": ("3.bn2",), "4.conv1": ("4.bn1",), "4.conv2": ("4.bn2",)},
        {"0": "branch", "3.conv3": "add", "3.downsample.0": "add", "4.conv3": "add"},
    ),
    "concatenation": Case(
        two(lambda m, x: m.b(torch.cat([m.a(x), m.c(x)], 1)), b=conv(8, 4), c=conv(3, 2)),
        whole={"a": "cat", "c": "cat", **OUTPUT},
    ),
    "squeeze and excite": Case(
        two(lambda m, x: m.b((y := m.a(x)) * torch.sigmoid(m.s(F.adaptive_avg_pool2d(y, 1)))), s=nn.Conv2d(6, 6, 1)),
        whole={"a": "branch", "s": "mul", **OUTPUT},
    ),
    "old value used after an operation in place": Case(
        two(lambda m, x: m.b(m.a(F.relu_(y := m.first(x))) + y), first=conv(3, 6), a=conv(6, 6), b=conv(6, 6)),
        whole={"first": "branch", "a": "add", **OUTPUT},
    ),
    "old value used before an operation in place": Case(
        two(lambda m, x: (m.b(y := m.a(x)), m.c(y.relu_()))[1], c=conv(6, 2)),
        whole={"a": "branch", "b": "0 operations", "c": "outputs"},
    ),
    "view used after an operation in place": Case(
        two(lambda m, x: (y := m.a(x), y.view(-1)[:3].mul_(2), m.b(y))[2]), whole={"a": "branch", **OUTPUT}
    ),
    # What mixes channels, or depends on their number.
    "depthwise": Case(
        two(lambda m, x: m.b(m.d(m.a(x))), d=conv(6, 6, groups=6)),
        whole={"a": "grouped", "d": "grouped", **OUTPUT},
    ),
    "grouped consumer": Case(
        two(lambda m, x: m.b(m.a(x)), b=conv(6, 4, groups=2)), whole={"a": "grouped", "b": "grouped"}
    ),
    "shuffle": Case(
        two(lambda m, x: m.b(m.a(x).view(-1, 2, 3, 12, 12).transpose(1, 2).reshape(-1, 6, 12, 12))),
        whole={"a": "view", **OUTPUT},
    ),
    "channel padding": Case(two(lambda m, x: m.b(F.pad(m.a(x), (0, 0, 0, 0, 1, -1)))), whole={"a": "pad", **OUTPUT}),
    "group norm": Case(two(lambda m, x: m.b(m.n(m.a(x))), n=nn.GroupNorm(2, 6)), whole={"a": "group_norm", **OUTPUT}),
    "softmax": Case(two(lambda m, x: m.b(m.a(x).softmax(1))), whole={"a": "softmax", **OUTPUT}),
    "transposed": Case(
        two(lambda m, x: m.b(m.t(m.a(x))), t=nn.ConvTranspose2d(6, 6, 2)), whole={"a": "conv_transpose2d", **OUTPUT}
    ),
    "slope per channel": Case(two(lambda m, x: m.b(m.p(m.a(x))), p=nn.PReLU(6)), whole={"a": "prelu", **OUTPUT}),
    "limit per channel": Case(
        two(lambda m, x: m.b(torch.clamp(m.a(x), max=m.p)), p=nn.Parameter(torch.ones(1, 6, 1, 1))),
        whole={"a": "clamp", **OUTPUT},
    ),
    "pooling with two results": Case(
        two(lambda m, x: m.b(m.p(m.a(x))), p=nn.AdaptiveMaxPool2d(4)), whole={"a": "adaptive_max_pool2d", **OUTPUT}
    ),
    # Weights that do not belong to one layer.
    "called twice": Case(
        two(lambda m, x: m.b(m.c(m.c(m.a(x)))), c=conv(6, 6)),
        whole={"a": "more than once", "c": "more than once", **OUTPUT},
    ),
    "tied weights": Case(
        tied(lambda m, x: m.last(m.b(m.a(m.first(x))))),
        whole={"first": "more than once", "a": "more than once", "b": "more than once", "last": "outputs"},
    ),
    "shared BatchNorm": Case(
        two(lambda m, x: m.b(m.n(m.c(m.n(m.a(x))))), c=conv(6, 6), n=nn.BatchNorm2d(6)),
        whole={"a": "BatchNorm", "c": "BatchNorm", **OUTPUT},
    ),
    "weight used again elsewhere": Case(
        two(lambda m, x: F.conv_transpose2d(m.b(m.a(x)), m.b.weight)),
        whole={"a": "more than once", "b": "more than once"},
    ),
    "consumer called as a function": Case(
        two(lambda m, x: F.conv2d(m.a(x), m.b.weight, m.b.bias)), whole={"a": "a function", "conv2d_1": "a function"}
    ),
    "computed weight": Case(two(lambda m, x: m.b(F.conv2d(x, m.a.weight * 2))), whole={"conv2d": "computed", **OUTPUT}),
    "normed weight": Case(
        two(lambda m, x: m.b(m.a(x)), b=nn.utils.parametrizations.weight_norm(conv(6, 4))),
        whole={"a": "computed", "b": "computed"},
    ),
    "weight of another kind of module": Case(
        two(
            lambda m, x: m.b(m.a(x)),
            a=Net(lambda m, x: F.conv2d(x, m.weight), weight=nn.Parameter(torch.randn(6, 3, 1, 1))),
        ),
        whole={"a": "own", **OUTPUT},
    ),
}


@pytest.fixture(scope="module")
def traced() -> Callable[[str], tuple[nn.Module, ChannelGraph]]:
    done: dict[str, tuple[nn.Module, ChannelGraph]] = {}

    def get(name: str) -> tuple[nn.Module, ChannelGraph]:
        if name not in done:
            torch.manual_seed(0)
            model = CASES[name].build().eval()
            done[name] = model, channel_graph(model, SHAPE)
        return done[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_groups_and_what_stays_whole(name: str, traced: Callable[[str], tuple[nn.Module, ChannelGraph]]) -> None:
    case, (model, graph) = CASES[name], traced(name)
    assert {group.producer: (group.consumer, group.spread) for group in graph.groups} == case.groups
    assert [group.producer for group in graph.groups] == list(case.groups)
    assert {group.producer: group.norms for group in graph.groups if group.norms} == case.norms
    assert set(graph.whole) == set(case.whole)
    for producer, reason in case.whole.items():
        assert reason in graph.whole[producer]
    for group in graph.groups:
        assert group.channels == model.get_submodule(group.producer).out_channels
        assert graph.group(group.producer) is group


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.groups])
def test_every_group_found_can_go(name: str, traced: Callable[[str], tuple[nn.Module, ChannelGraph]]) -> None:
    model, graph = traced(name)
    rng = np.random.default_rng(0)
    images = torch.randn(2, *SHAPE)
    for group in graph.groups:
        kept = sorted(rng.permutation(group.channels)[: group.channels // 2].tolist())
        assert prove(model, plan_group(model, group, kept), images, seed=0).passed


def test_map_sizes_are_those_of_the_producers_output() -> None:
    model = nn.Sequential(conv(3, 4, stride=2), nn.ReLU(), nn.MaxPool2d(2), conv(4, 4), nn.Flatten(), nn.Linear(24, 2))
    graph = channel_graph(model, (3, 12, 8))
    assert [group.map_size for group in graph.groups] == [(6, 4), (3, 2)]


def test_finding_groups_changes_nothing() -> None:
    model = CASES["BatchNorm"].build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    channel_graph(model, SHAPE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_first_ten_convolutions_of_vgg16_are_pruned() -> None:
    with torch.device("meta"):
        model = vgg16()
    graph = channel_graph(model, (3, 224, 224))
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert [group.producer for group in graph.groups] == convs
    assert graph.groups[-1].spread == 49
    assert not graph.whole
    groups = prunable(graph)
    assert [group.producer for group in groups] == convs[:10]
    assert [group.consumer for group in groups] == convs[1:11]


def named(groups: tuple[Any, ...]) -> list[str]:
    return [group.producer for group in groups]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("residual blocks", ["3.conv1", "3.conv2", "4.conv1", "4.conv2"]),
        ("global pooling", ["a"]),
        ("view", ["a"]),  # the one that feeds the head stays, however it feeds it
        ("flatten", []),
    ],
)
def test_prunable_groups(
    name: str, expected: list[str], traced: Callable[[str], tuple[nn.Module, ChannelGraph]]
) -> None:
    assert named(prunable(traced(name)[1])) == expected


def test_the_last_stage_of_the_small_vgg_stays() -> None:
    graph = channel_graph(vgg_small(), (3, 32, 32))
    assert named(prunable(graph)) == named(graph.groups)[:6]


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.b(m.a(x)) if x.sum() > 0 else m.b(m.a(x) * 2),
        lambda m, x: m.b(m.a(x))[: int(x.max())],
        lambda m, x: m.b(m.b(m.a(x))),
        lambda m, x: m.missing(x),
        lambda m, x: (_ for _ in ()).throw(ValueError),
    ],
    ids=["branch on data", "size from data", "wrong channels", "bug", "error without words"],
)
def test_a_network_that_cannot_be_traced_is_a_model_error(forward: Forward) -> None:
    with pytest.raises(ModelError, match="cannot trace the network for inputs of 3x12x12") as caught:
        channel_graph(two(forward)(), SHAPE)
    assert "forward()" in caught.value.hint
    assert caught.value.exit_code == 2


def test_a_wrong_input_shape_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="1x12x12"):
        channel_graph(CASES["relu"].build(), (1, 12, 12))


@pytest.mark.parametrize("layers", [[nn.Flatten(), nn.Linear(432, 2)], [nn.ReLU()]], ids=["linear", "no parameters"])
def test_a_network_without_convolutions_is_a_model_error(layers: list[nn.Module]) -> None:
    with pytest.raises(ModelError, match="no 2-D convolution"):
        channel_graph(nn.Sequential(*layers), SHAPE)
