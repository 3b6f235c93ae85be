"""data.py: the digits, folders of any images, and random choices that depend on what they are for alone."""

import contextlib
import io
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from thinet_deploy import data
from thinet_deploy.data import Dataset, ImageSet, load_digits, load_folder
from thinet_deploy.errors import DataError
from thinet_deploy.preprocess import Augment, Preprocess

PREPROCESS = Preprocess(
    resize=12, crop=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), augment=Augment(mirror=True, pad=1)
)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_digits()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Every file format and pixel mode, in two classes; val/ has other pixels than train/."""
    for split, offset in (("train", 0), ("val", 7)):
        for label, name in enumerate(("first", "second")):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            ramp = np.add.outer(np.arange(14), np.arange(0, 180, 9)) + 40 * label + offset
            grey = Image.fromarray(ramp.astype(np.uint8))
            grey.convert("RGB").save(place / "a.jpg")
            grey.convert("RGB").save(place / "b.PNG")
            grey.save(place / "c.png")
            grey.convert("RGBA").save(place / "d.png")
            grey.convert("P").save(place / "e.png")
            Image.fromarray(ramp.astype(np.uint16) * 257).save(place / "f.png")
            Image.fromarray(ramp.astype(np.uint16) * 257).save(place / "g.tif")
            grey.convert("CMYK").save(place / "h.jpeg")
            grey.save(place / "i.pgm")
            grey.save(place / "j.bmp")
            grey.save(place / "k.webp", lossless=True)
            (place / "notes.txt").write_text("no image")
    return tmp_path


def everything(images: ImageSet) -> NDArray[np.float32]:
    return images.inputs(np.arange(len(images)))


# ---------------------------------------------------------------------------------------------- digits


def test_digits(digits: Dataset) -> None:
    assert (len(digits.train), len(digits.test)) == (900, 897)
    assert len(digits.train) + len(digits.test) == 1797
    assert digits.classes == tuple("0123456789")
    inputs = everything(digits.test)
    assert inputs.shape == (897, 1, 32, 32)
    assert inputs.dtype == np.float32
    assert set(Counter(digits.train.labels.tolist())) == set(range(10))
    assert min(Counter(digits.test.labels.tolist()).values()) >= 80
    assert abs(float(everything(digits.train).mean())) < 0.2, "normalised"
    assert 0.7 < float(everything(digits.train).std()) < 1.3


def test_no_digit_is_in_both_halves(digits: Dataset) -> None:
    train, test = (
        {row.tobytes() for row in images.read(np.arange(len(images)))} for images in (digits.train, digits.test)
    )
    assert not train & test


def test_digits_for_another_network() -> None:
    colour = load_digits(Preprocess(resize=(16, 16), crop=(16, 16)))
    assert colour.test.inputs(np.arange(2)).shape == (2, 3, 16, 16)
    assert colour.digest != load_digits().digest
    assert load_digits().digest == load_digits().digest


# ---------------------------------------------------------------------------------------------- folders


def test_a_folder_of_all_kinds(folder: Path) -> None:
    """All files show the same picture, so all give (nearly) the same input."""
    found = load_folder(folder, PREPROCESS)
    assert found.classes == ("first", "second")
    assert found.name == folder.name
    assert found.train.labels.tolist() == [0] * 11 + [1] * 11
    for images in (found.train, found.test):
        pixels = images.read(np.arange(len(images))).astype(int)
        assert pixels.shape == (22, 12, 12, 3)
        for label in (0, 1):
            same = pixels[images.labels == label]
            assert np.abs(same - same[2]).max() <= 30, "a palette is coarse"
            exact = np.delete(same, 4, axis=0)
            assert np.abs(exact - same[2]).max() <= 6, "JPEG is lossy"
    assert np.abs(everything(found.train) - everything(found.test)).max() > 0


def test_test_stands_for_val(folder: Path) -> None:
    before = everything(load_folder(folder, PREPROCESS).test)
    (folder / "val").rename(folder / "test")
    assert (everything(load_folder(folder, PREPROCESS).test) == before).all()


def test_on_demand_equals_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_folder(folder, PREPROCESS)
    monkeypatch.setattr(data, "MEMORY_BYTES", 0)
    lazy = load_folder(folder, PREPROCESS)
    assert lazy.digest == whole.digest
    mixed = np.array([5, 0, 21, 5])
    for one, other in ((whole.train, lazy.train), (whole.test, lazy.test)):
        assert (one.read(mixed) == other.read(mixed)).all()
        assert (one.labels == other.labels).all()
        for (x, y), (u, v) in zip(
            one.training_batches(5, seed=1, stage="s", epoch=2),
            other.training_batches(5, seed=1, stage="s", epoch=2),
            strict=True,
        ):
            assert (x == u).all()
            assert (y == v).all()


def test_on_demand_does_not_read_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A truncated image passes the check of headers, and is named once it is needed; a text never passes."""
    monkeypatch.setattr(data, "MEMORY_BYTES", 0)
    broken = folder / "train" / "first" / "a.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(broken)
    broken.write_bytes(broken.read_bytes()[:-1000])
    images = load_folder(folder, PREPROCESS).train
    assert images.read(np.array([1])).shape == (1, 12, 12, 3)
    with pytest.raises(DataError, match=r"a\.jpg"):
        images.read(np.array([0]))
    broken.write_text("no image")
    with pytest.raises(DataError, match=r"a\.jpg is not an image"):
        load_folder(folder, PREPROCESS)


