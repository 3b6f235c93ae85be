"""ThiNet's samples: each input channel's share of the consumer's outputs (thinet.md, sections 1, 5 and 6)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from thinet_deploy.data import ImageSet
from thinet_deploy.errors import ModelError
from thinet_deploy.preprocess import Preprocess
from thinet_deploy.pruning.graph import ChannelGroup, channel_graph
from thinet_deploy.pruning.statistics import Draws, as_convolution, consumer_input, contributions, draw, sampled_gram
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


def everywhere(output: torch.Tensor) -> Draws:
    """Every filter at every position of an output map, in the order of `output[i].flatten()`."""
    j, y, x = np.indices(tuple(output.shape[1:]))
    return Draws(j.ravel(), y.ravel(), x.ravel())


def without_bias(layer: nn.Module, outputs: torch.Tensor) -> torch.Tensor:
    bias = layer.bias
    shaped = bias.view(-1, *[1] * (outputs.dim() - 2)) if isinstance(bias, torch.Tensor) else 0
    return (outputs - shaped).detach()


@settings(max_examples=120, deadline=None)
@given(convolutions())
def test_contributions_are_the_outputs_of_single_channels_and_sum_to_output_minus_bias(
    case: tuple[nn.Conv2d, torch.Tensor],
) -> None:
    conv, inputs = case
    expected = without_bias(conv, conv(inputs))
    rows = contributions(conv, inputs, [everywhere(expected)] * len(inputs))
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
    net = nn.Sequential(*layers)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net.eval()


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
    "linear after global pooling": lambda: build(
        nn.Conv2d(1, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)
    ),
}


def group_of(model: nn.Module) -> ChannelGroup:
    (group,) = channel_graph(model, SHAPE).groups[:1]
    return group


@pytest.fixture(scope="module")
def images() -> ImageSet:
    pixels = np.random.default_rng(3).integers(0, 256, (12, *SHAPE[1:], 1), np.uint8)
    preprocess = Preprocess(colour="GRAY", mean=(0.5,), std=(0.25,), resize=SHAPE[1:], crop=SHAPE[1:])
    return ImageSet(np.arange(12) % 3, lambda indices: pixels[indices], preprocess)


def watched(model: nn.Module, consumer: str, inputs: torch.Tensor) -> torch.Tensor:
    """Output of the consumer in an ordinary pass, without its bias."""
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(consumer).register_forward_hook(lambda m, _, out: seen.append(without_bias(m, out)))
    with torch.no_grad():
        model(inputs)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_of_a_network_sum_to_what_its_consumer_computes(name: str, images: ImageSet) -> None:
    model = NETWORKS[name]()
    group, inputs = group_of(model), torch.from_numpy(images.inputs(np.arange(3)))
    expected = watched(model, group.consumer, inputs)
    consumer, entering = as_convolution(
        model.get_submodule(group.consumer), consumer_input(model, group.consumer, inputs), group.channels
    )
    maps = expected if expected.dim() == 4 else expected[:, :, None, None]
    rows = contributions(consumer, entering, [everywhere(maps)] * 3)
    assert rows.shape == (expected.numel(), group.channels)
    np.testing.assert_allclose(rows.sum(1), expected.flatten(), rtol=1e-4, atol=1e-5)


def direct_gram(model: nn.Module, group: ChannelGroup, images: ImageSet, chosen: NDArray[np.int64], draws: int) -> Any:
    """The sums of thinet.md, section 1, spelt out for a zero-padded convolution."""
    consumer = model.get_submodule(group.consumer)
    assert isinstance(consumer, nn.Conv2d)
    stride, pad = consumer.stride[0], int(consumer.padding[0])
    weights, rows = consumer.weight.detach().double(), []
    for index in chosen:
        entering = consumer_input(model, group.consumer, torch.from_numpy(images.inputs(np.array([index]))))
        padded = nn.functional.pad(entering, (pad, pad, pad, pad))[0].double()
        with torch.inference_mode():
            height, width = consumer(entering).shape[2:]
        key = derive(7, "sample", group.producer, int(index))
        where = draw(consumer.out_channels, height, width, draws, key)
        for j, y, x in zip(where.filters, where.ys, where.xs, strict=True):
            row = np.zeros(group.channels)
            for channel in range(group.channels):
                for k, m in np.ndindex(*weights.shape[2:]):
                    row[channel] += float(weights[j, channel, k, m] * padded[channel, y * stride + k, x * stride + m])
            rows.append(row)
    return np.array(rows).T @ np.array(rows)


@pytest.mark.parametrize("name", ["ReLU in place", "pool between", "BatchNorm between", "stride in the consumer"])
def test_the_gram_matrix_is_that_of_the_direct_loops(name: str, images: ImageSet) -> None:
    model, chosen = NETWORKS[name](), np.array([1, 4, 8])
    group = group_of(model)
    gram, rows = sampled_gram(model, group, images, chosen, draws=6, seed=7)
    assert rows == 18
    assert_same(gram, direct_gram(model, group, images, chosen, 6))


def test_the_gram_matrix_of_a_linear_consumer_is_that_of_its_weights_and_inputs(images: ImageSet) -> None:
    model = NETWORKS["linear after flatten"]()
    group, chosen = group_of(model), np.arange(5)
    gram, _ = sampled_gram(model, group, images, chosen, draws=4, seed=7)
    consumer = model.get_submodule(group.consumer)
    weight = consumer.get_parameter("weight").detach().double()
    rows = []
    for index in chosen:
        entering = consumer_input(model, group.consumer, torch.from_numpy(images.inputs(np.array([index]))))[0].double()
        where = draw(len(weight), 1, 1, 4, derive(7, "sample", group.producer, int(index)))
        rows += [(weight[j] * entering).reshape(group.channels, group.spread).sum(1).numpy() for j in where.filters]
    assert_same(gram, np.array(rows).T @ np.array(rows))


def test_batch_size_and_order_of_images_do_not_change_the_rows(images: ImageSet) -> None:
    model, chosen = NETWORKS["pool between"](), np.arange(12)
    group = group_of(model)
    gram, _ = sampled_gram(model, group, images, chosen, draws=5, seed=1)
    for order, batch in ((chosen, 1), (chosen, 5), (chosen[::-1].copy(), 4), (np.roll(chosen, 5), 12)):
        other, _ = sampled_gram(model, group, images, order, draws=5, seed=1, batch=batch)
        assert_same(other, gram)


def test_grams_of_disjoint_images_add_up(images: ImageSet) -> None:
    model = NETWORKS["stride in the consumer"]()
    parts = [np.arange(4), np.arange(4, 12), np.arange(12)]
    first, second, whole = (sampled_gram(model, group_of(model), images, part, draws=5, seed=1)[0] for part in parts)
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
    entering = consumer_input(model, "1", torch.from_numpy(images.inputs(np.arange(12))))
    gram, rows = sampled_gram(model, group, images, np.arange(12), draws=200, seed=0)
    # Positions in the upper half see padding only, those in the lower half see the upper row of the input.
    inside = entering[:, 0, 0].sum(1).double().square().mean()
    assert 0.4 < gram[0, 0] / rows / float(inside) < 0.6


def test_a_network_in_training_mode_is_judged_in_eval_mode(images: ImageSet) -> None:
    model = build(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU(), nn.Conv2d(4, 3, 1))
    group = group_of(model)
    expected, _ = sampled_gram(model, group, images, np.arange(4), draws=5, seed=1)
    got, _ = sampled_gram(model.train(), group, images, np.arange(4), draws=5, seed=1)
    np.testing.assert_array_equal(got, expected)


def test_judging_leaves_no_hooks_and_no_changes(images: ImageSet) -> None:
    model = NETWORKS["pool between"]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sampled_gram(model, group_of(model), images, np.arange(4), draws=5, seed=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_no_numbers_are_refused(value: float, images: ImageSet) -> None:
    model = NETWORKS["pool between"]()
    group = group_of(model)
    with torch.no_grad():
        model.get_submodule("0").get_parameter("weight")[0, 0, 0, 0] = value
    with pytest.raises(ModelError, match="not finite"):
        sampled_gram(model, group, images, np.arange(4), draws=5, seed=1)
