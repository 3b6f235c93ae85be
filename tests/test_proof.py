"""The proof of a plan: right plans pass, and it is not blind to wrong ones (design.md, D2; docs/adr/0003)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import nn

from thinet_deploy.models.vgg import VGG
from thinet_deploy.pruning import proof
from thinet_deploy.pruning.graph import ChannelGroup, channel_graph
from thinet_deploy.pruning.plan import GapHead, Indices, Plan, empty_plan, plan_group
from thinet_deploy.pruning.proof import cut, prove, randomised
from thinet_deploy.pruning.surgery import apply

SHAPE = (3, 16, 16)
Network = tuple[nn.Module, tuple[ChannelGroup, ...]]


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


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "VGG": vgg,
    "BatchNorm": normed,
    "residual": residual,
    "zero gammas": zero_gammas,
}


@pytest.fixture(scope="module", params=BUILDERS)
def network(request: pytest.FixtureRequest) -> Network:
    torch.manual_seed(0)
    model = BUILDERS[request.param]()
    model.train()(torch.randn(16, *SHAPE))  # gives BatchNorms statistics of their own
    model.eval()
    return model, channel_graph(model, SHAPE).groups


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(2))


def some_of(group: ChannelGroup, seed: int) -> list[int]:
    order = np.random.default_rng(seed).permutation(group.channels)
    return sorted(order[: group.channels // 2].tolist())


def whole_plan(model: nn.Module, groups: tuple[ChannelGroup, ...], seed: int = 0) -> Plan:
    plan, thin = empty_plan(model), model
    for group in groups:
        step = plan_group(thin, group, some_of(group, seed))
        thin, plan = apply(step, thin), plan.then(step)
    return plan


def test_right_plans_pass(network: Network) -> None:
    model, groups = network
    for plan in (empty_plan(model), whole_plan(model, groups), *(plan_group(model, g, some_of(g, 1)) for g in groups)):
        result = prove(model, plan, images(), seed=0)
        assert result.passed, result
        assert result.error <= result.tolerance < 1e-9
        assert (result.images, result.batch_sizes) == (3, (1, 3))


def test_a_plan_may_reorder_what_it_keeps(network: Network) -> None:
    model, groups = network
    plan = plan_group(model, groups[0], some_of(groups[0], 3)[::-1])
    assert prove(model, plan, images(), seed=0).passed


def test_the_pruned_network_is_the_masked_network_in_single_precision_too(network: Network) -> None:
    model, groups = network
    plan = whole_plan(model, groups)
    with torch.inference_mode():
        torch.testing.assert_close(apply(plan, model)(images()), cut(model, plan)(images()), rtol=1e-4, atol=1e-5)


def test_masking_takes_the_removed_channels_out_of_the_consumer_alone(network: Network) -> None:
    model, groups = network
    group, kept = groups[0], some_of(groups[0], 0)
    before, after = model.state_dict(), cut(model, plan_group(model, group, kept)).state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {f"{group.consumer}.weight"}
    gone = [channel for channel in range(group.channels) if channel not in kept]
    weight = after[f"{group.consumer}.weight"]
    assert not weight[:, gone].any()
    assert torch.equal(weight[:, kept], before[f"{group.consumer}.weight"][:, kept])


def change(plan: Plan, keys: list[str], dim: int, indices: Indices) -> Plan:
    keep = {name: dict(dims) for name, dims in plan.keep.items()}
    for key in keys:
        keep[key][dim] = indices
    return plan.model_copy(update={"keep": keep})


def mutations(model: nn.Module, group: ChannelGroup, seed: int) -> Iterator[tuple[str, Plan]]:
    """Plans for one group whose indices no longer belong together."""
    kept, spread = some_of(group, seed), group.spread
    plan = plan_group(model, group, kept)
    producer = [name for name in plan.keep if name.startswith(f"{group.producer}.")]
    norms = [name for name in plan.keep if name.rpartition(".")[0] in group.norms]
    shifted = [(channel + 1) % group.channels for channel in kept]
    rolled = kept[1:] + kept[:1]
    swapped = [kept[1], kept[0], *kept[2:]]
    other = [channel for channel in range(group.channels) if channel not in kept][: len(kept)]
    one_off = [*kept[:-1], other[0]]
    for name, wrong in (("shifted", shifted), ("rolled", rolled), ("swapped", swapped), ("one off", one_off)):
        yield f"producer and norms {name}", change(plan, producer + norms, 0, tuple(wrong))
        yield f"producer {name}", change(plan, producer, 0, tuple(wrong))
        yield f"weight of the producer {name}", change(plan, producer[:1], 0, tuple(wrong))
        if norms:
            yield f"norms {name}", change(plan, norms, 0, tuple(wrong))
        inputs = tuple(channel * spread + k for channel in wrong for k in range(spread))
        yield f"consumer {name}", change(plan, [f"{group.consumer}.weight"], 1, inputs)
    if spread > 1:
        turned = tuple(channel * spread + (k + 1) % spread for channel in kept for k in range(spread))
        yield "positions of the consumer turned", change(plan, [f"{group.consumer}.weight"], 1, turned)


def test_at_least_99_of_100_wrong_plans_are_refused(network: Network) -> None:
    model, groups = network
    verdicts = {
        (group.producer, name): prove(model, plan, images(), seed=0).passed
        for index, group in enumerate(groups)
        for name, plan in mutations(model, group, seed=index)
    }
    assert len(verdicts) > 16 * len(groups) - 6
    passed = [key for key, verdict in verdicts.items() if verdict]
    assert len(passed) <= len(verdicts) // 100, passed


def test_wrong_plans_of_several_groups_are_refused_and_located(network: Network) -> None:
    model, groups = network
    right = whole_plan(model, groups)
    for group in groups:
        keys = [name for name in right.keep if name.startswith(f"{group.producer}.")]
        kept = right.keep[keys[0]][0]
        result = prove(model, change(right, keys, 0, kept[1:] + kept[:1]), images(), seed=0)
        assert not result.passed
        assert result.place in {proof.OUTPUT, *(later.consumer for later in groups)}


def test_zero_gammas_hide_a_mistake_from_the_output_and_the_randomised_copy_shows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = zero_gammas().eval()
    group = channel_graph(model, SHAPE).groups[1]
    # The consumer's own output tells; what is left are the networks in which not even that is looked at.
    plan = plan_group(model, group, some_of(group, 0))
    wrong = change(plan, [f"{group.producer}.weight"], 0, tuple(some_of(group, 5)))
    with torch.inference_mode():
        thin, masked = apply(wrong, model)(images()), cut(model, wrong)(images())
    assert torch.equal(thin, masked)
    assert not prove(model, wrong, images(), seed=0).passed
    observe = proof._observe

    def output_only(model: nn.Module, plan: Plan, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {proof.OUTPUT: observe(model, plan, batch)[proof.OUTPUT]}

    monkeypatch.setattr(proof, "_observe", output_only)
    assert not prove(model, wrong, images(), seed=0).passed
    monkeypatch.setattr(proof, "randomised", lambda model, seed: model)
    assert prove(model, wrong, images(), seed=0).passed


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
    group = channel_graph(model, SHAPE).groups[0]
    wrong = [plan for name, plan in mutations(model, group, 0) if name.startswith(("producer", "consumer"))]
    assert not any(prove(model, plan, images(), seed=0).passed for plan in wrong)
    monkeypatch.setattr(proof, "randomised", lambda model, seed: model)
    assert all(prove(model, plan, images(), seed=0).passed for plan in wrong)


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
    plan = whole_plan(model, channel_graph(model, SHAPE).groups)
    model.state_dict()[tensor].fill_(value)
    assert not prove(model, plan, images(), seed=0).passed


def test_a_replaced_head_does_not_matter_to_the_proof() -> None:
    torch.manual_seed(0)
    model = vgg().eval()
    plan = whole_plan(model, channel_graph(model, SHAPE).groups).model_copy(
        update={"head": GapHead(features=8, classes=5)}
    )
    assert prove(model, plan, images(), seed=0).passed


def test_the_proof_changes_nothing(network: Network) -> None:
    model, groups = network
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prove(model, whole_plan(model, groups), images(), seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
