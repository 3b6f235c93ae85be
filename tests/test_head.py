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
