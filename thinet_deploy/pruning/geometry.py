"""Convolutions of all kinds, and linear layers, as plain convolutions over padded inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from ..errors import ModelError


@dataclass(frozen=True)
class Geometry:
    """A consumer as a plain convolution.

    Attributes:
        weight: (filters, inputs per group, height, width).
        stride: vertical and horizontal step, in pixels.
        dilation: distance of kernel positions, in pixels.
        groups: of the convolution.
    """

    weight: torch.Tensor
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def as_convolution(given: Mapping[str, Any]) -> tuple[Geometry, torch.Tensor]:
    """A consumer and its padded inputs (images, inputs, height, width), as a plain 2-D convolution without padding.

    `given` are the arguments of its call by name. A linear layer is a 1×1 convolution over all positions; a transposed
    convolution is one over inputs that are spread by its stride, with its kernel turned round.

    Raises:
        ModelError: it is a 3-D convolution.
    """
    data, transposed = given["input"].detach(), "output_padding" in given
    if given["weight"].dim() > 4:
        raise ModelError("A 3-D convolution cannot be pruned by ThiNet's statistics; name it with --ignore.")
    weight = plain_weight(given["weight"], transposed=transposed, groups=given.get("groups", 1))
    if "stride" not in given:
        data = data.movedim(-1, 1).flatten(2).unsqueeze(-1) if data.dim() > 2 else data[:, :, None, None]
        return Geometry(weight, (1, 1), (1, 1), 1), data
    line = given["weight"].dim() == 3
    data = data.unsqueeze(2) if line else data
    stride, dilation = (_pair(given[each], 1 if line else None) for each in ("stride", "dilation"))
    nothing = 0 if line else None  # is added above and below the one line of a 1-D operation
    reach = [step * (size - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
    if not transposed:
        padding = given["padding"]
        if padding == "same":
            sides = [(whole // 2, whole - whole // 2) for whole in reach]
        else:
            sides = [(each, each) for each in _pair(0 if padding == "valid" else padding, nothing)]
        return Geometry(weight, stride, dilation, given["groups"]), F.pad(data, (*sides[1], *sides[0]))
    spread = data.new_zeros(
        *data.shape[:2], *((size - 1) * step + 1 for size, step in zip(data.shape[2:], stride, strict=True))
    )
    spread[:, :, :: stride[0], :: stride[1]] = data
    paddings, extras = (_pair(given[each], nothing) for each in ("padding", "output_padding"))
    sides = [
        (far - padding, far - padding + extra) for far, padding, extra in zip(reach, paddings, extras, strict=True)
    ]
    return Geometry(weight, (1, 1), dilation, given["groups"]), F.pad(spread, (*sides[1], *sides[0]))


def plain_weight(weight: torch.Tensor, *, transposed: bool, groups: int) -> torch.Tensor:
    """The weight of the plain convolution that a layer is, (filters, inputs per group, height, width)."""
    weight = weight.detach()
    weight = weight.reshape(*weight.shape[:2], *[1] * (4 - weight.dim()), *weight.shape[2:])
    return _turned(weight, groups) if transposed else weight


def layer_weight(plain: torch.Tensor, shape: torch.Size, *, transposed: bool, groups: int) -> torch.Tensor:
    """The inverse of `plain_weight`; `plain` may come as a matrix (filters, inputs per group · kernel)."""
    if transposed:
        kernel = (*[1] * (4 - len(shape)), *shape[2:])
        plain = _turned(plain.reshape(len(plain), shape[0] // groups, *kernel), groups)
    return plain.reshape(shape)


def _turned(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """(inputs, filters per group, …) of a transposed convolution ↔ (filters, inputs per group, …) of a plain one."""
    return torch.cat([part.transpose(0, 1) for part in weight.flip(2, 3).chunk(groups)])


def _pair(value: int | Sequence[int], height: int | None) -> tuple[int, int]:
    """A number for either direction; a 1-D operation has one for its width, and that of its `height` is known."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers[0] if height is None else height, numbers[-1]


def map_size(consumer: Geometry, inputs: torch.Tensor) -> tuple[int, int]:
    """Height and width of a consumer's output for padded inputs."""
    reach = [step * (size - 1) for step, size in zip(consumer.dilation, consumer.weight.shape[2:], strict=True)]
    height, width = (
        (size - far - 1) // step + 1 for size, far, step in zip(inputs.shape[2:], reach, consumer.stride, strict=True)
    )
    return height, width
