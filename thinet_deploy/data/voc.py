"""Data in VOC's layout: boxes in Annotations/*.xml, masks in SegmentationClass/*.png.

    ROOT/JPEGImages/ID.jpg
    ROOT/ImageSets/Main/train.txt, val.txt or test.txt              the IDs to detect on, with Annotations/ID.xml
    ROOT/ImageSets/Segmentation/train.txt, val.txt or test.txt      the IDs to segment, with SegmentationClass/ID.png
    ROOT/classes.txt                                                names, one a line, the background first; optional

Every annotation and every mask is read before any work starts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..artifact import hash_json
from ..errors import DataError, first_line
from ..interfaces import Progress, silent
from ..tasks.base import Task
from .dataset import CutTargets, Dataset, read_files
from .image_files import IMAGE_SUFFIXES, digest_of, size_of
from .preprocess import Preprocess
from .voc_boxes import box_targets, largest, place_boxes, read_annotation
from .voc_masks import read_masks

BACKGROUND = "background"
# What a task's lists and its files are in.
_LISTS = {"detection": "Main", "segmentation": "Segmentation"}
_KNOWN = {"detection": ("Annotations", ".xml"), "segmentation": ("SegmentationClass", ".png")}


def is_voc(root: Path) -> bool:
    """Whether a folder is in VOC's layout."""
    return (root / "JPEGImages").is_dir() and (root / "ImageSets").is_dir()


def tasks_of(root: Path) -> tuple[str, ...]:
    """What a folder in VOC's layout has images for: "detection", "segmentation", or both.

    Raises:
        DataError: neither.
    """
    found = tuple(task for task, name in _LISTS.items() if (root / "ImageSets" / name / "train.txt").is_file())
    if not found:
        raise DataError(
            f"{root} has neither ImageSets/Main/train.txt nor ImageSets/Segmentation/train.txt.",
            hint="List the IDs to train on there, one a line, and those to test on in val.txt or test.txt.",
        )
    return found


def load_voc(root: Path, task: Task, preprocess: Preprocess, progress: Progress = silent) -> Dataset:
    """The images of one task.

    Args:
        root: the folder.
        task: detection or segmentation.
        preprocess: how images, with their boxes or masks, become the network's input.
        progress: to report to.

    Raises:
        DataError: a list, an image, an annotation or a mask is missing or damaged, or does not fit (named).
    """
    train = _split(root, task.name, "train")
    chosen, notes = _choose_test_list(root, task.name)
    test = _split(root, task.name, chosen)
    if both := set(train.ids) & set(test.ids):
        raise DataError(
            f"{min(both)} is in {train.listed.name} and in {test.listed.name} of {train.listed.parent}, and "
            f"{len(both)} images are: accuracy would not be that of unseen images.",
            hint="Take it out of one of them.",
        )
    files = [(path, 0) for part in (train, test) for path in (*part.images, *part.known, part.listed)]
    given = _given_classes(root)
    known = (_boxes if task.name == "detection" else _masks)(train, test, given, preprocess)
    together = len(train.ids) + len(test.ids)
    parts = []
    for part, mine, targets in zip((train, test), known.labels, known.targets, strict=True):
        stage = f"Reading {'training' if part is train else 'test'} images"
        listed = list(zip(part.images, mine.tolist(), strict=True))
        images = read_files(listed, preprocess, progress, stage, together=together)
        parts.append(replace(images, task=task, targets=targets))
    digest = hash_json([task.name, known.classes, digest_of(root, files, preprocess)])
    return Dataset(root.resolve().name, known.classes, train=parts[0], test=parts[1], digest=digest, notes=notes)


@dataclass(frozen=True)
class Split:
    """The images of one list.

    Attributes:
        listed: the list.
        ids: in its order.
        images: the file of each.
        known: the annotation or mask of each.
    """

    listed: Path
    ids: tuple[str, ...]
    images: tuple[Path, ...]
    known: tuple[Path, ...]


def _choose_test_list(root: Path, task: str) -> tuple[str, tuple[str, ...]]:
    """The list of the test images, and a note where two could be it.

    Of test.txt and val.txt it is test.txt, for by val.txt choices may have been made, unless what is known of its
    images is not there: VOC's own of some years were never published.
    """
    folder = root / "ImageSets" / _LISTS[task]
    there = [name for name in ("val", "test") if (folder / f"{name}.txt").is_file()]
    if not there:
        raise DataError(f"{folder} has no val.txt or test.txt.", hint="It lists the IDs of the images, one a line.")
    if len(there) == 1:
        return there[0], ()
    ids = _ids(folder / "test.txt")
    pictures = {path.stem for path in (root / "JPEGImages").iterdir()}
    if ids and pictures >= set(ids) and all(path.is_file() for path in _known(root, task, ids)):
        return "test", (f"Accuracy is that of the images in {folder / 'test.txt'}; val.txt was not looked at.",)
    place, _ = _KNOWN[task]
    note = (
        f"Accuracy is that of the images in {folder / 'val.txt'}; those in test.txt were not looked at, for JPEGImages "
        f"or {place} has not all of them."
    )
    return "val", (note,)


