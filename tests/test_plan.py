"""The plan as data: applied, composed, written, read, replayed (design.md, "No pickles")."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from thinet_deploy.errors import InputError, ModelError
from thinet_deploy.models.vgg import VGG
from thinet_deploy.models.weights import save_weights
from thinet_deploy.preprocess import Augment, Preprocess
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.graph import ChannelGraph, ChannelGroup
from thinet_deploy.pruning.plan import (
    GapHead,
    Plan,
    empty_plan,
    fingerprint,
    load_plan,
    plan_channels,
    weights_fingerprint,
)
from thinet_deploy.pruning.proof import prove
from thinet_deploy.pruning.retrace import settled_plan
from thinet_deploy.pruning.surgery import apply, fold_scale, gap_head, load_thin, replace_head
from thinet_deploy.pruning.trace import example_inputs, first_names

SHAPE = (1, 8, 8)
Kept = NDArray[np.bool_]


def small_vgg() -> VGG:
    return VGG(((4, 5), (6,)), (7,), input_shape=SHAPE, num_classes=3)


def with_norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3),
        nn.BatchNorm2d(5),
        nn.Flatten(),
        nn.Linear(180, 3),
    )


class Shuffled(nn.Module):
    """Grouped convolutions, a shuffle between them, a shortcut around them, tied weights, a module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.left, self.right = nn.Conv2d(12, 12, 1, groups=3), nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.once, self.again = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 1)
        self.again.weight = self.once.weight
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stem = torch.relu(self.norm(self.stem(x)))
        out = torch.relu(self.left(stem))
        n, c, h, w = out.shape
        out = out.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)
        out = self.again(torch.relu(self.once(self.right(out)))) + stem
        return self.head(self.once(out).mean((2, 3)))  # type: ignore[no-any-return]


NETWORKS: dict[str, Callable[[], nn.Module]] = {"VGG": small_vgg, "BatchNorm": with_norms, "shuffled": Shuffled}


@functools.cache
def graph_of(name: str) -> ChannelGraph:
    model = network(name)
    return channel_graph(model, example_inputs(model, SHAPE))


def network(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = NETWORKS[name]().eval()
    for tensor in model.state_dict().values():  # BatchNorm's buffers too
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1)
    return model


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def some_kept(graph: ChannelGraph, keep: float, seed: int = 0, within: Kept | None = None) -> Kept:
    """Equal shares of every cell, out of those that `within` still has."""
    kept, rng = np.zeros(graph.channels, dtype=bool), np.random.default_rng(seed)
    for group in graph.groups:
        share = max(1, int(group.steps * keep)) / group.steps
        for cell in np.unique(group.cells):
            mine = group.channels[group.cells == cell]
            left = mine if within is None else mine[within[mine]]
            kept[rng.permutation(left)[: round(len(mine) * share)]] = True
    return kept


def prune(name: str, keep: float, seed: int = 0) -> tuple[nn.Module, Plan]:
    model = network(name)
    plan = settled_plan(model, graph_of(name), some_kept(graph_of(name), keep, seed), example_inputs(model, SHAPE))
    return apply(plan, model), plan


def since(after: Plan, before: Plan, model: nn.Module) -> Plan:
    """The second step of two, a plan for the network that the first one leaves."""
    return after.since(before).model_copy(update={"structure": fingerprint(apply(before, model))})


def only(graph: ChannelGraph, group: ChannelGroup, kept: list[int]) -> Kept:
    """Everything stays but what a group does not keep."""
    stays = np.ones(graph.channels, dtype=bool)
    stays[group.channels] = np.isin(np.arange(len(group.channels)), kept)
    return stays


