"""The plan as data: applied, composed, fitted to other weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prunable import NETWORKS, SHAPE, Kept, graph_of, images, network, prune, some_kept
from torch import nn

from thinet_deploy.data.preprocess import Preprocess
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.graph import ChannelGraph, ChannelGroup
from thinet_deploy.pruning.plan import GapHead, Plan, empty_plan, fingerprint, plan_channels, weights_fingerprint
from thinet_deploy.pruning.proof import prove
from thinet_deploy.pruning.retrace import settled_plan
from thinet_deploy.pruning.surgery import apply
from thinet_deploy.pruning.trace import example_inputs, first_names


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
