"""The plan as a file: written, read, refused where it does not hold, replayed (design.md, "No pickles")."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prunable import NETWORKS, SHAPE, graph_of, images, network, prune

from thinet_deploy.data.preprocess import Augment, Preprocess
from thinet_deploy.errors import InputError, ModelError
from thinet_deploy.models.vgg import VGG
from thinet_deploy.models.weights import save_weights
from thinet_deploy.pruning.plan import GapHead, Plan, empty_plan, fingerprint, load_plan
from thinet_deploy.pruning.surgery import apply, fold_scale, load_thin

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
