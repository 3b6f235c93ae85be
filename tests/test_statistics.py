"""ThiNet's samples: each input channel's share of the consumer's outputs (thinet.md, sections 1, 5 and 6)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Net, drawn
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from thinet_deploy.data.dataset import ImageSet
from thinet_deploy.data.preprocess import Preprocess
from thinet_deploy.errors import ModelError
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.geometry import as_convolution, map_size
from thinet_deploy.pruning.graph import STAYS, ChannelGroup
from thinet_deploy.pruning.plan import empty_plan, members
from thinet_deploy.pruning.retrace import settled_plan
from thinet_deploy.pruning.statistics import Draws, consumer_calls, contributions, draw, sampled_gram
from thinet_deploy.pruning.surgery import apply
from thinet_deploy.pruning.trace import example_inputs
from thinet_deploy.pruning.watch import Call, watch
from thinet_deploy.seeds import derive

SHAPE = (1, 12, 12)


@st.composite
def convolutions(draw_from: st.DrawFn) -> tuple[nn.Conv2d, torch.Tensor]:
    """A convolution with any geometry, in float64, and inputs for it."""
    pick = draw_from
    groups = pick(st.sampled_from([1, 1, 2, 3]))
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    padding: Any = pick(st.one_of(st.tuples(st.integers(0, 2), st.integers(0, 2)), st.sampled_from(["same", "valid"])))
    torch.manual_seed(pick(st.integers(0, 2**31)))
    conv = nn.Conv2d(
        groups * pick(st.integers(1, 4)),
        groups * pick(st.integers(1, 3)),
        pick(pair),
        stride=1 if padding == "same" else pick(pair),
        padding=padding,
        dilation=pick(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        groups=groups,
        bias=pick(st.booleans()),
        padding_mode=pick(st.sampled_from(["zeros", "reflect", "circular", "replicate"])),
    ).double()
    size = pick(st.integers(5, 8)), pick(st.integers(5, 8))
    return conv, torch.randn(pick(st.integers(1, 3)), conv.in_channels, *size, dtype=torch.float64)


@st.composite
def transposed(draw_from: st.DrawFn) -> tuple[nn.ConvTranspose2d, torch.Tensor]:
    """A transposed convolution with any geometry, in float64, and inputs for it."""
    pick = draw_from
    groups, stride = pick(st.sampled_from([1, 1, 2])), pick(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    torch.manual_seed(pick(st.integers(0, 2**31)))
    conv = nn.ConvTranspose2d(
        groups * pick(st.integers(1, 3)),
        groups * pick(st.integers(1, 3)),
        pick(st.tuples(st.integers(2, 3), st.integers(2, 3))),
        stride=stride,
        padding=pick(st.tuples(st.integers(0, 1), st.integers(0, 1))),
        output_padding=(pick(st.integers(0, stride[0] - 1)), pick(st.integers(0, stride[1] - 1))),
        groups=groups,
        bias=pick(st.booleans()),
        dilation=pick(st.tuples(st.integers(1, 2), st.integers(1, 2))) if stride == (3, 3) else 1,
    ).double()
    return conv, torch.randn(2, conv.in_channels, pick(st.integers(3, 5)), 4, dtype=torch.float64)


def called(layer: nn.Module, inputs: torch.Tensor) -> Call:
    """The layer's call."""
    seen: list[Call] = []
    with torch.no_grad(), watch(layer, ["weight"], seen.append):
        layer(inputs)
    return seen[0]


def everywhere(output: torch.Tensor) -> Draws:
    """Every filter at every position of an output map, in the order of `output[i].flatten()`."""
    j, y, x = np.indices(tuple(output.shape[1:]))
    return Draws(j.ravel(), y.ravel(), x.ravel())


def without_bias(layer: nn.Module, outputs: torch.Tensor) -> torch.Tensor:
    bias = layer.bias
    shaped = bias.view(-1, *[1] * (outputs.dim() - 2)) if isinstance(bias, torch.Tensor) else 0
    return (outputs - shaped).detach()


@settings(max_examples=120, deadline=None)
@given(convolutions() | transposed())
def test_contributions_are_the_outputs_of_single_channels_and_sum_to_output_minus_bias(
    case: tuple[nn.Conv2d | nn.ConvTranspose2d, torch.Tensor],
) -> None:
    conv, inputs = case
    expected = without_bias(conv, conv(inputs))
    geometry, padded = as_convolution(called(conv, inputs).given)
    assert map_size(geometry, padded) == expected.shape[2:]
    rows = contributions(geometry, padded, [everywhere(expected)] * len(inputs))
    np.testing.assert_allclose(rows.sum(1), expected.flatten(), atol=1e-12)
    for channel in range(conv.in_channels):
        alone = torch.zeros_like(inputs)
        alone[:, channel] = inputs[:, channel]
        np.testing.assert_allclose(rows[:, channel], without_bias(conv, conv(alone)).flatten(), atol=1e-12)


