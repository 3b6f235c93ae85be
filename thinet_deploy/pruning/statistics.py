"""ThiNet's samples and their Gram matrix: what the selection sees of a consumer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from ..data import ImageSet
from ..errors import ModelError
from ..seeds import derive, generator
from .graph import ChannelGroup


@dataclass(frozen=True)
class Draws:
    """Where one image is sampled: filter j at output position (y, x), arrays of shape (draws,)."""

    filters: NDArray[np.int64]
    ys: NDArray[np.int64]
    xs: NDArray[np.int64]


class _ReachedError(Exception):
    """Ends a forward pass once the consumer's input is known."""


def consumer_input(model: nn.Module, consumer: str, images: torch.Tensor) -> torch.Tensor:
    """What really enters the module `consumer` (after ReLU, pooling, flattening); the pass ends there."""
    caught: list[torch.Tensor] = []

    def catch(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        caught.append(inputs[0])
        raise _ReachedError

    hook = model.get_submodule(consumer).register_forward_pre_hook(catch)
    try:
        with torch.inference_mode():
            model(images)
    except _ReachedError:
        pass
    finally:
        hook.remove()
    return caught[0]


def draw(filters: int, height: int, width: int, draws: int, *key: int | str) -> Draws:
    """Output filters and positions drawn uniformly (zero padding included); they depend on `key` only."""
    rng = generator(*key, "draws")
    return Draws(rng.integers(filters, size=draws), rng.integers(height, size=draws), rng.integers(width, size=draws))


def contributions(consumer: nn.Conv2d, inputs: torch.Tensor, draws: list[Draws]) -> NDArray[np.float64]:
    """x̂ of ThiNet (ICCV 2017, section 3.2): each input channel's share of sampled outputs.

    x̂_c = Σ_k W[j, c, k] · X[c, p + k], so Σ_c x̂_c = output − bias. Padding, stride, dilation and groups
    are those of the convolution; channels outside filter j's group contribute 0.

    Args:
        consumer: the convolution.
        inputs: its inputs, (images, channels, height, width).
        draws: one per image, all of the same length.

    Returns:
        Rows (images · draws, channels).
    """
    mode = "constant" if consumer.padding_mode == "zeros" else consumer.padding_mode
    padding = consumer._reversed_padding_repeated_twice  # noqa: SLF001 - covers padding="same" and all modes
    padded = F.pad(inputs, padding, mode=mode)
    image, j, ys, xs = _rows(draws)
    (kernel_h, kernel_w), (step_h, step_w) = consumer.weight.shape[2:], consumer.stride
    rows_h = ys[:, None] * step_h + torch.arange(kernel_h) * consumer.dilation[0]
    rows_w = xs[:, None] * step_w + torch.arange(kernel_w) * consumer.dilation[1]
    per_group = consumer.in_channels // consumer.groups
    first = torch.div(j, consumer.out_channels // consumer.groups, rounding_mode="floor") * per_group
    channels = first[:, None] + torch.arange(per_group)
    patches = padded[
        image[:, None, None, None], channels[:, :, None, None], rows_h[:, None, :, None], rows_w[:, None, None, :]
    ].double()
    share = (patches * consumer.weight.detach()[j].double()).sum((2, 3))
    return torch.zeros(len(j), consumer.in_channels, dtype=torch.float64).scatter_(1, channels, share).numpy()


def _rows(draws: list[Draws]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    image = np.repeat(np.arange(len(draws)), [len(d.filters) for d in draws])
    columns = (image, *(np.concatenate([getattr(d, name) for d in draws]) for name in ("filters", "ys", "xs")))
    first, second, third, fourth = (torch.from_numpy(column) for column in columns)
    return first, second, third, fourth


def as_convolution(consumer: nn.Module, inputs: torch.Tensor, channels: int) -> tuple[nn.Conv2d, torch.Tensor]:
    """A linear layer after flattening is a convolution whose kernel is the whole map: (consumer, inputs) as such."""
    if isinstance(consumer, nn.Conv2d):
        return consumer, inputs
    assert isinstance(consumer, nn.Linear)
    spread = consumer.in_features // channels
    conv = nn.Conv2d(channels, consumer.out_features, (1, spread), bias=False)
    conv.weight = nn.Parameter(consumer.weight.detach().reshape(consumer.out_features, channels, 1, spread))
    return conv, inputs.reshape(len(inputs), channels, 1, spread)


def sampled_gram(
    model: nn.Module,
    group: ChannelGroup,
    images: ImageSet,
    chosen: NDArray[np.int64],
    *,
    draws: int,
    seed: int,
    batch: int = 64,
) -> tuple[NDArray[np.float64], int]:
    """G = X̂ᵀX̂ over sampled rows of a group's consumer, as the papers sample them.

    The rows depend on (seed, layer, image) only: not on batch size or order.

    Args:
        model: the network as it stands, in eval mode.
        group: whose filters are judged.
        images: training images, centre-cropped, without augmentation.
        chosen: indices of the images to use.
        draws: samples per image.
        seed: of the run.
        batch: images per forward pass.

    Returns:
        G (channels, channels) in float64, and the number of rows.

    Raises:
        ModelError: the network computes NaN or infinity.
    """
    model.eval()
    consumer = model.get_submodule(group.consumer)
    gram = np.zeros((group.channels, group.channels))
    for part in _chunks(chosen, batch):
        inputs = consumer_input(model, group.consumer, torch.from_numpy(images.inputs(part)))
        conv, inputs = as_convolution(consumer, inputs, group.channels)
        with torch.inference_mode():
            height, width = conv(inputs[:1]).shape[2:]
        sampled = [
            draw(conv.out_channels, height, width, draws, derive(seed, "sample", group.producer, int(i))) for i in part
        ]
        rows = contributions(conv, inputs, sampled)
        gram += rows.T @ rows
    if not np.isfinite(gram).all():
        raise ModelError(
            f"What enters {group.consumer} is not finite (NaN or infinite), so its filters cannot be judged.",
            hint="The weights are damaged, or training diverged: check --weights, or lower --lr.",
        )
    return gram, len(chosen) * draws


def _chunks(indices: NDArray[np.int64], size: int) -> Iterable[NDArray[np.int64]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
