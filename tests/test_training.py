"""Training is that of a plain loop, and reproducible to the bit (design.md, "Random choices")."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_training import CLASSES, COUNT, RECIPE, corners, network, plain, same, trained
from torch import nn

from thinet_deploy.data.dataset import ImageSet
from thinet_deploy.data.preprocess import Augment
from thinet_deploy.training import Recipe, evaluate, train


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return corners()


def test_training_learns_and_ends_in_eval_mode(images: ImageSet) -> None:
    model = trained(images, recipe=Recipe(epochs=12, lr=0.05, batch=16))
    assert not model.training
    assert evaluate(model, images).main > 90
    assert evaluate(network(), images).main < 60


def test_the_same_seed_gives_the_same_weights_whatever_ran_before(images: ImageSet) -> None:
    first = trained(images)
    torch.rand(17)
    np.random.default_rng().random()
    assert same(first, trained(images))


@pytest.mark.parametrize("change", [{"seed": 2}, {"stage": "t"}])
def test_another_seed_or_stage_gives_other_weights(change: dict[str, object], images: ImageSet) -> None:
    assert not same(trained(images), trained(images, **change))  # type: ignore[arg-type]


def epoch_of(
    images: ImageSet, size: int, *, seed: int = 1, stage: str = "s", epoch: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    batches = list(images.training_batches(size, seed=seed, stage=stage, epoch=epoch))
    assert [len(labels) for _, labels in batches][:-1] == [size] * (len(batches) - 1)
    return np.concatenate([inputs for inputs, _ in batches]), np.concatenate([labels for _, labels in batches])


@pytest.mark.parametrize("size", [1, 7, 50, 64])
def test_order_and_augmentation_do_not_depend_on_the_batch_size(size: int, images: ImageSet) -> None:
    (inputs, labels), (expected, expected_labels) = epoch_of(images, size), epoch_of(images, 16)
    np.testing.assert_array_equal(inputs, expected)
    np.testing.assert_array_equal(labels, expected_labels)


@pytest.mark.parametrize("change", [{"seed": 2}, {"stage": "t"}, {"epoch": 1}])
def test_order_and_augmentation_depend_on_seed_stage_and_epoch(change: dict[str, object], images: ImageSet) -> None:
    assert (epoch_of(images, 16)[1] != epoch_of(images, 16, **change)[1]).any()  # type: ignore[arg-type]


def test_an_epoch_shows_every_image_once(images: ImageSet) -> None:
    plain = images.preprocess.model_copy(
        update={"augment": Augment(mirror=False), "resize": (10, 10), "crop": (10, 10)}
    )
    inputs, labels = epoch_of(ImageSet(images.labels, images.read, plain), 16)
    expected = plain.normalise(images.read(np.arange(COUNT)))
    order = [int(np.flatnonzero((expected == image).all((1, 2, 3)))[0]) for image in inputs]
    assert sorted(order) == list(range(COUNT))
    np.testing.assert_array_equal(labels, images.labels[order])
    assert order != sorted(order)


def test_an_image_is_augmented_alike_wherever_it_stands_in_the_data(images: ImageSet) -> None:
    first = epoch_of(images, 16)[0]
    seen = list(range(COUNT))
    other = ImageSet(images.labels, lambda indices: images.read(np.asarray(seen)[indices]), images.preprocess)
    np.testing.assert_array_equal(epoch_of(other, 16)[0], first)


def test_the_rate_rises_and_then_falls_to_nothing(images: ImageSet) -> None:
    def moved(epochs: int) -> float:
        """How far the last of some epochs takes the weights."""
        recipe = Recipe(epochs=6, lr=0.05, batch=64, warmup=2, momentum=0, weight_decay=0)
        states: dict[int, nn.Module] = {}
        model = network()

        def progress(stage: str, done: int, total: int, note: str = "") -> None:
            states[done] = copy.deepcopy(model)

        train(model, images, recipe, seed=1, stage="s", progress=progress)
        before, after = (nn.utils.parameters_to_vector(states[i].parameters()) for i in (epochs - 1, epochs))
        return float((after - before).detach().norm())

    steps = [moved(epochs) for epochs in (1, 3, 6)]
    assert steps[0] < steps[1] / 4
    assert steps[2] < steps[1] / 4
    assert min(steps) > 0


def test_half_precision_trains_to_finite_weights(images: ImageSet) -> None:
    """A step whose gradient overflows is left out, not taken for divergence."""
    model = network()
    train(model, images, replace(RECIPE, precision="fp16"), seed=1, stage="s")
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not same(model, network())


def by_hand(images: ImageSet, recipe: Recipe, optimizer: torch.optim.Optimizer, model: nn.Module) -> list[nn.Module]:
    """The weights after every step of a plain loop, with the cosine of the papers' rate and the usual loss."""
    states, steps = list[nn.Module](), images.training_steps(recipe.batch)
    for epoch in range(recipe.epochs):
        batches = images.training_batches(recipe.batch, seed=1, stage="s", epoch=epoch)
        for step, (inputs, labels) in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * 0.5 * (1 + math.cos(math.pi * (epoch + step / steps) / recipe.epochs))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(
                model(torch.from_numpy(inputs)), torch.from_numpy(labels), label_smoothing=recipe.label_smoothing
            )
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            states.append(copy.deepcopy(model))
    return states


