"""The proof of a plan: right plans pass, and it is not blind to wrong ones (design.md, D2; docs/adr/0003)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from thinet_deploy.models.vgg import VGG
from thinet_deploy.pruning import proof
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.graph import ChannelGraph, ChannelGroup
from thinet_deploy.pruning.plan import GapHead, Indices, Plan, empty_plan, plan_channels
from thinet_deploy.pruning.proof import cut, prove, randomised
from thinet_deploy.pruning.retrace import settled_plan
from thinet_deploy.pruning.surgery import apply
from thinet_deploy.pruning.trace import Inputs, example_inputs

SHAPE = (3, 16, 16)
Network = tuple[nn.Module, ChannelGraph]


class Residual(nn.Module):
    """A bottleneck with a shortcut."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(inplace=True)),
            *(nn.Conv2d(inner, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(inplace=True)),
            *(nn.Conv2d(inner, channels, 1, bias=False), nn.BatchNorm2d(channels)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.body(x))


def vgg() -> nn.Module:
    return VGG(((8, 8), (12, 12), (16, 16)), (20,), input_shape=SHAPE, num_classes=5)


def normed() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU(inplace=True)),
        *(nn.Conv2d(10, 12, 3, stride=2), nn.BatchNorm2d(12), nn.SiLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(12, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 5)),
    )


def residual() -> nn.Module:
    blocks = (Residual(12, 6), Residual(12, 8), Residual(12, 6))
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)
    )


def zero_gammas() -> nn.Module:
    """As ResNets start: the last BatchNorm of every block is zero, so that a block's body does not count."""
    model = residual()
    for module in model.modules():
        if isinstance(module, Residual):
            last = module.body[-1]
            assert isinstance(last, nn.BatchNorm2d)
            nn.init.zeros_(last.weight)
    return model