@pytest.mark.parametrize("name", ["VGG", "BatchNorm"])
def test_a_group_is_cut_out_of_all_its_tensors_and_attributes(name: str) -> None:
    model, graph = network(name), graph_of(name)
    before = copy.deepcopy(model.state_dict())
    assert graph.groups
    for group in graph.groups:
        kept, (consumer,) = [0, 3], group.consumers
        thin = apply(plan_channels(model, graph, only(graph, group, kept)), model)
        expected = dict(before)
        norm = str(int(group.name) + 1) if name == "BatchNorm" else "none"
        for owner in (group.name, norm):
            for leaf in ("weight", "bias", "running_mean", "running_var"):
                if (key := f"{owner}.{leaf}") in before:
                    expected[key] = before[key][kept]
        inputs = [c * consumer.spread + k for c in kept for k in range(consumer.spread)]
        expected[consumer.weight] = before[consumer.weight][:, inputs]
        got = thin.state_dict()
        assert list(got) == list(before)
        assert all(torch.equal(got[key], expected[key]) for key in before)
        producer = thin.get_submodule(group.name)
        assert (producer.out_channels if isinstance(producer, nn.Conv2d) else producer.out_features) == 2
        reader = thin.get_submodule(consumer.weight.removesuffix(".weight"))
        assert (reader.in_channels if isinstance(reader, nn.Conv2d) else reader.in_features) == len(inputs)
        assert name == "VGG" or thin.get_submodule(norm).num_features == 2
        assert thin(images()).shape == (3, 3)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_parameters_stay_parameters_and_buffers_stay_buffers() -> None:
    model, plan = network("BatchNorm").train(), prune("BatchNorm", 0.5)[1]
    thin = apply(plan, model)
    assert [name for name, _ in thin.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert [name for name, _ in thin.named_buffers()] == [name for name, _ in model.named_buffers()]
    thin.train()(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in thin.parameters())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(4))
def test_pruning_twice_is_pruning_once(name: str, seed: int) -> None:
    model, graph = network(name), graph_of(name)
    inputs = example_inputs(model, SHAPE)
    wide = some_kept(graph, 0.7, seed)
    first, second = (settled_plan(model, graph, kept, inputs) for kept in (wide, some_kept(graph, 0.4, seed, wide)))
    step = since(second, first, model)
    thin, in_two = apply(second, model), apply(step, apply(first, model))
    together = apply(first.then(step), model)
    for other in (in_two, together):
        assert str(other) == str(thin)
        assert all(torch.equal(tensor, thin.state_dict()[key]) for key, tensor in other.state_dict().items())
        assert torch.equal(other(images()), thin(images()))
    assert first.then(step).keep == second.keep
    assert first.then(step).widths == second.widths
    assert first.then(step).structure == fingerprint(model)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pruned_network_can_be_pruned_again_as_a_network_of_its_own(name: str) -> None:
    thin, first = prune(name, 0.8)
    inputs = example_inputs(thin, SHAPE)
    graph = channel_graph(thin, inputs)
    assert len(graph.groups) == len(graph_of(name).groups)
    second = settled_plan(thin, graph, some_kept(graph, 0.5), inputs)
    assert prove(thin, graph, second, (images(),), seed=0).passed
    assert torch.equal(apply(first.then(second), network(name))(images()), apply(second, thin)(images()))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_pruning_the_same_layer_twice_composes(data: st.DataObject) -> None:
    model, graph = network("VGG"), graph_of("VGG")
    group = graph.group("features.5")
    first = sorted(data.draw(st.sets(st.sampled_from(range(6)), min_size=1)))
    second = sorted(data.draw(st.sets(st.sampled_from(first), min_size=1)))
    once, both = (plan_channels(model, graph, only(graph, group, kept)) for kept in (first, second))
    twice = since(both, once, model)
    assert torch.equal(apply(both, model)(images()), apply(twice, apply(once, model))(images()))
    together = once.then(twice)
    if len(second) < 6:
        assert together.keep["features.5.weight"][0] == tuple(second)
        assert together.widths == {"features.5": (6, len(second))}
        assert apply(together, model).get_submodule("classifier.0").in_features == 4 * len(second)
    else:
        assert together == empty_plan(model)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_plan_fits_fine_tuned_weights(name: str) -> None:
    plan, tuned = prune(name, 0.5)[1], network(name, seed=1)
    assert fingerprint(tuned) == plan.structure
    assert weights_fingerprint(tuned) != weights_fingerprint(network(name)) == weights_fingerprint(network(name))
    assert prove(tuned, graph_of(name), plan, (images(),), seed=0).passed
    for tensor_name, dims in plan.keep.items():
        tensor = tuned.state_dict()[tensor_name]
        if tensor_name not in plan.grouped:
            for dim, kept in dims.items():
                tensor = tensor.index_select(dim, torch.tensor(kept))
            assert torch.equal(apply(plan, tuned).state_dict()[tensor_name], tensor)


