"""Image data: folders of the user's, the embedded digits, batches for training and evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from .artifact import hash_json
from .errors import DataError, first_line
from .interfaces import Progress, silent
from .preprocess import Augment, Preprocess
from .seeds import derive, generator

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})
# Images whose resized pixels fit in this many bytes are decoded once, at the start; larger sets are read as needed.
MEMORY_BYTES = 2 << 30
_DIGITS_TRAIN = 900


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one split.

    Attributes:
        labels: class index per image, shape (n,).
        read: resized images by index, uint8 (n, height, width, channels) of the preprocessing's canvas.
        preprocess: how images become the network's input.
    """

    labels: NDArray[np.int64]
    read: Callable[[NDArray[np.int64]], NDArray[np.uint8]]
    preprocess: Preprocess

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """The network's input without augmentation, float32 (n, channels, height, width)."""
        return self.preprocess.normalise(self.preprocess.centre_crop(self.read(indices)))

    def batches(self, size: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """All images in order, without augmentation, as (inputs, labels)."""
        for start in range(0, len(self), size):
            indices = np.arange(start, min(start + size, len(self)))
            yield self.inputs(indices), self.labels[indices]

    def training_steps(self, size: int) -> int:
        """Batches of an epoch; a last image on its own joins the batch before, for BatchNorm cannot train on one."""
        full, rest = divmod(len(self), size)
        return full + (rest > 1 or not full)

    def training_batches(
        self, size: int, *, seed: int, stage: str, epoch: int
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """One shuffled, augmented epoch; order and augmentation depend on (seed, stage, epoch, image) only."""
        order = generator(seed, stage, epoch, "order").permutation(len(self))
        key = derive(seed, stage, epoch, "augment")
        for indices in np.split(order, size * np.arange(1, self.training_steps(size))):
            crops = _augmented(self.read(indices), indices, self.preprocess, key)
            yield self.preprocess.normalise(crops), self.labels[indices]

    def calibration(self, per_class: int, *, seed: int, stage: str) -> NDArray[np.int64]:
        """Up to `per_class` images of each class, drawn without replacement, in ascending order."""
        picks = []
        for label in np.unique(self.labels):
            members = np.flatnonzero(self.labels == label)
            picks.append(generator(seed, stage, "calibration", int(label)).permutation(members)[:per_class])
        return np.sort(np.concatenate(picks))


@dataclass(frozen=True)
class Dataset:
    """Images for training and testing.

    Attributes:
        name: shown to people.
        classes: class names in index order.
        train: training images; also the source of calibration samples.
        test: test images, never used for a choice.
        digest: changes when the images do.
    """

    name: str
    classes: tuple[str, ...]
    train: ImageSet
    test: ImageSet
    digest: str

    @property
    def preprocess(self) -> Preprocess:
        """How images become the network's input."""
        return self.train.preprocess


def digits_preprocess() -> Preprocess:
    """Preprocessing of the embedded digits: 8×8 upscaled to 32×32, grey; no mirroring, shifts by up to 2 pixels."""
    return Preprocess(
        colour="GRAY", mean=(0.3,), std=(0.36,), resize=(32, 32), crop=(32, 32), augment=Augment(mirror=False, pad=2)
    )


def load_digits(preprocess: Preprocess | None = None) -> Dataset:
    """The embedded default: 1,797 handwritten digits (see assets/README.md), 900 to train on, 897 to test."""
    preprocess = preprocess or digits_preprocess()
    with resources.files("thinet_deploy").joinpath("assets/digits.npz").open("rb") as stream:
        archive = np.load(stream, allow_pickle=False)
        raw, labels = archive["images"], archive["labels"].astype(np.int64)
    grey = np.round(raw * (255 / 16)).astype(np.uint8)
    pixels = np.stack([preprocess.read(Image.fromarray(image)) for image in grey])

    def part(rows: slice) -> ImageSet:
        chosen = pixels[rows]
        return ImageSet(labels[rows], lambda indices: chosen[indices], preprocess)

    digest = hash_json(["digits", preprocess.model_dump(mode="json")])
    classes = tuple(str(digit) for digit in range(10))
    return Dataset("digits", classes, part(slice(_DIGITS_TRAIN)), part(slice(_DIGITS_TRAIN, None)), digest)


def load_folder(root: Path, preprocess: Preprocess, progress: Progress = silent) -> Dataset:
    """Image folders: ROOT/train/CLASS/*.jpg and ROOT/val or ROOT/test alike.

    Every image is checked before any work starts: decoded whole where all fit in memory, else its header.

    Raises:
        DataError: a folder is missing or empty, classes differ, or a file is no whole image (named).
    """
    if not root.is_dir():
        raise DataError(
            f"There is no folder {root}.", hint="--data takes a folder with train/ and val/ or test/ in it."
        )
    held_out = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if held_out is None or not (root / "train").is_dir():
        found = sorted(p.name for p in root.iterdir() if p.is_dir())[:8]
        raise DataError(
            f"{root} needs the folders train/ and val/ (or test/), but has {', '.join(found) or 'no folders'}.",
            hint="Put the images in ROOT/train/CLASS/ and ROOT/val/CLASS/.",
        )
    classes, train_files = _list_split(root / "train")
    test_classes, test_files = _list_split(held_out)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise DataError(
            f"{root}: train/ and {held_out.name}/ have different classes: {', '.join(odd[:5])}.",
            hint="Both need one folder per class, with the same names.",
        )
    files = [(path.relative_to(root).as_posix(), *_stamp(path)) for path, _ in train_files + test_files]
    digest = hash_json([files, preprocess.model_dump(mode="json")])
    height, width = preprocess.canvas
    fits = len(files) * height * width * preprocess.channels <= MEMORY_BYTES
    load = _in_memory if fits else _on_demand
    train = load(train_files, preprocess, progress, "Reading training images")
    test = load(test_files, preprocess, progress, "Reading test images")
    return Dataset(root.name, classes, train, test, digest)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _list_split(folder: Path) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    classes = tuple(sorted(p.name for p in _visible(folder) if p.is_dir()))
    if len(classes) < 2:
        raise DataError(
            f"{folder} has {len(classes)} class folder{'s' if not classes else ''}, but at least 2 are needed.",
            hint=f"Put the images of each class in a folder of its own: {folder}/CLASS/.",
        )
    files: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        members = sorted(p for p in _visible(folder / name) if p.suffix.lower() in IMAGE_SUFFIXES)
        if not members:
            raise DataError(
                f"The class folder {folder / name} has no images.",
                hint=f"Add images ({', '.join(sorted(IMAGE_SUFFIXES))}) or remove the folder.",
            )
        files += [(path, label) for path in members]
    return classes, files


def _visible(folder: Path) -> Iterator[Path]:
    """What is in a folder, without .ipynb_checkpoints, .DS_Store, ._photo.jpg and the like."""
    return (path for path in folder.iterdir() if not path.name.startswith("."))


def _decode(path: Path, preprocess: Preprocess) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            return preprocess.read(image)
    except Exception as error:  # a damaged file makes Pillow raise anything
        raise _no_image(path, error) from error


def _check_header(path: Path) -> None:
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


def _each(work: Callable[[Path], None], files: Sequence[tuple[Path, int]], progress: Progress, stage: str) -> None:
    """Run `work` on every path with one thread per core, reporting progress."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tasks = pool.map(work, (path for path, _ in files))
        try:
            for done, _ in enumerate(tasks, 1):
                if done % 64 == 0 or done == len(files):
                    progress(stage, done, len(files))
        except DataError:
            pool.shutdown(cancel_futures=True)
            raise


def _in_memory(files: list[tuple[Path, int]], preprocess: Preprocess, progress: Progress, stage: str) -> ImageSet:
    pixels = np.empty((len(files), *preprocess.canvas, preprocess.channels), np.uint8)
    rows = {path: row for row, (path, _) in enumerate(files)}

    def decode(path: Path) -> None:
        pixels[rows[path]] = _decode(path, preprocess)

    _each(decode, files, progress, stage)
    return ImageSet(np.array([label for _, label in files]), lambda indices: pixels[indices], preprocess)


def _on_demand(files: list[tuple[Path, int]], preprocess: Preprocess, progress: Progress, stage: str) -> ImageSet:
    _each(_check_header, files, progress, stage)
    pool = ThreadPoolExecutor(os.cpu_count())

    def read(indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        return np.stack(list(pool.map(lambda i: _decode(files[i][0], preprocess), indices)))

    return ImageSet(np.array([label for _, label in files]), read, preprocess)


def _augmented(
    images: NDArray[np.uint8], indices: NDArray[np.int64], preprocess: Preprocess, key: int
) -> NDArray[np.uint8]:
    """Random crops and mirroring; each image's choice depends on (key, index) only."""
    augment, (height, width) = preprocess.augment, preprocess.crop
    pad = augment.pad
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0))) if pad else images
    top_range, left_range = padded.shape[1] - height + 1, padded.shape[2] - width + 1
    crops = np.empty((len(images), height, width, images.shape[3]), np.uint8)
    for row, index in enumerate(indices):
        top, left, flip = np.random.Generator(np.random.Philox(key=[key, int(index)])).random(3)
        y, x = int(top * top_range), int(left * left_range)
        crop = padded[row, y : y + height, x : x + width]
        crops[row] = crop[:, ::-1] if augment.mirror and flip < 0.5 else crop
    return crops
