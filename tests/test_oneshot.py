"""Pruning without training: exact where the network is redundant, the same however it is run."""

import copy

import numpy as np
import pytest
import torch
from small_networks import NETWORKS, SHAPE, Fire, graph_of, images, network, sample
from torch import fx, nn
from torch.nn import functional as F

from thinet_deploy.pruning import repair
from thinet_deploy.pruning.budget import Wish, uniform
from thinet_deploy.pruning.calibration import Sampling, observe
from thinet_deploy.pruning.layerwise import prunable
from thinet_deploy.pruning.moments import Moments
from thinet_deploy.pruning.oneshot import Method, Pruned, prune_once, weigh
from thinet_deploy.pruning.readers import readers
from thinet_deploy.pruning.reconstruction import Solver
from thinet_deploy.pruning.replay import Replay, Values
from thinet_deploy.pruning.retrace import settled_plan
from thinet_deploy.pruning.surgery import apply
from thinet_deploy.pruning.trace import example_inputs, named_tensors, operation, trace
from thinet_deploy.pruning.wide import Wide


def prune(name: str, method: Method = Method(), keep: float = 0.5, batch: int = 16) -> tuple[nn.Module, Pruned]:  # noqa: B008
    model = network(name)
    graph = graph_of(model)
    groups = prunable(graph)
    done = prune_once(model, graph, groups, lambda _: uniform(groups, keep, Wish()), sample(batch=batch), SHAPE, method)
    return model, done


def refit(wide: Wide, weight: str, moments: Moments, ridge: float) -> None:
    reader = wide.readers[weight]
    stats = wide.centred(reader, moments)
    wide.refit(reader, stats, Solver(stats.covariance, wide.counting(reader), ridge))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_replay_is_the_network_wherever_it_stops(name: str) -> None:
    model, inputs = network(name), torch.randn(3, *SHAPE)
    replay = Replay(model, SHAPE, 4)
    for stop in range(0, len(replay.trace.nodes) - 2, 3):
        values = replay.begin(inputs)
        replay.run(values, 0, stop)
        kept = {each: tensor.clone() for each, tensor in values.items()}
        seen: list[torch.Tensor] = []

        def see(node: fx.Node, values: Values, seen: list[torch.Tensor] = seen) -> None:
            seen.append(values[node.name].clone())

        replay.run(kept, stop, len(replay.trace.nodes) - 1, see)
        assert torch.allclose(seen[-1][:3], model(inputs), atol=1e-5)


def test_readers_know_their_norms_and_what_they_are_added_to() -> None:
    found = {each.name: each for each in readers(trace(network("residual"), (torch.zeros(4, *SHAPE),)))}
    assert list(found) == ["stem.0", "a", "b", "c", "depth", "d", "project", "head"]
    assert {name for name, each in found.items() if each.norm} == {"stem.0", "a", "b", "c", "d"}
    assert {name for name, each in found.items() if each.uses[0].other} == {"b", "d", "project"}
    assert operation(found["d"].uses[0].other) == "conv2d"  # type: ignore[arg-type]
    assert (found["depth"].blocks, found["depth"].inputs, found["depth"].filters) == (12, 9, 12)
    without = readers(trace(network("residual"), (torch.zeros(4, *SHAPE),)), residual=False)
    assert not any(use.other for each in without for use in each.uses)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("residual", [True, False])
def test_refitting_every_layer_of_a_whole_network_changes_nothing(name: str, residual: bool) -> None:
    model, inputs = network(name), torch.from_numpy(images(48).inputs(np.arange(48)))
    wide = Wide.of(model, graph_of(model), SHAPE, 16, residual=residual)
    sampling = Sampling.of(wide, sample())
    _, original = observe(wide, sampling, ())
    front = repair.Front(wide, sampling, original)
    for reader in wide.readers.values():
        refit(wide, reader.weight, front.collect([reader])[0][reader.weight], Method().ridge)
    with torch.inference_mode():
        assert torch.allclose(wide.model(inputs), model(inputs), atol=2e-4)
    for name_, tensor in named_tensors(model):
        if name_.endswith("running_var"):
            assert bool((dict(named_tensors(wide.model))[name_] > 0).all()), name_
        if name_.endswith("weight") and tensor.dim() > 1:  # filters keep their norm in front of a BatchNorm
            after = dict(named_tensors(wide.model))[name_]
            assert torch.allclose(after.flatten(1).norm(dim=1), tensor.flatten(1).norm(dim=1), rtol=1e-3), name_


@pytest.mark.parametrize("name", NETWORKS)
def test_a_batchnorm_behind_a_refitted_layer_knows_its_inputs(name: str) -> None:
    _, done = prune(name)
    seen: dict[str, torch.Tensor] = {}
    for each, module in done.model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, inputs, each=each: seen.update({each: inputs[0].detach()}))
    done.model(torch.from_numpy(images(48).inputs(np.arange(48))))
    for each, inputs in seen.items():
        norm = done.model.get_submodule(each)
        if each in {"stem.1", "na"}:  # before the first filters that went
            continue
        assert torch.allclose(norm.running_mean, inputs.mean((0, 2, 3)), atol=1e-3)  # type: ignore[arg-type]
        assert torch.allclose(norm.running_var, inputs.var((0, 2, 3), correction=0), rtol=1e-2)  # type: ignore[arg-type]