def _ids(listed: Path) -> tuple[str, ...]:
    """What a list names, in its order."""
    return tuple(dict.fromkeys(line.split()[0] for line in _lines(listed) if line.strip()))


def _known(root: Path, task: str, ids: tuple[str, ...]) -> tuple[Path, ...]:
    """The annotation or mask of each image."""
    place, suffix = _KNOWN[task]
    return tuple(root / place / f"{each}{suffix}" for each in ids)


def _split(root: Path, task: str, name: str) -> Split:
    listed = root / "ImageSets" / _LISTS[task] / f"{name}.txt"
    if not listed.is_file():
        raise DataError(f"{listed.parent} has no {listed.name}.", hint="It lists the IDs of the images, one a line.")
    if not (ids := _ids(listed)):
        raise DataError(f"{listed} is empty.", hint="It lists the IDs of the images, one a line.")
    known = _known(root, task, ids)
    if missing := [path for path in known if not path.is_file()]:
        raise DataError(
            f"{listed} names {missing[0].stem}, but there is no {missing[0]} ({len(missing)} are missing).",
            hint=f"Add it, or take {missing[0].stem} out of {listed.name}.",
        )
    return Split(listed, ids, tuple(_image(root, each, listed) for each in ids), known)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {first_line(error)}.", hint="Save it as UTF-8.") from error


def _image(root: Path, name: str, listed: Path) -> Path:
    folder = root / "JPEGImages"
    for suffix in (".jpg", *sorted(IMAGE_SUFFIXES)):
        if (path := folder / f"{name}{suffix}").is_file():
            return path
    raise DataError(
        f"{listed} names {name}, but there is no image {name}.jpg in {folder}.",
        hint=f"Add it ({', '.join(sorted(IMAGE_SUFFIXES))}), or take {name} out of {listed.name}.",
    )


def _given_classes(root: Path) -> tuple[str, ...]:
    """The names in classes.txt; () without one."""
    path = root / "classes.txt"
    if not path.is_file():
        return ()
    names = tuple(line.strip() for line in _lines(path) if line.strip())
    if len(set(names)) < len(names) or len(names) < 2 or names[0] != BACKGROUND:
        raise DataError(
            f"{path} has to name {BACKGROUND} and then each class once, but has {', '.join(names[:4]) or 'nothing'}.",
            hint="One name a line, in the order of the indices.",
        )
    return names


@dataclass(frozen=True)
class Known:
    """What is known of the images of both lists.

    Attributes:
        classes: names in index order, the background first.
        labels: of each list, the class that is largest in each image, for choices of images, shape (n,).
        targets: of each list, see `ImageSet.targets`.
    """

    classes: tuple[str, ...]
    labels: tuple[NDArray[np.int64], ...]
    targets: tuple[CutTargets, ...]


def _boxes(train: Split, test: Split, given: tuple[str, ...], preprocess: Preprocess) -> Known:
    read = [[read_annotation(path) for path in part.known] for part in (train, test)]
    names = [sorted({name for each in mine for name in each.names}) for mine in read]
    classes = given or (BACKGROUND, *names[0])
    if strange := sorted({*names[0], *names[1]} - set(classes[1:])):
        place = "classes.txt" if given else f"the images of {train.listed}"
        file = next(
            path
            for part, mine in zip((train, test), read, strict=True)
            for path, each in zip(part.known, mine, strict=True)
            if strange[0] in each.names
        )
        raise DataError(
            f"{file} has an object of the class {strange[0]!r}, which is not in {place}.",
            hint=f"Known: {', '.join(classes[1:]) or 'none'}.",
        )
    if len(classes) < 2:
        raise DataError(f"No image of {train.listed} has an object.", hint="Annotate some: Annotations/ID.xml.")
    index = {name: number for number, name in enumerate(classes)}
    rows = [
        [place_boxes(each, index, size_of(image), preprocess) for each, image in zip(mine, part.images, strict=True)]
        for part, mine in zip((train, test), read, strict=True)
    ]
    labels = tuple(np.array([largest(each) for each in mine]) for mine in rows)
    return Known(classes, labels, tuple(box_targets(mine, preprocess) for mine in rows))


def _masks(train: Split, test: Split, given: tuple[str, ...], preprocess: Preprocess) -> Known:
    together = len(train.ids) + len(test.ids)
    read = [read_masks(part.known, part.images, preprocess, together=together) for part in (train, test)]
    highest = read[0].highest
    classes = given or (BACKGROUND, *(f"class {number}" for number in range(1, highest + 1)))
    for part in read:
        if part.highest >= len(classes):
            place = "classes.txt" if given else f"the masks of {train.listed}"
            raise DataError(
                f"{part.highest_in} has the index {part.highest}, but the highest of {place} is {len(classes) - 1}.",
                hint="Masks hold a class index for each pixel, 0 for the background, 255 where it does not count.",
            )
    if len(classes) < 2:
        raise DataError(
            f"The masks of {train.listed} hold nothing but background.",
            hint="Masks hold a class index for each pixel: 1 for the first class, and so on.",
        )
    return Known(classes, tuple(part.labels for part in read), tuple(part.targets for part in read))
