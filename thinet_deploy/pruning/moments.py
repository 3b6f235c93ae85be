"""Second moments of what layers read: all that selection and reconstruction need of the data.

They are sums over sampled output positions, so they add up over images and processes, and their size does not depend
on how many images there are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from ..seeds import generator
from .geometry import Geometry, map_size

Positions = NDArray[np.int64]


@dataclass
class Moments:
    """Sums over rows, in float64; a grouped convolution has G blocks, each with D inputs (channels × kernel).

    Attributes:
        count: rows.
        patches: Σ p, (G, D).
        squares: Σ p pᵀ, (G, D, D).
        targets: Σ t over what the filters should say, (G, O); O filters per block.
        cross: Σ t pᵀ, (G, O, D).
    """

    count: int
    patches: torch.Tensor
    squares: torch.Tensor
    targets: torch.Tensor
    cross: torch.Tensor

    def among(self, inputs: torch.Tensor) -> Moments:
        """Of some of the inputs only, by index."""
        return replace(
            self,
            patches=self.patches[:, inputs],
            squares=self.squares[:, inputs][:, :, inputs],
            cross=self.cross[:, :, inputs],
        )

    def saying(self, weight_god: torch.Tensor, shift_go: torch.Tensor) -> Moments:
        """The same rows with t = W p + b as targets: then all sums over t follow from those over p."""
        return Moments(
            self.count,
            self.patches,
            self.squares,
            (weight_god @ self.patches[..., None])[..., 0] + self.count * shift_go,
            weight_god @ self.squares + shift_go[..., None] * self.patches[:, None],
        )


@dataclass(frozen=True)
class Centred:
    """Means and covariances per block, from `Moments`; uncentred where a layer has nowhere to put a mean.

    Attributes:
        mean: E p, (G, D).
        covariance: (G, D, D).
        target: E t, (G, O).
        cross: covariance of targets and patches, (G, O, D).
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    target: torch.Tensor
    cross: torch.Tensor


def centred(moments: Moments, *, intercept: bool = True) -> Centred:
    """Divide by the number of rows; without an intercept nothing is subtracted and the means are 0."""
    count = max(moments.count, 1)
    mean, target = moments.patches / count, moments.targets / count
    if not intercept:
        mean, target = torch.zeros_like(mean), torch.zeros_like(target)
    covariance, cross = moments.squares / count, moments.cross / count
    covariance.baddbmm_(mean[:, :, None], mean[:, None, :], alpha=-1)
    return Centred(mean, covariance, target, cross.baddbmm_(target[:, :, None], mean[:, None, :], alpha=-1))


def positions(size: tuple[int, int], most: int, *key: int | str) -> Positions:
    """At most `most` different output positions of one image, as indices into the flattened map; by `key` only."""
    pixels = size[0] * size[1]
    if most >= pixels:
        return np.arange(pixels)
    return np.sort(generator(*key, "positions").choice(pixels, most, replace=False, shuffle=False))


def patches(layer: Geometry, inputs: torch.Tensor, places: list[Positions]) -> torch.Tensor:
    """What a layer reads at some output positions.

    Args:
        layer: the convolution.
        inputs: its padded inputs, (images, inputs, height, width).
        places: one array per image, of equal lengths.

    Returns:
        (images · positions, G, D); D runs over the block's channels, then over the kernel.
    """
    _, width = map_size(layer, inputs)
    flat = torch.from_numpy(np.stack(places))
    ys, xs = flat.div(width, rounding_mode="floor") * layer.stride[0], flat % width * layer.stride[1]
    kernel_h, kernel_w = layer.weight.shape[2:]
    rows = ys[..., None] + torch.arange(kernel_h) * layer.dilation[0]  # (images, positions, kernel_h)
    columns = xs[..., None] + torch.arange(kernel_w) * layer.dilation[1]
    # Channels last: one gather moves all channels of a pixel.
    pixels = inputs.permute(0, 2, 3, 1).contiguous()
    image = torch.arange(len(inputs))[:, None, None, None]
    found = pixels[image, rows[..., :, None], columns[..., None, :]]  # (images, positions, kernel_h, kernel_w, inputs)
    found = found.flatten(0, 1).flatten(1, 2).transpose(1, 2)  # (rows, inputs, kernel)
    return found.reshape(len(found), layer.groups, -1)


def output_size(values: torch.Tensor, *, linear: bool) -> tuple[int, int]:
    """Height and width of a layer's output, as `map_size` gives them; of a linear layer, positions and 1."""
    if linear:
        return values[0, ..., 0].numel(), 1
    return (int(values.shape[2]), int(values.shape[3])) if values.dim() == 4 else (1, int(values.shape[2]))


def at_positions(values: torch.Tensor, places: list[Positions], *, linear: bool) -> torch.Tensor:
    """Rows (images · positions, channels) of a layer's outputs; a linear layer's channels come last."""
    pixels = (values.flatten(1, -2) if values.dim() > 2 else values[:, None]) if linear else values.flatten(2).mT
    flat = torch.from_numpy(np.stack(places))
    return pixels.gather(1, flat[..., None].expand(-1, -1, pixels.shape[2])).flatten(0, 1)
