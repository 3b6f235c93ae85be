"""How fine-tuning goes best, tried on a tenth of the work: at which learning rate, with the original or without."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..artifact import write_json
from ..data.dataset import ImageSet
from ..errors import DivergedError
from ..parallel import join
from ..tasks.base import Judgement
from ..training import judge
from .tools import Tools, labelled_by

TRIAL = "trial.json"
# What is tried beside the usual rate, as long as each is better than the one before.
LOWER, HIGHER = (0.003, 0.001), (0.03,)
_SHARE = 10  # of the epochs and, where these are fewer, of the images


@dataclass(frozen=True)
class _Attempt:
    """A short fine-tuning, and what held-out images say of it; None where it diverged."""

    rate: float
    taught: bool
    judged: Judgement | None

    def behind(self, other: _Attempt, *, clearly: bool) -> bool:
        """Whether the other one is better: clearly is by the whole interval."""
        if self.judged is None or other.judged is None:
            return other.judged is not None
        found = self.judged.behind(other.judged)
        return (found.low if clearly else found.value) > 0

    def told(self) -> dict[str, Any]:
        """For the record."""
        accuracy = asdict(self.judged.accuracy) if self.judged else None
        return {"lr": self.rate, "teacher": self.taught, "accuracy": accuracy}


def tried(tools: Tools, dense_folder: Path, pruned_folder: Path, epochs: int, folder: Path) -> None:
    """Leave in trial.json what to fine-tune with: the usual unless held-out training images say otherwise.

    A lower rate, and learning without the original, have to be clearly better. A higher rate has to be better at all:
    that a trial is short, and that the original may have seen these images, both speak for low ones.

    The rate is only tried where the user has given none, learning without the original only where images have labels.

    Args:
        tools: of the job.
        dense_folder: of the original.
        pruned_folder: of the network that is to be fine-tuned.
        epochs: that it is to be fine-tuned for.
        folder: gets the file.
    """
    options, original = tools.job.options, tools.load(dense_folder)
    fit, held_out = tools.job.split
    images = _some(tools, fit, epochs)
    judging = labelled_by(original, held_out)

    def attempt(rate: float, teacher: nn.Module | None) -> _Attempt:
        model = tools.load(pruned_folder)
        stage = f"Trying to fine-tune at {rate:g}, {'with' if teacher else 'without'} the original as teacher"
        try:
            tools.train(model, stage, max(1, epochs // _SHARE), rate, teacher=teacher, images=images)
        except DivergedError:
            return _Attempt(rate, bool(teacher), None)
        # What is tried next has to be the same in all processes, whatever the last bits of their outputs are.
        return _Attempt(rate, bool(teacher), join().once(lambda: judge(model, judging)))

    best = attempt(options.rate, original)
    attempts = [best]
    for rates, clearly in () if options.finetune_lr else ((LOWER, True), (HIGHER, False)):
        for rate in rates if best is attempts[0] else ():
            attempts.append(attempt(rate, original))
            if not best.behind(attempts[-1], clearly=clearly):
                break
            best = attempts[-1]
    if fit.labelled:
        attempts.append(attempt(best.rate, None))
        best = attempts[-1] if best.behind(attempts[-1], clearly=True) else best
    told = {"epochs": epochs, "images": len(images), "judged on": len(judging)}
    write_json(folder / TRIAL, {**best.told(), **told, "tried": [each.told() for each in attempts]})


def _some(tools: Tools, images: ImageSet, epochs: int) -> ImageSet:
    """All images, or as many as make one epoch a tenth of the work."""
    if epochs >= _SHARE:
        return images
    count = min(len(images), max(2, len(images) * epochs // _SHARE))  # BatchNorm cannot train on one
    return images.view(images.sample(count, seed=tools.job.options.seed, stage="trial"))
