"""Image data: folders of the user's, the embedded digits, batches for training and evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..artifact import hash_json
from ..errors import DataError
from ..interfaces import Progress, silent
from ..seeds import derive, generator
from ..tasks.base import Targets, Task
from ..tasks.classification import CLASSIFICATION
from .crops import Window, centre_window, cut, drawn
from .folders import choose_test_folder, passed_over, seen_before, training_files
from .image_files import File, check_header, decode, digest_of, list_images, list_split
from .preprocess import Augment, Preprocess

# Images whose resized pixels fit in this many bytes are decoded once, at the start; larger sets are read as needed.
MEMORY_BYTES = 2 << 30
# The label of an image whose class nobody told: good for calibration and distillation, not for training on labels.
UNLABELLED = -1
_DIGITS_TRAIN = 900
# What is known of the images with these indices, of their crops in these windows.
CutTargets = Callable[[NDArray[np.int64], Sequence[Window]], Targets]


@dataclass(frozen=True)
class ImageSet:
    """Images of one split, or a choice of them.

    Attributes:
        labels: class index per image, shape (n,); UNLABELLED where it is not known.
        read: resized images by index, uint8 (n, height, width, channels) of the preprocessing's canvas.
        preprocess: how images become the network's input.
        numbers: what each image goes by in random augmentation, shape (n,); None for its index. A view keeps the
            numbers of the whole, so that an image is augmented alike in both.
        task: what networks learn from them.
        targets: what is known of the images with these indices, in these windows, batch first, as the task has it;
            None where it is the labels.
    """

    labels: NDArray[np.int64]
    read: Callable[[NDArray[np.int64]], NDArray[np.uint8]]
    preprocess: Preprocess
    numbers: NDArray[np.int64] | None = None
    task: Task = CLASSIFICATION
    targets: CutTargets | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labelled(self) -> bool:
        """Whether the class of every image is known."""
        return bool((self.labels != UNLABELLED).all())

    def view(self, rows: NDArray[np.int64]) -> ImageSet:
        """The images of these indices, in this order, read from here when they are needed."""
        numbers = np.arange(len(self)) if self.numbers is None else self.numbers
        whole = self.targets
        return replace(
            self,
            labels=self.labels[rows],
            read=lambda indices: self.read(rows[indices]),
            numbers=numbers[rows],
            targets=None if whole is None else lambda indices, windows: whole(rows[indices], windows),
        )

    def inputs(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """The network's input without augmentation, float32 (n, channels, height, width)."""
        return self.preprocess.normalise(self.preprocess.centre_crop(self.read(indices)))

    def known(self, indices: NDArray[np.int64], windows: Sequence[Window] = ()) -> Targets:
        """What is known of images, batch first: their labels, or what their task says; of the centre crops by default.

        Args:
            indices: of the images.
            windows: of their crops.
        """
        if self.targets is None:
            return self.labels[indices]
        return self.targets(indices, windows or [centre_window(self.preprocess)] * len(indices))

    def batches(self, size: int) -> Iterator[tuple[NDArray[np.float32], Targets]]:
        """All images in order, without augmentation, as (inputs, what is known)."""
        for start in range(0, len(self), size):
            indices = np.arange(start, min(start + size, len(self)))
            yield self.inputs(indices), self.known(indices)

    def training_steps(self, size: int) -> int:
        """Batches of an epoch; a last image on its own joins the batch before, for BatchNorm cannot train on one."""
        full, rest = divmod(len(self), size)
        return full + (rest > 1 or not full)

    def training_batches(
        self, size: int, *, seed: int, stage: str, epoch: int
    ) -> Iterator[tuple[NDArray[np.float32], Targets]]:
        """One shuffled, augmented epoch; order and augmentation depend on (seed, stage, epoch, image) only."""
        order = generator(seed, stage, epoch, "order").permutation(len(self))
        key = derive(seed, stage, epoch, "augment")
        for indices in np.split(order, size * np.arange(1, self.training_steps(size))):
            numbers = indices if self.numbers is None else self.numbers[indices]
            windows = drawn(numbers, self.preprocess, key)
            crops = cut(self.read(indices), windows, self.preprocess.crop)
            yield self.preprocess.normalise(crops), self.known(indices, windows)

    def calibration(self, per_class: int, *, seed: int, stage: str) -> NDArray[np.int64]:
        """Up to `per_class` images of each class, drawn without replacement, in ascending order.

        Unlabelled images are all taken, for each may be of a class of its own: `sample` draws a number of them.
        """
        places = self._places(seed, stage, "calibration")
        places[self.labels == UNLABELLED] = 0
        return np.flatnonzero(places < per_class)

    def sample(self, count: int, *, seed: int, stage: str) -> NDArray[np.int64]:
        """`count` images (all, if there are no more), drawn without replacement, in ascending order.

        As equally over the classes as possible: the numbers of two classes differ by more than one only where the
        smaller class is used up. A larger sample holds the smaller ones, and holds `calibration`'s images where it has
        room for them. Unlabelled images count as one class.
        """
        classes, members = np.unique(self.labels, return_inverse=True)
        # Which classes give one more where `count` is no multiple of their number is drawn too.
        turns = generator(seed, stage, "calibration", "classes").permutation(len(classes))
        order = np.lexsort((turns[members], self._places(seed, stage, "calibration")))
        return np.sort(order[: max(0, count)])

    def split(self, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
        """Images to fit on and images to choose by: `share` of every class, drawn at random, is held out.

        A class is rounded to whole images, with at least one on both sides; the only image of a class is not held out.
        Both are views in ascending order: no pixels are copied.

        Args:
            share: of the images to hold out, between 0 and 1.
            seed: of the choice; it depends on nothing else but the labels.

        Raises:
            ValueError: `share` is not between 0 and 1.
            DataError: no class has two images.
        """
        if not 0 < share < 1:
            raise ValueError(f"The share to hold out has to be between 0 and 1, but is {share}.")
        _, members, sizes = np.unique(self.labels, return_inverse=True, return_counts=True)
        quota = np.clip(np.round(share * sizes).astype(np.int64), 1, np.maximum(1, sizes - 1)) * (sizes > 1)
        if not quota.any():
            raise DataError(
                f"No image can be held out of {len(self)}: every class has one image alone.",
                hint="A choice between variants needs two images of a class or more.",
            )
        out = self._places(seed, "split", "held out") < quota[members]
        return self.view(np.flatnonzero(~out)), self.view(np.flatnonzero(out))

    def _places(self, seed: int, stage: str, purpose: str) -> NDArray[np.int64]:
        """Place of each image in a random order of its class, from 0, shape (n,)."""
        places = np.empty(len(self), np.int64)
        for label in np.unique(self.labels):
            members = np.flatnonzero(self.labels == label)
            places[generator(seed, stage, purpose, int(label)).permutation(members)] = np.arange(len(members))
        return places


@dataclass(frozen=True)
class Dataset:
    """Images for training and testing.

    Attributes:
        name: shown to people.
        classes: class names in index order.
        train: training images; also the source of calibration samples.
        test: test images, never used for a choice.
        digest: changes when the images do.
        notes: what the user has to know about them.
    """

    name: str
    classes: tuple[str, ...]
    train: ImageSet
    test: ImageSet
    digest: str
    notes: tuple[str, ...] = ()

    @property
    def preprocess(self) -> Preprocess:
        """How images become the network's input."""
        return self.train.preprocess

    @property
    def task(self) -> Task:
        """What networks learn from them."""
        return self.train.task


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


def load_folder(
    root: Path,
    preprocess: Preprocess,
    progress: Progress = silent,
    *,
    unlabelled: Path | None = None,
    checked: bool = True,
) -> Dataset:
    """Image folders: ROOT/train/CLASS/*.jpg and ROOT/test or ROOT/val alike (see `choose_test_folder`).

    Every image is checked before any work starts: decoded whole where all fit in memory, else its header.

    Args:
        root: the folder.
        preprocess: how images become the network's input.
        progress: to report to.
        unlabelled: folder of the images to learn from, instead of ROOT/train, which then need not be there.
        checked: False to look at images only when they are needed, where these will be few.

    Raises:
        DataError: a folder is missing or empty, classes differ, or a file is no whole image (named).
    """
    held_out, notes = choose_test_folder(root, needs_train=unlabelled is None)
    classes, test_files = list_split(held_out)
    learnt_from = unlabelled or root / "train"
    if unlabelled:
        stage, train_files = "Reading unlabelled images", _unlabelled(unlabelled)
        digest = hash_json([digest_of(root, test_files, preprocess), images_digest(unlabelled, preprocess)])
    else:
        stage, train_files = "Reading training images", training_files(learnt_from, held_out, classes)
        digest = digest_of(root, train_files + test_files, preprocess)
    together = len(train_files) + len(test_files)
    train = read_files(train_files, preprocess, progress, stage, together=together, checked=checked)
    test = read_files(test_files, preprocess, progress, "Reading test images", together=together, checked=checked)
    if checked:
        notes += seen_before(learnt_from, train_files, test_files)
        notes += passed_over({learnt_from: train_files, held_out: test_files})
    return Dataset(root.resolve().name, classes, train, test, digest, notes)


def load_images(root: Path, preprocess: Preprocess, progress: Progress = silent) -> ImageSet:
    """All images in a folder and the folders inside it, in the order of their paths, every one UNLABELLED.

    For calibration and distillation, which need no classes. Checked as in `load_folder`.

    Raises:
        DataError: the folder is missing or has no images, or a file is no whole image (named).
    """
    files = _unlabelled(root)
    return read_files(files, preprocess, progress, "Reading unlabelled images", together=len(files))


def images_digest(root: Path, preprocess: Preprocess) -> str:
    """Changes when what `load_images` gives does; reads no pixels.

    Raises:
        DataError: the folder is missing or has no images.
    """
    return digest_of(root, _unlabelled(root), preprocess)


def _unlabelled(root: Path) -> list[File]:
    return [(path, UNLABELLED) for path in list_images(root)]


def read_files(
    files: Sequence[File],
    preprocess: Preprocess,
    progress: Progress = silent,
    stage: str = "Reading images",
    *,
    together: int,
    checked: bool = True,
) -> ImageSet:
    """Images from files: decoded once, at the start, where `together` of them fit in memory, else when needed.

    Args:
        files: with their labels.
        preprocess: how images become the network's input.
        progress: to report to.
        stage: what it is told.
        together: how many images there are in all.
        checked: False to look at images only when they are needed.

    Raises:
        DataError: a file is no whole image (named); where they do not fit in memory, as far as its header tells.
    """
    height, width = preprocess.canvas
    fits = together * height * width * preprocess.channels <= MEMORY_BYTES
    load = _unchecked if not checked else _in_memory if fits else _on_demand
    return load(files, preprocess, progress, stage)


def _each(work: Callable[[Path], None], files: Sequence[File], progress: Progress, stage: str) -> None:
    """Run `work` on every path with one thread per core, reporting progress."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tasks = pool.map(work, (path for path, _ in files))
        try:
            for done, _ in enumerate(tasks, 1):
                if done % 64 == 0 or done == len(files):
                    progress(stage, done, len(files), f"{len(files):,}")
        except DataError:
            pool.shutdown(cancel_futures=True)
            raise


def _in_memory(files: Sequence[File], preprocess: Preprocess, progress: Progress, stage: str) -> ImageSet:
    pixels = np.empty((len(files), *preprocess.canvas, preprocess.channels), np.uint8)
    rows = {path: row for row, (path, _) in enumerate(files)}

    def fill(path: Path) -> None:
        pixels[rows[path]] = decode(path, preprocess)

    _each(fill, files, progress, stage)
    return ImageSet(np.array([label for _, label in files]), lambda indices: pixels[indices], preprocess)


def _on_demand(files: Sequence[File], preprocess: Preprocess, progress: Progress, stage: str) -> ImageSet:
    _each(check_header, files, progress, stage)
    return _unchecked(files, preprocess, progress, stage)


def _unchecked(files: Sequence[File], preprocess: Preprocess, progress: Progress, stage: str) -> ImageSet:
    pool = ThreadPoolExecutor(os.cpu_count())

    def read(indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        return np.stack(list(pool.map(lambda i: decode(files[i][0], preprocess), indices)))

    return ImageSet(np.array([label for _, label in files]), read, preprocess)
