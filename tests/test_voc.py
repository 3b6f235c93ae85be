"""Data in VOC's layout: what is read, how boxes and masks follow their image, and what is said of mistakes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from voc_shapes import CLASSES, NETWORKS, write_voc

from thinet_deploy.data.crops import Window, centre_window, cut
from thinet_deploy.data.dataset import ImageSet
from thinet_deploy.data.preprocess import Augment, Preprocess
from thinet_deploy.data.voc import is_voc, load_voc, tasks_of
from thinet_deploy.data.voc_boxes import cut_boxes, place_boxes, read_annotation
from thinet_deploy.data.voc_masks import BORDER
from thinet_deploy.errors import DataError, InputError, MissingError, ModelError
from thinet_deploy.models.ssd import default_boxes
from thinet_deploy.options import make_options
from thinet_deploy.stages.job import load_job
from thinet_deploy.tasks.base import Task
from thinet_deploy.tasks.choice import task_of
from thinet_deploy.tasks.detection import NONE, Detection
from thinet_deploy.tasks.segmentation import Segmentation

WHOLE = Preprocess(resize=(48, 48), crop=(48, 48), augment=Augment(pad=6))
DETECTION: Task = Detection(default_boxes([(2, 2)], [()]))
SEGMENTATION: Task = Segmentation()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc(tmp_path_factory.mktemp("voc") / "shapes", 6, 3, side=48)


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    """A copy, to spoil."""
    return Path(shutil.copytree(original, tmp_path / "shapes"))


def first_targets(images: ImageSet) -> Any:
    return images.known(np.arange(len(images)))


# ---------------------------------------------------------------------------------------------- what is read


def test_the_folder_is_recognised(original: Path, tmp_path: Path) -> None:
    assert is_voc(original)
    assert tasks_of(original) == ("detection", "segmentation")
    assert not is_voc(tmp_path)


def test_boxes_are_those_of_the_files(original: Path) -> None:
    data = load_voc(original, DETECTION, WHOLE)
    assert data.classes == ("background", *CLASSES)
    assert (len(data.train), len(data.test), data.task) == (6, 3, DETECTION)
    for index, rows in enumerate(first_targets(data.train)):
        there = rows[rows[:, 0] != NONE]
        mask = np.asarray(Image.open(original / "SegmentationClass" / f"train_{index:05}.png"))
        assert set(there[:, 0].astype(int)) == set(np.unique(mask)) - {0, 255}
        for label, *sides, difficult in there:
            left, top, right, bottom = (round(48 * side) for side in sides)
            inside = (mask[top:bottom, left:right] == label) | (mask[top:bottom, left:right] == BORDER)
            assert inside.mean() > 0.7, "a disc fills π/4 of its box"
            assert difficult == 0


def test_masks_are_those_of_the_files(original: Path) -> None:
    data = load_voc(original, SEGMENTATION, WHOLE)
    assert data.classes == ("background", "class 1", "class 2")
    mask = np.asarray(Image.open(original / "SegmentationClass" / "val_00001.png")).astype(int)
    np.testing.assert_array_equal(first_targets(data.test)[1], np.where(mask == 255, -1, mask))
    assert set(data.train.labels) <= {1, 2}, "an image goes by the class that it has most of"


@pytest.mark.parametrize("task", [DETECTION, SEGMENTATION], ids=lambda task: task.name)
def test_of_two_lists_accuracy_is_on_the_test_images_if_they_are_annotated(task: Task, root: Path) -> None:
    lists = root / "ImageSets" / {"detection": "Main", "segmentation": "Segmentation"}[task.name]
    assert load_voc(root, task, WHOLE).notes == ()
    ids = (lists / "train.txt").read_text().split()
    (lists / "train.txt").write_text("\n".join(ids[:-2]))
    (lists / "test.txt").write_text("\n".join(ids[-2:]))
    data = load_voc(root, task, WHOLE)
    assert (len(data.train), len(data.test)) == (4, 2)
    assert "val.txt was not looked at" in data.notes[0]
    (lists / "test.txt").write_text("\n")
    assert len(load_voc(root, task, WHOLE).test) == 3, "an empty list is none"
    (lists / "test.txt").write_text("\n".join(ids[-2:]))
    for path in (*root.glob(f"Annotations/{ids[-1]}.xml"), *root.glob(f"SegmentationClass/{ids[-1]}.png")):
        path.unlink()
    data = load_voc(root, task, WHOLE)
    assert (len(data.train), len(data.test)) == (4, 3)
    assert "test.txt were not looked at" in data.notes[0]


def test_names_may_be_given(root: Path) -> None:
    (root / "classes.txt").write_text("background\nsquare\ndisc\nring\n")
    assert load_voc(root, SEGMENTATION, WHOLE).classes == ("background", "square", "disc", "ring")
    swapped = {1: 2, 2: 1}
    plain = first_targets(load_voc(root, DETECTION, WHOLE).train)
    (root / "classes.txt").unlink()
    renamed = first_targets(load_voc(root, DETECTION, WHOLE).train)
    assert [[swapped.get(int(label), -1) for label in rows[:, 0]] for rows in plain] == renamed[..., 0].tolist()


@pytest.mark.parametrize("task", [DETECTION, SEGMENTATION], ids=lambda task: task.name)
def test_a_view_knows_the_same_of_its_images(task: Task, original: Path) -> None:
    images = load_voc(original, task, WHOLE).train
    view = images.view(np.array([4, 1]))
    np.testing.assert_array_equal(first_targets(view), first_targets(images)[[4, 1]])
    (pixels, known), *_ = images.batches(6)
    np.testing.assert_array_equal(pixels, images.inputs(np.arange(6)))
    np.testing.assert_array_equal(known, first_targets(images))


def test_masks_that_do_not_fit_in_memory_are_read_again(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = load_voc(original, SEGMENTATION, WHOLE)
    monkeypatch.setattr("thinet_deploy.data.voc_masks.MEMORY_BYTES", 0)
    np.testing.assert_array_equal(
        first_targets(load_voc(original, SEGMENTATION, WHOLE).train), first_targets(kept.train)
    )


def test_the_digest_follows_annotations_and_masks(root: Path) -> None:
    before = [load_voc(root, task, WHOLE).digest for task in (DETECTION, SEGMENTATION)]
    assert before == [load_voc(root, task, WHOLE).digest for task in (DETECTION, SEGMENTATION)]
    file = root / "Annotations" / "train_00000.xml"
    file.write_text(file.read_text().replace("<difficult>0</difficult>", "<difficult>1</difficult>\n"))
    after = [load_voc(root, task, WHOLE).digest for task in (DETECTION, SEGMENTATION)]
    assert (after[0] == before[0], after[1] == before[1]) == (False, True)
    assert first_targets(load_voc(root, DETECTION, WHOLE).train)[0, 0, 5] == 1


# ---------------------------------------------------------------------------------------------- boxes follow the pixels


@given(
    *(st.integers(-20, 20) for _ in range(2)),
    st.booleans(),
    st.tuples(*(st.integers(0, 30) for _ in range(2)), *(st.integers(3, 17) for _ in range(2))),
)
def test_a_box_is_cut_and_mirrored_with_its_pixels(
    top: int, left: int, mirrored: bool, place: tuple[int, int, int, int]
) -> None:
    x, y, width, height = place
    image = np.zeros((1, 48, 48), np.uint8)
    image[0, y : y + height, x : x + width] = 1
    window = Window(top, left, mirrored)
    (crop,) = cut(image, [window], (32, 40))
    rows = np.array([[1, x, y, x + width, y + height, 0]], np.float32)
    found = cut_boxes(rows, window, (32, 40))
    middle_y, middle_x = y + height / 2 - top, x + width / 2 - left
    assert len(found) == (0 < middle_y < 32 and 0 < middle_x < 40)
    for _, *sides, _ in found:
        rows_seen, columns_seen = np.flatnonzero(crop.any(1)), np.flatnonzero(crop.any(0))
        expected = [columns_seen[0], rows_seen[0], columns_seen[-1] + 1, rows_seen[-1] + 1]
        np.testing.assert_allclose(np.array(sides) * [40, 32, 40, 32], expected, atol=1e-4)


@pytest.mark.parametrize("size", [(96, 48), (50, 70), (480, 48), (48, 48)])
@pytest.mark.parametrize("resize", [(48, 48), 48])
def test_a_box_comes_to_lie_where_its_pixels_do(
    size: tuple[int, int], resize: int | tuple[int, int], tmp_path: Path
) -> None:
    """Resized, and cut at the sides where the shape of the image stays."""
    preprocess = Preprocess(resize=resize, crop=(48, 48))
    width, height = size
    box = [width // 2 - 8, height // 2 - 8, width // 2 + 8, height // 2 + 10]
    pixels = np.zeros((height, width), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 1
    (tmp_path / "a.xml").write_text(
        f"<annotation><object><name>disc</name><bndbox><xmin>{box[0] + 1}</xmin><ymin>{box[1] + 1}</ymin>"
        f"<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object></annotation>"
    )
    (row,) = place_boxes(read_annotation(tmp_path / "a.xml"), {"disc": 1}, size, preprocess)
    seen = preprocess.read_classes(Image.fromarray(pixels))
    assert seen.shape == (48, 48)
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    np.testing.assert_allclose(row[1:5], [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], atol=1.01)


def test_training_shows_boxes_where_the_shapes_are(original: Path) -> None:
    """The shapes are the brightest or darkest of their image, whatever the crop."""
    images = load_voc(original, DETECTION, WHOLE).train
    plain = replace(images, preprocess=images.preprocess.model_copy(update={"mean": (0, 0, 0), "std": (1, 1, 1)}))
    windows = set()
    for epoch in range(4):
        for pixels, known in plain.training_batches(3, seed=0, stage="s", epoch=epoch):
            for image, rows in zip(pixels, known, strict=True):
                for label, *sides, _ in rows[rows[:, 0] != NONE]:
                    left, top, right, bottom = (48 * side for side in sides)
                    y, x = int((top + bottom) / 2), int((left + right) / 2)
                    colour = float(np.median(image[:, max(0, y - 2) : y + 3, max(0, x - 2) : x + 3]))
                    assert colour < 0.27 if label == 1 else colour > 0.5
                    windows.add((round(left), round(top)))
    assert len(windows) > 12, "each epoch cuts anew"


# ---------------------------------------------------------------------------------------------- mistakes


def _spoil(path: str, old: str, new: str) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        text = (root / path).read_text()
        assert old in text
        (root / path).write_text(text.replace(old, new, 1))

    return spoil


def _recolour(mode: str) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        path = root / "SegmentationClass" / "train_00002.png"
        Image.open(path).convert(mode).save(path)

    return spoil


def _resize(root: Path) -> None:
    path = root / "SegmentationClass" / "train_00002.png"
    Image.open(path).resize((20, 20)).save(path)


XML = "Annotations/train_00001.xml"
MISTAKES: dict[str, tuple[Task, Callable[[Path], object], str]] = {
    "no lists": (DETECTION, lambda root: shutil.rmtree(root / "ImageSets" / "Main"), "has no train.txt"),
    "no test list": (DETECTION, lambda root: (root / "ImageSets/Main/val.txt").unlink(), "has no val.txt or test.txt"),
    "empty list": (SEGMENTATION, lambda root: (root / "ImageSets/Segmentation/val.txt").write_text("\n"), "is empty"),
    "in both lists": (DETECTION, lambda root: shutil.copy(root / "ImageSets/Main/train.txt", root / "ImageSets/Main/val.txt"), "train_00000 is in train.txt and in val.txt"),  # noqa: E501 - a row of a table
    "no image": (DETECTION, lambda root: (root / "JPEGImages/train_00003.jpg").unlink(), "no image train_00003.jpg"),
    "no annotation": (DETECTION, lambda root: (root / XML).unlink(), "names train_00001, but there is no"),
    "no mask": (SEGMENTATION, lambda root: (root / "SegmentationClass/val_00000.png").unlink(), "names val_00000"),
    "no XML": (DETECTION, lambda root: (root / XML).write_text("<annotation>"), "cannot be read as XML"),
    "no name": (DETECTION, _spoil(XML, "<name>", "<nome>x</nome><name/><name>"), "object 1 has no name"),
    "no number": (DETECTION, _spoil(XML, "<xmin>", "<xmin>x"), "object 1 has no box of four numbers: xmin 'x"),
    "empty box": (DETECTION, _spoil(XML, "<xmin>", "<xmin>9"), "the box of object 1 is empty"),
    "unknown class": (DETECTION, _spoil("Annotations/val_00001.xml", "<name>", "<name>un"), "which is not in the images"),  # noqa: E501 - a row of a table
    "unnamed class": (SEGMENTATION, lambda root: (root / "classes.txt").write_text("background\ndisc\n"), "has the index 2, but the highest of classes.txt is 1"),  # noqa: E501 - a row of a table
    "no background": (DETECTION, lambda root: (root / "classes.txt").write_text("disc\nsquare\n"), "has to name background"),  # noqa: E501 - a row of a table
    "colours": (SEGMENTATION, _recolour("RGB"), r"has colours \(RGB\), but class indices were expected"),
    "another size": (SEGMENTATION, _resize, "have different sizes: 20x20 and 48x48 pixels"),
    "damaged mask": (SEGMENTATION, lambda root: (root / "SegmentationClass/val_00000.png").write_bytes(b"x"), "cannot be read as a mask"),  # noqa: E501 - a row of a table
    "size of another image": (DETECTION, _spoil("Annotations/val_00001.xml", "<object>", "<size><width>96</width><height>48</height></size><object>"), "is of an image of 96x48 pixels, but the file has 48x48"),  # noqa: E501 - a row of a table
    "no size": (DETECTION, _spoil("Annotations/val_00001.xml", "<object>", "<size><width>wide</width></size><object>"), "its size is wide x 0"),  # noqa: E501 - a row of a table
    "Latin-1": (DETECTION, lambda root: (root / "ImageSets/Main/train.txt").write_bytes(b"caf\xe9\n"), "cannot be read as text"),  # noqa: E501 - a row of a table
    "damaged image": (SEGMENTATION, lambda root: (root / "JPEGImages/val_00000.jpg").write_bytes(b"x"), "is not an image"),  # noqa: E501 - a row of a table
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake: str, root: Path) -> None:
    task, spoil, words = MISTAKES[mistake]
    spoil(root)
    with pytest.raises(DataError, match=words) as found:
        load_voc(root, task, WHOLE)
    assert found.value.hint
    assert str(root) in found.value.what or mistake == "in both lists"


def test_a_box_outside_of_its_image_is_named(root: Path) -> None:
    Image.new("RGB", (12, 12)).save(root / "JPEGImages" / "train_00001.jpg")
    with pytest.raises(DataError, match=r"lies outside of its image of 12x12 pixels"):
        load_voc(root, DETECTION, WHOLE)


# ---------------------------------------------------------------------------------------------- which task it is


class Says(nn.Module):
    """A network that says what it is for."""

    def __init__(self, **said: Any) -> None:
        super().__init__()
        for name, value in said.items():
            setattr(self, name, value)


def test_the_network_says_its_task_or_the_folder_leaves_no_choice() -> None:
    root, both = Path("shapes"), ("detection", "segmentation")
    assert task_of(Says(task="segmentation"), "net", both, root).name == "segmentation"
    assert task_of(Says(default_boxes=[[0.5, 0.5, 1, 1]]), "net", both[:1], root).name == "detection"
    with pytest.raises(DataError, match="does not say which of them it is for") as found:
        task_of(Says(), "net", both, root)
    assert "self.task" in found.value.hint
    with pytest.raises(DataError, match="net is for detection, but shapes has images for segmentation only"):
        task_of(Says(task="detection"), "net", both[1:], root)
    with pytest.raises(ModelError, match="has no default boxes"):
        task_of(Says(task="detection"), "net", both, root)


@pytest.fixture
def options(root: Path, tmp_path: Path, torchvision_or_none: None) -> Callable[..., Any]:
    for package in ("torchmetrics", "pycocotools"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    (tmp_path / "net.py").write_text(NETWORKS)

    def make(network: str = "narrow_detector", **changes: Any) -> Any:
        model = f"{tmp_path / 'net.py'}:{network}"
        return make_options({"data": root, "model": model, "out": tmp_path / "run", **changes})

    return make


def test_a_job_takes_task_and_whole_images_from_folder_and_network(options: Callable[..., Any]) -> None:
    job = load_job(options())
    assert job.data.task.name == "detection"
    assert job.data.preprocess.resize == job.data.preprocess.crop == (32, 32)
    assert job.data.preprocess.augment.pad == 4
    assert load_job(options("narrow_segmenter")).data.task.name == "segmentation"


@pytest.mark.parametrize(
    ("network", "package"), [("narrow_detector", "pycocotools"), ("narrow_segmenter", "torchmetrics.classification")]
)
def test_what_figures_need_is_missed_before_any_work(
    network: str, package: str, options: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package.partition(".")[0]]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingError, match=rf"needs {package.partition('.')[0]}") as found:
        load_job(options(network))
    assert "thinet-deploy[tasks]" in found.value.hint


@pytest.mark.parametrize("option", ["unlabelled", "transfer_to"])
def test_what_needs_image_folders_says_so(option: str, options: Callable[..., Any], root: Path) -> None:
    weights = {"weights": root / "w.pth"} if option == "unlabelled" else {}
    (root / "w.pth").touch()
    with pytest.raises(InputError, match=rf"--{option.replace('_', '-')} goes with image folders"):
        load_job(options(**{option: root, **weights}))


def test_a_classifier_cannot_learn_boxes(options: Callable[..., Any], root: Path) -> None:
    with pytest.raises(DataError, match="does not say which"):
        load_job(options().model_copy(update={"model": "resnet20"}))
    shutil.rmtree(root / "ImageSets" / "Main")
    with pytest.raises(ModelError, match=r"gives \(1, 3\) for an image, but \(1, 3, 32, 32\) was expected: logits"):
        load_job(options().model_copy(update={"model": "resnet20"}))


def test_types_other_than_fp32_are_refused_before_any_work(options: Callable[..., Any]) -> None:
    from thinet_deploy.stages.precision import planned

    with pytest.raises(InputError, match="files in int8 are made of classifiers only so far"):
        planned(load_job(options(precision="int8")))
    plan = planned(load_job(options(target="jetson")))
    assert plan.files == ()
    assert any("the bundle has fp32" in note for note in plan.notes)


def test_the_middle_is_cut_by_default() -> None:
    assert centre_window(Preprocess(resize=(48, 64), crop=(32, 32))) == Window(8, 16)
