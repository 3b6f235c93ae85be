"""Batches, calibration images, views and splits: random choices depend on what they are for alone."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_folders import PREPROCESS, everything
from numpy.typing import NDArray

from thinet_deploy.data.dataset import UNLABELLED, Dataset, ImageSet, load_digits
from thinet_deploy.data.preprocess import Augment, Preprocess
from thinet_deploy.errors import DataError


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_digits()


# ---------------------------------------------------------------------------------------------- batches


def test_batches_are_all_images_in_order(digits: Dataset) -> None:
    parts = list(digits.test.batches(100))
    assert [len(labels) for _, labels in parts] == [100] * 8 + [97]
    assert (np.concatenate([labels for _, labels in parts]) == digits.test.labels).all()
    assert (np.concatenate([inputs for inputs, _ in parts]) == everything(digits.test)).all()


def numbered(count: int, pad: int = 0) -> ImageSet:
    """Images whose pixels are their own index, where they are not padding."""
    preprocess = Preprocess(
        colour="GRAY", range="0..255", mean=(-1,), std=(1,), resize=(8, 8), crop=(6, 6), augment=Augment(pad=pad)
    )
    pixels = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 8, 8, 1))
    return ImageSet(np.arange(count), lambda indices: pixels[indices], preprocess)


@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 3), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_an_epoch_has_every_image_once(count: int, size: int, pad: int, epoch: int) -> None:
    parts = list(numbered(count, pad).training_batches(size, seed=0, stage="s", epoch=epoch))
    labels = np.concatenate([labels for _, labels in parts])
    assert sorted(labels.tolist()) == list(range(count))
    assert [len(labels) for _, labels in parts[:-1]] == [size] * (len(parts) - 1)
    assert len(parts) == numbered(count).training_steps(size)
    assert min(count, size, 2) <= len(parts[-1][1]) <= size + 1, "a last image on its own joins the batch before"
    inputs = np.concatenate([inputs for inputs, _ in parts])
    assert (inputs.max(axis=(1, 2, 3)) == labels + 1).all(), "each image with its own label"


def epoch_of(images: ImageSet, size: int, **named: object) -> dict[int, bytes]:
    """Label (unique) → augmented input, in the order of the epoch."""
    keys = {"seed": 0, "stage": "s", "epoch": 0, **named}
    parts = images.training_batches(size, **keys)  # type: ignore[arg-type]
    return {int(label): x.tobytes() for inputs, labels in parts for x, label in zip(inputs, labels, strict=True)}


@pytest.fixture(scope="module")
def unique(digits: Dataset) -> ImageSet:
    """Forty digits with a number each for a label, mirrored and shifted in training."""
    augment = Augment(mirror=True, pad=3)
    preprocess = digits.preprocess.model_copy(update={"augment": augment})
    return ImageSet(np.arange(40), digits.train.read, preprocess)


@pytest.mark.parametrize("size", [1, 7, 40, 100])
def test_batch_size_changes_neither_order_nor_augmentation(unique: ImageSet, size: int) -> None:
    assert list(epoch_of(unique, size).items()) == list(epoch_of(unique, 16).items())


@pytest.mark.parametrize("other", [{"seed": 1}, {"stage": "t"}, {"epoch": 1}])
def test_seed_stage_and_epoch_change_both(unique: ImageSet, other: dict[str, object]) -> None:
    one, two = epoch_of(unique, 16), epoch_of(unique, 16, **other)
    assert list(one) != list(two)
    assert sum(one[label] != two[label] for label in one) > 20


def test_a_running_generator_changes_nothing(unique: ImageSet) -> None:
    before = epoch_of(unique, 16)
    np.random.seed(5)  # noqa: NPY002 - the global generator is the point
    np.random.random(3)  # noqa: NPY002
    half = unique.training_batches(16, seed=0, stage="s", epoch=0)
    next(half)
    assert epoch_of(unique, 16) == before


def test_augmentation_shifts_and_mirrors(unique: ImageSet) -> None:
    """Every result is a crop of the padded image, mirrored or not; all kinds occur."""
    seen = Counter[tuple[int, int, bool]]()
    padded = np.pad(unique.read(np.arange(40)), ((0, 0), (3, 3), (3, 3), (0, 0)))
    for epoch in range(4):
        for inputs, labels in unique.training_batches(16, seed=0, stage="s", epoch=epoch):
            for found, label in zip(inputs, labels, strict=True):
                places = [(top, left, flip) for top in range(7) for left in range(7) for flip in (False, True)]
                crops = [padded[label, y : y + 32, x : x + 32][:, :: -1 if f else 1] for y, x, f in places]
                same = (unique.preprocess.normalise(np.stack(crops)) == found).all(axis=(1, 2, 3))
                assert same.any()
                seen[places[int(same.argmax())]] += 1
    assert len({(top, left) for top, left, _ in seen}) > 35
    assert 40 < sum(count for (_, _, flip), count in seen.items() if flip) < 120


# ---------------------------------------------------------------------------------------------- calibration


@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.integers(1, 12), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_calibration_is_balanced(labels: list[int], per_class: int, seed: int) -> None:
    images = ImageSet(np.array(labels), lambda indices: np.zeros((len(indices), 8, 8, 3), np.uint8), PREPROCESS)
    chosen = images.calibration(per_class, seed=seed, stage="s")
    assert (np.diff(chosen) > 0).all(), "each once, ascending"
    there, counted = Counter(labels), Counter(images.labels[chosen].tolist())
    assert counted == {label: min(per_class, count) for label, count in there.items()}
    assert (images.calibration(per_class, seed=seed, stage="s") == chosen).all()


def test_calibration_depends_on_seed_and_stage(digits: Dataset) -> None:
    drawn = {
        tuple(digits.train.calibration(5, seed=seed, stage=stage).tolist()) for seed in (0, 1) for stage in ("a", "b")
    }
    assert len(drawn) == 4
    more = digits.train.calibration(10, seed=0, stage="a")
    assert set(digits.train.calibration(5, seed=0, stage="a")) <= set(more), "more images include the fewer"


def labelled(labels: list[int]) -> ImageSet:
    """Images whose first pixel is their own index."""

    def read(indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        return np.broadcast_to(indices.astype(np.uint8)[:, None, None, None], (len(indices), 12, 12, 3))

    return ImageSet(np.array(labels, dtype=np.int64), read, PREPROCESS)


def test_all_unlabelled_images_calibrate() -> None:
    images = labelled([UNLABELLED] * 30)
    assert images.calibration(2, seed=0, stage="s").tolist() == list(range(30))
    assert images.calibration(0, seed=0, stage="s").tolist() == []
    chosen = images.sample(7, seed=0, stage="s")
    assert len(set(chosen.tolist())) == 7
    assert chosen.tolist() != list(range(7))


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=80), st.integers(0, 90), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_a_sample_is_as_balanced_as_can_be(labels: list[int], count: int, seed: int) -> None:
    images = labelled(labels)
    chosen = images.sample(count, seed=seed, stage="s")
    assert len(chosen) == min(count, len(labels))
    assert (np.diff(chosen) > 0).all(), "each once, ascending"
    there, counted = Counter(labels), Counter(images.labels[chosen].tolist())
    most = max(counted.values(), default=0)
    assert all(counted[label] >= most - 1 or counted[label] == there[label] for label in there)
    assert set(images.sample(count // 2, seed=seed, stage="s")) <= set(chosen), "more images include the fewer"


def test_a_sample_of_equal_shares_is_the_calibration(digits: Dataset) -> None:
    """So one can stand for the other."""
    per_class = digits.train.calibration(7, seed=3, stage="s")
    assert (digits.train.sample(70, seed=3, stage="s") == per_class).all()


def test_every_image_is_as_likely_in_a_sample() -> None:
    images = labelled([0] * 10 + [1] * 10 + [2] * 10)
    times = Counter(int(row) for seed in range(600) for row in images.sample(5, seed=seed, stage="s"))
    assert set(times) == set(range(30))
    assert max(abs(each - 100) for each in times.values()) < 45, "600 · 5 / 30 = 100, σ ≈ 9"


# ---------------------------------------------------------------------------------------------- views and splits


def test_a_view_reads_its_rows_when_they_are_needed() -> None:
    asked = list[list[int]]()
    images = labelled([3, 1, 2, 1, 0])

    def read(rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        asked.append(rows.tolist())
        return images.read(rows)

    spied = ImageSet(images.labels, read, PREPROCESS)
    view = spied.view(np.array([4, 1, 3])).view(np.array([2, 0]))
    assert asked == []
    assert view.labels.tolist() == [1, 0]
    assert view.read(np.array([1, 0, 1]))[:, 0, 0, 0].tolist() == [4, 3, 4]
    assert asked == [[4, 3, 4]]


def test_an_image_is_augmented_alike_in_a_view_and_in_the_whole(unique: ImageSet) -> None:
    rows = np.array([39, 3, 17, 4, 20, 8, 11])
    whole = epoch_of(unique, 16)
    for view in (unique.view(rows), unique.view(np.arange(1, 40)[::-1]).view(40 - 1 - rows)):
        part = epoch_of(view, 3)
        assert sorted(part) == sorted(rows.tolist())
        assert all(part[label] == whole[label] for label in part)
        assert epoch_of(view, 3, epoch=1) != part


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=80), st.floats(0.01, 0.99), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_a_split_has_every_image_on_one_side_and_every_class_on_both(
    labels: list[int], share: float, seed: int
) -> None:
    images = labelled(labels)
    there = Counter(labels)
    if max(there.values()) == 1:
        with pytest.raises(DataError, match="one image alone"):
            images.split(share, seed)
        return
    fit, held_out = images.split(share, seed)
    rows = [side.read(np.arange(len(side)))[:, 0, 0, 0].tolist() for side in (fit, held_out)]
    assert sorted(rows[0] + rows[1]) == list(range(len(labels)))
    assert rows == [sorted(rows[0]), sorted(rows[1])]
    for label, size in there.items():
        out = int((held_out.labels == label).sum())
        assert abs(out - share * size) < 1 or out in (1, size - 1)
        assert 1 <= out < size or (size == 1 and out == 0)
    assert [labels[row] for row in rows[1]] == held_out.labels.tolist()


def test_a_split_depends_on_its_seed_alone(digits: Dataset) -> None:
    one, same, other = (digits.train.split(0.2, seed)[1].labels.tolist() for seed in (0, 0, 1))
    numbers = [digits.train.split(0.2, seed)[1].numbers for seed in (0, 0, 1)]
    assert Counter(one) == Counter(other), "stratified"
    assert one == same
    assert np.array_equal(numbers[0], numbers[1])  # type: ignore[arg-type]
    assert not np.array_equal(numbers[0], numbers[2])  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_is_between_nothing_and_all(share: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        labelled([0, 0, 1, 1]).split(share, 0)
