"""Images without classes, in whatever folders: for statistics, and to learn from a teacher."""

from pathlib import Path

import numpy as np
import pytest
from image_folders import PREPROCESS, everything, write_folder

from thinet_deploy.data import dataset as data
from thinet_deploy.data.dataset import UNLABELLED, images_digest, load_folder, load_images
from thinet_deploy.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


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
