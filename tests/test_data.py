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
from thinet_deploy.data import UNLABELLED, Dataset, ImageSet, images_digest, load_digits, load_folder, load_images
from thinet_deploy.errors import DataError
from thinet_deploy.image_files import check_header, decode
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
    for check in (lambda: decode(path, PREPROCESS), lambda: check_header(path)):
        with contextlib.suppress(DataError):
            check()


def test_progress_is_reported(folder: Path) -> None:
    said: list[tuple[str, int, int]] = []
    load_folder(folder, PREPROCESS, lambda stage, done, total, note="": said.append((stage, done, total)))
    assert said == [("Reading training images", 22, 22), ("Reading test images", 22, 22)]


# ---------------------------------------------------------------------------------------------- unlabelled images


def test_unlabelled_images_are_those_of_all_folders_in_the_order_of_their_paths(folder: Path) -> None:
    found, whole = load_images(folder, PREPROCESS), load_folder(folder, PREPROCESS)
    assert found.labels.tolist() == [UNLABELLED] * 44
    assert not found.labelled
    assert whole.train.labelled
    assert (everything(found) == np.concatenate([everything(whole.train), everything(whole.test)])).all()
    assert (everything(load_images(folder / "train", PREPROCESS)) == everything(whole.train)).all()
    assert (everything(load_images(folder / "train" / "first", PREPROCESS)) == everything(whole.train)[:11]).all()


def test_files_and_folders_side_by_side_have_one_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "zzz.png").write_bytes((folder / "train" / "first" / "c.png").read_bytes())
    (folder / "b.png").write_bytes((folder / "val" / "second" / "c.png").read_bytes())
    before, digest = everything(load_images(folder, PREPROCESS)), images_digest(folder, PREPROCESS)
    assert len(before) == 46
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: reversed(list(listed(path))))
    assert (everything(load_images(folder, PREPROCESS)) == before).all()
    assert images_digest(folder, PREPROCESS) == digest


def test_hidden_and_linked_folders_add_nothing(folder: Path) -> None:
    before, digest = everything(load_images(folder, PREPROCESS)), images_digest(folder, PREPROCESS)
    hidden = folder / ".thumbnails"
    hidden.mkdir()
    (hidden / "a.png").write_bytes((folder / "train" / "first" / "c.png").read_bytes())
    (folder / "train" / "._a.jpg").write_text("what macOS leaves beside a.jpg")
    (folder / "val" / "round").symlink_to(folder)
    assert (everything(load_images(folder, PREPROCESS)) == before).all()
    assert images_digest(folder, PREPROCESS) == digest


def test_a_linked_folder_is_read(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("links")
    (place / "photos").symlink_to(folder / "train")
    assert (everything(load_images(place, PREPROCESS)) == everything(load_folder(folder, PREPROCESS).train)).all()


def test_unlabelled_on_demand_equals_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = everything(load_images(folder, PREPROCESS))
    monkeypatch.setattr(data, "MEMORY_BYTES", 0)
    assert (everything(load_images(folder, PREPROCESS)) == whole).all()


@pytest.mark.parametrize("memory", [0, 2 << 30])
def test_what_is_no_image_is_named(folder: Path, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MEMORY_BYTES", memory)
    with pytest.raises(DataError, match="no folder"):
        load_images(folder / "absent", PREPROCESS)
    (folder / "empty" / "emptier").mkdir(parents=True)
    with pytest.raises(DataError, match="has no images"):
        load_images(folder / "empty", PREPROCESS)
    with pytest.raises(DataError, match="has no images"):
        images_digest(folder / "empty", PREPROCESS)
    (folder / "empty" / "emptier" / "text.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"text\.jpg is not an image"):
        load_images(folder, PREPROCESS)


def test_the_digest_of_unlabelled_images_changes_with_them(folder: Path) -> None:
    seen = [images_digest(folder, PREPROCESS)]
    seen.append(images_digest(folder, PREPROCESS.model_copy(update={"crop": (7, 7)})))
    (folder / "new.png").write_bytes((folder / "train" / "first" / "c.png").read_bytes())
    seen.append(images_digest(folder, PREPROCESS))
    (folder / "new.png").rename(folder / "newer.png")
    seen.append(images_digest(folder, PREPROCESS))
    assert len(set(seen)) == 4


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
