"""Training and evaluation in torch: SGD with momentum as in the papers, resumable epoch by epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from .data import ImageSet
from .errors import ThinetDeployError
from .interfaces import Progress, silent
from .seeds import derive
from .store import Checkpoint


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: passes over the training images.
        lr: learning rate at the start; it follows half a cosine down to zero over all epochs.
        batch: images per step.
        momentum: of SGD.
        weight_decay: L2 penalty.
        warmup: epochs over which the rate rises to `lr`.
        clip: largest gradient norm of a step; keeps deep networks without BatchNorm from diverging.
    """

    epochs: int
    lr: float
    batch: int = 32
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: int = 0
    clip: float = 1.0


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on a set of images.

    Attributes:
        top1: share of images whose class is ranked first, in percent.
        top5: share of images whose class is among the first five, in percent.
        images: how many were used.
    """

    top1: float
    top5: float
    images: int


def logits(
    model: nn.Module, images: ImageSet, batch: int = 256, stage: str = "", progress: Progress = silent
) -> torch.Tensor:
    """Outputs of the network in eval mode for all images in order, shape (n, classes)."""
    model.eval()
    parts, done = [], 0
    with torch.inference_mode():
        for inputs, labels in images.batches(batch):
            progress(stage, done, len(images))
            parts.append(model(torch.from_numpy(inputs)))
            done += len(labels)
    return torch.cat(parts)


def evaluate(model: nn.Module, images: ImageSet, stage: str = "Testing", progress: Progress = silent) -> Accuracy:
    """Top-1 and top-5 accuracy of a network."""
    result = accuracy(logits(model, images, stage=stage, progress=progress).numpy(), images.labels)
    progress(stage, len(images), len(images), f"top-1 {result.top1:.2f} %")
    return result


def accuracy(outputs: NDArray[np.float32], labels: NDArray[np.int64]) -> Accuracy:
    """Top-1 and top-5 accuracy of outputs (n, classes) for labels (n,).

    Ties and NaN count against the label's class: a network whose outputs are all equal has learnt nothing.
    """
    ranks = (~(outputs < np.take_along_axis(outputs, labels[:, None], 1))).sum(1) - 1
    top1, top5 = float((ranks < 1).mean() * 100), float((ranks < 5).mean() * 100)
    return Accuracy(top1, top5, len(labels))


def train(
    model: nn.Module,
    images: ImageSet,
    recipe: Recipe,
    *,
    seed: int,
    stage: str,
    checkpoint: Checkpoint | None = None,
    progress: Progress = silent,
) -> None:
    """Train a network in place.

    The order of images, augmentation and dropout depend on (seed, stage, epoch) only, so that going on from a
    checkpoint, which is saved after every epoch, gives the same weights as training without a break.

    Raises:
        ThinetDeployError: the loss is no longer a number.
    """
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    steps = images.training_steps(recipe.batch)
    first = _resume(model, optimizer, checkpoint) if checkpoint else 0
    note = ""
    for epoch in range(first, recipe.epochs):
        torch.manual_seed(derive(seed, stage, epoch, "dropout"))
        model.train()
        total = 0.0
        batches = images.training_batches(recipe.batch, seed=seed, stage=stage, epoch=epoch)
        for step, (inputs, labels) in enumerate(batches):
            progress(stage, epoch * steps + step, recipe.epochs * steps, note)
            for group in optimizer.param_groups:
                group["lr"] = _rate(recipe, epoch + step / steps)
            loss = F.cross_entropy(model(torch.from_numpy(inputs)), torch.from_numpy(labels))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            total += loss.item()
            note = f"epoch {epoch + 1}/{recipe.epochs}, loss {total / (step + 1):.3f}"
        if not math.isfinite(total):
            raise ThinetDeployError(
                f"Training diverged: the loss of {stage} is {total} after epoch {epoch + 1} of {recipe.epochs}.",
                hint="Lower the learning rate with --lr.",
            )
        if checkpoint:
            _save(model, optimizer, checkpoint, epoch + 1)
        progress(stage, (epoch + 1) * steps, recipe.epochs * steps, note)
    model.eval()


def _save(model: nn.Module, optimizer: torch.optim.SGD, checkpoint: Checkpoint, epochs: int) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, parameter in enumerate(model.parameters()):
        if (momentum := optimizer.state[parameter].get("momentum_buffer")) is not None:
            tensors[f"momentum.{index}"] = momentum
    checkpoint.save(tensors, {"epochs": epochs})


def _resume(model: nn.Module, optimizer: torch.optim.SGD, checkpoint: Checkpoint) -> int:
    """Load what was saved last; the number of epochs that are done."""
    saved = checkpoint.load()
    if saved is None:
        return 0
    tensors, state = saved
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
    for index, parameter in enumerate(model.parameters()):
        if f"momentum.{index}" in tensors:
            optimizer.state[parameter]["momentum_buffer"] = tensors[f"momentum.{index}"]
    return int(state["epochs"])


def _rate(recipe: Recipe, epoch: float) -> float:
    if epoch < recipe.warmup:
        return recipe.lr * (epoch + 1 / 16) / recipe.warmup
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * epoch / recipe.epochs))