class Mixed(nn.Module):
    """Grouped and depthwise convolutions, shuffle, split, concatenation, squeeze and excite, a slope per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.slope, self.norm = nn.Conv2d(3, 12, 3, 2), nn.PReLU(12), nn.BatchNorm2d(12)
        self.first, self.second = nn.Conv2d(12, 12, 1, groups=3), nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.depth, self.point = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 8, 1)
        self.squeeze, self.excite = nn.Conv2d(14, 6, 1), nn.Conv2d(6, 14, 1)
        self.up, self.head = nn.ConvTranspose2d(14, 6, 2, 2), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.norm(self.slope(self.stem(x))))
        n, c, h, w = x.shape
        x = self.second(x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)).relu()
        left, right = x.chunk(2, 1)
        x = torch.cat([left, self.point(self.depth(right)).relu()], 1)
        x = x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.head(torch.relu(self.up(x)).mean((2, 3)))  # type: ignore[no-any-return]


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "VGG": vgg,
    "BatchNorm": normed,
    "residual": residual,
    "zero gammas": zero_gammas,
    "mixed": Mixed,
}


def graph_of(model: nn.Module) -> ChannelGraph:
    return channel_graph(model, example_inputs(model, SHAPE))


@pytest.fixture(scope="module", params=BUILDERS)
def network(request: pytest.FixtureRequest) -> Network:
    torch.manual_seed(0)
    model = BUILDERS[request.param]()
    model.train()(torch.randn(16, *SHAPE))  # gives BatchNorms statistics of their own
    model.eval()
    return model, graph_of(model)


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(2))


def real(count: int = 3) -> Inputs:
    return (images(count),)


def choose(graph: ChannelGraph, groups: Iterable[ChannelGroup], seed: int) -> NDArray[np.bool_]:
    """About half of the channels of some groups, the same share of every cell; all of the others."""
    kept, rng = np.ones(graph.channels, dtype=bool), np.random.default_rng(seed)
    for group in groups:
        share = max(1, group.steps // 2) / group.steps
        for cell in np.unique(group.cells):
            mine = rng.permutation(group.channels[group.cells == cell])
            kept[mine[round(len(mine) * share) :]] = False
    return kept


def plan_for(model: nn.Module, graph: ChannelGraph, *groups: ChannelGroup, seed: int = 0) -> Plan:
    return settled_plan(model, graph, choose(graph, groups or graph.groups, seed), example_inputs(model, SHAPE))


def test_right_plans_pass(network: Network) -> None:
    model, graph = network
    each = (plan_for(model, graph, group, seed=1) for group in graph.groups)
    for plan in (empty_plan(model), plan_for(model, graph), *each):
        result = prove(model, graph, plan, real(), seed=0)
        assert result.passed, result
        assert result.error <= result.tolerance < 1e-9
        assert (result.images, result.batch_sizes) == (3, (1, 3))


def test_a_plan_may_reorder_what_it_keeps() -> None:
    torch.manual_seed(0)
    model = normed().eval()
    graph = graph_of(model)
    plan = plan_for(model, graph, graph.groups[0])
    turned = {name: {dim: kept[::-1] for dim, kept in dims.items()} for name, dims in plan.keep.items()}
    assert prove(model, graph, plan.model_copy(update={"keep": turned}), real(), seed=0).passed


def test_the_pruned_network_is_the_masked_network_in_single_precision_too(network: Network) -> None:
    model, graph = network
    plan = plan_for(model, graph)
    with torch.inference_mode():
        got, expected = apply(plan, model)(images()), cut(model, graph, plan)(images())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_masking_takes_the_removed_channels_out_of_the_consumers_alone(network: Network) -> None:
    model, graph = network
    group = graph.groups[0]
    kept = choose(graph, [group], 0)
    plan = plan_channels(model, graph, kept)
    before, after = model.state_dict(), cut(model, graph, plan).state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {consumer.weight for consumer in group.consumers}
    for consumer in group.consumers:
        was, now = before[consumer.weight], after[consumer.weight]
        per_group, filters = was.shape[1], len(was) * was.shape[1] // len(consumer.channels)
        for index, channel in enumerate(consumer.channels.tolist()):
            stays, first = channel < 0 or kept[channel], index // per_group * filters
            rows = slice(first, first + filters) if consumer.dim == 1 else slice(None)
            old, new = (each.movedim(consumer.dim, 0) for each in (was, now))
            column = index % per_group if consumer.dim == 1 else index
            assert torch.equal(new[column][rows], old[column][rows] if stays else 0 * old[column][rows])


def change(plan: Plan, name: str, dim: int, indices: Indices) -> Plan:
    keep = {key: dict(dims) for key, dims in plan.keep.items()}
    keep[name][dim] = indices
    return plan.model_copy(update={"keep": keep})


def rolled(plan: Plan, name: str, dim: int) -> Indices:
    """Indices turned round by one; of a grouped convolution within each group."""
    groups = plan.grouped.get(name, 1)
    return tuple(np.roll(np.array(plan.keep[name][dim]).reshape(groups, -1), 1, axis=1).ravel().tolist())


def mutations(plan: Plan, graph: ChannelGraph) -> Iterator[tuple[tuple[str, int, str], Plan]]:
    """Plans of which one dimension of one parameter no longer belongs to the rest."""
    for axis in graph.axes:
        (name, dim), kept = axis.site, plan.keep.get(axis.site.parameter, {}).get(axis.site.dim)
        if kept is None or len(set(axis.channels[list(kept)])) < 2:
            continue
        groups = plan.grouped.get(name, 1)
        wrong = {"rolled": rolled(plan, name, dim)}
        gone = [index for index in range(len(axis.channels)) if index not in kept]
        if gone and groups == 1:
            wrong["one off"] = (*kept[:-1], gone[0])
            wrong["first off"] = (gone[-1], *kept[1:])
        wrong["swapped"] = (kept[1], kept[0], *kept[2:])
        for kind, indices in wrong.items():
            same = indices == kept or (kind == "swapped" and len(set(axis.channels[list(kept[:2])])) == 1)
            if not same:
                yield (name, dim, kind), change(plan, name, dim, indices)


def refuses(model: nn.Module, graph: ChannelGraph, plan: Plan) -> bool:
    return not prove(model, graph, plan, real(2), seed=0).passed


def test_at_least_99_of_100_wrong_plans_are_refused(network: Network) -> None:
    model, graph = network
    plans = [plan_for(model, graph), plan_for(model, graph, graph.groups[-1], seed=3)]
    verdicts = [
        (number, where, refuses(model, graph, wrong))
        for number, plan in enumerate(plans)
        for where, wrong in mutations(plan, graph)
    ]
    assert len(verdicts) > 8 * len(graph.groups)
    passed = [(number, where) for number, where, refused in verdicts if not refused]
    assert len(passed) <= len(verdicts) // 100, passed


def test_wrong_plans_are_located(network: Network) -> None:
    model, graph = network
    plan = plan_for(model, graph)
    places = {consumer.weight.removesuffix(".weight") for group in graph.groups for consumer in group.consumers}
    for group in graph.groups:
        weight = f"{group.name}.weight"
        dim = next(axis.site.dim for axis in graph.axes if axis.producer and axis.site.parameter == weight)
        result = prove(model, graph, change(plan, weight, dim, rolled(plan, weight, dim)), real(), seed=0)
        assert not result.passed
        assert result.place in places | {proof.OUTPUT}


def test_zero_gammas_hide_a_mistake_from_the_output_and_the_randomised_copy_shows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = zero_gammas().eval()
    graph = graph_of(model)
    group = next(group for group in graph.groups if group.name.endswith("body.3"))
    # The consumer's own output tells; what is left are the networks in which not even that is looked at.
    plan = plan_for(model, graph, group)
    weight = f"{group.name}.weight"
    wrong = change(plan, weight, 0, rolled(plan, weight, 0))
    with torch.inference_mode():
        thin, masked = apply(wrong, model)(images()), cut(model, graph, wrong)(images())
    assert torch.equal(thin, masked)
    assert not prove(model, graph, wrong, real(), seed=0).passed
    observe = proof._observe

    def output_only(model: nn.Module, filters: Any, batch: Inputs) -> dict[str, torch.Tensor]:
        return {proof.OUTPUT: observe(model, filters, batch)[proof.OUTPUT]}

    monkeypatch.setattr(proof, "_observe", output_only)
    assert not prove(model, graph, wrong, real(), seed=0).passed
    monkeypatch.setattr(proof, "randomised", lambda model, seed: model)
    assert prove(model, graph, wrong, real(), seed=0).passed


def dead_consumers() -> nn.Module:
    """The first BatchNorm's gamma and beta are zero: its channels look all alike, and every index right."""
    model = normed()
    norm = model.get_submodule("1")
    assert isinstance(norm, nn.BatchNorm2d)
    nn.init.zeros_(norm.weight)
    nn.init.zeros_(norm.bias)
    return model


