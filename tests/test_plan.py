"""The plan as data: applied, composed, written, read, replayed (design.md, "No pickles")."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from thinet_deploy.errors import InputError, ModelError
from thinet_deploy.models.vgg import VGG
from thinet_deploy.models.weights import save_weights
from thinet_deploy.preprocess import Augment, Preprocess
from thinet_deploy.pruning.graph import ChannelGroup, channel_graph
from thinet_deploy.pruning.plan import GapHead, Plan, empty_plan, fingerprint, load_plan, plan_group
from thinet_deploy.pruning.surgery import apply, fold_scale, gap_head, load_thin, replace_head

SHAPE = (1, 8, 8)


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


NETWORKS: dict[str, Callable[[], nn.Module]] = {"VGG": small_vgg, "BatchNorm": with_norms}


def network(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = NETWORKS[name]().eval()
    for tensor in model.state_dict().values():  # BatchNorm's buffers too
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1)
    return model


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def prune_all(model: nn.Module, keep: float) -> tuple[nn.Module, Plan]:
    """All groups front to back, each from the network that the one before left."""
    plan, thin = empty_plan(model), model
    for group in channel_graph(model, SHAPE).groups:
        kept = np.random.default_rng(0).permutation(group.channels)[: int(group.channels * keep)]
        step = plan_group(thin, group, sorted(kept.tolist()))
        thin, plan = apply(step, thin), plan.then(step)
    return thin, plan


@pytest.mark.parametrize("name", NETWORKS)
def test_a_group_is_cut_out_of_all_its_tensors_and_attributes(name: str) -> None:
    model = network(name)
    before = copy.deepcopy(model.state_dict())
    for group in channel_graph(model, SHAPE).groups:
        kept = [0, 3]
        thin = apply(plan_group(model, group, kept), model)
        expected = dict(before)
        for owner in (group.producer, *group.norms):
            for leaf in ("weight", "bias", "running_mean", "running_var"):
                if (key := f"{owner}.{leaf}") in before:
                    expected[key] = before[key][kept]
        inputs = [c * group.spread + k for c in kept for k in range(group.spread)]
        expected[f"{group.consumer}.weight"] = before[f"{group.consumer}.weight"][:, inputs]
        got = thin.state_dict()
        assert list(got) == list(before)
        assert all(torch.equal(got[key], expected[key]) for key in before)
        assert thin.get_submodule(group.producer).out_channels == 2
        consumer = thin.get_submodule(group.consumer)
        assert (consumer.in_channels if isinstance(consumer, nn.Conv2d) else consumer.in_features) == len(inputs)
        assert all(thin.get_submodule(norm).num_features == 2 for norm in group.norms)
        assert thin(images()).shape == (3, 3)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_parameters_stay_parameters_and_buffers_stay_buffers() -> None:
    model = network("BatchNorm").train()
    thin = prune_all(model, 0.5)[0]
    assert [name for name, _ in thin.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert [name for name, _ in thin.named_buffers()] == [name for name, _ in model.named_buffers()]
    thin.train()(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in thin.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_one_composed_plan_is_pruning_layer_by_layer(name: str) -> None:
    model = network(name)
    thin, plan = prune_all(model, 0.6)
    at_once = apply(plan, model)
    assert all(torch.equal(tensor, thin.state_dict()[key]) for key, tensor in at_once.state_dict().items())
    assert torch.equal(at_once(images()), thin(images()))
    assert plan.structure == fingerprint(model)
    channels = {group.producer: group.channels for group in channel_graph(model, SHAPE).groups}
    assert plan.widths == {producer: (width, int(width * 0.6)) for producer, width in channels.items()}


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_pruning_the_same_layer_twice_composes(data: st.DataObject) -> None:
    model = network("VGG")
    group = ChannelGroup("features.5", (), "classifier.0", 6, 4, (4, 4))
    first = data.draw(st.permutations(range(6)))[: data.draw(st.integers(1, 6))]
    second = data.draw(st.permutations(range(len(first))))[: data.draw(st.integers(1, len(first)))]
    once = plan_group(model, group, first)
    middle = apply(once, model)
    twice = plan_group(middle, ChannelGroup("features.5", (), "classifier.0", len(first), 4, (4, 4)), second)
    together = once.then(twice)
    assert torch.equal(apply(together, model)(images()), apply(twice, middle)(images()))
    assert together.keep["features.5.weight"][0] == tuple(first[i] for i in second)
    assert together.widths == {"features.5": (6, len(second))}
    assert apply(together, model).get_submodule("classifier.0").in_features == 4 * len(second)


def test_then_keeps_what_the_second_plan_does_not_speak_of() -> None:
    model = network("VGG")
    preprocess = Preprocess(colour="GRAY", mean=(0.5,), std=(0.5,), resize=(8, 8), crop=(8, 8))
    plan = empty_plan(model, preprocess).model_copy(update={"head": GapHead(features=6, classes=3)})
    after = plan.then(prune_all(model, 0.5)[1])
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
    attributes=st.dictionaries(names, st.dictionaries(names, st.integers(1, 10**6), max_size=2), max_size=3),
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
        damaged(lambda d: d.update(version=2)),
        damaged(lambda d: d.update(format="something else")),
        damaged(lambda d: d.update(unknown=1)),
        damaged(lambda d: d["keep"].update({"features.0.weight": {"zero": [0]}})),
        damaged(lambda d: d["keep"].update({"features.0.weight": {"0": [0.5]}})),
        damaged(lambda d: d.update(head={"features": "many", "classes": 3})),
    ],
)
def test_a_damaged_plan_is_refused_by_name(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    prune_all(network("VGG"), 0.5)[1].save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"plan\.json is no plan of this version") as caught:
        load_plan(path)
    assert caught.value.hint


def test_a_missing_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no plan at .*plan\.json"):
        load_plan(tmp_path / "plan.json")


def test_a_plan_of_another_structure_is_refused() -> None:
    plan = prune_all(network("VGG"), 0.5)[1]
    wider = VGG(((4, 5), (6,)), (8,), input_shape=SHAPE, num_classes=3)
    for other in (network("BatchNorm"), wider, prune_all(network("VGG"), 0.5)[0]):
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
    ],
)
def test_a_plan_that_keeps_what_is_not_there_is_refused(tensor: str, dim: int, kept: tuple[int, ...]) -> None:
    model = network("VGG")
    plan = empty_plan(model).model_copy(update={"keep": {tensor: {dim: kept}}})
    with pytest.raises(ModelError, match=f"damaged: {tensor}"):
        apply(plan, model)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_saved_thin_model_computes_the_same_bits(name: str, tmp_path: Path) -> None:
    model = network(name)
    thin, plan = prune_all(model, 0.5)
    last = channel_graph(model, SHAPE).groups[-1]
    fold_scale(thin, last, np.linspace(0.5, 2, plan.widths[last.producer][1]))
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
    model = network("VGG")
    thin, plan = prune_all(model, 0.5)
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