def close(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_training_is_torchs_own_loop(name: str, images: ImageSet) -> None:
    recipe = Recipe(epochs=3, lr=0.01, batch=16, label_smoothing=0.1, optimizer=name)  # type: ignore[arg-type]
    model, expected = plain(), plain()
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(expected.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
        if name == "sgd"
        else torch.optim.AdamW(expected.parameters(), 0.01, weight_decay=5e-4)
    )
    train(model, images, recipe, seed=1, stage="s")
    close(model, by_hand(images, recipe, optimizer, expected)[-1])


def test_what_already_says_what_its_teacher_says_stays_as_it_is_dropout_or_not(images: ImageSet) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, CLASSES))
    before, recipe = copy.deepcopy(model), replace(RECIPE, distill=1.0, weight_decay=0.0)
    train(model, images, recipe, seed=1, stage="s", teacher=copy.deepcopy(model))
    torch.testing.assert_close(model.state_dict(), before.state_dict())
    train(model, images, recipe, seed=1, stage="s")
    assert not same(model, before)


def test_the_average_is_that_of_a_plain_loop(images: ImageSet) -> None:
    recipe, model, start = Recipe(epochs=4, lr=0.05, batch=16, ema=0.5), plain(), plain()
    train(model, images, recipe, seed=1, stage="s")
    average = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    optimizer = torch.optim.SGD(start.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    decays = list[float]()
    for step, state in enumerate(by_hand(images, recipe, optimizer, start)):
        decays.append(min(0.5, (1 + step) / (10 + step)))
        for name, tensor in state.state_dict().items():
            average[name] = decays[-1] * average[name] + (1 - decays[-1]) * tensor
    assert decays[0] == 0.1
    assert decays[-1] == 0.5
    torch.testing.assert_close(dict(model.state_dict()), average, rtol=1e-5, atol=1e-6)


def test_the_average_takes_the_statistics_of_batchnorm_along(images: ImageSet) -> None:
    """With a decay of nearly nothing it is the last state; with more, both weights and statistics lag behind."""
    last, lagging = trained(images), trained(images, recipe=replace(RECIPE, ema=0.8))
    torch.testing.assert_close(trained(images, recipe=replace(RECIPE, ema=1e-12)).state_dict(), last.state_dict())
    assert torch.equal(lagging[1].num_batches_tracked, last[1].num_batches_tracked)  # type: ignore[index]
    for name in ("0.weight", "1.running_mean", "1.running_var"):
        assert not torch.allclose(lagging.state_dict()[name], last.state_dict()[name], rtol=1e-3)


def rates(images: ImageSet, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The learning rate of every step."""
    seen, step = list[float](), torch.optim.SGD.step

    def spy(self: torch.optim.SGD) -> None:
        seen.append(self.param_groups[0]["lr"])
        step(self)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    train(plain(), images, recipe, seed=1, stage="s")
    return seen


def test_the_rate_falls_to_a_tenth_after_each_third(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(epochs=6, lr=0.1, batch=25, schedule="steps")
    expected = [0.1] * 4 + [0.01] * 4 + [0.001] * 4
    assert rates(images, recipe, monkeypatch) == pytest.approx(expected)
    # After the warm-up, as without it.
    assert rates(images, replace(recipe, warmup=1), monkeypatch)[2:] == pytest.approx(expected[2:])


def test_bf16_learns_and_leaves_fp32_weights(images: ImageSet) -> None:
    model = trained(images, recipe=Recipe(epochs=12, lr=0.05, batch=16, precision="bf16"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert evaluate(model, images).main > 90
    assert not same(model, trained(images, recipe=Recipe(epochs=12, lr=0.05, batch=16)))


def test_a_last_image_on_its_own_is_no_batch(images: ImageSet) -> None:
    """BatchNorm on maps of 1x1 cannot be trained on one image: 50 = 7 x 7 + 1."""
    points = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(1, CLASSES))
    train(points, images, Recipe(epochs=1, lr=0.01, batch=7), seed=1, stage="s")


def test_no_epochs_change_nothing(images: ImageSet) -> None:
    model = network()
    train(model, images, Recipe(epochs=0, lr=1), seed=1, stage="s")
    assert same(model, network())
    assert not model.training
