"""Parity, hop by hop: masked → pruned → fine-tuned; torch → ONNX → each engine. Every hop gets a verdict.

The tolerance of a numeric hop comes from the network itself: the difference between its float32 and its float64
run is its rounding noise, and a correct engine stays within a small multiple of it, scaled to the unit roundoff of
the precision asked for. Silent bf16 exceeds the tolerance of fp32 several hundred times.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .export import INPUT, OUTPUT, run_onnx
from .interfaces import Precision
from .on_device.engines import open_engine
from .precision.accuracy_gate import ROUNDING
from .pruning.proof import Proof
from .tasks.base import Accuracy, said

Floats = NDArray[np.float32]
Said = Mapping[str, Floats]  # what a network says: output → values, batch first

UNIT_ROUNDOFF: dict[Precision, float] = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
# Engines reorder sums and transform small convolutions (Winograd): measured up to 4 × the noise in fp32. The shorter
# types still accumulate in float32, so their error grows by less than their roundoff.
ALLOWANCE: dict[Precision, float] = {"fp32": 32, "fp16": 2, "bf16": 2}
# INT8 has no roundoff to go by: quantising moves the outputs by so much, and an engine that adds up in another order
# rounds other values the other way. Two roundings are apart by no more than twice what one of them moves.
INT8_ALLOWANCE = 2


@dataclass(frozen=True)
class Hop:
    """One step from one form of a network to the next, and the verdict on it.

    Attributes:
        model: which network: "original", "conv", "gap".
        hop: what became what, such as "ONNX → openvino".
        passed: the verdict.
        error: largest difference, relative to the largest output; None where outputs are meant to change.
        tolerance: for the error.
        agreement: share of images with the same top-1 class, in percent; None where images have no one class.
        images: how many were compared.
        detail: what else there is to say.
    """

    model: str
    hop: str
    passed: bool
    error: float | None = None
    tolerance: float | None = None
    agreement: float | None = None
    images: int = 0
    detail: str = ""


def rounding_noise(model: nn.Module, inputs: Floats) -> float:
    """Largest difference between the float32 and the float64 run of a network, relative to the largest output.

    Of several outputs each has its own largest value, and the worst one counts.
    """
    images = torch.from_numpy(inputs)
    with torch.inference_mode():
        single = said(model.eval(), images)
        double = said(copy.deepcopy(model).double(), images.double())
    errors = [_apart(ours.double(), exact) for ours, exact in zip(single, double, strict=True)]
    return max(*errors, UNIT_ROUNDOFF["fp32"])


def _apart(got: torch.Tensor, expected: torch.Tensor) -> float:
    scale = float(expected.abs().max())
    return float((got - expected).abs().max()) / scale if scale else 0.0


def tolerance(noise: float, precision: Precision) -> float:
    """Allowed error of an engine, relative to the largest output, for the precision asked."""
    return ALLOWANCE[precision] * noise * UNIT_ROUNDOFF[precision] / UNIT_ROUNDOFF["fp32"]


def engine_tolerance(precision: Precision, noise: float, moved: float) -> float:
    """Allowed error of an engine against what it was made from; `moved` is what quantising moved the outputs by."""
    return max(INT8_ALLOWANCE * moved, tolerance(noise, "fp32")) if precision == "int8" else tolerance(noise, precision)


def compare(expected: Floats, got: Floats, allowed: float) -> tuple[bool, float, float | None]:
    """Compare outputs: (passed, relative error, top-1 agreement in percent).

    Scores (n, classes) have to rank the same class first; images whose two best classes are closer than twice the
    allowed error may swap them. Outputs of more dimensions, as of detectors, have no agreement.
    """
    if expected.shape != got.shape or not (np.isfinite(expected).all() and np.isfinite(got).all()):
        return False, math.inf, 0.0
    exact = expected.astype(np.float64)  # float32 could overflow in a difference
    scale = max(float(np.abs(exact).max()), float(np.finfo(np.float32).tiny))
    error = float(np.abs(exact - got).max()) / scale
    if expected.ndim != 2:
        return error <= allowed, error, None
    same = expected.argmax(1) == got.argmax(1)
    best = np.sort(exact, axis=1)[:, -2:]
    undecided = best[:, -1] - best[:, 0] <= 2 * allowed * scale
    return error <= allowed and bool((same | undecided).all()), error, float(same.mean() * 100)


def compare_all(expected: Said, got: Said, allowed: float) -> tuple[bool, float, float | None]:
    """Compare outputs by name, each to its own scale: whether all pass, the worst error, the agreement of the first."""
    if expected.keys() != got.keys():
        return False, math.inf, 0.0
    rows = [compare(value, got[name], allowed) for name, value in expected.items()]
    return all(passed for passed, _, _ in rows), max(error for _, error, _ in rows), rows[0][2]


def pruning_hop(model: str, proof: Proof) -> Hop:
    """Masked → pruned: the plan's proof."""
    detail = (
        f"float64, real and random weights, batch {' and '.join(map(str, proof.batch_sizes))}; worst: {proof.place}"
        + (f" (from {proof.group})" if proof.group else "")
    )
    return Hop(model, "masked → pruned", proof.passed, proof.error, proof.tolerance, images=proof.images, detail=detail)


def grouping_hop(model: str, masked: nn.Module, grouped: nn.Module, inputs: Floats) -> Hop:
    """Masked → grouped (gcos): the dense network with zeros between groups says the same, in float64."""
    images = torch.from_numpy(inputs).double()
    with torch.inference_mode():
        expected, got = (said(copy.deepcopy(each).double().eval(), images) for each in (masked, grouped))
    error = max(_apart(ours, exact) for ours, exact in zip(got, expected, strict=True))
    allowed = ALLOWANCE["fp32"] * max(rounding_noise(masked, inputs) * 2.0**-29, 2.0**-53)  # noise of float64
    return Hop(model, "masked → grouped", error <= allowed, error, allowed, images=len(inputs), detail="float64")


