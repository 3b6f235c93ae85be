"""The stage that carries a network over to other classes: all but the layer that tells them apart, then fine-tuned."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..artifact import write_json
from ..models.loading import build_model
from ..pruning.head import fit_head
from ..pruning.plan import Plan, fingerprint, load_plan
from ..pruning.surgery import apply
from ..seeds import derive
from ..store import Checkpoint
from .prune import calibration
from .steps import FineTuning
from .tools import PLAN, REPORT, Tools, fine_tuning, write_network


def carried(
    source: Tools, target: Tools, label: str, how: FineTuning, start: Path, folder: Path, checkpoint: Checkpoint
) -> None:
    """The network that a stage of `source` left in `start`, with a new last layer, fine-tuned to `target`'s images.

    With a teacher the new layer is first fitted to what that says, but for the papers' recipes, which leave it fresh.
    """
    options, classes = target.job.options, len(target.job.data.classes)
    plan = load_plan(start / PLAN) if (start / PLAN).exists() else None
    model, plan = _fresh(target, plan, classes)
    fresh, other = model.state_dict(), _fresh(target, plan, classes + 1)[0].state_dict()
    taken = source.load(start).state_dict()
    model.load_state_dict(
        {name: taken[name] if fresh[name].shape == other[name].shape else fresh[name] for name in fresh}
    )
    teacher = target.load(how.teacher) if how.teacher else None
    report: dict[str, Any] = {"epochs": how.epochs}
    last = _only_linear(model, {name for name in fresh if fresh[name].shape != other[name].shape})
    if teacher and last and not options.layerwise:
        sample, _ = calibration(target)
        if fit_head(model.eval(), last, teacher, sample, target.progress):
            report["before"] = asdict(target.test(model, label))
    stage = f"Fine-tuning {label} to {target.job.data.name}"
    schedule = fine_tuning(options)
    target.train(model, stage, how.epochs, how.lr, checkpoint, teacher=teacher, schedule=schedule)
    write_network(folder, model.eval(), plan)
    write_json(folder / REPORT, {"accuracy": asdict(target.test(model, label)), **report})


def _only_linear(model: nn.Module, new: set[str]) -> nn.Linear | None:
    """The layer that all new parameters belong to, if it is a linear one with a bias."""
    owners = {name.rpartition(".")[0] for name in new}
    if len(owners) != 1:
        return None
    layer = model.get_submodule(*owners)
    return layer if isinstance(layer, nn.Linear) and layer.bias is not None else None


def _fresh(tools: Tools, plan: Plan | None, classes: int) -> tuple[nn.Module, Plan | None]:
    """The architecture of a plan for so many classes, with fresh weights, and the plan that leads there."""
    job = tools.job
    dense = build_model(job.options.model, input_shape=job.input_shape, num_classes=classes, seed=job.options.seed)
    if plan is None:
        return dense, None
    head = plan.head.model_copy(update={"classes": classes}) if plan.head else None
    mine = plan.model_copy(update={"structure": fingerprint(dense), "head": head})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(job.options.seed, "new last layer"))
        return apply(mine, dense), mine
