"""The digits, and folders of images of any kind (data/dataset.py)."""

import contextlib
import io
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_folders import PREPROCESS, everything, write_folder
from PIL import Image

from thinet_deploy.data import dataset as data
from thinet_deploy.data.dataset import Dataset, load_digits, load_folder
from thinet_deploy.data.image_files import check_header, decode
from thinet_deploy.data.preprocess import Preprocess
from thinet_deploy.errors import DataError


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_digits()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


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
