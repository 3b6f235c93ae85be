"""The folders of --data: which of them are read, and what the user has to know about what lies in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import DataError
from .image_files import IMAGE_SUFFIXES, File, class_names, copies, has_images_of, left_out, list_split


def choose_test_folder(root: Path, *, needs_train: bool) -> tuple[Path, tuple[str, ...]]:
    """The folder of the test images, where all the folders are that there have to be; a note where two could be it.

    Of ROOT/test and ROOT/val it is test/, for by val/ choices may have been made, unless test/ lacks the classes.

    Raises:
        DataError: a folder is missing.
    """
    if not root.is_dir():
        raise DataError(
            f"There is no folder {root}.", hint="--data takes a folder with train/ and val/ or test/ in it."
        )
    train, val, test = (root / name for name in ("train", "val", "test"))
    there = [folder for folder in (val, test) if folder.is_dir()]
    if not there or (needs_train and not train.is_dir()):
        found = sorted(p.name for p in root.iterdir() if p.is_dir())[:8]
        needed = "folders train/ and val/" if needs_train else "folder val/"
        raise DataError(
            f"{root} needs the {needed} (or test/), but has {', '.join(found) or 'no folders'}.",
            hint=f"Put the images in {'ROOT/train/CLASS/ and ' if needs_train else ''}ROOT/val/CLASS/.",
        )
    if len(there) == 1:
        return there[0], ()
    like = train if needs_train else val
    if has_images_of(test, class_names(like)):
        return test, (f"Accuracy is that of the images in {test}; those in {val} were not looked at.",)
    note = (
        f"Accuracy is that of the images in {val}; {test} was not looked at, for its folders with images are not "
        f"the classes of {like}."
    )
    return val, (note,)


def training_files(folder: Path, held_out: Path, classes: tuple[str, ...]) -> list[File]:
    """The training images, which have the classes of the test images.

    Raises:
        DataError: they do not, or a class has no images.
    """
    train_classes, files = list_split(folder)
    if odd := sorted(set(classes) ^ set(train_classes)):
        raise DataError(
            f"{folder.parent}: {folder.name}/ and {held_out.name}/ have different classes: {', '.join(odd[:5])}.",
            hint="Both need one folder per class, with the same names.",
        )
    return files


def seen_before(folder: Path, files: Sequence[File], test_files: Sequence[File]) -> tuple[str, ...]:
    """What the user has to know where test images are learnt from."""
    if not (found := copies(files, test_files)):
        return ()
    note = (
        f"Test images are among those to learn from: {len(found)} of {len(files)} in {folder} (such as {found[0][0]}, "
        f"the same as {found[0][1]}). So the accuracies are not those of unseen images: take them out of {folder}."
    )
    return (note,)


def passed_over(taken: Mapping[Path, Sequence[File]]) -> tuple[str, ...]:
    """What the user has to know where folders have more than the images taken from them."""
    if not (found := [path for folder, files in taken.items() for path in left_out(folder, files)]):
        return ()
    note = (
        f"{len(found)} file{'s were' if len(found) > 1 else ' was'} passed over (such as {found[0]}). Images end in "
        f"{', '.join(sorted(IMAGE_SUFFIXES))}, and are right in the folder of their class if they have one: "
        "convert or move what is to count."
    )
    return (note,)