def assert_same(gram: NDArray[np.float64], expected: NDArray[np.float64]) -> None:
    """Equal but for the float32 rounding of the activations."""
    np.testing.assert_allclose(gram, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def build(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    return drawn(nn.Sequential(*layers), 0.5)


NETWORKS = {
    "ReLU in place": lambda: build(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 3, padding=1)),
    "pool between": lambda: build(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 3, 3, padding=1)),
    "BatchNorm between": lambda: build(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(3, 2), nn.Conv2d(4, 3, 1)
    ),
    "stride in the consumer": lambda: build(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, padding=1)),
    "dilated reflecting consumer": lambda: build(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3, dilation=2, padding=2, padding_mode="reflect")
    ),
    "linear after flatten": lambda: build(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d((3, 2)), nn.Flatten(), nn.Linear(24, 5)
    ),
    "grouped consumer": lambda: build(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2, padding=1)),
    "transposed consumer": lambda: build(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 2, 3, stride=2)),
    "linear after global pooling": lambda: build(
        nn.Conv2d(1, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)
    ),
}


def group_of(model: nn.Module) -> ChannelGroup:
    return channel_graph(model, example_inputs(model, SHAPE)).groups[0]


def gram_of(
    model: nn.Module,
    images: ImageSet,
    chosen: NDArray[np.int64],
    *,
    draws: int = 5,
    seed: int = 1,
    batch: int = 64,
) -> NDArray[np.float64]:
    """Of the first group of a network that is whole."""
    group = group_of(model)
    return sampled_gram(model, group, empty_plan(model), images, chosen, draws=draws, seed=seed, batch=batch)[0]


def only_call(model: nn.Module, group: ChannelGroup, inputs: torch.Tensor) -> Call:
    assert len(group.consumers) == 1
    return consumer_calls(model, group.consumers, inputs)[0]


@pytest.fixture(scope="module")
def images() -> ImageSet:
    pixels = np.random.default_rng(3).integers(0, 256, (12, *SHAPE[1:], 1), np.uint8)
    preprocess = Preprocess(colour="GRAY", mean=(0.5,), std=(0.25,), resize=SHAPE[1:], crop=SHAPE[1:])
    return ImageSet(np.arange(12) % 3, lambda indices: pixels[indices], preprocess)


def watched(model: nn.Module, weight: str, inputs: torch.Tensor) -> torch.Tensor:
    """Output of the consumer in an ordinary pass, without its bias."""
    seen: list[torch.Tensor] = []
    consumer = model.get_submodule(weight.removesuffix(".weight"))
    hook = consumer.register_forward_hook(lambda m, _, out: seen.append(without_bias(m, out)))
    with torch.no_grad():
        model(inputs)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_of_a_network_sum_to_what_its_consumer_computes(name: str, images: ImageSet) -> None:
    model = NETWORKS[name]()
    group, inputs = group_of(model), torch.from_numpy(images.inputs(np.arange(3)))
    expected = watched(model, group.consumers[0].weight, inputs)
    consumer, entering = as_convolution(only_call(model, group, inputs).given)
    maps = expected if expected.dim() == 4 else expected[:, :, None, None]
    rows = contributions(consumer, entering, [everywhere(maps)] * 3)
    assert rows.shape == (expected.numel(), len(group.channels) * group.consumers[0].spread)
    np.testing.assert_allclose(rows.sum(1), expected.flatten(), rtol=1e-4, atol=1e-5)


def direct_rows(
    model: nn.Module, group: ChannelGroup, number: int, images: ImageSet, chosen: NDArray[np.int64], draws: int
) -> NDArray[np.float64]:
    """The sums of thinet.md, section 1, spelt out for a zero-padded convolution."""
    weight = group.consumers[number].weight
    consumer = model.get_submodule(weight.removesuffix(".weight"))
    assert isinstance(consumer, nn.Conv2d)
    stride, pad = consumer.stride[0], int(consumer.padding[0])
    weights, rows = consumer.weight.detach().double(), []
    for index in chosen:
        inputs = torch.from_numpy(images.inputs(np.array([index])))
        call = consumer_calls(model, group.consumers, inputs)[number]
        padded = nn.functional.pad(call.given["input"], (pad, pad, pad, pad))[0].double()
        height, width = call.output.shape[2:]
        key = derive(7, "sample", f"{group.name} {number}" if number else group.name, int(index))
        where = draw(consumer.out_channels, height, width, draws, key)
        for j, y, x in zip(where.filters, where.ys, where.xs, strict=True):
            row = np.zeros(len(group.channels))
            for channel in range(len(group.channels)):
                for k, m in np.ndindex(*weights.shape[2:]):
                    row[channel] += float(weights[j, channel, k, m] * padded[channel, y * stride + k, x * stride + m])
            rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("name", ["ReLU in place", "pool between", "BatchNorm between", "stride in the consumer"])
