"""What filters are worth by the papers' criteria, against their definitions spelt out (thinet.md, section 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nets import Forward, Net, conv, drawn
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from thinet_deploy.data.dataset import ImageSet
from thinet_deploy.data.preprocess import Preprocess
from thinet_deploy.errors import ModelError
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.graph import ChannelGraph
from thinet_deploy.pruning.plan import Plan, empty_plan
from thinet_deploy.pruning.retrace import settled_plan
from thinet_deploy.pruning.scores import apoz, random_scores, taylor, weight_sum
from thinet_deploy.pruning.surgery import apply
from thinet_deploy.pruning.trace import example_inputs

SHAPE = (1, 8, 8)
CHOSEN = np.arange(7)
# The scores of a group, from the network, its graph, the group's name, a plan and images.
Given = tuple[nn.Module, ChannelGraph, str, Plan, ImageSet]


def net(forward: Forward, **parts: nn.Module) -> nn.Module:
    """With random values in all parameters and buffers."""
    torch.manual_seed(3)
    return drawn(Net(forward, **parts), 0.4)


def pooled(x: torch.Tensor) -> torch.Tensor:
    return x.mean((2, 3))


@pytest.fixture(scope="module")
def images() -> ImageSet:
    pixels = np.random.default_rng(3).integers(0, 256, (9, *SHAPE[1:], 1), np.uint8)
    preprocess = Preprocess(colour="GRAY", mean=(0.5,), std=(0.25,), resize=SHAPE[1:], crop=SHAPE[1:])
    return ImageSet(np.arange(9) % 3, lambda indices: pixels[indices], preprocess)


def graph_of(model: nn.Module) -> ChannelGraph:
    return channel_graph(model, example_inputs(model, SHAPE))


def whole(model: nn.Module, group: str, images: ImageSet) -> Given:
    return model, graph_of(model), group, empty_plan(model), images


def by_weights(given: Given) -> NDArray[np.float64]:
    model, graph, name, plan, _ = given
    return weight_sum(model, graph, graph.group(name), plan)


def by_zeros(given: Given, **options: Any) -> NDArray[np.float64]:
    model, graph, name, plan, images = given
    return apoz(model, graph.group(name), plan, images, CHOSEN, **options)


def by_taylor(given: Given, **options: Any) -> NDArray[np.float64]:
    model, graph, name, plan, images = given
    return taylor(model, graph.group(name), plan, images, CHOSEN, **options)


def weights(model: nn.Module, name: str) -> NDArray[np.float64]:
    return model.get_parameter(f"{name}.weight").detach().double().numpy()


def activation(x: torch.Tensor) -> torch.Tensor:
    """Marks what is judged: `direct` sees it."""
    return x


def direct(
    model: nn.Module, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> list[list[tuple[NDArray[np.float64], NDArray[np.float64]]]]:
    """Image by image, in float64: every marked activation and ∂cross-entropy/∂activation, without the image's axis."""
    found = []
    twin = Net(model._forward, **dict(model.named_children())).double().eval()  # type: ignore[arg-type]
    for index in CHOSEN:
        marked: list[torch.Tensor] = []

        def mark(x: torch.Tensor, marked: list[torch.Tensor] = marked) -> torch.Tensor:
            marked.append(x)
            return x

        monkeypatch.setitem(globals(), "activation", mark)
        inputs = torch.from_numpy(images.inputs(np.array([index]))).double()
        loss = F.cross_entropy(twin(inputs), torch.tensor([int(images.labels[index])]))
        gradients = torch.autograd.grad(loss, marked)
        found.append([(a.detach()[0].numpy(), g[0].numpy()) for a, g in zip(marked, gradients, strict=True)])
    monkeypatch.setitem(globals(), "activation", activation)
    twin.float()
    return found


