"""What values the tensors of a network take on real images, and the limits that INT8 gives them.

The network runs twice over the images in ONNX Runtime with every tensor as an output: once for the smallest and the
largest value, once for a histogram between them. Memory does not grow with the number of images (ONNX Runtime's own
histogram calibrators keep every activation of every image: 18 GB for VGG-16 and 300 images).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, ValueInfoProto

from ..errors import DataError, MissingError, ModelError, UnknownNameError, first_line
from .graph import ACTIVATIONS, copy_of, element_types, readers

Floats = NDArray[np.float32]
Batches = Callable[[], Iterable[Floats]]
Method = Literal["min-max", "percentile", "entropy"]
METHODS: tuple[Method, ...] = get_args(Method)
MIN_IMAGES = 16  # with fewer, limits are those of single images
BINS = 2048
PERCENTILE = 99.99
_LEVELS = 128  # of a magnitude in 8 bits


@dataclass(frozen=True)
class Values:
    """The values of one tensor.

    Attributes:
        low, high: the smallest and the largest; infinite, or NaN, where a network masks with minus infinity.
        counts: how many fell into each of `BINS` equal parts between them; none were counted of tensors that only
            an activation function reads, for runtimes fuse it into what stands in front of it.
    """

    low: float
    high: float
    counts: NDArray[np.float64]

    @property
    def finite(self) -> bool:
        """Whether all are finite, so that there are limits for INT8."""
        return math.isfinite(self.low) and math.isfinite(self.high)


def session(model: ModelProto, *, literal: bool = False) -> Any:
    """An ONNX Runtime session on the CPU.

    Args:
        model: to run.
        literal: node by node as the file has it: nothing is fused, so Q/DQ pairs are computed as what they mean.

    Raises:
        MissingError: ONNX Runtime is not installed.
        ModelError: it refuses the network.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingError(
            "INT8 and FP16 need ONNX Runtime here, to run the calibration images, and it is not installed.",
            hint='Install it: pip install "thinet-deploy[onnxruntime]"',
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if literal:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has exceptions of its own
        raise ModelError(
            f"ONNX Runtime refuses the network: {first_line(error)}",
            hint="An operator that it does not know cannot be brought to another precision here.",
        ) from error


def observe(model: ModelProto, batches: Batches) -> dict[str, Values]:
    """Run a float32 network on calibration images.

    Args:
        model: whose only input takes the images.
        batches: gives all images, batch by batch; called twice.

    Returns:
        Tensor → its values, for every float32 tensor that depends on the input, the input too.

    Raises:
        DataError: there are fewer than `MIN_IMAGES` images.
        ModelError: what the network says is not finite.
    """
    run = _exposed(model)
    extremes: dict[str, tuple[float, float]] = {}
    images = 0
    for batch in batches():
        images += len(batch)
        for name, array in run(batch).items():
            low, high = extremes.get(name, (math.inf, -math.inf))
            # numpy's, by which what is no number stays none.
            extremes[name] = float(np.minimum(low, array.min())), float(np.maximum(high, array.max()))
    _check(images, {each.name: extremes[each.name] for each in model.graph.output if each.name in extremes})
    counts = {name: np.zeros(BINS) for name in extremes}
    counted = set(extremes) - {n for n, users in readers(model).items() if {u.op_type for u in users} <= ACTIVATIONS}
    for batch in batches():
        for name, array in run(batch).items():
            low, high = extremes[name]
            if math.inf > high > low > -math.inf and name in counted:
                counts[name] += torch.histc(torch.from_numpy(array).flatten(), BINS, low, high).double().numpy()
    return {name: Values(low, high, counts[name]) for name, (low, high) in extremes.items()}


def _exposed(model: ModelProto) -> Callable[[Floats], dict[str, Floats]]:
    """A function from images to every float32 tensor, the input too."""
    shown, types, taken = copy_of(model), element_types(model), model.graph.input[0].name
    made = [name for node in shown.graph.node for name in node.output if name]
    names = [name for name in made if types.get(name, TensorProto.FLOAT) == TensorProto.FLOAT]
    del shown.graph.output[:]
    shown.graph.output.extend(ValueInfoProto(name=name) for name in names)
    running = session(shown, literal=True)

    def run(images: Floats) -> dict[str, Floats]:
        return {taken: images, **dict(zip(names, running.run(names, {taken: images}), strict=True))}

    return run


def _check(images: int, said: dict[str, tuple[float, float]]) -> None:
    if images < MIN_IMAGES:
        raise DataError(
            f"There are {images} calibration images, but at least {MIN_IMAGES} are needed for the limits of INT8.",
            hint="Give more training images (some hundred are usual), or --precision fp32.",
        )
    for name, values in said.items():
        if not all(map(math.isfinite, values)):
            raise ModelError(
                f"The network's {name} is not finite on the calibration images.",
                hint="Weights or preprocessing are wrong.",
            )


def limits(values: Values, method: Method) -> tuple[float, float]:
    """Between which values a tensor is quantised; zero, which padding needs, always lies between.

    Args:
        values: of the tensor, finite.
        method: "min-max": all of them; "percentile": all but one in ten thousand; "entropy": where quantising changes
            their distribution least, by Kullback and Leibler's divergence (TensorRT's calibration, GTC 2017).

    Raises:
        UnknownNameError: there is no such method.
    """
    if method not in METHODS:
        raise UnknownNameError("calibration method", method, METHODS)
    low, high = values.low, values.high
    if values.counts.any() and method == "percentile":
        low, high = _percentile(values)
    elif values.counts.any() and method == "entropy":
        reach = _least_divergence(*_magnitudes(values))
        low, high = max(low, -reach), min(high, reach)
    return min(low, 0.0), max(high, 0.0)


def _percentile(values: Values) -> tuple[float, float]:
    edges = np.linspace(values.low, values.high, BINS + 1)
    share = np.cumsum(values.counts) / values.counts.sum()
    tail = (1 - PERCENTILE / 100) / 2
    first, last = np.searchsorted(share, [tail, 1 - tail], side="left")
    return float(edges[first]), float(edges[min(int(last), BINS - 1) + 1])


def _magnitudes(values: Values) -> tuple[NDArray[np.float64], float]:
    """Histogram of |x| from 0 to the largest one."""
    edges = np.linspace(values.low, values.high, BINS + 1)
    most = max(-values.low, values.high)
    middles = np.abs((edges[:-1] + edges[1:]) / 2)
    return np.histogram(middles, BINS, (0, most), weights=values.counts)[0], most


def _least_divergence(counts: NDArray[np.float64], most: float) -> float:
    """The magnitude to clip at: of all multiples of 16 bins the one with the least divergence.

    The first bin is left out: zeros are exact whatever the limit is, and there are many of them behind ReLUs.
    """
    counts = counts.copy()
    counts[0] = 0
    stops = np.arange(_LEVELS, BINS + 1, 16)
    divergences = [_divergence(counts, int(stop)) for stop in stops]
    return float(most * stops[int(np.argmin(divergences))] / BINS)


def _divergence(counts: NDArray[np.float64], stop: int) -> float:
    """Kullback-Leibler divergence of the clipped histogram from the same on `_LEVELS` levels."""
    clipped = counts[:stop].copy()
    clipped[-1] += counts[stop:].sum()
    level = np.arange(stop) * _LEVELS // stop
    filled = counts[:stop] > 0
    total = np.bincount(level, counts[:stop], _LEVELS)
    members = np.bincount(level, filled, _LEVELS)
    spread = np.where(filled, (total / np.maximum(members, 1))[level], 0)
    if not clipped.sum() or not spread.sum():
        return math.inf
    p, q = clipped / clipped.sum(), spread / spread.sum()
    both = p > 0
    # A bin that only clipping fills has no counterpart: a small one keeps the divergence finite.
    return float((p[both] * np.log(p[both] / np.maximum(q[both], 1e-9))).sum())
