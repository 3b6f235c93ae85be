"""Image files: which there are in a folder, whether they can be read, which are the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ..artifact import hash_json, sha256_of
from ..errors import DataError, first_line
from .preprocess import Preprocess, check_depth

File = tuple[Path, int]  # and the index of its class
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})
# What lies beside images and is none.
_NO_IMAGES = frozenset({"thumbs.db", "desktop.ini"})
_TEXT_SUFFIXES = frozenset(
    {".txt", ".md", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".toml", ".html", ".log", ".py"}
)
_MIDDLE = 4096  # bytes of a file, by which most files of the same size can be told apart


def list_split(folder: Path) -> tuple[tuple[str, ...], list[File]]:
    """The classes in FOLDER/CLASS/*.jpg, sorted, and the images with the index of theirs.

    Raises:
        DataError: there are fewer than two classes, or one has no images.
    """
    classes = class_names(folder)
    if len(classes) < 2:
        raise DataError(
            f"{folder} has {len(classes)} class folder{'s' if not classes else ''}, but at least 2 are needed.",
            hint=f"Put the images of each class in a folder of its own: {folder}/CLASS/.",
        )
    files: list[File] = []
    for label, name in enumerate(classes):
        members = sorted(_images(folder / name))
        if not members:
            raise DataError(
                f"The class folder {folder / name} has no images.",
                hint=f"Add images ({', '.join(sorted(IMAGE_SUFFIXES))}) or remove the folder.",
            )
        files += [(path, label) for path in members]
    return classes, files


def class_names(folder: Path) -> tuple[str, ...]:
    """The classes in FOLDER/CLASS/, sorted."""
    return tuple(sorted(path.name for path in _visible(folder) if path.is_dir()))


def has_images_of(folder: Path, classes: tuple[str, ...]) -> bool:
    """Whether FOLDER/CLASS/*.jpg are images of these classes, some of each, and of no others."""
    return class_names(folder) == classes and all(any(_images(folder / name)) for name in classes)


def left_out(folder: Path, files: Iterable[File]) -> list[Path]:
    """What may be images in a folder and the folders inside it, but is not among those taken, such as a.heic."""
    taken = {path for path, _ in files}
    found, seen = list[Path](), set[str]()
    for place, folders, names in os.walk(folder, followlinks=True):
        new = (real := os.path.realpath(place)) not in seen  # see `list_images`
        seen.add(real)
        folders[:] = sorted(name for name in folders if new and not name.startswith("."))
        found += [path for name in names if new and _may_be_image(name) and (path := Path(place, name)) not in taken]
    return sorted(found)


def _may_be_image(name: str) -> bool:
    ordinary = not name.startswith(".") and name.lower() not in _NO_IMAGES
    return ordinary and Path(name).suffix.lower() not in _TEXT_SUFFIXES


def list_images(root: Path) -> list[Path]:
    """The images in a folder and the folders inside it, in the order of their paths.

    Raises:
        DataError: the folder is missing or has no images.
    """
    if not root.is_dir():
        raise DataError(
            f"There is no folder {root}.", hint="Expected is a folder of images; it may have folders in it."
        )
    found, folders, seen = list[Path](), [root], set[Path]()
    while folders:
        folder = folders.pop()
        if (real := folder.resolve()) in seen:  # a link to a folder that was read already, maybe to one around it
            continue
        seen.add(real)
        entries = sorted(_visible(folder), reverse=True)
        folders += [path for path in entries if path.is_dir()]
        found += [path for path in entries if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    if not found:
        raise DataError(
            f"The folder {root} has no images, nor have the folders in it.",
            hint=f"Images end in {', '.join(sorted(IMAGE_SUFFIXES))}; hidden files do not count.",
        )
    return sorted(found)


def _images(folder: Path) -> Iterator[Path]:
    """What is called an image right in a folder."""
    return (path for path in _visible(folder) if path.suffix.lower() in IMAGE_SUFFIXES)


def _visible(folder: Path) -> Iterator[Path]:
    """What is in a folder, without .ipynb_checkpoints, .DS_Store, ._photo.jpg and the like."""
    return (path for path in folder.iterdir() if not path.name.startswith("."))


def decode(path: Path, preprocess: Preprocess) -> NDArray[np.uint8]:
    """An image as the preprocessing resizes it, (height, width, channels).

    Raises:
        DataError: it is no whole image, or has pixels of more than 16 bits.
    """
    try:
        with Image.open(path) as image:
            return preprocess.read(image)
    except Exception as error:  # a damaged file makes Pillow raise anything
        raise _no_image(path, error) from error


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of an image in pixels, from its header.

    Raises:
        DataError: it is no image.
    """
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:  # as above
        raise _no_image(path, error) from error


def check_header(path: Path) -> None:
    """Raise DataError where a file is no image for `decode`, as far as that can be told without decoding it."""
    try:
        with Image.open(path) as image:
            check_depth(image)
            image.verify()
    except Exception as error:  # as above
        raise _no_image(path, error) from error


def _no_image(path: Path, error: Exception) -> DataError:
    if isinstance(error, DataError):
        return DataError(f"{path}: {error.what}", hint=error.hint)
    if isinstance(error, UnidentifiedImageError):
        return DataError(f"{path} is not an image.", hint="Remove or replace the file.")
    return DataError(
        f"{path} cannot be read as an image: {first_line(error).rstrip('.')}.",
        hint="It may be truncated or corrupt: remove or replace it.",
    )


def digest_of(root: Path, files: Iterable[File], preprocess: Preprocess) -> str:
    """Changes when one of the files in a folder does, or the preprocessing; reads no pixels."""
    stamps = [(path.relative_to(root).as_posix(), *_stamp(path)) for path, _ in files]
    return hash_json([stamps, preprocess.model_dump(mode="json")])


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:  # such as a link to a file that is gone
        raise _no_image(path, error) from error
    return status.st_size, status.st_mtime_ns


def copies(files: Iterable[File], others: Iterable[File]) -> list[tuple[Path, Path]]:
    """Files that are, byte for byte, one of the others, with that one.

    Only files with the size and the middle of one of the others are read whole.
    """
    mine, theirs = [path for path, _ in files], [path for path, _ in others]
    for look in (_size, _middle):
        looks = {path: look(path) for path in {*mine, *theirs}}
        both = {looks[path] for path in mine} & {looks[path] for path in theirs}
        mine, theirs = ([path for path in paths if looks[path] in both] for paths in (mine, theirs))
    known = {sha256_of(path): path for path in theirs}
    return [(path, other) for path in mine if (other := known.get(sha256_of(path)))]


def _size(path: Path) -> int:
    return path.stat().st_size


def _middle(path: Path) -> bytes:
    """Tells files apart whose beginnings and ends are alike, as those of images from one camera are."""
    with path.open("rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        stream.seek(max(0, size - _MIDDLE) // 2)
        return hashlib.sha256(stream.read(_MIDDLE) + size.to_bytes(8)).digest()
