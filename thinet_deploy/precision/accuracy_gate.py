"""INT8 within an accuracy budget: the layers that cost most go back to float32, one by one, until it is kept.

Judged on training images that neither the pruning's statistics nor the calibration has seen, never on test images. The
fine-tuning has seen them, so that what INT8 costs on new images, which the table shows, may be more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from ..errors import GateError
from ..interfaces import Progress, silent
from .calibration import METHODS, Batches, Floats, Method, Values, limits, session
from .graph import names_of
from .int8 import quantisable, quantise, unbounded
from .refit import refit
from .rounded import in_float32
from .weights import Layout

Limits = dict[str, tuple[float, float]]
ROUNDING = 1e-9  # points; of percentages that are a whole number of images apart
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
        unbounded: nodes that stay in float32 because values there are not finite → what they are called.
        refitted: layers whose weights were refitted → share of their outputs' error that this left.
        before: top-1 of the float32 network on the held-out images, in percent.
        after: of this one.
        images: how many there were.
    """

    model: ModelProto
    method: Method
    kept: dict[str, str]
    unbounded: dict[str, str]
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
    search = _Search(model, values, layout, judge, batches, progress)
    kept = list[str]()
    while (done := search.quantised(kept)).before - done.after > max_drop + ROUNDING:
        kept = search.worst_first[: len(kept) + 1]
        if len(kept) >= len(search.worst_first):
            raise _cannot(done, max_drop, [search.names[node] for node in search.worst_first[:3]])
    return done


class _Search:
    """INT8 networks with ever more layers in float32, and what each says of the held-out images.

    Attributes:
        names: node → what it is called.
        finite: tensor → its values, where there are limits of them.
        always: nodes that cannot be in INT8, for want of limits.
        method: of calibration: the one whose limits leave the outputs nearest, with all other layers in INT8.
    """

    def __init__(
        self,
        model: ModelProto,
        values: Mapping[str, Values],
        layout: Layout,
        judge: Judge,
        batches: Batches,
        progress: Progress,
    ) -> None:
        self.model, self.layout, self.judge, self.batches, self.progress = model, layout, judge, batches, progress
        self.names, self.exact = names_of(model), outputs(model, judge.images)
        self.labels = self.exact.argmax(1) if judge.labels is None else judge.labels
        # Folders have one class after another.
        self.few = np.linspace(0, len(self.exact) - 1, min(_FEW, len(self.exact))).astype(np.int64)
        self.finite = {name: each for name, each in values.items() if each.finite}
        self.always = unbounded(model, self.finite)
        self.method, self.limits = self._calibrated()

    def _calibrated(self) -> tuple[Method, Limits]:
        tried = {method: {name: limits(each, method) for name, each in self.finite.items()} for method in METHODS}
        made = {method: quantise(self.model, tried[method], self.layout, keep=self.always) for method in METHODS}
        costs = {method: self._cost(made[method]) for method in METHODS}
        best = min(METHODS, key=lambda each: costs[each])
        return best, tried[best]

    def _cost(self, made: ModelProto) -> float:
        return _distance(outputs(made, self.judge.images[self.few]), self.exact[self.few])

    @cached_property
    def worst_first(self) -> list[str]:
        """The nodes by what each alone in INT8 changes of the outputs, most first."""
        nodes = [node for node in quantisable(self.model) if node not in self.always]
        images = self.judge.images[self.few]
        exact = outputs(self.model, images)
        alone = {node: _distance(outputs(self._plain(set(nodes) - {node}), images), exact) for node in nodes}
        return sorted(nodes, key=lambda node: -alone[node])

    def quantised(self, kept: Collection[str]) -> Quantised:
        """The network with some nodes in float32; its weights refitted, if the outputs are nearer then."""
        single = {*kept, *self.always}
        better = refit(self.model, self.limits, self.layout, self.batches, keep=single, progress=self.progress)
        made = {
            True: quantise(self.model, self.limits, self.layout, keep=single, weights=better.weights),
            False: self._plain(kept),
        }
        refitted = min(made, key=lambda each: self._cost(made[each]))
        return Quantised(
            model=made[refitted],
            method=self.method,
            kept={node: self.names[node] for node in kept},
            unbounded={node: self.names[node] for node in self.always},
            refitted={self.names[node]: better.error[node] for node in better.weights} if refitted else {},
            before=_top1(self.exact, self.labels),
            after=_top1(outputs(made[refitted], self.judge.images), self.labels),
            images=len(self.judge.images),
        )

    def _plain(self, kept: Collection[str]) -> ModelProto:
        return quantise(self.model, self.limits, self.layout, keep={*kept, *self.always})


def outputs(model: ModelProto, images: Floats) -> Floats:
    """What a network says of images, computed node by node as the file has it, (n, classes)."""
    return speaking(model, literal=True)(images)


def speaking(model: ModelProto, *, literal: bool) -> Callable[[Floats], Floats]:
    """A function from images to what a network says of them, in batches of 32; `literal` as in `session`."""
    running, taken = session(in_float32(model), literal=literal), model.graph.input[0]
    kind = np.float32 if taken.type.tensor_type.elem_type == TensorProto.FLOAT else np.float16

    def run(images: Floats) -> Floats:
        parts = [images[start : start + _BATCH].astype(kind) for start in range(0, len(images), _BATCH)]
        return np.concatenate([running.run(None, {taken.name: part})[0] for part in parts]).astype(np.float32)

    return run


def _distance(got: Floats, exact: Floats) -> float:
    """Mean squared difference of the outputs, each image's mean left out: it moves no class past another."""
    difference = (got - exact).astype(np.float64)
    return float(np.square(difference - difference.mean(1, keepdims=True)).mean())


def _top1(scores: Floats, labels: NDArray[np.int64]) -> float:
    return float((scores.argmax(1) == labels).mean() * 100)


def _cannot(done: Quantised, max_drop: float, worst: list[str]) -> GateError:
    return GateError(
        f"INT8 costs more than --max-drop {max_drop:g} allows: top-1 on {done.images} held-out training images falls "
        f"from {done.before:.2f} to {done.after:.2f} %, even with nearly all layers in fp32. The worst: "
        f"{', '.join(worst)}.",
        hint="Allow more with --max-drop, give more training images, or use --precision fp32.",
    )
