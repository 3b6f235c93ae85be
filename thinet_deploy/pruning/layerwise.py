"""ThiNet's schedule: prune a layer, reconstruct, fine-tune, go on to the next (ICCV 2017, section 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from torch import nn

from ..data import Dataset
from ..interfaces import Progress, silent
from ..store import Checkpoint
from ..training import evaluate
from .graph import ChannelGraph, ChannelGroup
from .plan import Plan, empty_plan, plan_group
from .reconstruction import relative_error, scale
from .selection import keep_count, thinet
from .statistics import sampled_gram
from .surgery import apply, fold_scale

DRAWS = 10
IMAGES_PER_CLASS = 10
# With few classes ten images of each are too few: at least this many images in all.
MIN_IMAGES = 1000


@dataclass(frozen=True)
class Layer:
    """What happened to one layer.

    Attributes:
        producer: module name of the pruned convolution.
        consumer: module name of the layer whose input statistics decided.
        before: filters before.
        after: filters after.
        rows: samples behind the decision.
        error: ‖ŷ − Σ kept x̂‖² / ‖ŷ‖² on them, without ŵ.
        error_scaled: the same with ŵ.
        top1_pruned: on the test images, after ŵ was folded in. Percent.
        top1_tuned: after fine-tuning. Percent.
    """

    producer: str
    consumer: str
    before: int
    after: int
    rows: int
    error: float
    error_scaled: float
    top1_pruned: float
    top1_tuned: float


def prunable(graph: ChannelGraph) -> tuple[ChannelGroup, ...]:
    """The groups that ThiNet prunes, front to back.

    In a plain network the last convs stay: those at the smallest map (conv5_x of VGG-16, which the papers keep),
    and the one that feeds the head. Where branches meet, all groups are pruned (the inner convs of a ResNet).
    """
    if graph.joins:
        return graph.groups
    smallest = min((group.map_size for group in graph.groups), default=(0, 0))
    inner = tuple(group for group in graph.groups if group.map_size != smallest and group.spread == 1)
    return inner or tuple(group for group in graph.groups[:-1] if group.spread == 1)


def prune_layerwise(
    model: nn.Module,
    data: Dataset,
    groups: Sequence[ChannelGroup],
    *,
    keep: float,
    seed: int,
    tune: Callable[[nn.Module, str], None],
    checkpoint: Checkpoint,
    progress: Progress = silent,
) -> tuple[nn.Module, Plan, list[Layer]]:
    """Prune groups front to back with ThiNet as published.

    Args:
        model: the dense network; left untouched.
        data: calibration samples come from its training images.
        groups: from `prunable`.
        keep: share of filters kept in every group.
        seed: of the run.
        tune: fine-tunes the network in place; called with the network and the name of the step.
        checkpoint: saved after every layer.
        progress: called before the first and after every layer.

    Returns:
        The thin network, the plan that leads to it, and what happened layer by layer.
    """
    plan, layers, thin = empty_plan(model, data.preprocess), list[Layer](), model
    if saved := checkpoint.load():
        tensors, state = saved
        plan, layers = Plan.model_validate(state["plan"]), [Layer(**layer) for layer in state["layers"]]
        thin = apply(plan, model)
        thin.load_state_dict(tensors)
    for index, group in enumerate(groups):
        progress("Pruning", index, len(groups), group.producer)
        if index < len(layers):
            continue
        thin, step, layer = _prune_group(thin, data, group, keep, seed, tune)
        plan = plan.then(step)
        layers.append(layer)
        state = {"plan": plan.model_dump(mode="json"), "layers": [asdict(layer) for layer in layers]}
        checkpoint.save(thin.state_dict(), state)
    progress("Pruning", len(groups), len(groups))
    return (thin if groups else apply(plan, model)), plan, layers


def _prune_group(
    model: nn.Module, data: Dataset, group: ChannelGroup, keep: float, seed: int, tune: Callable[[nn.Module, str], None]
) -> tuple[nn.Module, Plan, Layer]:
    per_class = max(IMAGES_PER_CLASS, MIN_IMAGES // len(data.classes))
    chosen = data.train.calibration(per_class, seed=seed, stage=group.producer)
    gram, rows = sampled_gram(model, group, data.train, chosen, draws=DRAWS, seed=seed)
    kept = thinet(gram, keep_count(group.channels, keep))
    weights = scale(gram, kept)
    step = plan_group(model, group, kept.tolist())
    thin = apply(step, model)
    fold_scale(thin, group, weights)
    pruned = evaluate(thin, data.test).top1
    tune(thin, f"layer {group.producer}")
    layer = Layer(
        producer=group.producer,
        consumer=group.consumer,
        before=group.channels,
        after=len(kept),
        rows=rows,
        error=relative_error(gram, kept, weights * 0 + 1),
        error_scaled=relative_error(gram, kept, weights),
        top1_pruned=pruned,
        top1_tuned=evaluate(thin, data.test).top1,
    )
    return thin, step, layer
