"""A few images, networks that are trained on them in a blink, and how."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from thinet_deploy.data.dataset import ImageSet
from thinet_deploy.data.preprocess import Augment, Preprocess
from thinet_deploy.interfaces import Progress
from thinet_deploy.training import Recipe, train

COUNT, CLASSES = 50, 4
RECIPE = Recipe(epochs=4, lr=0.05, batch=16, warmup=1)


class StoppedError(Exception):
    """The process ends here."""


def corners() -> ImageSet:
    """Images with a bright corner for each class."""
    rng = np.random.default_rng(0)
    labels = np.arange(COUNT) % CLASSES
    pixels = rng.integers(0, 100, (COUNT, 10, 10, 1), np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[(label % 2) * 5 :, (label // 2) * 5 :][:5, :5] += 120
    augment = Augment(mirror=True, pad=1)
    preprocess = Preprocess(colour="GRAY", mean=(0.3,), std=(0.3,), resize=(10, 10), crop=(8, 8), augment=augment)
    return ImageSet(labels, lambda indices: pixels[indices], preprocess)


def network() -> nn.Module:
    """With everything whose state or chance could differ: BatchNorm and dropout."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(54, CLASSES)),
    )


def plain() -> nn.Module:
    """Without BatchNorm and dropout: alike in training and eval mode."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, CLASSES))


def trained(images: ImageSet, *, seed: int = 1, stage: str = "s", recipe: Recipe = RECIPE) -> nn.Module:
    """The network after a training."""
    model = network()
    train(model, images, recipe, seed=seed, stage=stage)
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether all parameters and buffers are the same to the bit."""
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def stop_after(epochs: int) -> Progress:
    """What ends the process when so many epochs of RECIPE are done."""

    def progress(stage: str, done: int, total: int, note: str = "") -> None:
        if done == epochs * total // RECIPE.epochs and note:
            raise StoppedError

    return progress
