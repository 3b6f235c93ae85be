"""Accuracy is never flattered: what a network does not tell apart it does not know."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from small_training import CLASSES, COUNT, corners, network

from thinet_deploy.data.dataset import ImageSet
from thinet_deploy.tasks.base import Accuracy
from thinet_deploy.tasks.classification import CLASSIFICATION
from thinet_deploy.training import logits


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return corners()


def accuracy(outputs: NDArray[np.float32], labels: NDArray[np.int64]) -> Accuracy:
    meter = CLASSIFICATION.meter()
    meter.add([outputs], labels)
    return meter.judge().accuracy


@settings(deadline=None)
@given(
    hnp.arrays(np.float32, (12, 7), elements=st.floats(-5, 5, width=16)),
    hnp.arrays(np.int64, 12, elements=st.integers(0, 6)),
)
def test_accuracy_is_the_share_of_labels_ranked_first_or_among_five(
    outputs: NDArray[np.float32], labels: NDArray[np.int64]
) -> None:
    """A class that others equal comes after them: a tie is not knowledge."""
    ranks = [sum(score >= row[label] for score in row) for row, label in zip(outputs, labels, strict=True)]
    result = accuracy(outputs, labels)
    assert result.images == 12
    assert result.figures["top-1"].value == pytest.approx(100 * np.mean([rank <= 1 for rank in ranks]))
    assert result.figures["top-5"].value == pytest.approx(100 * np.mean([rank <= 5 for rank in ranks]))


def test_accuracy_without_ties_is_that_of_torch() -> None:
    outputs = torch.randn(200, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(200) % 10
    result = accuracy(outputs.numpy(), labels.numpy())
    assert result.figures["top-1"].value == pytest.approx(float((outputs.argmax(1) == labels).double().mean() * 100))
    assert result.figures["top-5"].value == pytest.approx(
        float((outputs.topk(5).indices == labels[:, None]).any(1).double().mean() * 100)
    )


@pytest.mark.parametrize("value", [0.0, 3.0, math.nan, math.inf, -math.inf])
def test_a_network_whose_outputs_are_all_alike_knows_nothing(value: float) -> None:
    result = accuracy(np.full((20, 10), value, np.float32), np.arange(20) % 10)
    assert [figure.value for figure in result.figures.values()] == [0, 0]


def test_logits_are_those_of_all_images_in_order_in_eval_mode(images: ImageSet) -> None:
    model = network().train()
    expected = logits(model, images, batch=COUNT)
    assert expected.shape == (COUNT, CLASSES)
    torch.testing.assert_close(logits(model.train(), images, batch=7), expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(torch.from_numpy(images.inputs(np.array([31])))), expected[31:32])
