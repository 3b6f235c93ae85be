"""Image files: which there are in a folder, whether they can be read, which are the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ..artifact import hash_json, sha256_of
from ..errors import DataError, first_line
from .preprocess import Preprocess

File = tuple[Path, int]  # and the index of its class
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})


def list_split(folder: Path) -> tuple[tuple[str, ...], list[File]]:
    """The classes in FOLDER/CLASS/*.jpg, sorted, and the images with the index of theirs.

    Raises:
        DataError: there are fewer than two classes, or one has no images.
    """
    classes = tuple(sorted(p.name for p in _visible(folder) if p.is_dir()))
    if len(classes) < 2:
        raise DataError(
            f"{folder} has {len(classes)} class folder{'s' if not classes else ''}, but at least 2 are needed.",
            hint=f"Put the images of each class in a folder of its own: {folder}/CLASS/.",
        )
    files: list[File] = []
    for label, name in enumerate(classes):
        members = sorted(p for p in _visible(folder / name) if p.suffix.lower() in IMAGE_SUFFIXES)
        if not members:
            raise DataError(
                f"The class folder {folder / name} has no images.",
                hint=f"Add images ({', '.join(sorted(IMAGE_SUFFIXES))}) or remove the folder.",
            )
        files += [(path, label) for path in members]
    return classes, files


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


def _visible(folder: Path) -> Iterator[Path]:
    """What is in a folder, without .ipynb_checkpoints, .DS_Store, ._photo.jpg and the like."""
    return (path for path in folder.iterdir() if not path.name.startswith("."))


def decode(path: Path, preprocess: Preprocess) -> NDArray[np.uint8]:
    """An image as the preprocessing resizes it, (height, width, channels).

    Raises:
        DataError: it is no whole image.
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
    """Raise DataError where a file is no image, as far as that can be told without decoding it."""
    try:
        with Image.open(path) as image:
            image.verify()
    except Exception as error:  # as above
        raise _no_image(path, error) from error


def _no_image(path: Path, error: Exception) -> DataError:
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
    """Files that are, byte for byte, one of the others, with that one; only files of equal sizes are read."""
    by_size: dict[int, list[Path]] = {}
    for path, _ in others:
        by_size.setdefault(path.stat().st_size, []).append(path)
    digests: dict[int, dict[str, Path]] = {}
    found = []
    for path, _ in files:
        size = path.stat().st_size
        if size in by_size:
            if size not in digests:
                digests[size] = {sha256_of(other): other for other in by_size[size]}
            if other := digests[size].get(sha256_of(path)):
                found.append((path, other))
    return found