def test_tied_weights_stay_tied() -> None:
    model = network("shuffled")
    for thin in (prune("shuffled", 0.5)[0], apply(empty_plan(model), model)):
        parts = dict(thin.named_children())
        assert parts["once"].weight is parts["again"].weight
        assert first_names(thin) == first_names(model)
    thin = prune("shuffled", 0.5)[0]
    assert thin.get_parameter("once.weight").shape == (6, 6, 1, 1)
    assert thin.get_submodule("again").out_channels == 6


def test_then_keeps_what_the_second_plan_does_not_speak_of() -> None:
    model = network("VGG")
    preprocess = Preprocess(colour="GRAY", mean=(0.5,), std=(0.5,), resize=(8, 8), crop=(8, 8))
    plan = empty_plan(model, preprocess).model_copy(update={"head": GapHead(features=6, classes=3)})
    after = plan.then(prune("VGG", 0.5)[1])
    assert (after.preprocess, after.head, after.structure) == (preprocess, plan.head, plan.structure)
    other = GapHead(features=2, classes=3)
    assert plan.then(plan.model_copy(update={"head": other})).head == other


def test_the_plan_that_keeps_everything_copies() -> None:
    model = network("VGG")
    same = apply(empty_plan(model), model)
    assert same is not model
    assert torch.equal(same(images()), model(images()))


names = st.text(min_size=1, max_size=12)
indices = st.lists(st.integers(0, 10**6), min_size=1, max_size=6).map(tuple)
preprocesses = st.builds(
    Preprocess,
    colour=st.sampled_from(["RGB", "BGR"]),
    range=st.sampled_from(["0..1", "0..255"]),
    mean=st.tuples(*[st.floats(-10, 10)] * 3),
    std=st.tuples(*[st.floats(0.01, 10)] * 3),
    resize=st.integers(32, 64) | st.tuples(st.integers(32, 64), st.integers(32, 64)),
    crop=st.tuples(st.integers(1, 32), st.integers(1, 32)),
    augment=st.builds(Augment, mirror=st.booleans(), pad=st.integers(0, 4)),
)
plans = st.builds(
    Plan,
    structure=st.text(alphabet="0123456789abcdef", min_size=1),
    keep=st.dictionaries(names, st.dictionaries(st.integers(0, 3), indices, min_size=1, max_size=2), max_size=3),
    weights=st.text(alphabet="0123456789abcdef"),
    grouped=st.dictionaries(names, st.integers(2, 64), max_size=2),
    attributes=st.dictionaries(names, st.dictionaries(names, st.integers(1, 10**6) | indices, max_size=2), max_size=3),
    widths=st.dictionaries(names, st.tuples(st.integers(1, 4096), st.integers(1, 4096)), max_size=3),
    head=st.none() | st.builds(GapHead, features=st.integers(1, 9), classes=st.integers(1, 9)),
    preprocess=st.none() | preprocesses,
)


@settings(max_examples=60, deadline=None)
@given(plans)
def test_a_plan_survives_json(tmp_path_factory: pytest.TempPathFactory, plan: Plan) -> None:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    assert load_plan(path) == plan
    assert Plan.model_validate(json.loads(path.read_bytes())) == plan


def damaged(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def damage(text: bytes) -> bytes:
        data = json.loads(text)
        change(data)
        return json.dumps(data).encode()

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: b"",
        lambda text: b"\xff\xfe" + text,
        lambda text: b"[]",
        damaged(lambda d: d.pop("structure")),
        damaged(lambda d: d.update(version=1)),
        damaged(lambda d: d.update(format="something else")),
        damaged(lambda d: d.update(unknown=1)),
        damaged(lambda d: d["keep"].update({"features.0.weight": {"zero": [0]}})),
        damaged(lambda d: d["keep"].update({"features.0.weight": {"0": [0.5]}})),
        damaged(lambda d: d.update(head={"features": "many", "classes": 3})),
    ],
)
def test_a_damaged_plan_is_refused_by_name(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    prune("VGG", 0.5)[1].save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"plan\.json is no plan of this version") as caught:
        load_plan(path)
    assert caught.value.hint


def test_a_missing_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no plan at .*plan\.json"):
        load_plan(tmp_path / "plan.json")


def test_a_plan_of_another_structure_is_refused() -> None:
    plan = prune("VGG", 0.5)[1]
    wider = VGG(((4, 5), (6,)), (8,), input_shape=SHAPE, num_classes=3)
    for other in (network("BatchNorm"), wider, prune("VGG", 0.5)[0]):
        with pytest.raises(ModelError, match="another network"):
            apply(plan, other)


