"""The loss of each image: from its label, from a teacher, or both (Hinton et al., 2015)."""

import pytest
import torch
from torch.nn import functional as F

from thinet_deploy.distillation import losses

COUNT, CLASSES = 20, 7
LABELS = torch.arange(COUNT) % CLASSES


def scores(seed: int) -> torch.Tensor:
    return 3 * torch.randn(COUNT, CLASSES, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_a_teacher_it_is_the_cross_entropy(smoothing: float) -> None:
    got = losses(scores(0), LABELS, smoothing=smoothing)
    assert got.shape == (COUNT,)
    torch.testing.assert_close(got.mean(), F.cross_entropy(scores(0), LABELS, label_smoothing=smoothing))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_it_is_nothing_where_both_agree(temperature: float) -> None:
    """A shift of all outputs of an image changes no probability."""
    got = losses(scores(0), LABELS, scores(0) + torch.arange(COUNT)[:, None], share=1, temperature=temperature)
    torch.testing.assert_close(got, torch.zeros(COUNT), atol=1e-5, rtol=0)


def test_the_gradient_is_that_of_the_papers_cross_entropy() -> None:
    outputs, heat = scores(0).requires_grad_(), 3.0
    (got,) = torch.autograd.grad(losses(outputs, LABELS, scores(1), share=1, temperature=heat).mean(), outputs)
    paper = heat**2 * F.cross_entropy(outputs / heat, (scores(1) / heat).softmax(1))
    (expected,) = torch.autograd.grad(paper, outputs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_shares_mix_and_images_without_labels_go_by_the_teacher_alone() -> None:
    labels = torch.where(torch.arange(COUNT) < 5, -1, LABELS)
    hard, soft = losses(scores(0), LABELS), losses(scores(0), LABELS, scores(1), share=1)
    got = losses(scores(0), labels, scores(1), share=0.3, smoothing=0.0)
    torch.testing.assert_close(got[5:], (0.3 * soft + 0.7 * hard)[5:])
    torch.testing.assert_close(got[:5], soft[:5])