def test_hidden_files_and_folders_are_no_data(folder: Path) -> None:
    before = load_folder(folder, PREPROCESS)
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / "first" / "._a.jpg").write_text("what macOS leaves beside a.jpg")
    after = load_folder(folder, PREPROCESS)
    assert after.classes == before.classes
    assert after.digest == before.digest


@pytest.mark.parametrize("change", ["content", "touch", "new", "gone", "renamed", "class", "preprocess"])
def test_the_digest_changes_with_the_data(folder: Path, change: str) -> None:
    before = load_folder(folder, PREPROCESS).digest
    assert load_folder(folder, PREPROCESS).digest == before
    path, preprocess = folder / "train" / "first" / "c.png", PREPROCESS
    if change == "content":
        path.write_bytes((folder / "val" / "first" / "c.png").read_bytes())
    elif change == "touch":
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    elif change == "new":
        path.with_name("z.png").write_bytes(path.read_bytes())
    elif change == "gone":
        path.unlink()
    elif change == "renamed":
        path.rename(path.with_name("z.png"))
    elif change == "class":
        for split in ("train", "val"):
            (folder / split / "first").rename(folder / split / "0first")
    else:
        preprocess = PREPROCESS.model_copy(update={"crop": (7, 7)})
    assert load_folder(folder, preprocess).digest != before


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of the damage, before it raises
@given(st.sampled_from(["JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM"]), st.data())
@settings(max_examples=80, deadline=None)
def test_any_damage_is_read_or_refused_in_our_words(
    tmp_path_factory: pytest.TempPathFactory, kind: str, draw: st.DataObject
) -> None:
    whole = io.BytesIO()
    Image.fromarray(np.arange(9 * 9 * 3, dtype=np.uint8).reshape(9, 9, 3)).save(whole, kind)
    content = bytearray(whole.getvalue())
    for _ in range(draw.draw(st.integers(1, 4))):
        content[draw.draw(st.integers(0, len(content) - 1))] = draw.draw(st.integers(0, 255))
    path: Path = tmp_path_factory.getbasetemp() / "damaged.jpg"
    path.write_bytes(content[: draw.draw(st.integers(0, len(content)))])
    for check in (lambda: data._decode(path, PREPROCESS), lambda: data._check_header(path)):
        with contextlib.suppress(DataError):
            check()


def test_progress_is_reported(folder: Path) -> None:
    said: list[tuple[str, int, int]] = []
    load_folder(folder, PREPROCESS, lambda stage, done, total, note="": said.append((stage, done, total)))
    assert said == [("Reading training images", 22, 22), ("Reading test images", 22, 22)]


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