def test_the_gram_matrix_is_that_of_the_direct_loops(name: str, images: ImageSet) -> None:
    model, chosen = NETWORKS[name](), np.array([1, 4, 8])
    group = group_of(model)
    gram, count = sampled_gram(model, group, empty_plan(model), images, chosen, draws=6, seed=7)
    assert count == 18
    rows = direct_rows(model, group, 0, images, chosen, 6)
    assert_same(gram, rows.T @ rows)


class Fork(nn.Module):
    """Two consumers of the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 5, 3)
        self.left, self.right = nn.Conv2d(5, 3, 3, padding=1), nn.Conv2d(5, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        return torch.cat([self.left(x), self.right(x)], 1)


def test_grams_of_several_consumers_are_summed(images: ImageSet) -> None:
    torch.manual_seed(0)
    model, chosen = Fork().eval(), np.array([0, 3])
    group = group_of(model)
    assert [each.weight for each in group.consumers] == ["left.weight", "right.weight"]
    gram, count = sampled_gram(model, group, empty_plan(model), images, chosen, draws=6, seed=7)
    assert count == 24
    parts = [direct_rows(model, group, number, images, chosen, 6) for number in (0, 1)]
    assert_same(gram, np.sum([rows.T @ rows for rows in parts], axis=0))


def test_a_group_is_judged_in_a_network_that_was_pruned_before_it(images: ImageSet) -> None:
    """What reaches the consumer from elsewhere does not count, and the group's own channels keep their numbers."""
    torch.manual_seed(0)
    model = Joined().eval()
    inputs = example_inputs(model, SHAPE)
    graph = channel_graph(model, inputs)
    first, second = graph.group("left"), graph.group("right")
    kept = np.ones(graph.channels, dtype=bool)
    kept[first.channels[[0, 2]]] = False
    plan = settled_plan(model, graph, kept, inputs)
    thin = apply(plan, model)
    gram, _ = sampled_gram(thin, second, plan, images, np.arange(4), draws=50, seed=7)
    assert gram.shape == (4, 4)
    assert members(second, second.consumers[0], plan).tolist() == [STAYS, 0, 1, 2, 3]
    batch = torch.from_numpy(images.inputs(np.arange(4)))
    entering = torch.relu(model.right(batch)).double()
    drawn = [draw(2, 10, 10, 50, derive(7, "sample", second.name, index)) for index in range(4)]
    weight = model.last.weight.detach().double()[:, 3:, 0, 0]
    rows = torch.cat(
        [
            weight[torch.from_numpy(where.filters)] * entering[image][:, where.ys, where.xs].T
            for image, where in enumerate(drawn)
        ]
    ).detach()
    assert_same(gram, (rows.T @ rows).numpy())


