"""What every stage of a build uses: training, testing, networks in files."""

from __future__ import annotations

import inspect
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .artifact import read_json
from .errors import ModelError
from .interfaces import Progress
from .job import Job
from .models.loading import load_function
from .models.weights import load_weights, save_weights
from .parallel import join
from .pruning.plan import Plan, load_plan
from .pruning.surgery import load_thin
from .seeds import derive
from .store import Checkpoint
from .training import Accuracy, Recipe, evaluate, train

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

    def teacher(self, dense: Path) -> nn.Module | None:
        """The original, to learn from while fine-tuning; None where the recipe does without."""
        return self.load(dense) if self.job.options.distils else None

    def train(
        self,
        model: nn.Module,
        stage: str,
        epochs: int,
        lr: float,
        checkpoint: Checkpoint | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        """Train in place: by the user's --trainer if there is one, else by ours."""
        options, images = self.job.options, self.job.data.train
        if not options.trainer:
            recipe = Recipe(epochs, lr, options.batch_size, warmup=1 if epochs > 3 else 0)
            train(
                model,
                images,
                recipe,
                seed=options.seed,
                stage=stage,
                teacher=teacher,
                checkpoint=checkpoint,
                progress=self.progress,
            )
            return
        fit = load_function(options.trainer, "fit")
        offered = {"epochs": epochs, "lr": lr, "stage": stage, "seed": options.seed, "batch_size": options.batch_size}
        taken = inspect.signature(fit).parameters
        takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
        torch.manual_seed(derive(options.seed, stage))  # so that a plain loop gives the same weights when it is resumed
        try:
            fit(model, images, **{name: value for name, value in offered.items() if takes_all or name in taken})
        except Exception as error:  # the user's own code may raise anything
            raise ModelError(f"{options.trainer} failed in {stage}: {type(error).__name__}: {error}") from error
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


def write_network(folder: Path, model: nn.Module, plan: Plan | None) -> None:
    """plan.json (for a thin network) and model.safetensors."""
    if plan:
        plan.save(folder / PLAN)
    save_weights(model, folder / WEIGHTS)


def read_accuracy(folder: Path) -> Accuracy:
    """The accuracy that a stage measured."""
    return Accuracy(**read_json(folder / REPORT)["accuracy"])


def json_ready(record: Any) -> dict[str, object]:
    """JSON knows neither infinity nor NaN: an error that is no number becomes a string."""
    fields = asdict(record).items()
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value for key, value in fields
    }
