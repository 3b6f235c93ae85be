"""The proof that a pruned network is the same network minus filters (docs/adr/0003).

In float64 and before any reconstruction, the pruned network is compared with the original whose removed
channels are cut at their consumers: at every consumer and at the output, at two batch sizes, on the real
weights and on a copy with all parameters and buffers random (zeros in trained weights hide mistakes).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..seeds import derive
from .graph import ChannelGraph, Consumer
from .plan import Plan
from .surgery import apply
from .trace import Inputs, named_tensors
from .watch import Call, watch

OUTPUT = "output"
# A wrong index changes outputs by parts in a hundred; rounding in another order by a few units in the last place.
_NOISE_FACTOR = 64
# Large enough that the response is not itself rounding, small enough to be linear.
_NUDGE = 2.0**-30


@dataclass(frozen=True)
class Proof:
    """The verdict on a plan.

    Attributes:
        passed: whether the error is within the tolerance everywhere.
        error: largest difference, relative to the largest value at that place.
        tolerance: from the cut network's own response to small changes of its weights and inputs, scaled down to
            one unit in the last place.
        place: where the error is closest to, or furthest above, its tolerance: a consumer's module name, or "output".
        group: producers of the channels that are read there; "" for the output.
        images: how many inputs were used.
        batch_sizes: that were run.
    """

    passed: bool
    error: float
    tolerance: float
    place: str
    group: str
    images: int
    batch_sizes: tuple[int, ...]


def cut(model: nn.Module, graph: ChannelGraph, plan: Plan) -> nn.Module:
    """A copy of the original in which consumers ignore the channels that the plan removes; nothing is sliced."""
    masked = copy.deepcopy(model)
    tensors = dict(named_tensors(masked))
    for consumer in {(each.weight, each.dim): each for group in graph.groups for each in group.consumers}.values():
        indices = plan.keep.get(consumer.weight, {}).get(consumer.dim)
        if consumer.weight.removesuffix(".weight") in plan.vanished:
            tensors[consumer.weight].detach().zero_()
            continue
        if indices is None:
            continue
        weight = tensors[consumer.weight].detach().movedim(consumer.dim, 0)
        groups = plan.grouped.get(consumer.weight, 1)
        goes = torch.ones(len(weight) * groups, dtype=torch.bool)
        goes[list(indices)] = False
        for group, part in enumerate(goes.chunk(groups)):  # a grouped convolution's filters read only their own part
            filters = weight.shape[1] // groups
            weight[part, group * filters : (group + 1) * filters] = 0
    return masked


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose parameters and buffers are random and nowhere zero, of a size that keeps activations moderate."""
    other = copy.deepcopy(model)
    rng = torch.Generator().manual_seed(derive(seed, "randomised"))
    for tensor in other.state_dict().values():
        if not tensor.is_floating_point():
            continue
        if tensor.dim() > 1:
            fan_in = tensor[0].numel()
            tensor.copy_(torch.randn(tensor.shape, generator=rng) * (2 / fan_in) ** 0.5)
        else:
            tensor.copy_(torch.rand(tensor.shape, generator=rng) + 0.5)
    return other


def prove(model: nn.Module, graph: ChannelGraph, plan: Plan, inputs: Inputs, *, seed: int) -> Proof:
    """Prove a plan on the original network (the head is left as it is).

    Args:
        model: the original.
        graph: its channels.
        plan: whose indices are to be proved.
        inputs: real inputs of the network, each (n, …), n at least 2.
        seed: of the randomised copy.
    """
    body = plan.model_copy(update={"head": None})
    sizes = (1, len(inputs[0]))
    rows: list[tuple[str, float, float]] = []
    for base in (model, randomised(model, seed)):
        original = copy.deepcopy(base).double().eval()
        thin, masked = apply(body, original), cut(original, graph, body)
        del original
        batches = [
            tuple(each[:size].double() if each.is_floating_point() else each[:size] for each in inputs)
            for size in sizes
        ]
        rows += _compare(masked, thin, graph, body, batches)
    place, error, tolerance = max(rows, key=_excess)
    return Proof(error <= tolerance, error, tolerance, place, _feeders(graph, place), len(inputs[0]), sizes)