def test_channels_that_are_all_alike_are_told_apart_by_the_randomised_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = dead_consumers().eval()
    graph = graph_of(model)
    plan = plan_for(model, graph, graph.groups[0])
    wrong = [change(plan, name, dim, rolled(plan, name, dim)) for name, dim in (("0.weight", 0), ("3.weight", 1))]
    # A wrong order of the consumer's inputs is seen by itself only where these differ.
    assert not any(prove(model, graph, each, real(), seed=0).passed for each in wrong)
    monkeypatch.setattr(proof, "randomised", lambda model, seed: model)
    assert all(prove(model, graph, each, real(), seed=0).passed for each in wrong)


def test_the_randomised_copy_has_no_zeros_keeps_the_original_and_depends_on_the_seed() -> None:
    model = zero_gammas().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, again, other = randomised(model, 1), randomised(model, 1), randomised(model, 2)
    for name, tensor in first.state_dict().items():
        if tensor.is_floating_point():
            assert (tensor != 0).all()
            assert torch.equal(tensor, again.state_dict()[name])
            assert not torch.equal(tensor, other.state_dict()[name])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["0.weight", "3.bias", "4.running_mean", "10.bias"])
def test_a_network_that_computes_no_numbers_is_refused(value: float, tensor: str) -> None:
    torch.manual_seed(0)
    model = normed().eval()
    graph = graph_of(model)
    plan = plan_for(model, graph)
    model.state_dict()[tensor].fill_(value)
    assert not prove(model, graph, plan, real(), seed=0).passed


def test_a_replaced_head_does_not_matter_to_the_proof() -> None:
    torch.manual_seed(0)
    model = vgg().eval()
    graph = graph_of(model)
    plan = plan_for(model, graph).model_copy(update={"head": GapHead(features=8, classes=5)})
    assert prove(model, graph, plan, real(), seed=0).passed


def test_the_proof_changes_nothing(network: Network) -> None:
    model, graph = network
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prove(model, graph, plan_for(model, graph), real(), seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
