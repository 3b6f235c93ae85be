"""INT8 within an accuracy budget: the layers that cost most go back to float32, one by one, until it is kept.

Judged on images that neither training's statistics nor the calibration has seen, never on test images.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from ..errors import GateError
from ..interfaces import Progress, silent
from .calibration import METHODS, Batches, Floats, Method, Values, limits, session
from .graph import names_of
from .int8 import quantisable, quantise
from .refit import refit
from .weights import Layout

_BATCH = 32
_FEW = 64  # images to tell which limits are best, and which layers cost most; all of them give the verdict


@dataclass(frozen=True)
class Judge:
    """Held-out images to judge by.

    Attributes:
        images: inputs, (n, channels, height, width).
        labels: class per image; None to count agreement with the float32 network instead.
    """

    images: Floats
    labels: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Quantised:
    """A network in INT8 and how it was found.

    Attributes:
        model: with Q/DQ pairs.
        method: of calibration, the best on the held-out images.
        kept: nodes that stay in float32 → what they are called, in the order in which they went back.
        refitted: layers whose weights were refitted → share of their outputs' error that this left.
        before: top-1 of the float32 network on the held-out images, in percent.
        after: of this one.
        images: how many there were.
    """

    model: ModelProto
    method: Method
    kept: dict[str, str]
    refitted: dict[str, float]
    before: float
    after: float
    images: int


def quantise_within(
    model: ModelProto,
    values: Mapping[str, Values],
    layout: Layout,
    judge: Judge,
    max_drop: float,
    batches: Batches,
    *,
    progress: Progress = silent,
) -> Quantised:
    """Quantise a network so that its top-1 falls by `max_drop` points at most.

    Weights are refitted while they are rounded (`refit`), unless the outputs on held-out images get no nearer by it.

    Args:
        model: in float32, with named nodes.
        values: of its tensors on the calibration images.
        layout: of the Q/DQ pairs.
        judge: held-out images.
        max_drop: points of top-1.
        batches: the calibration images.
        progress: to report to.

    Raises:
        GateError: it falls further even with one layer alone in INT8.
    """
    exact = outputs(model, judge.images)
    few = np.linspace(0, len(exact) - 1, min(_FEW, len(exact))).astype(np.int64)  # folders have one class after another
    labels = exact.argmax(1) if judge.labels is None else judge.labels
    tried = {method: _limits(values, method) for method in METHODS}

    def plain(method: Method, keep: Collection[str] = ()) -> ModelProto:
        return quantise(model, tried[method], layout, keep=keep)

    def cost(made: ModelProto) -> float:
        return _distance(outputs(made, judge.images[few]), exact[few])

    costs = {method: cost(plain(method)) for method in METHODS}
    method = min(METHODS, key=lambda each: costs[each])
    before, kept, names = _top1(exact, labels), list[str](), names_of(model)
    ranking: list[str] | None = None
    while True:
        better = refit(model, tried[method], layout, batches, keep=kept, progress=progress)
        made = {
            True: quantise(model, tried[method], layout, keep=kept, weights=better.weights),
            False: plain(method, kept),
        }
        refitted = min(made, key=lambda each: cost(made[each]))
        after = _top1(outputs(made[refitted], judge.images), labels)
        if before - after <= max_drop:
            named = {node: names[node] for node in kept}
            gains = {names[node]: better.error[node] for node in better.weights} if refitted else {}
            return Quantised(made[refitted], method, named, gains, before, after, len(judge.images))
        if ranking is None:
            ranking = _worst_first(model, lambda keep: plain(method, keep), judge.images[few])
        if len(kept) + 1 >= len(ranking):
            raise _cannot(before, after, max_drop, len(judge.images), [names[node] for node in ranking[:3]])
        kept.append(ranking[len(kept)])


def outputs(model: ModelProto, images: Floats) -> Floats:
    """What a network says of images, computed node by node as the file has it, (n, classes)."""
    return speaking(model, literal=True)(images)


def speaking(model: ModelProto, *, literal: bool) -> Callable[[Floats], Floats]:
    """A function from images to what a network says of them, in batches of 32; `literal` as in `session`."""
    running, taken = session(model, literal=literal), model.graph.input[0]
    kind = np.float32 if taken.type.tensor_type.elem_type == TensorProto.FLOAT else np.float16

    def run(images: Floats) -> Floats:
        parts = [images[start : start + _BATCH].astype(kind) for start in range(0, len(images), _BATCH)]
        return np.concatenate([running.run(None, {taken.name: part})[0] for part in parts]).astype(np.float32)

    return run


def _limits(values: Mapping[str, Values], method: Method) -> dict[str, tuple[float, float]]:
    return {name: limits(each, method) for name, each in values.items()}


def _worst_first(model: ModelProto, made: Callable[[Collection[str]], ModelProto], images: Floats) -> list[str]:
    """The nodes by what each alone in INT8 changes of the outputs, most first."""
    nodes, exact = quantisable(model), outputs(model, images)
    alone = {node: _distance(outputs(made(set(nodes) - {node}), images), exact) for node in nodes}
    return sorted(nodes, key=lambda node: -alone[node])


def _distance(got: Floats, exact: Floats) -> float:
    """Mean squared difference of the outputs, each image's mean left out: it moves no class past another."""
    difference = (got - exact).astype(np.float64)
    return float(np.square(difference - difference.mean(1, keepdims=True)).mean())


def _top1(scores: Floats, labels: NDArray[np.int64]) -> float:
    return float((scores.argmax(1) == labels).mean() * 100)


def _cannot(before: float, after: float, max_drop: float, images: int, worst: list[str]) -> GateError:
    return GateError(
        f"INT8 costs more than --max-drop {max_drop:g} allows: top-1 on {images} held-out training images falls from "
        f"{before:.2f} to {after:.2f} %, even with nearly all layers in fp32. The worst: {', '.join(worst)}.",
        hint="Allow more with --max-drop, give more training images, or use --precision fp32.",
    )