def tuning_hop(model: str, hop: str, before: Accuracy, after: Accuracy) -> Hop:
    """Pruned → fine-tuned: the function is meant to change, so accuracy decides; it must not get worse.

    It fails when the figure that decides falls by more than the test set's own uncertainty (95 %, binomial: what a
    share of so many images has; of the figures of other tasks it is the order of magnitude).
    """
    share, least = after.main / 100, before.main
    margin = 100 * 1.96 * math.sqrt(max(share * (1 - share), 0.25 / after.images) / after.images)
    detail = f"{after.name} {before.main:.2f} → {after.main:.2f} %, allowed from {max(least - margin, 0):.2f} %"
    return Hop(model, hop, after.main >= least - margin, images=after.images, detail=detail)


def onnx_hop(model: str, path: Path, inputs: Floats, expected: Said, allowed: float) -> Hop:
    """Torch → ONNX, by the reference implementation, at batch 1 and at the batch of `inputs`."""
    single = run_onnx(path, inputs[:1])
    batch = run_onnx(path, inputs)
    first = compare_all({name: each[:1] for name, each in expected.items()}, single, allowed)
    passed, error, agreement = compare_all(expected, batch, allowed)
    return Hop(
        model,
        "torch → ONNX",
        passed and first[0],
        max(error, first[1]),
        allowed,
        agreement,
        len(inputs),
        f"ONNX reference evaluator, batch 1 and {len(inputs)}",
    )


def int8_hop(model: str, expected: Floats, got: Floats, how: dict[str, Any]) -> Hop:
    """FP32 → INT8: outputs are meant to change a little, so accuracy on held-out training images decides.

    Args:
        model: which network.
        expected: of the float32 network, (n, classes).
        got: of the INT8 file, computed as it is written.
        how: it was made: top-1 before and after, method, layers that were refitted, and that stayed in float32.
    """
    same = int((expected.argmax(1) == got.argmax(1)).sum())
    drop = how["top1_fp32"] - how["top1"]
    detail = (
        f"{how['layout']}, {how['method']}, {len(how['refitted'])} layers refitted; "
        f"top-1 on {how['images']} held-out images {how['top1_fp32']:.2f} → "
        f"{how['top1']:.2f} %, allowed {how['max_drop']:g} points; same top-1 {same}/{len(got)}, outputs move by "
        f"{distance(expected, got):.1e}" + (f"; {len(how['kept'])} layers in fp32" if how["kept"] else "")
    )
    passed = bool(np.isfinite(got).all()) and drop <= how["max_drop"] + ROUNDING
    return Hop(model, "FP32 → int8 ONNX", passed, images=len(got), detail=detail)


def own_int8_hop(
    model: str,
    runtime: str,
    expected: Floats,
    got: Floats,
    held: tuple[Floats, Floats, NDArray[np.int64]],
    max_drop: float,
) -> Hop:
    """FP32 → an engine whose makers' tools quantised it: accuracy on held-out training images decides here too.

    Args:
        model: which network.
        runtime: of the engine.
        expected: of the float32 network, (n, classes).
        got: of the engine.
        held: of held-out images, what the float32 network says, what the engine says, and the classes, (m,).
        max_drop: points of top-1 on these that may be lost.
    """
    before, after = (float((scores.argmax(1) == held[2]).mean() * 100) for scores in held[:2])
    same = int((expected.argmax(1) == got.argmax(1)).sum())
    detail = (
        f"int8 by the runtime's own tools; top-1 on {len(held[2])} held-out images {before:.2f} → {after:.2f} %, "
        f"allowed {max_drop:g} points; same top-1 {same}/{len(got)}"
    )
    passed = bool(np.isfinite(got).all()) and before - after <= max_drop + ROUNDING
    return Hop(model, f"ONNX → {runtime}", passed, error=distance(expected, got), images=len(got), detail=detail)


def distance(expected: Floats, got: Floats) -> float:
    """Largest difference, relative to the largest expected value."""
    scale = max(float(np.abs(expected).max()), float(np.finfo(np.float32).tiny))
    return float(np.abs(expected.astype(np.float64) - got).max()) / scale


def engine_outputs(
    runtime: str, path: Path, inputs: Floats, *, threads: int, precision: Precision, names: Collection[str] = (OUTPUT,)
) -> Said:
    """Outputs of an engine for all inputs, in batches of 32, and of 1 for the first image."""
    engine = open_engine(runtime, str(path), threads, precision)
    try:
        # Copied: an engine may give the same memory again.
        starts = [slice(1), *(slice(start, start + 32) for start in range(1, len(inputs), 32))]
        runs = (engine.run({INPUT: inputs[part]}) for part in starts)
        parts = [{name: np.array(run[name]) for name in names if name in run} for run in runs]
    finally:
        engine.close()
    return {name: np.concatenate([part[name] for part in parts]).astype(np.float32) for name in parts[0]}


def engine_hop(
    model: str, runtime: str, path: Path, inputs: Floats, expected: Said, allowed: float, *, precision: Precision
) -> Hop:
    """ONNX → engine, on all inputs, against torch's outputs."""
    outputs = engine_outputs(runtime, path, inputs, threads=1, precision=precision, names=expected)
    passed, error, agreement = compare_all(expected, outputs, allowed)
    return Hop(
        model, f"ONNX → {runtime}", passed, error, allowed, agreement, len(inputs), f"{precision}, batch 1 and 32"
    )
