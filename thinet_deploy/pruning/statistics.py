"""ThiNet's samples and their Gram matrix: what the selection sees of a consumer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..data.dataset import ImageSet
from ..errors import NOT_FINITE, ModelError
from ..parallel import join
from ..seeds import derive, generator
from .geometry import Geometry, as_convolution, map_size
from .graph import STAYS, ChannelGroup, Consumer
from .plan import Plan, members
from .watch import Call, watch


@dataclass(frozen=True)
class Draws:
    """Where one image is sampled: filter j at output position (y, x), arrays of shape (draws,)."""

    filters: NDArray[np.int64]
    ys: NDArray[np.int64]
    xs: NDArray[np.int64]


class _ReachedError(Exception):
    """Ends a forward pass once all consumers have run."""


def consumer_calls(model: nn.Module, consumers: Sequence[Consumer], images: torch.Tensor) -> list[Call]:
    """What really enters the consumers (after ReLU, pooling, flattening); the pass ends at the last of them."""
    seen: dict[tuple[str, int], Call] = {}
    wanted = [(each.weight, each.call) for each in consumers]

    def see(call: Call) -> None:
        seen[call.weight, call.number] = call
        if all(each in seen for each in wanted):
            raise _ReachedError

    with contextlib.suppress(_ReachedError), torch.inference_mode(), watch(model, [name for name, _ in wanted], see):
        model(images)
    return [seen[each] for each in wanted]


def draw(filters: int, height: int, width: int, draws: int, *key: int | str) -> Draws:
    """Output filters and positions drawn uniformly (zero padding included); they depend on `key` only."""
    rng = generator(*key, "draws")
    return Draws(rng.integers(filters, size=draws), rng.integers(height, size=draws), rng.integers(width, size=draws))


def contributions(consumer: Geometry, inputs: torch.Tensor, draws: list[Draws]) -> torch.Tensor:
    """x̂ of ThiNet (ICCV 2017, section 3.2): each input's share of sampled outputs.

    x̂_c = Σ_k W[j, c, k] · X[c, p + k], so Σ_c x̂_c = output − bias. Inputs outside filter j's group contribute 0.

    Args:
        consumer: the convolution.
        inputs: its padded inputs, (images, inputs, height, width).
        draws: one per image, all of the same length.

    Returns:
        Rows (images · draws, inputs), in float64.
    """
    image, j, ys, xs = _rows(draws)
    (kernel_h, kernel_w), (step_h, step_w) = consumer.weight.shape[2:], consumer.stride
    rows_h = ys[:, None] * step_h + torch.arange(kernel_h) * consumer.dilation[0]
    rows_w = xs[:, None] * step_w + torch.arange(kernel_w) * consumer.dilation[1]
    filters, per_group = consumer.weight.shape[:2]
    first = torch.div(j, filters // consumer.groups, rounding_mode="floor") * per_group
    channels = first[:, None] + torch.arange(per_group)
    patches = inputs[
        image[:, None, None, None], channels[:, :, None, None], rows_h[:, None, :, None], rows_w[:, None, None, :]
    ].double()
    share = (patches * consumer.weight[j]).sum((2, 3))
    return torch.zeros(len(j), inputs.shape[1], dtype=torch.float64).scatter_(1, channels, share)


def _rows(draws: list[Draws]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    image = np.repeat(np.arange(len(draws)), [len(d.filters) for d in draws])
    columns = (image, *(np.concatenate([getattr(d, name) for d in draws]) for name in ("filters", "ys", "xs")))
    first, second, third, fourth = (torch.from_numpy(column) for column in columns)
    return first, second, third, fourth


def sampled_gram(
    model: nn.Module,
    group: ChannelGroup,
    plan: Plan,
    images: ImageSet,
    chosen: NDArray[np.int64],
    *,
    draws: int,
    seed: int,
    batch: int = 64,
) -> tuple[NDArray[np.float64], int]:
    """G = X̂ᵀX̂ over sampled rows of a group's consumers, as the papers sample them.

    Several consumers are summed, each by its number of filters: as if rows were drawn from all filters alike.

    The rows depend on (seed, layer, image) only: not on batch size, order, or how many processes share the images.

    Args:
        model: the network as it stands, in eval mode.
        group: whose filters are judged.
        plan: that led to the network; it keeps the whole group.
        images: training images, centre-cropped, without augmentation.
        chosen: indices of the images to use.
        draws: samples per image and consumer.
        seed: of the run.
        batch: images per forward pass.

    Returns:
        G (channels, channels) in float64, and the number of rows.

    Raises:
        ModelError: the network computes NaN or infinity.
    """
    model.eval()
    gram = torch.zeros(len(group.channels), len(group.channels), dtype=torch.float64)
    places = [torch.from_numpy(members(group, each, plan)) for each in group.consumers]
    filters = torch.zeros(len(places), dtype=torch.float64)  # of each consumer, once for each image
    team = join()
    for part in _chunks(team.mine(chosen), batch):
        calls = consumer_calls(model, group.consumers, torch.from_numpy(images.inputs(part)))
        for number, (call, place) in enumerate(zip(calls, places, strict=True)):
            consumer, inputs = as_convolution(call.given)
            size = map_size(consumer, inputs)
            key = group.name if number == 0 else f"{group.name} {number}"
            sampled = [draw(len(consumer.weight), *size, draws, derive(seed, "sample", key, int(i))) for i in part]
            shares, mine = contributions(consumer, inputs, sampled), place != STAYS
            rows = shares.new_zeros(len(shares), len(gram)).index_add_(1, place[mine], shares[:, mine])
            filters[number] += len(consumer.weight) * len(part)
            gram += rows.T @ rows * (len(consumer.weight) if len(places) > 1 else 1)
    team.sum_(gram)
    if len(places) > 1:
        gram /= team.sum_(filters).mean() / len(chosen)
    if not bool(gram.isfinite().all()):
        raise ModelError(
            f"What enters {group.consumers[0].weight.removesuffix('.weight')} is not finite (NaN or infinite), "
            "so its filters cannot be judged.",
            hint=NOT_FINITE,
        )
    return gram.numpy(), len(chosen) * draws * len(group.consumers)


def _chunks(indices: NDArray[np.int64], size: int) -> Iterable[NDArray[np.int64]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
