"""The proof that a pruned network is the same network minus filters (docs/adr/0003).

In float64 and before any reconstruction, the pruned network is compared with the original whose removed
channels are cut at their consumers: at every consumer and at the output, at two batch sizes, on the real
weights and on a copy with all parameters and buffers random (zeros in trained weights hide mistakes).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn

from ..seeds import derive
from .plan import Plan
from .surgery import apply

OUTPUT = "output"
# A wrong index changes outputs by parts in a hundred; rounding in another order by a few units in the last place.
_NOISE_FACTOR = 64


@dataclass(frozen=True)
class Proof:
    """The verdict on a plan.

    Attributes:
        passed: whether the error is within the tolerance everywhere.
        error: largest difference, relative to the largest value at that place.
        tolerance: from the cut network's own response to inputs changed by one unit in the last place.
        place: where the error is closest to, or furthest above, its tolerance: a consumer's module name, or "output".
        images: how many inputs were used.
        batch_sizes: that were run.
    """

    passed: bool
    error: float
    tolerance: float
    place: str
    images: int
    batch_sizes: tuple[int, ...]


def cut(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the original in which consumers ignore the channels that the plan removes; nothing is sliced."""
    masked = copy.deepcopy(model)
    for name, dims in plan.keep.items():
        if 1 in dims:
            weight = masked.get_parameter(name)
            stays = torch.zeros(weight.shape[1], dtype=torch.bool)
            stays[list(dims[1])] = True
            with torch.no_grad():
                weight[:, ~stays] = 0
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


def prove(model: nn.Module, plan: Plan, images: torch.Tensor, *, seed: int) -> Proof:
    """Prove a plan on the original network (the head is left as it is).

    Args:
        model: the original.
        plan: whose indices are to be proved.
        images: real inputs (n, channels, height, width), n at least 2.
        seed: of the randomised copy.
    """
    body = plan.model_copy(update={"head": None})
    sizes = (1, len(images))
    rows: list[tuple[str, float, float]] = []
    for base in (model, randomised(model, seed)):
        original = copy.deepcopy(base).double().eval()
        thin, masked = apply(body, original), cut(original, body)
        for size in sizes:
            rows += _compare(masked, thin, body, images[:size].double())
    place, error, tolerance = max(rows, key=_excess)
    return Proof(error <= tolerance, error, tolerance, place, len(images), sizes)


def _excess(row: tuple[str, float, float]) -> float:
    """Error in units of the tolerance; what is no number is the worst."""
    _, error, tolerance = row
    return math.inf if math.isnan(error / tolerance) else error / tolerance


def _compare(masked: nn.Module, thin: nn.Module, plan: Plan, batch: torch.Tensor) -> list[tuple[str, float, float]]:
    """(place, error, tolerance) at every consumer and at the output, each relative to the largest value there."""
    expected, got = _observe(masked, plan, batch), _observe(thin, plan, batch)
    nudged = _observe(masked, plan, batch * (1 + torch.finfo(torch.float64).eps))
    rows = []
    for place, value in expected.items():
        indices = plan.keep.get(f"{place}.weight", {}).get(0)
        stays = slice(None) if indices is None else torch.tensor(indices)
        scale = max(float(value.abs().max()), torch.finfo(torch.float64).tiny)
        noise = float((value - nudged[place]).abs().max()) / scale
        tolerance = _NOISE_FACTOR * (noise + torch.finfo(torch.float64).eps)
        rows.append((place, float((value[:, stays] - got[place]).abs().max()) / scale, tolerance))
    return rows


def _observe(model: nn.Module, plan: Plan, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs of all consumers of the plan, and of the network."""
    seen: dict[str, torch.Tensor] = {}
    consumers = [name.removesuffix(".weight") for name, dims in plan.keep.items() if 1 in dims]

    def watch(place: str) -> torch.utils.hooks.RemovableHandle:
        # clone: an in-place ReLU behind the consumer would overwrite what was seen
        return model.get_submodule(place).register_forward_hook(lambda _, __, out: seen.update({place: out.clone()}))

    hooks = [watch(place) for place in consumers]
    try:
        with torch.inference_mode():
            seen[OUTPUT] = model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