class Joined(nn.Module):
    """Two producers side by side in one consumer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Conv2d(1, 3, 3), nn.Conv2d(1, 4, 3), nn.Conv2d(7, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(torch.cat([self.left(x), self.right(x)], 1)))  # type: ignore[no-any-return]


def test_the_gram_matrix_of_a_linear_consumer_is_that_of_its_weights_and_inputs(images: ImageSet) -> None:
    model = NETWORKS["linear after flatten"]()
    group, chosen = group_of(model), np.arange(5)
    gram = gram_of(model, images, chosen, draws=4, seed=7)
    weight = model.get_parameter(group.consumers[0].weight).detach().double()
    rows = []
    for index in chosen:
        entering = (
            only_call(model, group, torch.from_numpy(images.inputs(np.array([index])))).given["input"][0].double()
        )
        where = draw(len(weight), 1, 1, 4, derive(7, "sample", group.name, int(index)))
        rows += [(weight[j] * entering).reshape(len(group.channels), -1).sum(1).numpy() for j in where.filters]
    assert_same(gram, np.array(rows).T @ np.array(rows))


def test_batch_size_and_order_of_images_do_not_change_the_rows(images: ImageSet) -> None:
    model, chosen = NETWORKS["pool between"](), np.arange(12)
    gram = gram_of(model, images, chosen)
    for order, batch in ((chosen, 1), (chosen, 5), (chosen[::-1].copy(), 4), (np.roll(chosen, 5), 12)):
        other = gram_of(model, images, order, batch=batch)
        assert_same(other, gram)


def test_grams_of_disjoint_images_add_up(images: ImageSet) -> None:
    model = NETWORKS["stride in the consumer"]()
    parts = [np.arange(4), np.arange(4, 12), np.arange(12)]
    first, second, whole = (gram_of(model, images, part) for part in parts)
    assert_same(first + second, whole)


def test_seed_layer_and_image_choose_other_rows() -> None:
    keys = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    draws = [draw(50, 20, 20, 10, derive(seed, "sample", layer, image)) for seed, layer, image in keys]
    for name in ("filters", "ys", "xs"):
        assert len({getattr(one, name).tobytes() for one in draws}) == len(keys)


def test_draws_cover_every_filter_and_position_evenly() -> None:
    where = draw(4, 3, 5, 6000, "key")
    cells = np.zeros((4, 3, 5), int)
    np.add.at(cells, (where.filters, where.ys, where.xs), 1)
    assert cells.min() > 60  # 100 on average
    assert cells.max() < 140


def test_positions_whose_window_reaches_into_the_padding_are_drawn(images: ImageSet) -> None:
    model = build(nn.Conv2d(1, 2, 11), nn.Conv2d(2, 1, 3, padding=1, bias=False))  # maps of 2×2: all windows are padded
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    with torch.no_grad():
        model.get_submodule("1").get_parameter("weight")[..., 1:, :] = 0  # only the row above the position counts
    group = group_of(model)
    entering = only_call(model, group, torch.from_numpy(images.inputs(np.arange(12)))).given["input"]
    gram, rows = sampled_gram(model, group, empty_plan(model), images, np.arange(12), draws=200, seed=0)
    # Positions in the upper half see padding only, those in the lower half see the upper row of the input.
    inside = entering[:, 0, 0].sum(1).double().square().mean()
    assert 0.4 < gram[0, 0] / rows / float(inside) < 0.6


def test_filters_of_several_consumers_count_alike(images: ImageSet) -> None:
    """As in the Gram over all filters, which these are samples of."""
    parts = {"a": nn.Conv2d(1, 6, 3), "b": nn.Conv2d(6, 2, 3), "c": nn.Conv2d(6, 40, 3)}
    model = drawn(Net(lambda m, x: m.b(y := m.a(x).relu()).sum(1) + m.c(y).sum(1), **parts), 0.4)
    with torch.no_grad():
        model.get_submodule("b").get_parameter("weight").mul_(5)
    group, chosen = group_of(model), np.arange(12)
    gram, _ = sampled_gram(model, group, empty_plan(model), images, chosen, draws=3000, seed=0)
    expected = np.zeros_like(gram)
    for call in consumer_calls(model, group.consumers, torch.from_numpy(images.inputs(chosen))):
        patches = F.unfold(call.given["input"], 3).double().view(12, 6, 9, -1)
        said = torch.einsum("jck,nckp->jcnp", call.given["weight"].double().flatten(2), patches).flatten(2)
        expected += torch.einsum("jcn,jdn->cd", said, said).detach().numpy() / said.shape[2]
    np.testing.assert_allclose(gram / np.trace(gram), expected / np.trace(expected), atol=0.01)


def test_a_network_in_training_mode_is_judged_in_eval_mode(images: ImageSet) -> None:
    model = build(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU(), nn.Conv2d(4, 3, 1))
    expected, group = gram_of(model, images, np.arange(4)), group_of(model)
    got, _ = sampled_gram(model.train(), group, empty_plan(model), images, np.arange(4), draws=5, seed=1)
    np.testing.assert_array_equal(got, expected)


def test_judging_leaves_no_hooks_and_no_changes(images: ImageSet) -> None:
    model = NETWORKS["pool between"]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gram_of(model, images, np.arange(4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_no_numbers_are_refused(value: float, images: ImageSet) -> None:
    model = NETWORKS["pool between"]()
    group = group_of(model)
    with torch.no_grad():
        model.get_submodule("0").get_parameter("weight")[0, 0, 0, 0] = value
    with pytest.raises(ModelError, match="not finite"):
        sampled_gram(model, group, empty_plan(model), images, np.arange(4), draws=5, seed=1)
