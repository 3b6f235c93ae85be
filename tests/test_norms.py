"""BatchNorm statistics measured anew are those of all images (norms.py)."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from small_training import COUNT, RECIPE, corners, network, plain, same, stop_after, trained
from torch import nn

from thinet_deploy.data.dataset import ImageSet
from thinet_deploy.norms import reestimate_norms
from thinet_deploy.training import train


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return corners()


@pytest.mark.parametrize("batch", [3, 7, 16, 50, 256])
def test_reestimated_statistics_are_those_of_all_images_at_the_first_batchnorm(batch: int, images: ImageSet) -> None:
    model = trained(images)
    before = copy.deepcopy(model)
    reestimate_norms(model, images, seed=1, stage="s", batch=batch)
    with torch.no_grad():
        values = model[0](torch.from_numpy(images.inputs(np.arange(COUNT)))).double()  # type: ignore[index]
    variance, mean = torch.var_mean(values, (0, 2, 3))
    state = model.state_dict()
    torch.testing.assert_close(state["1.running_mean"].double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state["1.running_var"].double(), variance, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before.state_dict()["1.running_var"], state["1.running_var"], rtol=1e-3)
    assert all(map(torch.equal, before.parameters(), model.parameters()))
    assert not any(module.training for module in model.modules())
    assert model[1].momentum == 0.1  # type: ignore[index]
    train(model, images, RECIPE, seed=1, stage="s")  # nothing that was hooked in is left


def test_reestimation_forgets_damaged_statistics_and_passes_over_idle_norms(images: ImageSet) -> None:
    model, idle = network(), nn.BatchNorm2d(6)
    model[0].idle = idle  # type: ignore[index]
    idle.running_mean.fill_(7)  # type: ignore[union-attr]
    model[1].running_mean.fill_(math.nan)  # type: ignore[index]
    reestimate_norms(model, images, seed=1, stage="s")
    assert model[1].running_mean.isfinite().all()  # type: ignore[index]
    assert (idle.running_mean == 7).all()  # type: ignore[union-attr]
    chosen = copy.deepcopy(model)
    reestimate_norms(chosen, images, seed=1, stage="s", limit=10)
    assert not torch.allclose(chosen[1].running_mean, model[1].running_mean, rtol=1e-3)  # type: ignore[index]


def test_batches_for_statistics_hold_images_of_all_kinds(images: ImageSet) -> None:
    """Images come sorted by class: a second BatchNorm must not see classes one by one."""
    order = np.argsort(images.labels, kind="stable")
    by_class = ImageSet(images.labels[order], lambda indices: images.read(order[indices]), images.preprocess)
    deep = nn.Sequential(network()[:4], nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5))  # type: ignore[index]
    whole = copy.deepcopy(deep)
    reestimate_norms(whole, by_class, seed=1, stage="s", batch=COUNT)
    reestimate_norms(deep, by_class, seed=1, stage="s", batch=13)
    torch.testing.assert_close(deep[2].running_var, whole[2].running_var, rtol=0.15, atol=0)


def test_a_network_without_batchnorm_has_nothing_to_reestimate(images: ImageSet) -> None:
    model = plain()
    reestimate_norms(model, images, seed=1, stage="s", progress=stop_after(0))
    assert same(model, plain())
