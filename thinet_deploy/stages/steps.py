"""The stages that make networks, one function each: from the results of earlier stages to files in an empty folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from ..artifact import read_json, write_json
from ..counting import count
from ..export import export_program
from ..models.weights import load_weights
from ..pruning.head import fit_head
from ..pruning.plan import Plan, empty_plan, load_plan
from ..pruning.surgery import apply, gap_head, load_thin
from ..seeds import derive
from ..store import Checkpoint
from .gcos import check_layout
from .prune import calibration, check_way
from .tools import PLAN, PROGRAM, REPORT, Tools, fine_tuning, write_network


def dense(tools: Tools, folder: Path, checkpoint: Checkpoint) -> None:
    """The original network: the user's weights, or trained here."""
    options, model = tools.job.options, tools.job.fresh()
    check_way(tools, model)
    check_layout(tools, model)
    if options.weights:
        load_weights(model, options.weights)
    else:
        tools.train(model, "Training the original", options.epochs, options.lr, checkpoint)
    write_network(folder, model, None)
    write_json(folder / REPORT, {"accuracy": asdict(tools.test(model, "the original"))})


@dataclass(frozen=True)
class FineTuning:
    """How to train at the end.

    Attributes:
        epochs: passes over the training images.
        lr: learning rate at the start.
        teacher: folder of the network to learn from, if there is one.
        teacher_name: what the ledger calls it.
        own: whether the user's own function trains.
    """

    epochs: int
    lr: float
    teacher: Path | None = None
    teacher_name: str = "the original"
    own: bool = False


def tuned(tools: Tools, name: str, how: FineTuning, start_folder: Path, folder: Path, checkpoint: Checkpoint) -> None:
    """A network of an earlier stage, trained for longer: ThiNet-Conv from the pruned network; the control."""
    model = tools.load(start_folder)
    plan = load_plan(start_folder / PLAN) if (start_folder / PLAN).exists() else None
    teacher = tools.load(how.teacher) if how.teacher else None
    schedule = fine_tuning(tools.job.options)
    tools.train(model, f"Fine-tuning {name}", how.epochs, how.lr, checkpoint, teacher=teacher, schedule=schedule)
    write_network(folder, model, plan)
    write_json(folder / REPORT, {"accuracy": asdict(tools.test(model, name)), "epochs": how.epochs, "lr": how.lr})


def with_gap(tools: Tools, dense_folder: Path, folder: Path) -> tuple[nn.Module, Plan]:
    """The network of a stage with global average pooling instead of its head.

    In the recipe "best" its new layer is fitted to what the original says; in the papers' it is fresh.
    """
    model, plan, options = tools.load(folder), load_plan(folder / PLAN), tools.job.options
    head = gap_head(model, tools.job.input_shape)
    assert head is not None, "load_job refuses --preset thinet-gap for such a network"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(options.seed, "ThiNet-GAP head"))
        model = apply(empty_plan(model).model_copy(update={"head": head}), model).eval()
    if not options.layerwise:
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        fit_head(model, last, tools.load(dense_folder), calibration(tools)[0], tools.progress)
    return model, plan.model_copy(update={"head": head})


def gap(
    tools: Tools, how: FineTuning, dense_folder: Path, conv_folder: Path, folder: Path, checkpoint: Checkpoint
) -> None:
    """ThiNet-GAP: the head replaced, trained again."""
    model, plan = with_gap(tools, dense_folder, conv_folder)
    before, teacher = tools.test(model, "the new head"), tools.load(how.teacher) if how.teacher else None
    schedule = fine_tuning(tools.job.options)
    tools.train(model, "Fine-tuning ThiNet-GAP", how.epochs, how.lr, checkpoint, teacher=teacher, schedule=schedule)
    write_network(folder, model, plan)
    after = tools.test(model, "ThiNet-GAP")
    write_json(
        folder / REPORT, {"accuracy": asdict(after), "before": asdict(before), "epochs": how.epochs, "lr": how.lr}
    )


def scratch(tools: Tools, thin_folder: Path, epochs: int, folder: Path, checkpoint: Checkpoint) -> None:
    """The control: the thin architecture with fresh weights, trained for as many epochs as all of the above."""
    plan = load_plan(thin_folder / PLAN)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(tools.job.options.seed, "from scratch"))
        model = apply(plan, tools.job.fresh())
        for module in model.modules():
            # What a network starts at zero (the scores of FCN) stays so.
            if isinstance(module, nn.Conv2d | nn.Linear) and bool(module.weight.any()):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    tools.train(model, "Training from scratch", epochs, tools.job.options.lr, checkpoint)
    write_network(folder, model, plan)
    write_json(folder / REPORT, {"accuracy": asdict(tools.test(model, "the control")), "epochs": epochs})


def unfinished(tools: Tools, dense_folder: Path, prunings: Mapping[str, Path], head: bool, folder: Path) -> None:
    """The thin network for the user's own training: pruned, with the new head if there is to be one.

    Of several prunings by method it is the first; its report compares them.
    """
    pruned_folder = next(iter(prunings.values()))
    if head:
        write_network(folder, *with_gap(tools, dense_folder, pruned_folder))
    else:
        write_network(folder, tools.load(pruned_folder), load_plan(pruned_folder / PLAN))
    reports = {method: read_json(each / REPORT) for method, each in prunings.items()}
    compared = {method: {key: each[key] for key in ("accuracy", "ledger", "macs")} for method, each in reports.items()}
    thin, report = tools.load(folder), read_json(pruned_folder / REPORT)
    macs = {**report["macs"], "after": count(thin, tools.job.input_shape).macs}
    write_json(folder / REPORT, {**report, "macs": macs, "methods": compared})
    export_program(thin, tools.job.input_shape, folder / PROGRAM)


def own(tools: Tools, thin_folder: Path, weights: Path, folder: Path) -> None:
    """The thin network with the weights that the user trained."""
    plan = load_plan(thin_folder / PLAN)
    model = load_thin(plan, tools.job.fresh(), weights)
    write_network(folder, model, plan)
    write_json(folder / REPORT, {"accuracy": asdict(tools.test(model, "the trained network"))})