def _feeders(graph: ChannelGraph, place: str) -> str:
    """The producers whose channels a consumer reads."""
    name = place.partition(" (")[0]
    groups = [group for group in graph.groups if any(_named(each) == name for each in group.consumers)]
    return ", ".join(dict.fromkeys(producer for group in groups for producer in group.producers))


def _named(consumer: Consumer) -> str:
    return consumer.weight.removesuffix(".weight")


def _excess(row: tuple[str, float, float]) -> float:
    """Error in units of the tolerance; what is no number is the worst."""
    _, error, tolerance = row
    return math.inf if math.isnan(error / tolerance) else error / tolerance


def _compare(
    masked: nn.Module, thin: nn.Module, graph: ChannelGraph, plan: Plan, batches: Sequence[Inputs]
) -> list[tuple[str, float, float]]:
    """(place, error, tolerance) at every consumer and at the output, each relative to the largest value there.

    `masked` is not what it was afterwards.
    """
    gone = {name for end, branch in plan.vanished.items() for name in (end, *branch.inside)}
    consumers = [each for group in graph.groups for each in group.consumers if _named(each) not in gone]
    filters = {each.weight: plan.keep.get(each.weight, {}) for each in consumers}
    expected = [_observe(masked, filters, batch) for batch in batches]
    got = [_observe(thin, {name: {} for name in filters}, batch) for batch in batches]
    errors = [
        {place: _apart(value, other.get(place)) for place, value in mine.items()}
        for mine, other in zip(expected, got, strict=True)
    ]
    del got
    rng = torch.Generator().manual_seed(0)
    for tensor in masked.state_dict().values():
        tensor.copy_(_nudged(tensor, rng))
    rows = []
    for batch, values, apart in zip(batches, expected, errors, strict=True):
        nudged = _observe(masked, filters, tuple(_nudged(each, rng) for each in batch))
        for place, value in values.items():
            noise = _apart(value, nudged[place]) / _NUDGE + 1
            rows.append((place, apart[place], _NOISE_FACTOR * noise * torch.finfo(torch.float64).eps))
    return rows


def _nudged(tensor: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor * (1 + _NUDGE * torch.randn(tensor.shape, generator=rng, dtype=torch.float64))


def _apart(value: torch.Tensor, other: torch.Tensor | None) -> float:
    """The largest difference, relative to the largest value."""
    if other is None or other.shape != value.shape:
        return math.inf
    return float((value - other).abs().max()) / max(float(value.abs().max()), torch.finfo(torch.float64).tiny)


def _observe(
    model: nn.Module, filters: Mapping[str, Mapping[int, Sequence[int]]], batch: Inputs
) -> dict[str, torch.Tensor]:
    """Outputs of consumers, reduced to the filters named, and of the network."""
    seen: dict[str, torch.Tensor] = {}

    def see(call: Call) -> None:
        place = call.weight.removesuffix(".weight") + (f" (use {call.number + 1})" if call.number else "")
        stays = filters[call.weight].get(int("output_padding" in call.given))  # the dimension of a weight's filters
        channel = -1 if call.given["weight"].dim() == 2 else 1
        # clone: an in-place ReLU behind the consumer would overwrite what was seen
        seen[place] = call.output.clone() if stays is None else call.output.index_select(channel, torch.tensor(stays))

    with torch.inference_mode(), watch(model, filters, see):
        outputs = tree_leaves(model(*batch))
    for index, output in enumerate(each for each in outputs if isinstance(each, torch.Tensor)):
        seen[OUTPUT if index == 0 else f"{OUTPUT} {index + 1}"] = output
    return seen
