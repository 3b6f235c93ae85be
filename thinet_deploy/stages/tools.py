"""What every stage of a build uses: training, testing, networks in files."""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..artifact import read_json, write_bytes
from ..data.dataset import UNLABELLED, ImageSet
from ..errors import ModelError
from ..interfaces import Progress, Selection
from ..models.loading import load_function
from ..models.weights import load_weights, save_weights, unused_weights
from ..options import Options
from ..parallel import join
from ..pruning.plan import Plan, load_plan
from ..pruning.surgery import load_thin
from ..seeds import derive
from ..store import Checkpoint
from ..tasks.base import Accuracy
from ..training import Recipe, Schedule, changed, evaluate, logits, train
from .job import Job

PLAN, WEIGHTS, REPORT, PROGRAM = "plan.json", "model.safetensors", "report.json", "model.pt2"


@dataclass(frozen=True)
class Tools:
    """What every stage may use.

    Attributes:
        job: what is being built.
        progress: to report to.
    """

    job: Job
    progress: Progress

    def only(self, method: Selection) -> Tools:
        """The same with one of the methods that the user named."""
        return replace(self, job=replace(self.job, options=self.job.options.only(method)))

    def train(
        self,
        model: nn.Module,
        stage: str,
        epochs: int,
        lr: float,
        checkpoint: Checkpoint | None = None,
        *,
        teacher: nn.Module | None = None,
        schedule: Schedule = "cosine",
        images: ImageSet | None = None,
    ) -> None:
        """Train in place: by the user's --trainer if there is one, else by ours.

        Args:
            model: changed in place.
            stage: what this training is called.
            epochs: passes over the training images.
            lr: learning rate at the start.
            checkpoint: where the state is kept.
            teacher: a network to learn from; a --trainer gets it if it asks for it.
            schedule: of the learning rate; "steps" and "constant" are the papers' and come without our warm-up and
                limit of the gradient.
            images: to train on, if not all training images.
        """
        options, images = self.job.options, images or self.job.data.train
        if options.trainer:
            self._fit(model, images, {"epochs": epochs, "lr": lr, "stage": stage, "teacher": teacher})
            return
        train(
            model,
            images,
            changed(self._recipe(epochs, lr, schedule), options.train),
            seed=options.seed,
            stage=stage,
            teacher=teacher,
            checkpoint=checkpoint,
            progress=self.progress,
        )

    def _recipe(self, epochs: int, lr: float, schedule: Schedule) -> Recipe:
        """Ours, or without what the papers do not have."""
        recipe = Recipe(epochs, lr, self.job.options.batch_size, schedule=schedule)
        if schedule != "cosine":
            return replace(recipe, warmup=0, clip=math.inf)
        return replace(recipe, warmup=1 if epochs > 3 else 0, clip=1.0)

    def _fit(self, model: nn.Module, images: ImageSet, about: dict[str, Any]) -> None:
        """Train by the user's --trainer, which gets of all there is what it asks for."""
        options, stage = self.job.options, about["stage"]
        fit = load_function(str(options.trainer), "fit")
        offered = {**about, "seed": options.seed, "batch_size": options.batch_size}  # by the names of job.OFFERED
        taken = inspect.signature(fit).parameters
        takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
        torch.manual_seed(derive(options.seed, stage))  # so that a plain loop gives the same weights when it is resumed
        try:
            fit(model, images, **{name: value for name, value in offered.items() if takes_all or name in taken})
        except Exception as error:  # the user's own code may raise anything
            log = options.out / "logs" / "trainer.log"
            write_bytes(log, traceback.format_exc().encode())
            raise ModelError(
                f"{options.trainer} failed in {stage}: {type(error).__name__}: {error}",
                hint=f"{log} has where. Run the same command again when it is mended: finished stages are kept.",
            ) from error
        join().align(model.cpu().eval())

    def test(self, model: nn.Module, name: str) -> Accuracy:
        """Accuracy on the test images."""
        return evaluate(model, self.job.data.test, f"Testing {name}", self.progress)

    def load(self, folder: Path) -> nn.Module:
        """The network that a stage left: plan and weights, or weights alone."""
        plan = load_plan(folder / PLAN) if (folder / PLAN).exists() else None
        model = self.job.fresh()
        if plan:
            return load_thin(plan, model, folder / WEIGHTS)
        load_weights(model, folder / WEIGHTS)
        return model.eval()


def labelled_by(original: nn.Module, images: ImageSet) -> ImageSet:
    """The same images, those without a label with the class that the original ranks first: top-1 is agreement then."""
    if images.labelled:
        return images
    predicted = logits(original, images).argmax(1).numpy()
    return replace(images, labels=np.where(images.labels == UNLABELLED, predicted, images.labels))


def write_network(folder: Path, model: nn.Module, plan: Plan | None) -> None:
    """plan.json (for a thin network) and model.safetensors."""
    if plan:
        plan.save(folder / PLAN)
    save_weights(model, folder / WEIGHTS)


def fine_tuning(options: Options) -> Schedule:
    """The learning rate's schedule at the end: the papers', where their recipe is asked for."""
    return "steps" if options.layerwise else "cosine"


def read_accuracy(folder: Path) -> Accuracy:
    """The accuracy that a stage measured."""
    return Accuracy.read(read_json(folder / REPORT)["accuracy"])


def remarks(job: Job, original: Path) -> Iterator[str]:
    """What the user has to know of the images and of the original, whose stage's folder it is."""
    yield from job.data.notes
    accuracy, classes = read_accuracy(original), len(job.data.classes)
    if accuracy.name == "top-1" and accuracy.figures["top-1"].low <= 100 / classes:
        yield (
            f"The original has {accuracy.main:.2f} % of {accuracy.images} test images right, which guessing among "
            f"{classes} classes may give, so that no comparison with it means much. Check --weights, --preprocess and "
            "the order of the classes."
        )
    weights = job.options.weights
    if weights and (others := unused_weights(weights)):
        yield f"{weights.name} also holds {', '.join(others)}, which may be better; save them alone to use them."
    if frozen := [name for name, each in job.fresh().named_parameters() if not each.requires_grad]:
        yield (
            f"No training changes what {job.model_name} has frozen: {', '.join(frozen[:3])}"
            f"{f' and {len(frozen) - 3} more' if len(frozen) > 3 else ''}."
        )


def json_ready(record: Any) -> dict[str, object]:
    """JSON knows neither infinity nor NaN: an error that is no number becomes a string."""
    fields = asdict(record).items()
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value for key, value in fields
    }
