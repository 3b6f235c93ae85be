"""Second moments of patches against torch's own unfold, for layers of all kinds."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from thinet_deploy.pruning.geometry import as_convolution, layer_weight, map_size, plain_weight
from thinet_deploy.pruning.moments import at_positions, centred, patches, positions
from thinet_deploy.pruning.sums import Sums

LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 7, 6)),
    "strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 9, 8)),
    "dilated": (lambda: nn.Conv2d(4, 6, (3, 1), dilation=(2, 1)), (4, 8, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (4, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (4, 5, 4)),
    "transposed grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (4, 3, 4)),
    "1-D": (lambda: nn.Conv1d(4, 6, 3, stride=2), (4, 11)),
    "1-D padded": (lambda: nn.Conv1d(4, 6, 3, padding=2, dilation=2), (4, 11)),
    "1-D transposed": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1, output_padding=1), (4, 5)),
    "linear": (lambda: nn.Linear(4, 6), (4,)),
    "linear over positions": (lambda: nn.Linear(4, 6), (5, 4)),
}


def call_of(layer: Any, inputs: torch.Tensor) -> dict[str, Any]:
    given = {"input": inputs, "weight": layer.weight, "bias": layer.bias}
    for name in ("stride", "padding", "dilation", "groups"):
        if hasattr(layer, name):
            given[name] = getattr(layer, name)
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d):
        given["output_padding"] = layer.output_padding
    return given


def sums_of(rows: torch.Tensor, targets: torch.Tensor, steps: Sequence[int] = (50,)) -> Sums:
    """Gathered in batches that begin at `steps`."""
    blocks, inputs = rows.shape[1:]
    sums = Sums(blocks, inputs, targets.shape[1] // blocks)
    for some, wanted in zip(rows.float().tensor_split(steps), targets.float().tensor_split(steps), strict=True):
        sums.add(some, wanted)
    return sums


@pytest.mark.parametrize("name", LAYERS)
def test_weight_times_patch_is_what_the_layer_says(name: str) -> None:
    build, size = LAYERS[name]
    torch.manual_seed(0)
    layer, inputs = build().double(), torch.randn(3, *size, dtype=torch.float64)
    outputs = layer(inputs).detach()
    geometry, padded = as_convolution(call_of(layer, inputs))
    places = [positions(map_size(geometry, padded), 5, "test", image) for image in range(3)]
    rows = patches(geometry, padded, places)
    weight = geometry.weight.reshape(geometry.groups, -1, rows.shape[2])
    said = torch.einsum("ngd,god->ngo", rows, weight).flatten(1) + layer.bias.detach()
    assert torch.allclose(
        said, at_positions(outputs, places, linear="stride" not in call_of(layer, inputs)), atol=1e-12
    )


@pytest.mark.parametrize("name", LAYERS)
def test_a_plain_weight_goes_back_into_the_layer(name: str) -> None:
    layer = LAYERS[name][0]()
    transposed, groups = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d), getattr(layer, "groups", 1)
    plain = plain_weight(layer.weight, transposed=transposed, groups=groups)
    for each in (plain, plain.flatten(1)):
        back = layer_weight(each, layer.weight.shape, transposed=transposed, groups=groups)
        assert torch.equal(back.float(), layer.weight)


def test_all_positions_give_the_moments_of_unfold() -> None:
    torch.manual_seed(0)
    inputs, layer = torch.randn(5, 4, 6, 6, dtype=torch.float64), nn.Conv2d(4, 6, 3, padding=1).double()
    columns = F.unfold(inputs, 3, padding=1).mT.flatten(0, 1)
    geometry, padded = as_convolution(call_of(layer, inputs))
    places = [positions((6, 6), 36, image) for image in range(5)]
    rows = patches(geometry, padded, places)
    targets = at_positions(layer(inputs).detach(), places, linear=False)
    moments = sums_of(rows, targets).moments()
    stats = centred(moments)
    together = torch.cat([targets, columns], 1)
    expected = torch.cov(together.T, correction=0)
    assert torch.allclose(stats.covariance[0], expected[6:, 6:], atol=1e-6)
    assert torch.allclose(stats.cross[0], expected[:6, 6:], atol=1e-6)
    assert torch.allclose(stats.mean[0], columns.mean(0))
    own = moments.saying(layer.weight.detach().reshape(1, 6, 36), layer.bias[None].detach())  # type: ignore[index]
    assert torch.allclose(own.cross, moments.cross, rtol=1e-5, atol=1e-4)
    assert torch.allclose(own.targets, moments.targets, rtol=1e-5, atol=1e-4)
    plain = centred(moments, intercept=False)
    assert torch.allclose(plain.covariance[0], columns.T @ columns / len(columns), atol=1e-6)
    assert not plain.mean.any()
    assert not plain.target.any()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 2000), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_positions_are_different_and_depend_on_the_key_only(height: int, width: int, most: int, image: int) -> None:
    found = positions((height, width), most, "seed", image)
    assert len(found) == min(most, height * width) == len(np.unique(found))
    assert found.min() >= 0
    assert found.max() < height * width
    assert np.array_equal(found, positions((height, width), most, "seed", image))
