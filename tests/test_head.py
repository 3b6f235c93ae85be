"""A new last layer in closed form: what is linear in its inputs comes out exactly."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from thinet_deploy.data.dataset import ImageSet
from thinet_deploy.data.preprocess import Preprocess
from thinet_deploy.pruning import head as heads
from thinet_deploy.pruning.calibration import Sample
from thinet_deploy.pruning.head import fit_head

PREPROCESS = Preprocess(colour="GRAY", mean=(0.5,), std=(0.25,), resize=(8, 8), crop=(8, 8))


def sample(count: int, batch: int = 7) -> Sample:
    pixels: NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1)).astype(np.uint8)
    images = ImageSet(np.zeros(count, np.int64), lambda rows: pixels[rows], PREPROCESS)
    return Sample(images, np.arange(count), batch, 0)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear = nn.Conv2d(1, 5, 3), nn.Linear(5, 3)
        self.eval()

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.linear(self.conv(x_nchw).relu().mean((2, 3)))
        return scores


def test_a_teacher_that_is_linear_in_the_features_is_met_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "RIDGE", 0.0)
    teacher, model = Network(), Network()
    nn.init.normal_(model.linear.weight)
    fit_head(model, model.linear, teacher, sample(50))
    torch.testing.assert_close(model.linear.weight, teacher.linear.weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.linear.bias, teacher.linear.bias, rtol=1e-3, atol=1e-4)


def test_dead_features_and_few_images_do_not_make_it_fail() -> None:
    teacher, model = Network(), Network()
    with torch.no_grad():
        model.conv.weight[2:] = 0
        model.conv.bias.zero_()  # type: ignore[union-attr]
    fit_head(model, model.linear, teacher, sample(2))
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_it_does_not_depend_on_the_batch_size() -> None:
    models = [Network(), Network()]
    for model, batch in zip(models, (1, 32), strict=True):
        fit_head(model, model.linear, Network(), sample(40, batch))
    torch.testing.assert_close(models[0].linear.weight, models[1].linear.weight, rtol=1e-5, atol=1e-6)


class InATuple(Network):
    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        return (super().forward(x_nchw),)  # type: ignore[return-value]


class Along(Network):
    """The last layer runs along positions."""

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        tokens = self.conv(x_nchw).relu().flatten(2).transpose(1, 2)
        return self.linear(tokens).mean(1)  # type: ignore[no-any-return]


def test_a_teacher_that_gives_a_tuple_of_one_is_the_same_teacher() -> None:
    models = [Network(), Network()]
    for model, teacher in zip(models, (Network(), InATuple()), strict=True):
        assert fit_head(model, model.linear, teacher, sample(20))
    assert torch.equal(models[0].linear.weight, models[1].linear.weight)


def test_a_layer_along_positions_is_left_alone() -> None:
    model = Along()
    before = model.linear.weight.clone()
    assert not fit_head(model, model.linear, Along(), sample(20))
    assert torch.equal(model.linear.weight, before)
