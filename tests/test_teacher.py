"""Training by a teacher: it sees what the network sees, is left as it was, and stands in where labels are missing."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_training import COUNT, RECIPE, corners, network, plain, same, trained
from torch import nn

from thinet_deploy.data.dataset import ImageSet
from thinet_deploy.errors import InputError
from thinet_deploy.training import Recipe, evaluate, train


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return corners()


class Watcher(nn.Module):
    """Notes what a network sees, and in which mode."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, list[torch.Tensor]()

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.seen.append(values.clone())
        assert self.training == torch.is_grad_enabled()
        return self.inner(values)  # type: ignore[no-any-return]


def test_the_teacher_sees_the_same_images_in_eval_mode_and_stays_as_it_is(images: ImageSet) -> None:
    student, teacher = Watcher(network()), Watcher(network()).eval()
    before = copy.deepcopy(teacher.state_dict())
    train(student, images, RECIPE, seed=1, stage="s", teacher=teacher.train())
    assert len(student.seen) == len(teacher.seen) == 1 + 16, "one look for parts in common, then every step"
    assert all(map(torch.equal, student.seen, teacher.seen))
    assert not teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_nothing_is_learnt_from_a_teacher_who_knows_no_more(images: ImageSet) -> None:
    model, recipe = plain(), Recipe(epochs=2, lr=0.1, batch=16, distill=1, weight_decay=0)
    train(model, images, recipe, seed=1, stage="s", teacher=plain())
    torch.testing.assert_close(model.state_dict(), plain().state_dict())


def test_images_without_labels_are_learnt_from_the_teacher(images: ImageSet) -> None:
    teacher = trained(images, recipe=Recipe(epochs=12, lr=0.05, batch=16))
    bare = replace(images, labels=np.where(np.arange(COUNT) < 40, -1, images.labels))
    model = network()
    train(model, bare, Recipe(epochs=12, lr=0.05, batch=16), seed=2, stage="s", teacher=teacher)
    assert evaluate(model, images).main > 80 > evaluate(network(), images).main


def test_images_without_labels_need_a_teacher(images: ImageSet) -> None:
    model = network()
    with pytest.raises(InputError, match="s: 3 of 50 training images have no label, and there is no teacher"):
        train(model, replace(images, labels=np.r_[[-1] * 3, images.labels[3:]]), RECIPE, seed=1, stage="s")
    assert same(model, network())