def test_structure_is_names_and_shapes_not_values_or_types() -> None:
    assert fingerprint(network("VGG", 0)) == fingerprint(network("VGG", 1)) == fingerprint(network("VGG").double())
    assert fingerprint(network("VGG")) != fingerprint(network("BatchNorm"))


@pytest.mark.parametrize(
    ("tensor", "dim", "kept"),
    [
        ("features.0.weight", 0, (0, 4)),
        ("features.0.weight", 0, (-1,)),
        ("features.0.weight", 0, ()),
        ("features.0.weight", 7, (0,)),
        ("features.0.missing", 0, (0,)),
        ("nowhere.weight", 0, (0,)),
        ("features.2.weight", 1, (0, 1, 2, 4)),  # as many inputs as there are not
    ],
)
def test_a_plan_that_keeps_what_is_not_there_is_refused(tensor: str, dim: int, kept: tuple[int, ...]) -> None:
    model = network("VGG")
    plan = empty_plan(model).model_copy(update={"keep": {tensor: {dim: kept}}})
    with pytest.raises(ModelError, match=f"damaged: {tensor}"):
        apply(plan, model)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_saved_thin_model_computes_the_same_bits(name: str, tmp_path: Path) -> None:
    model, (thin, plan) = network(name), prune(name, 0.5)
    last = graph_of(name).groups[-1]
    fold_scale(thin, last, plan, np.linspace(0.5, 2, len(last.channels)))
    plan.save(tmp_path / "plan.json")
    save_weights(thin, tmp_path / "model.safetensors")
    fresh = NETWORKS[name]().train()
    loaded = load_thin(load_plan(tmp_path / "plan.json"), fresh, tmp_path / "model.safetensors")
    assert not loaded.training
    assert torch.equal(loaded(images()), thin.eval()(images()))
    assert fingerprint(fresh) == fingerprint(model)


def with_gap(model: nn.Module, plan: Plan) -> tuple[nn.Module, Plan]:
    head = gap_head(model)
    assert head is not None
    return apply(empty_plan(model).model_copy(update={"head": head}), model), plan.model_copy(update={"head": head})


def test_the_gap_head_averages_the_last_map_and_replays(tmp_path: Path) -> None:
    thin, plan = prune("VGG", 0.5)
    assert gap_head(thin) == GapHead(features=3, classes=3)
    gap, plan = with_gap(thin, plan)
    last_map = thin.get_submodule("features")[:-1](images())  # type: ignore[index]
    assert last_map.shape == (3, 3, 4, 4)  # without the last pool
    (linear,) = gap.get_submodule("classifier").children()
    torch.testing.assert_close(gap(images()), linear(last_map.mean((2, 3))))
    assert [module for module in gap.modules() if isinstance(module, nn.Linear)] == [linear]

    plan.save(tmp_path / "plan.json")
    save_weights(gap, tmp_path / "gap.safetensors")
    replayed = load_thin(load_plan(tmp_path / "plan.json"), small_vgg(), tmp_path / "gap.safetensors")
    assert torch.equal(replayed(images()), gap(images()))


class Parts(nn.Module):
    """A network with `features` and `classifier`, flattened by the latter."""

    def __init__(self, *classifier: nn.Module) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2))
        self.classifier = nn.Sequential(*classifier)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))  # type: ignore[no-any-return]


def test_a_head_that_flattens_by_itself_is_replaced_too() -> None:
    model = Parts(nn.Flatten(), nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    gap, _ = with_gap(model, empty_plan(model))
    assert gap(images().double()).shape == (3, 3)
    assert {parameter.dtype for parameter in gap.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    "model",
    [with_norms(), Parts(nn.Flatten(), nn.Linear(96, 3)), Parts(nn.Conv2d(6, 3, 1)), nn.Linear(2, 2)],
    ids=["no features", "one linear layer", "convolutional head", "no network"],
)
def test_networks_without_a_fully_connected_head_have_no_gap_head(model: nn.Module) -> None:
    assert gap_head(model) is None


def test_replacing_a_head_that_is_not_there_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="`features`") as caught:
        replace_head(with_norms(), GapHead(features=5, classes=3))
    assert "thinet-conv" in caught.value.hint
