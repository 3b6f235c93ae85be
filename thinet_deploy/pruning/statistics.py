"""ThiNet's samples and their Gram matrix: what the selection sees of a consumer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from ..data import ImageSet
from ..errors import ModelError
from ..seeds import derive, generator
from .graph import STAYS, ChannelGroup, Consumer
from .plan import Plan, members
from .watch import Call, watch


@dataclass(frozen=True)
class Draws:
    """Where one image is sampled: filter j at output position (y, x), arrays of shape (draws,)."""

    filters: NDArray[np.int64]
    ys: NDArray[np.int64]
    xs: NDArray[np.int64]


@dataclass(frozen=True)
class Geometry:
    """A consumer as a plain convolution.

    Attributes:
        weight: (filters, inputs per group, height, width), in float64.
        stride: vertical and horizontal step, in pixels.
        dilation: distance of kernel positions, in pixels.
        groups: of the convolution.
    """

    weight: torch.Tensor
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


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


def as_convolution(call: Call) -> tuple[Geometry, torch.Tensor]:
    """A consumer and its padded inputs (images, inputs, height, width), as a plain 2-D convolution without padding.

    A linear layer is a 1×1 convolution over all positions; a transposed convolution is one over inputs that are
    spread by its stride, with its kernel turned round.

    Raises:
        ModelError: it is a 3-D convolution.
    """
    given = call.given
    data, weight = given["input"].detach(), given["weight"].detach().double()
    if "stride" not in given:
        data = data.movedim(-1, 1).flatten(2).unsqueeze(-1) if data.dim() > 2 else data[:, :, None, None]
        return Geometry(weight[:, :, None, None], (1, 1), (1, 1), 1), data
    if weight.dim() > 4:
        raise ModelError(f"{call.weight} belongs to a 3-D convolution; ThiNet's samples are taken from 2-D ones.")
    if weight.dim() == 3:
        data, weight = data.unsqueeze(2), weight.unsqueeze(2)
    stride, dilation = _pair(given["stride"]), _pair(given["dilation"])
    reach = [step * (size - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
    if "output_padding" not in given:
        padding = given["padding"]
        if padding == "same":
            sides = [(whole // 2, whole - whole // 2) for whole in reach]
        else:
            sides = [(each, each) for each in _pair(0 if padding == "valid" else padding)]
        return Geometry(weight, stride, dilation, given["groups"]), F.pad(data, (*sides[1], *sides[0]))
    spread = data.new_zeros(
        *data.shape[:2], *((size - 1) * step + 1 for size, step in zip(data.shape[2:], stride, strict=True))
    )
    spread[:, :, :: stride[0], :: stride[1]] = data
    sides = [
        (far - padding, far - padding + extra)
        for far, padding, extra in zip(reach, _pair(given["padding"]), _pair(given["output_padding"]), strict=True)
    ]
    parts = weight.flip(2, 3).chunk(given["groups"])
    turned = torch.cat([part.transpose(0, 1) for part in parts])
    return Geometry(turned, (1, 1), dilation, given["groups"]), F.pad(spread, (*sides[1], *sides[0]))


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    """One number for both directions, or the one that a 1-D operation has."""
    if isinstance(value, int):
        return value, value
    return (value[0], value[1]) if len(value) > 1 else (1 if value[0] > 0 else 0, value[0])


def draw(filters: int, height: int, width: int, draws: int, *key: int | str) -> Draws:
    """Output filters and positions drawn uniformly (zero padding included); they depend on `key` only."""
    rng = generator(*key, "draws")
    return Draws(rng.integers(filters, size=draws), rng.integers(height, size=draws), rng.integers(width, size=draws))


def map_size(consumer: Geometry, inputs: torch.Tensor) -> tuple[int, int]:
    """Height and width of a consumer's output for padded inputs."""
    reach = [step * (size - 1) for step, size in zip(consumer.dilation, consumer.weight.shape[2:], strict=True)]
    height, width = (
        (size - far - 1) // step + 1 for size, far, step in zip(inputs.shape[2:], reach, consumer.stride, strict=True)
    )
    return height, width


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
    """G = X̂ᵀX̂ over sampled rows of a group's consumers, as the papers sample them; several consumers are summed.

    The rows depend on (seed, layer, image) only: not on batch size or order.

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
    for part in _chunks(chosen, batch):
        calls = consumer_calls(model, group.consumers, torch.from_numpy(images.inputs(part)))
        for number, (call, place) in enumerate(zip(calls, places, strict=True)):
            consumer, inputs = as_convolution(call)
            size = map_size(consumer, inputs)
            key = group.name if number == 0 else f"{group.name} {number}"
            sampled = [draw(len(consumer.weight), *size, draws, derive(seed, "sample", key, int(i))) for i in part]
            shares, mine = contributions(consumer, inputs, sampled), place != STAYS
            rows = shares.new_zeros(len(shares), len(gram)).index_add_(1, place[mine], shares[:, mine])
            gram += rows.T @ rows
    if not bool(gram.isfinite().all()):
        raise ModelError(
            f"What enters {group.consumers[0].weight.removesuffix('.weight')} is not finite (NaN or infinite), "
            "so its filters cannot be judged.",
            hint="The weights are damaged, or training diverged: check --weights, or lower --lr.",
        )
    return gram.numpy(), len(chosen) * draws * len(group.consumers)


def _chunks(indices: NDArray[np.int64], size: int) -> Iterable[NDArray[np.int64]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
