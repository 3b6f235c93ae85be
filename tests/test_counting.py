"""#Param and #FLOPs, to the last digit of the papers' tables (thinet.md, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn

from thinet_deploy.counting import Count, count
from thinet_deploy.models.vgg import VGG, vgg16, vgg_small
from thinet_deploy.pruning.budget import Wish, some, uniform
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.graph import ChannelGraph
from thinet_deploy.pruning.layerwise import prunable
from thinet_deploy.pruning.retrace import settled_plan
from thinet_deploy.pruning.surgery import apply, gap_head, replace_head
from thinet_deploy.pruning.trace import example_inputs

IMAGENET = (3, 224, 224)
TINY = ((16, 16), (32, 32), (64,) * 3, (128,) * 3, (128, 128, 256))


class Bottleneck(nn.Module):
    """ResNet's block as in the authors' Caffe network: the stride is in the first convolution."""

    def __init__(self, inputs: int, inner: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * inner
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 1, stride, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if inputs == outputs else shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(out)))))
        return torch.relu(out + self.shortcut(x))


def resnet50() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    channels = 64
    for stage, (inner, blocks) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True)):
        for block in range(blocks):
            layers.append(Bottleneck(channels, inner, 2 if stage and not block else 1))
            channels = 4 * inner
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """A network without memory: shapes only."""
    with torch.device("meta"):
        return build().eval()


@cache
def dense(name: str) -> tuple[nn.Module, ChannelGraph]:
    model = on_meta(resnet50 if name == "resnet50" else lambda: vgg16(num_classes=int(name.removeprefix("vgg16-"))))
    return model, channel_graph(model, example_inputs(model, IMAGENET))


def pruned(name: str, keep: float) -> nn.Module:
    """Every prunable group at one keep ratio, by plans, as the pipeline does it."""
    model, graph = dense(name)
    groups = prunable(graph)
    kept = some(graph, groups, uniform(groups, keep, Wish()))
    return apply(settled_plan(model, graph, kept, example_inputs(model, IMAGENET)), model)


def with_gap(model: nn.Module) -> nn.Module:
    head = gap_head(model)
    assert head is not None
    replace_head(model, head)
    return model


def tiny(classes: int) -> nn.Module:
    """ThiNet-Tiny: a VGG by its widths, its head replaced."""
    return with_gap(on_meta(lambda: VGG(TINY, (8,), input_shape=IMAGENET, num_classes=classes)))


# (network, classes): weights, FLOPs.
VGG_ROWS = {
    ("VGG-16", 1000): (138_344_128, 30_940_528_640),
    ("ThiNet-Conv", 1000): (131_440_480, 9_582_411_776),
    ("ThiNet-GAP", 1000): (8_318_816, 9_336_168_448),
    ("ThiNet-Tiny", 1000): (1_323_184, 2_009_157_632),
    ("VGG-16", 200): (135_067_328, 30_933_975_040),
    ("ThiNet-Conv", 200): (128_163_680, 9_575_858_176),
    ("ThiNet-GAP", 200): (7_909_216, 9_335_349_248),
    ("ThiNet-Tiny", 200): (1_118_384, 2_008_748_032),
    ("VGG-16", 67): (134_522_560, 30_932_885_504),
    ("ThiNet-Conv", 67): (127_618_912, 9_574_768_640),
    ("ThiNet-GAP", 67): (7_841_120, 9_335_213_056),
    ("ThiNet-Tiny", 67): (1_084_336, 2_008_679_936),
}
BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    "VGG-16": lambda classes: dense(f"vgg16-{classes}")[0],
    "ThiNet-Conv": lambda classes: pruned(f"vgg16-{classes}", 0.5),
    "ThiNet-GAP": lambda classes: with_gap(pruned(f"vgg16-{classes}", 0.5)),
    "ThiNet-Tiny": tiny,
}


@pytest.mark.parametrize(("row", "expected"), VGG_ROWS.items(), ids=str)
def test_vgg_rows_of_the_papers(row: tuple[str, int], expected: tuple[int, int]) -> None:
    name, classes = row
    counted = count(BUILDERS[name](classes), IMAGENET)
    assert (counted.parameters, counted.flops) == expected


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (1.0, (25_556_032, 7_716_052_736)),
        (0.7, (16_944_246, 4_880_149_800)),
        (0.5, (12_380_864, 3_412_943_872)),
        (0.3, (8_664_318, 2_195_070_102)),
    ],
)
def test_resnet_rows_of_the_papers(keep: float, expected: tuple[int, int]) -> None:
    counted = count(pruned("resnet50", keep), IMAGENET)
    assert (counted.parameters, counted.flops) == expected


def test_resnet_prunes_the_first_two_convolutions_of_every_block() -> None:
    model, graph = dense("resnet50")
    blocks = [name for name, module in model.named_modules() if isinstance(module, Bottleneck)]
    assert len(blocks) == 16
    expected = [(f"{name}.conv{i}", f"{name}.conv{i + 1}") for name in blocks for i in (1, 2)]
    pairs = [(*group.producers, *(each.weight for each in group.consumers)) for group in prunable(graph)]
    assert pairs == [(producer, f"{consumer}.weight") for producer, consumer in expected]


def test_vgg_at_keep_04() -> None:
    counted = count(pruned("vgg16-1000", 0.4), IMAGENET)
    assert counted.parameters == 130_503_922
    assert round(counted.flops / 1e9, 3) == 6.909


def test_flops_left_at_every_keep_ratio() -> None:
    # The paper's percentages are ratios of figures that were already rounded to 0.01 B.
    models = [with_gap(pruned("vgg16-200", ratio / 10)) for ratio in range(10, 0, -1)]
    billions = [round(count(model, IMAGENET).flops / 1e9, 2) for model in models]
    percent = [round(100 * each / billions[0], 2) for each in billions]
    assert percent == [100, 82.01, 66.37, 52.39, 40.37, 30.43, 21.70, 15.09, 10.23, 7.23]


def test_counting_without_memory_is_counting() -> None:
    model = vgg_small()
    assert count(model, (3, 32, 32)) == count(on_meta(vgg_small), (3, 32, 32))


LAYERS: dict[str, tuple[nn.Module, Count]] = {
    "biases do not count": (nn.Conv2d(2, 4, 3), Count(72, 2 * 72 * 36, 72 * 36)),
    "stride and padding": (nn.Conv2d(2, 4, 3, stride=2, padding=1), Count(72, 2 * 72 * 16, 72 * 16)),
    "groups": (nn.Conv2d(2, 4, 3, groups=2, padding=1), Count(36, 2 * 36 * 64, 36 * 64)),
    "fully connected": (nn.Sequential(nn.Flatten(), nn.Linear(128, 5)), Count(640, 1280, 640)),
    "BatchNorm is mean and scale, not times the map": (nn.BatchNorm2d(2), Count(4, 8, 0)),
    "BatchNorm without scale": (nn.BatchNorm2d(2, affine=False), Count(2, 4, 0)),
    "pooling and activations are free": (nn.Sequential(nn.MaxPool2d(2), nn.ReLU(), nn.Softmax(1)), Count(0, 0, 0)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_rule_layer_by_layer(name: str) -> None:
    layer, expected = LAYERS[name]
    assert count(nn.Sequential(nn.Conv2d(2, 2, 1), layer), (2, 8, 8)) == Count(
        expected.parameters + 4, expected.flops + 2 * 4 * 64, expected.macs + 4 * 64
    )


def test_a_layer_used_twice_has_its_weights_once_and_works_twice() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    assert count(nn.Sequential(conv, nn.ReLU(), conv), (3, 8, 8)) == Count(81, 2 * 2 * 81 * 64, 2 * 81 * 64)


def test_a_layer_that_is_not_used_does_not_count() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    model[0].spare = nn.Conv2d(4, 4, 3)
    assert count(model, (3, 2, 2)).parameters == 12


def test_counting_leaves_no_hooks() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    count(model, (3, 2, 2))
    with pytest.raises(RuntimeError):
        count(model, (5, 2, 2))
    assert not any(module._forward_hooks for module in model.modules())
