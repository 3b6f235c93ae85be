"""Training is reproducible to the bit and resumable; accuracy is never flattered (design.md, "Random choices")."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import nn

from thinet_deploy.data import ImageSet
from thinet_deploy.errors import ThinetDeployError
from thinet_deploy.interfaces import Progress
from thinet_deploy.preprocess import Augment, Preprocess
from thinet_deploy.store import Checkpoint
from thinet_deploy.training import Recipe, accuracy, evaluate, logits, train

COUNT, CLASSES = 50, 4
RECIPE = Recipe(epochs=4, lr=0.05, batch=16, warmup=1)


class StoppedError(Exception):
    """The process ends here."""


@pytest.fixture(scope="module")
def images() -> ImageSet:
    rng = np.random.default_rng(0)
    labels = np.arange(COUNT) % CLASSES
    pixels = rng.integers(0, 100, (COUNT, 10, 10, 1), np.uint8)
    for image, label in zip(pixels, labels, strict=True):  # a bright corner per class
        image[(label % 2) * 5 :, (label // 2) * 5 :][:5, :5] += 120
    augment = Augment(mirror=True, pad=1)
    preprocess = Preprocess(colour="GRAY", mean=(0.3,), std=(0.3,), resize=(10, 10), crop=(8, 8), augment=augment)
    return ImageSet(labels, lambda indices: pixels[indices], preprocess)


def network() -> nn.Module:
    """With everything whose state or chance could differ: BatchNorm and dropout."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(54, CLASSES)),
    )


def trained(images: ImageSet, *, seed: int = 1, stage: str = "s", recipe: Recipe = RECIPE) -> nn.Module:
    model = network()
    train(model, images, recipe, seed=seed, stage=stage)
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_training_learns_and_ends_in_eval_mode(images: ImageSet) -> None:
    model = trained(images, recipe=Recipe(epochs=12, lr=0.05, batch=16))
    assert not model.training
    assert evaluate(model, images).top1 > 90
    assert evaluate(network(), images).top1 < 60


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


def stop_after(epochs: int) -> Progress:
    def progress(stage: str, done: int, total: int, note: str = "") -> None:
        if done == epochs * total // RECIPE.epochs and note:
            raise StoppedError

    return progress


@pytest.mark.parametrize("done", [1, 2, 3, 4])
def test_resuming_gives_the_weights_of_training_without_a_break(done: int, images: ImageSet, tmp_path: Path) -> None:
    expected, path = trained(images), tmp_path / "checkpoint.safetensors"
    with pytest.raises(StoppedError):
        train(
            network(),
            images,
            RECIPE,
            seed=1,
            stage="s",
            checkpoint=Checkpoint(path, "key"),
            progress=stop_after(done),
        )
    torch.manual_seed(99)
    resumed, seen = network(), list[int]()
    for parameter in resumed.parameters():
        nn.init.zeros_(parameter)  # nothing of a fresh network may shine through
    train(
        resumed,
        images,
        RECIPE,
        seed=1,
        stage="s",
        checkpoint=Checkpoint(path, "key"),
        progress=lambda stage, now, total, note="": seen.append(now),
    )
    assert same(resumed, expected)
    steps = images.training_steps(RECIPE.batch)
    assert sorted(set(seen)) == list(range(done * steps, RECIPE.epochs * steps + 1)) or done == RECIPE.epochs


def test_a_checkpoint_of_other_inputs_is_ignored(images: ImageSet, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    train(network(), images, RECIPE, seed=5, stage="s", checkpoint=Checkpoint(path, "other"))
    model = network()
    train(model, images, RECIPE, seed=1, stage="s", checkpoint=Checkpoint(path, "key"))
    assert same(model, trained(images))


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


@pytest.mark.parametrize("lr", [1e12, math.nan])
def test_divergence_is_an_error_with_advice(lr: float, images: ImageSet, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "c.safetensors", "key")
    recipe = Recipe(epochs=6, lr=lr, batch=16, clip=math.inf)
    with pytest.raises(ThinetDeployError, match=r"diverged: the loss of stage x is (nan|inf) after epoch \d") as caught:
        train(network(), images, recipe, seed=1, stage="stage x", checkpoint=checkpoint)
    assert "--lr" in caught.value.hint
    saved = checkpoint.load()
    assert saved is None or all(tensor.isfinite().all() for tensor in saved[0].values())


def test_a_last_image_on_its_own_is_no_batch(images: ImageSet) -> None:
    """BatchNorm on maps of 1x1 cannot be trained on one image: 50 = 7 x 7 + 1."""
    points = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(1, CLASSES))
    train(points, images, Recipe(epochs=1, lr=0.01, batch=7), seed=1, stage="s")


def test_no_epochs_change_nothing(images: ImageSet) -> None:
    model = network()
    train(model, images, Recipe(epochs=0, lr=1), seed=1, stage="s")
    assert same(model, network())
    assert not model.training


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
    assert result.top1 == pytest.approx(100 * np.mean([rank <= 1 for rank in ranks]))
    assert result.top5 == pytest.approx(100 * np.mean([rank <= 5 for rank in ranks]))


def test_accuracy_without_ties_is_that_of_torch() -> None:
    outputs = torch.randn(200, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(200) % 10
    result = accuracy(outputs.numpy(), labels.numpy())
    assert result.top1 == pytest.approx(float((outputs.argmax(1) == labels).double().mean() * 100))
    assert result.top5 == pytest.approx(
        float((outputs.topk(5).indices == labels[:, None]).any(1).double().mean() * 100)
    )


@pytest.mark.parametrize("value", [0.0, 3.0, math.nan, math.inf, -math.inf])
def test_a_network_whose_outputs_are_all_alike_knows_nothing(value: float) -> None:
    result = accuracy(np.full((20, 10), value, np.float32), np.arange(20) % 10)
    assert (result.top1, result.top5) == (0, 0)


def test_logits_are_those_of_all_images_in_order_in_eval_mode(images: ImageSet) -> None:
    model = network().train()
    expected = logits(model, images, batch=COUNT)
    assert expected.shape == (COUNT, CLASSES)
    torch.testing.assert_close(logits(model.train(), images, batch=7), expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(torch.from_numpy(images.inputs(np.array([31])))), expected[31:32])