# Networks whose judged group has the name "a" and 6 channels; `activation` marks what enters its consumers.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: net(
        lambda m, x: pooled(m.b(activation(m.a(x).relu_()))), a=conv(1, 6), b=conv(6, 3, stride=2)
    ),
    "BatchNorm and pool between": lambda: net(
        lambda m, x: pooled(m.b(activation(F.max_pool2d(m.n(m.a(x)).relu(), 2)))),
        a=conv(1, 6),
        n=nn.BatchNorm2d(6),
        b=conv(6, 3),
    ),
    "grouped consumer": lambda: net(
        lambda m, x: pooled(m.b(activation(m.a(x).relu()))), a=conv(1, 6), b=conv(6, 4, groups=2)
    ),
    "transposed consumer": lambda: net(
        lambda m, x: pooled(m.b(activation(m.a(x).relu()))), a=conv(1, 6), b=nn.ConvTranspose2d(6, 3, 3, 2)
    ),
    "transposed producer": lambda: net(
        lambda m, x: pooled(m.b(activation(m.a(x).relu()))), a=nn.ConvTranspose2d(1, 6, 3, 2), b=conv(6, 3)
    ),
    "linear": lambda: net(lambda m, x: m.b(activation(pooled(m.a(x).relu()))), a=conv(1, 6), b=nn.Linear(6, 3)),
    "two consumers of one tensor": lambda: net(
        lambda m, x: pooled(m.b(x := activation(m.a(x).relu())) + m.c(x)), a=conv(1, 6), b=conv(6, 3), c=conv(6, 3, 1)
    ),
    "two consumers of different tensors": lambda: net(
        lambda m, x: pooled(m.b(activation((y := m.a(x)).relu()))) + pooled(m.c(activation(F.max_pool2d(y, 4).relu()))),
        a=conv(1, 6),
        b=conv(6, 3),
        c=conv(6, 3, 1),
    ),
    "called twice": lambda: net(
        lambda m, x: m.b(activation(pooled(m.twice(activation(m.twice(activation(m.a(x).relu())).relu())).relu()))),
        a=conv(1, 6),
        twice=conv(6, 6),
        b=nn.Linear(6, 3),
    ),
    "residual stream": lambda: net(
        lambda m, x: m.last(activation(pooled((y := activation(m.a(x).relu())) + m.c(m.b(y).relu())))),
        a=conv(1, 6),
        b=conv(6, 4),
        c=conv(4, 6),
        last=nn.Linear(6, 3),
    ),
}  # fmt: skip
PRODUCERS = {"residual stream": ["a", "c"], "called twice": ["a", "twice"]}


def maps(array: NDArray[np.float64]) -> NDArray[np.float64]:
    """(channels, positions)"""
    return array.reshape(len(array), -1)


@pytest.mark.parametrize("name", NETWORKS)
def test_weight_sum_is_the_sum_of_the_filters_absolute_weights(name: str, images: ImageSet) -> None:
    model = NETWORKS[name]()
    expected = np.zeros(6)
    for producer in PRODUCERS.get(name, ["a"]):
        filters = weights(model, producer)
        for j in range(6):
            expected[j] += np.abs(filters[:, j] if name == "transposed producer" else filters[j]).sum()
    got = by_weights(whole(model, "a", images))
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize("name", [name for name in NETWORKS if "pool" not in name])
def test_apoz_is_the_share_of_zeros_over_images_and_positions(
    name: str, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = NETWORKS[name]()
    rows = direct(model, images, monkeypatch)
    calls = 2 if name == "two consumers of one tensor" else 1  # the same share twice
    shares = []
    for number in range(len(rows[0])):
        zeros = [[np.mean(maps(row[number][0])[c] == 0) for c in range(6)] for row in rows]
        shares += [np.mean(zeros, axis=0)] * calls
    got = by_zeros(whole(model, "a", images))
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, 1 - np.mean(shares, axis=0), rtol=1e-12)
    assert name in {"linear", "residual stream", "called twice"} or 0 < got.min() < 1