def test_what_a_relu_hides_is_not_repaired_at_the_cost_of_what_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = network("residual"), torch.from_numpy(images(48).inputs(np.arange(48)))
    graph = graph_of(model)
    groups = (graph.group("a"),)
    errors = []
    for rounds in (0, 1, 4):
        monkeypatch.setattr(repair, "ROUNDS", rounds)
        done = prune_once(model, graph, groups, lambda _: {"a": 3}, sample(), SHAPE, Method(ridge=1e-6))
        seen: list[torch.Tensor] = []
        for each in (model, done.model):
            handle = each.get_submodule("c").register_forward_pre_hook(
                lambda _, given, seen=seen: seen.append(given[0])
            )
            with torch.inference_mode():
                each(inputs)
            handle.remove()
        errors.append(float((seen[0] - seen[1]).square().mean()))
    assert errors[0] > errors[1] > errors[2]


def test_copies_of_filters_go_without_a_trace() -> None:
    model = network("residual")
    half = 5
    with torch.no_grad():
        for tensor in (model.a.weight, model.na.weight, model.na.bias, model.na.running_mean, model.na.running_var):  # type: ignore[union-attr]
            tensor[half:] = tensor[:half]  # type: ignore[index, operator]
    graph = graph_of(model)
    groups = tuple(group for group in prunable(graph) if group.name == "a")
    done = prune_once(model, graph, groups, lambda _: {"a": half}, sample(), SHAPE, Method(ridge=1e-9))
    inputs = torch.from_numpy(images(8).inputs(np.arange(8)))
    assert done.curves["a"].error[half] < 1e-6 * done.curves["a"].error[-1]
    kept = np.flatnonzero(done.kept[graph.group("a").channels])
    assert sorted(kept % half) == list(range(half))
    with torch.inference_mode():
        assert torch.allclose(done.model(inputs), model(inputs), atol=1e-3)


def test_of_two_producers_side_by_side_that_say_the_same_not_both_go() -> None:
    torch.manual_seed(0)
    model = Fire().eval()
    model.three.load_state_dict({"weight": F.pad(model.one.weight, (1, 1, 1, 1)), "bias": model.one.bias})
    graph = graph_of(model)
    curves = weigh(model, graph, prunable(graph), sample(), SHAPE, Method()).curves
    for name in ("one", "three"):  # neither is free because the other one would be left
        assert curves[name].error[-1] > 0.01


@pytest.mark.parametrize("name", NETWORKS)
def test_the_slices_of_the_plan_are_the_network_of_full_width(name: str) -> None:
    model, done = prune(name)
    graph = graph_of(model)
    plan = settled_plan(model, graph, done.kept, example_inputs(model, SHAPE))
    inputs = torch.from_numpy(images(8).inputs(np.arange(8)))
    with torch.inference_mode():
        assert torch.allclose(apply(plan, done.model)(inputs), done.model(inputs), atol=1e-5)


@pytest.mark.parametrize("name", ["residual", "fire"])
@pytest.mark.parametrize("targets", ["symmetric", "asymmetric", "residual"])
def test_full_reconstruction_comes_nearer_than_scales_and_these_than_nothing(targets: str, name: str) -> None:
    inputs = torch.from_numpy(images(48).inputs(np.arange(48)))
    errors = {}
    for kind in ("full", "scale", "none"):
        model, done = prune(name, Method("thinet", kind, targets))  # type: ignore[arg-type]
        with torch.inference_mode():
            errors[kind] = float((done.model(inputs) - model(inputs)).square().mean())
    assert errors["full"] < min(errors["scale"], errors["none"])


@pytest.mark.parametrize("name", ["plain", "fire"])
@pytest.mark.parametrize("selection", ["elimination", "thinet", "thinet-omp", "weight-sum", "apoz", "taylor", "random"])
def test_every_selection_keeps_the_widths_asked_for(selection: str, name: str) -> None:
    model, done = prune(name, Method(selection, "scale"))  # type: ignore[arg-type]
    graph = graph_of(model)
    for group in prunable(graph):
        assert done.kept[group.channels].sum() == done.widths[group.name] == len(group.channels) // 2
        for cell in np.unique(group.cells):
            assert done.kept[group.channels[group.cells == cell]].sum() == (group.cells == cell).sum() // 2


@pytest.mark.parametrize("name", NETWORKS)
def test_the_batch_size_changes_neither_filters_nor_weights(name: str) -> None:
    _, first = prune(name, batch=16)
    for batch in (1, 7, 32):
        _, other = prune(name, batch=batch)
        assert np.array_equal(first.kept, other.kept)
        for (_, one), (_, two) in zip(named_tensors(first.model), named_tensors(other.model), strict=True):
            assert torch.allclose(one.double(), two.double(), rtol=1e-3, atol=1e-4)


def test_the_original_is_left_untouched() -> None:
    model = network("residual")
    before = copy.deepcopy(model.state_dict())
    wide = Wide.of(model, graph_of(model), SHAPE, 16)
    moments, _ = observe(wide, Sampling.of(wide, sample()), ["b.weight"])
    refit(wide, "b.weight", wide.own(wide.readers["b.weight"], moments["b.weight"]), 0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
