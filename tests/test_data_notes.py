"""What the user is told of image folders: test images learnt from, folders and files that are passed over."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_folders import PREPROCESS, everything, write_folder
from PIL import Image

from thinet_deploy.artifact import sha256_of
from thinet_deploy.data import image_files
from thinet_deploy.data.dataset import load_folder
from thinet_deploy.data.image_files import copies

TRAIN, VAL, TEST = Path("train"), Path("val"), Path("test")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Current, so that what is said begins with train/, val/ or test/."""
    monkeypatch.chdir(write_folder(tmp_path))
    return Path()


@pytest.fixture
def three(folder: Path) -> Path:
    """As `folder`, with test/, which has other pixels than val/."""
    shutil.copytree(VAL, TEST)
    for path in TEST.rglob("c.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    return folder


# ---------------------------------------------------------------------------------------------- copies


def test_images_of_their_own_need_no_note(folder: Path) -> None:
    assert load_folder(folder, PREPROCESS).notes == ()


def test_training_images_among_the_test_images_are_named(folder: Path) -> None:
    shutil.copyfile(TRAIN / "first" / "c.png", VAL / "first" / "x.png")
    shutil.copyfile(TRAIN / "second" / "a.jpg", VAL / "first" / "y.jpg")
    (note,) = load_folder(folder, PREPROCESS).notes
    assert "2 of 22 in train (such as train/first/c.png, the same as val/first/x.png)" in note
    assert load_folder(folder, PREPROCESS, checked=False).notes == (), "where few images are needed, none are compared"


def test_copies_in_a_command(cli: Callable[..., Any], workplace: Path) -> None:
    shutil.copyfile("data/val/dark/1.png", "data/train/dark/x.png")
    done = cli("prune", "--data", "data", "--model", "net.py:tiny", "--epochs", "1", "--out", "run")
    assert done.code == 0, done.err
    assert "Test images are among those to learn from: 1 of 13 in data/train" in done.out


def test_files_of_one_size_are_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large folders have many images of one size by chance: the middle tells them apart."""
    random = np.random.default_rng(0)
    files = [(tmp_path / f"{index}.bmp", 0) for index in range(8)]
    for path, _ in files:
        path.write_bytes(random.bytes(20_000))
    files[7][0].write_bytes(files[0][0].read_bytes())
    end_differs = files[1][0].read_bytes()[:-1] + b"?"
    files[6][0].write_bytes(end_differs)
    read: list[Path] = []

    def whole(path: Path) -> str:
        read.append(path)
        return sha256_of(path)

    monkeypatch.setattr(image_files, "sha256_of", whole)
    assert copies(files[:4], files[4:]) == [(files[0][0], files[7][0])]
    assert sorted(read) == [files[index][0] for index in (0, 1, 6, 7)]


# ---------------------------------------------------------------------------------------------- val/ and test/


def test_accuracy_is_that_of_test_where_there_is_val_too(three: Path) -> None:
    found = load_folder(three, PREPROCESS)
    assert found.notes == ("Accuracy is that of the images in test; those in val were not looked at.",)
    shutil.rmtree(VAL)
    alone = load_folder(three, PREPROCESS)
    assert (everything(found.test) == everything(alone.test)).all()
    assert (found.digest, alone.notes) == (alone.digest, ())


def remove_a_class() -> None:
    shutil.rmtree(TEST / "second")


def add_a_class() -> None:
    shutil.copytree(TEST / "second", TEST / "third")


def empty_a_class() -> None:
    shutil.rmtree(TEST / "second")
    (TEST / "second").mkdir()


def flatten() -> None:
    shutil.rmtree(TEST)
    shutil.copytree(VAL / "first", TEST)


@pytest.mark.parametrize("spoil", [remove_a_class, add_a_class, empty_a_class, flatten])
def test_a_test_folder_of_other_classes_is_left_for_val(spoil: Callable[[], None], three: Path) -> None:
    spoil()
    found = load_folder(three, PREPROCESS)
    (note,) = found.notes
    assert note.startswith("Accuracy is that of the images in val; test was not looked at")
    assert "classes of train" in note
    shutil.rmtree(TEST)
    assert (everything(found.test) == everything(load_folder(three, PREPROCESS).test)).all()


def test_val_of_other_classes_does_not_matter_where_test_fits(three: Path) -> None:
    (VAL / "first").rename(VAL / "other")
    assert "in test;" in load_folder(three, PREPROCESS).notes[0]


def test_without_labels_the_classes_of_test_are_those_of_val(three: Path) -> None:
    shutil.move(TRAIN, "photos")
    photos = Path("photos")
    assert "in test;" in load_folder(three, PREPROCESS, unlabelled=photos).notes[0]
    remove_a_class()
    assert "classes of val" in load_folder(three, PREPROCESS, unlabelled=photos, checked=False).notes[0]


# ---------------------------------------------------------------------------------------------- files passed over


def test_files_that_are_passed_over_are_counted(folder: Path) -> None:
    before = load_folder(folder, PREPROCESS)
    picture = (TRAIN / "first" / "c.png").read_bytes()
    lost = ("val/first/a.heic", "train/loose.png", "train/first/IMG.HEIC", "train/first/more/yet/z.png")
    known = ("train/notes.md", "train/first/Thumbs.db", "val/first/desktop.ini", "val/first/a.json", "val/second/a.xml")
    hidden = ("train/first/.a.heic", "train/.cache/x.png", "train/first/.cache/x.png", "val/labels.csv", "other.png")
    for name in (*lost, *known, *hidden):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(picture)
    found = load_folder(folder, PREPROCESS)
    (note,) = found.notes
    assert note.startswith("4 files were passed over (such as train/first/IMG.HEIC)")
    assert ".jpg" in note
    assert found.digest == before.digest
    assert load_folder(folder, PREPROCESS, checked=False).notes == ()


def test_one_file_and_folders_that_lead_round(folder: Path) -> None:
    (TRAIN / "first" / "round").symlink_to(Path("..").resolve() / TRAIN.resolve())
    (TRAIN / "second" / "a.avif").write_text("")
    (note,) = load_folder(folder, PREPROCESS).notes
    assert note.startswith("1 file was passed over (such as train/second/a.avif)")


def test_files_in_a_linked_class_folder_are_counted(folder: Path) -> None:
    shutil.move(TRAIN / "first", "elsewhere")
    (TRAIN / "first").symlink_to(Path("elsewhere").resolve())
    Path("elsewhere/a.heic").write_text("")
    (note,) = load_folder(folder, PREPROCESS).notes
    assert "train/first/a.heic" in note


def test_without_labels_folders_count_and_other_files_do_not(folder: Path) -> None:
    shutil.move(TRAIN, "photos")
    shutil.copyfile("photos/first/c.png", "photos/loose.png")
    assert load_folder(folder, PREPROCESS, unlabelled=Path("photos")).notes == ()
    Path("photos/first/a.heic").write_text("")
    (note,) = load_folder(folder, PREPROCESS, unlabelled=Path("photos")).notes
    assert note.startswith("1 file was passed over (such as photos/first/a.heic)")


def test_jfif_is_jpeg(folder: Path) -> None:
    whole = everything(load_folder(folder, PREPROCESS).train)
    (TRAIN / "first" / "a.jpg").rename(TRAIN / "first" / "a.JFIF")
    found = load_folder(folder, PREPROCESS)
    assert (everything(found.train) == whole).all()
    assert found.notes == ()