def test_apoz_counts_zeros_before_pools_and_flattening(images: ImageSet) -> None:
    def relu(m: Any, x: torch.Tensor) -> Any:
        return m.a(x).relu()

    def flat(m: Any, x: torch.Tensor) -> Any:
        return m.b(torch.flatten(F.dropout(F.max_pool2d(relu(m, x), 2), 0.5, m.training), 1))

    def twice(m: Any, x: torch.Tensor) -> Any:
        return pooled(m.b(F.avg_pool2d(F.max_pool2d(relu(m, x), 2), 2)))

    def late(m: Any, x: torch.Tensor) -> Any:
        return pooled(m.b(F.relu(F.max_pool2d(m.a(x), 2), inplace=True)))

    given = torch.from_numpy(images.inputs(CHOSEN))
    for forward, reader in ((twice, conv(6, 3, 1)), (flat, nn.Linear(6 * 16, 3)), (late, conv(6, 3, 1))):
        model = net(forward, a=conv(1, 6), b=reader).eval()
        with torch.no_grad():
            read = F.max_pool2d(relu(model, given), 2) if forward is late else relu(model, given)
        expected = (read != 0).double().mean((0, 2, 3)).numpy()
        np.testing.assert_allclose(by_zeros(whole(model, "a", images)), expected, rtol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_taylor_is_the_absolute_mean_of_activation_times_gradient(
    name: str, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = NETWORKS[name]()
    expected = np.zeros(6)
    for row in direct(model, images, monkeypatch):
        for a, g in row:
            for c in range(6):
                expected[c] += abs(np.mean(maps(a)[c] * maps(g)[c])) / len(CHOSEN)
    got = by_taylor(whole(model, "a", images))
    assert got.dtype == np.float64
    assert expected.max() > 0
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * expected.max())


def flattened() -> nn.Module:
    return net(lambda m, x: m.b(m.a(x).relu().flatten(1)), a=conv(1, 6, stride=3), b=nn.Linear(54, 3))


def test_the_inputs_of_a_linear_layer_after_flattening_belong_to_their_channels(images: ImageSet) -> None:
    """Each channel's zeros over its nine inputs; activation times gradient summed over them."""
    model = flattened()
    zeros, expected = np.zeros(6), np.zeros(6)
    for index in CHOSEN:
        x = torch.from_numpy(images.inputs(np.array([index])))
        entering = model.get_submodule("a")(x).relu().flatten(1).detach()
        entering.requires_grad_()
        loss = F.cross_entropy(model.get_submodule("b")(entering), torch.tensor([int(images.labels[index])]))
        (gradient,) = torch.autograd.grad(loss, entering)
        for c in range(6):
            mine = slice(9 * c, 9 * c + 9)
            zeros[c] += float((entering[0, mine] == 0).double().mean()) / len(CHOSEN)
            expected[c] += abs(float((entering[0, mine] * gradient[0, mine]).sum().detach())) / len(CHOSEN)
    given = whole(model, "a", images)
    assert 0 < zeros.max() < 1
    np.testing.assert_allclose(by_zeros(given), 1 - zeros, rtol=1e-12)
    np.testing.assert_allclose(by_taylor(given), expected, rtol=1e-4, atol=1e-6)


def test_linear_layers_are_producers_too(images: ImageSet) -> None:
    model = net(
        lambda m, x: m.c(m.b(m.a(x).relu().flatten(1)).relu()),
        a=conv(1, 2),
        b=nn.Linear(128, 5),
        c=nn.Linear(5, 3),
    )
    given = whole(model, "b", images)
    np.testing.assert_allclose(by_weights(given), np.abs(weights(model, "b")).sum(1), rtol=1e-12)
    assert by_zeros(given).shape == by_taylor(given).shape == (5,)


# --- in a network that is pruned already ---------------------------------------------------------------------------


def two_branches() -> nn.Module:
    return net(
        lambda m, x: pooled(m.last(torch.cat([m.left(x).relu(), m.a(m.first(x).relu()).relu()], 1))),
        left=conv(1, 3),
        first=conv(1, 4),
        a=conv(4, 5),
        last=conv(8, 3, 1),
    )


def test_a_group_is_judged_in_a_network_that_was_pruned_before_it(images: ImageSet) -> None:
    """As if the filters that went were zero: in the producer's inputs, and beside the group in the consumer."""
    model = two_branches()
    graph = graph_of(model)
    kept = np.ones(graph.channels, dtype=bool)
    kept[graph.group("left").channels[[0, 2]]] = False
    kept[graph.group("first").channels[[1]]] = False
    plan = settled_plan(model, graph, kept, example_inputs(model, SHAPE))
    thin = apply(plan, model), graph, "a", plan, images
    with torch.no_grad():
        for name, gone in (("left", [0, 2]), ("first", [1])):
            for parameter in model.get_submodule(name).parameters():
                parameter[gone] = 0
        model.get_parameter("a.weight")[:, 1] = 0
    dense = whole(model, "a", images)
    assert thin[0].get_parameter("last.weight").shape[1] == 6
    np.testing.assert_allclose(by_weights(thin), by_weights(dense), rtol=1e-12)
    np.testing.assert_allclose(by_zeros(thin), by_zeros(dense), rtol=1e-12)
    np.testing.assert_allclose(by_taylor(thin), by_taylor(dense), rtol=1e-4, atol=1e-7)


def test_filters_that_a_plan_put_in_another_order_keep_their_channels(images: ImageSet) -> None:
    model = NETWORKS["conv"]()
    graph, order = graph_of(model), [4, 0, 5, 2, 1, 3]
    plan = empty_plan(model).model_copy(
        update={"keep": {"a.weight": {0: tuple(order)}, "a.bias": {0: tuple(order)}, "b.weight": {1: tuple(order)}}}
    )
    given = apply(plan, model), graph, "a", plan, images
    for score in (by_weights, by_zeros, by_taylor):
        np.testing.assert_allclose(score(given), score(whole(model, "a", images)), rtol=1e-5)


# --- what holds for all --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [by_zeros, by_taylor])
@pytest.mark.parametrize("name", ["BatchNorm and pool between", "residual stream"])
def test_the_size_of_batches_does_not_matter(name: str, score: Callable[..., Any], images: ImageSet) -> None:
    given = whole(NETWORKS[name](), "a", images)
    for batch in (1, 3, 7):
        np.testing.assert_allclose(score(given, batch=batch), score(given), rtol=1e-4, atol=1e-7)


def test_a_dead_filter_is_worth_least(images: ImageSet) -> None:
    model = NETWORKS["conv"]()
    with torch.no_grad():
        for parameter in model.get_submodule("a").parameters():
            parameter[2] = 0
    for score in (by_weights, by_zeros, by_taylor):
        assert score(whole(model, "a", images))[2] == 0


def test_judging_changes_nothing_and_works_in_eval_mode(images: ImageSet) -> None:
    model = NETWORKS["BatchNorm and pool between"]()
    given = whole(model, "a", images)
    expected = by_zeros(given), by_taylor(given)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    assert np.array_equal(by_zeros(given), expected[0])
    model.train()
    with torch.no_grad():
        assert np.array_equal(by_taylor(given), expected[1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(each.grad is None and each.requires_grad for each in model.parameters())


def test_frozen_weights_and_operations_in_place_have_gradients_too(images: ImageSet) -> None:
    model = net(lambda m, x: pooled(m.b(m.a(x.mul_(2)).relu_())), a=conv(1, 6), b=conv(6, 3))
    expected = by_taylor(whole(model, "a", images))
    assert expected.max() > 0
    model.requires_grad_(requires_grad=False)
    np.testing.assert_array_equal(by_taylor(whole(model, "a", images)), expected)


def test_a_consumer_that_the_loss_does_not_depend_on_counts_for_nothing(images: ImageSet) -> None:
    parts = {"a": conv(1, 6), "b": conv(6, 3), "c": conv(6, 3)}
    model = net(lambda m, x: (m.b((y := m.a(x)).sigmoid()), pooled(m.c(y.relu())))[1], **parts)
    alone = net(lambda m, x: pooled(m.c(m.a(x).relu())), **parts)
    given = whole(model, "a", images)
    assert len(given[1].group("a").consumers) == 2
    np.testing.assert_array_equal(by_taylor(given), by_taylor(whole(alone, "a", images)))


def test_a_channel_that_nobody_reads_is_worth_nothing(images: ImageSet) -> None:
    given = whole(NETWORKS["conv"](), "a", images)
    model, graph, _, plan, _ = given
    alone = dataclasses.replace(graph.group("a"), consumers=())
    assert not apoz(model, alone, plan, images, CHOSEN).any()
    assert not taylor(model, alone, plan, images, CHOSEN).any()


def test_a_network_without_gradients_is_a_model_error(images: ImageSet) -> None:
    model = net(lambda m, x: pooled(m.b(m.a(x).relu().detach())), a=conv(1, 6), b=conv(6, 3))
    with pytest.raises(ModelError, match="no gradient for what follows a") as caught:
        by_taylor(whole(model, "a", images))
    assert caught.value.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("score", [by_weights, by_zeros, by_taylor])
def test_weights_and_activations_that_are_no_numbers_are_refused(
    score: Callable[[Given], Any], value: float, images: ImageSet
) -> None:
    given = whole(NETWORKS["conv"](), "a", images)
    with torch.no_grad():
        given[0].get_parameter("a.weight")[0, 0, 0, 0] = value
    with pytest.raises(ModelError, match="filters of a cannot be judged") as caught:
        score(given)
    assert caught.value.hint


def test_random_scores_depend_on_seed_and_name_only(images: ImageSet) -> None:
    graph = graph_of(two_branches())
    groups = [graph.group(name) for name in ("left", "first")]
    keys = [(group, seed) for group in groups for seed in (0, 1)]
    scores = [random_scores(group, seed) for group, seed in keys]
    assert [each.shape for each in scores] == [(3,), (3,), (4,), (4,)]
    assert len({each[:3].tobytes() for each in scores}) == 4
    for (group, seed), each in zip(keys, scores, strict=True):
        np.testing.assert_array_equal(random_scores(group, seed), each)
        assert ((each >= 0) & (each < 1)).all()
