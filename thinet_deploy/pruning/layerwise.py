"""The papers' schedule: prune a layer, reconstruct, fine-tune, go on to the next (ICCV 2017, section 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..data.dataset import Dataset
from ..errors import ModelError
from ..interfaces import Progress, silent
from ..parallel import join
from ..store import Checkpoint
from ..tasks.base import Accuracy
from ..training import evaluate
from .budget import Widths, kept_note, possible
from .graph import ChannelGraph, ChannelGroup
from .plan import Plan, empty_plan, fingerprint
from .reconstruction import relative_error, scale
from .retrace import RetraceError, settled_plan
from .scores import apoz, random_scores, taylor, weight_sum
from .selection import by_score, thinet, thinet_omp
from .statistics import sampled_gram
from .surgery import apply, fold_scale
from .trace import Inputs

DRAWS = 10
IMAGES_PER_CLASS = 10
# With few classes ten images of each are too few: at least this many images in all.
MIN_IMAGES = 1000


@dataclass(frozen=True)
class Layer:
    """What happened to one group of layers.

    Attributes:
        producer: module names of the pruned layers, the first one of the network first.
        consumer: module names of the layers whose input statistics decided.
        before: filters before.
        after: filters after.
        rows: samples behind the decision.
        error: ‖ŷ − Σ kept x̂‖² / ‖ŷ‖² on them, without ŵ.
        error_scaled: the same with ŵ.
        pruned: accuracy on the test images without these filters.
        reconstructed: after ŵ was folded in; None without ŵ.
        tuned: after fine-tuning; None without.
        epochs: of it.
    """

    producer: str
    consumer: str
    before: int
    after: int
    rows: int
    error: float
    error_scaled: float
    pruned: Accuracy
    reconstructed: Accuracy | None
    tuned: Accuracy | None
    epochs: int

    @property
    def untrained(self) -> Accuracy:
        """The accuracy before any fine-tuning for it."""
        return self.reconstructed or self.pruned

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Layer:
        """The inverse of `asdict`."""
        measured = {step: data[step] and Accuracy.read(data[step]) for step in ("pruned", "reconstructed", "tuned")}
        return cls(**{**data, **measured})


def prunable(graph: ChannelGraph, *, shortcuts: bool = False) -> tuple[ChannelGroup, ...]:
    """The groups that ThiNet prunes, front to back.

    In a plain network the last convs stay: those at the smallest map (conv5_x of VGG-16, which the papers keep),
    and the fully connected head. Where branches meet, all groups but the residual streams are pruned (the first two
    convs of a ResNet's bottleneck).

    Args:
        graph: of the network.
        shortcuts: prune residual streams too.
    """
    if graph.joins:
        return tuple(group for group in graph.groups if shortcuts or not group.shortcut)
    convs = [group for group in graph.groups if group.map_size is not None]
    smallest = min((group.map_size for group in convs if group.map_size), default=None)
    inner = tuple(group for group in convs if group.map_size != smallest and not _feeds_head(graph, group))
    return inner or tuple(group for group in convs[:-1] if not _feeds_head(graph, group))


def _feeds_head(graph: ChannelGraph, group: ChannelGroup) -> bool:
    return any(consumer.spread > 1 for consumer in group.consumers)


@dataclass(frozen=True)
class Thin:
    """A network on its way to being thin.

    Attributes:
        model: as it stands.
        plan: that leads to it from the original.
        kept: per channel of the graph, whether it stays.
    """

    model: nn.Module
    plan: Plan
    kept: NDArray[np.bool_]


@dataclass(frozen=True)
class Schedule:
    """What every step of the schedule works with.

    Attributes:
        original: the dense network; left untouched.
        graph: of it.
        data: calibration samples come from its training images.
        inputs: example inputs of the network, to trace it.
        seed: of the run.
        tune: fine-tunes a network in place and says for how many epochs; called with the network and the group that
            was just pruned.
        selection: criterion: "thinet", "thinet-omp", or one that judges filters one by one.
        scaled: whether the consumers make up for what goes by ŵ.
    """

    original: nn.Module
    graph: ChannelGraph
    data: Dataset
    inputs: Inputs
    seed: int
    tune: Callable[[nn.Module, ChannelGroup], int]
    selection: str = "thinet"
    scaled: bool = True


def prune_layerwise(
    schedule: Schedule,
    groups: Sequence[ChannelGroup],
    widths: Widths,
    checkpoint: Checkpoint,
    progress: Progress = silent,
) -> tuple[nn.Module, Plan, list[Layer]]:
    """Prune groups front to back with ThiNet as published.

    Args:
        schedule: network, data and fine-tuning.
        groups: to prune, from `prunable`.
        widths: how many channels of each group stay.
        checkpoint: saved after every layer.
        progress: called before the first and after every layer.

    Returns:
        The thin network, the plan that leads to it, and what happened layer by layer.
    """
    model, kept = schedule.original, np.ones(schedule.graph.channels, dtype=bool)
    thin = Thin(model, empty_plan(model, schedule.data.preprocess), kept)
    layers: list[Layer] = []
    if saved := checkpoint.load():
        tensors, state = saved
        plan, layers = Plan.model_validate(state["plan"]), [Layer.read(layer) for layer in state["layers"]]
        kept[state["removed"]] = False
        thin = Thin(apply(plan, model), plan, kept)
        thin.model.load_state_dict(tensors)
    todo = [group for group in groups if widths[group.name] < len(group.channels)]
    for index, group in enumerate(todo):
        progress("Pruning", index, len(todo), group.name)
        if index < len(layers):
            continue
        thin, layer = _prune_group(schedule, thin, group, widths[group.name])
        layers.append(layer)
        state = {
            "plan": thin.plan.model_dump(mode="json"),
            "removed": np.flatnonzero(~thin.kept).tolist(),
            "layers": [asdict(layer) for layer in layers],
        }
        if not join().rank:  # the others have loaded the one before: they took part in the statistics since
            checkpoint.save(thin.model.state_dict(), state)
    progress("Pruning", len(todo), len(todo), kept_note(groups, widths))
    return (thin.model if layers else apply(thin.plan, model)), thin.plan, layers


def _prune_group(schedule: Schedule, thin: Thin, group: ChannelGroup, width: int) -> tuple[Thin, Layer]:
    data, seed = schedule.data, schedule.seed
    per_class = max(IMAGES_PER_CLASS, MIN_IMAGES // len(data.classes))
    chosen = data.train.calibration(per_class, seed=seed, stage=group.name)
    gram, rows = sampled_gram(thin.model, group, thin.plan, data.train, chosen, draws=DRAWS, seed=seed)
    rule = _rule(schedule, thin, group, gram, chosen)
    stays, kept = join().tell(_select(schedule.graph, thin.kept, group, rule, width))
    weights = scale(gram, stays) if schedule.scaled else np.ones(len(stays))
    try:
        plan = settled_plan(schedule.original, schedule.graph, kept, schedule.inputs)
    except RetraceError as error:
        raise ModelError(
            f"Without the filters chosen in {group.name} the network is another one: {error.what} "
            f"({error.modules[0] or 'the network'} {error.line}).",
            hint=f'Leave this layer whole: --ignore "{group.name}".',
        ) from error
    plan = plan.model_copy(update={"preprocess": data.preprocess})
    step = plan.since(thin.plan).model_copy(update={"structure": fingerprint(thin.model)})
    model = apply(step, thin.model)
    pruned, reconstructed = evaluate(model, data.test), None
    if schedule.scaled:
        everywhere = np.ones(len(group.channels))
        everywhere[stays] = weights
        fold_scale(model, group, plan, everywhere)
        reconstructed = evaluate(model, data.test)
    epochs = schedule.tune(model, group)
    layer = Layer(
        producer=", ".join(group.producers),
        consumer=", ".join(dict.fromkeys(each.weight.removesuffix(".weight") for each in group.consumers)),
        before=len(group.channels),
        after=len(stays),
        rows=rows,
        error=relative_error(gram, stays, weights * 0 + 1),
        error_scaled=relative_error(gram, stays, weights),
        pruned=pruned,
        reconstructed=reconstructed,
        tuned=evaluate(model, data.test) if epochs else None,
        epochs=epochs,
    )
    return Thin(model, plan, kept), layer


def _rule(
    schedule: Schedule, thin: Thin, group: ChannelGroup, gram: NDArray[np.float64], chosen: NDArray[np.int64]
) -> Callable[[int], NDArray[np.int64]]:
    """Width → which channels of a group stay."""
    kind, train = schedule.selection, schedule.data.train
    if kind in {"thinet", "thinet-omp"}:
        greedy = thinet if kind == "thinet" else thinet_omp
        return lambda width: greedy(gram, width, group.cells)
    scores = {
        "weight-sum": lambda: weight_sum(thin.model, schedule.graph, group, thin.plan),
        "apoz": lambda: apoz(thin.model, group, thin.plan, train, chosen),
        "taylor": lambda: taylor(thin.model, group, thin.plan, train, chosen),
        "random": lambda: random_scores(group, schedule.seed),
    }[kind]()
    return lambda width: by_score(scores, width, group.cells)


def _select(
    graph: ChannelGraph,
    kept: NDArray[np.bool_],
    group: ChannelGroup,
    rule: Callable[[int], NDArray[np.int64]],
    width: int,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The rule's choice, and all channels that stay then; wider where a layer would lose all of its filters."""
    while True:
        stays = rule(width)
        after = kept.copy()
        after[group.channels] = False
        after[group.channels[stays]] = True
        if graph.leaves_filters(after) or width == len(group.channels):
            return stays, after
        width = next(wider for wider in possible(group, 1) if wider > width)
