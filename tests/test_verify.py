"""Parity between stages: what passes, what does not, and what the tolerance can tell apart (docs/adr/0004)."""

from __future__ import annotations

import math
from importlib import util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from thinet_deploy.export import export_onnx
from thinet_deploy.interfaces import OUTPUT, Conversion
from thinet_deploy.intervals import Interval
from thinet_deploy.models.vgg import VGG
from thinet_deploy.on_device.engines import open_engine
from thinet_deploy.pruning.proof import Proof
from thinet_deploy.registry import convert
from thinet_deploy.tasks.base import Accuracy
from thinet_deploy.verify import (
    ALLOWANCE,
    UNIT_ROUNDOFF,
    Floats,
    compare,
    engine_hop,
    onnx_hop,
    own_int8_hop,
    pruning_hop,
    rounding_noise,
    tolerance,
    tuning_hop,
)

SHAPE = (3, 16, 16)


def outputs(*rows: list[float]) -> Floats:
    return np.array(rows, np.float32)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["expected", "got", "both"])
def test_what_is_no_number_never_passes(value: float, side: str) -> None:
    good = outputs([1, 2, 3], [3, 2, 1])
    bad = good.copy()
    bad[1, 2] = value
    expected, got = (bad if side in {name, "both"} else good for name in ("expected", "got"))
    assert compare(expected, got, math.inf) == (False, math.inf, 0.0)


@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (1, 3), (2, 3, 1), (6,)])
def test_another_shape_never_passes(shape: tuple[int, ...]) -> None:
    assert compare(np.ones((2, 3), np.float32), np.ones(shape, np.float32), 1.0) == (False, math.inf, 0.0)


def test_equal_outputs_pass_at_no_tolerance() -> None:
    same = outputs([1, 2, 3], [0, 0, 0])
    assert compare(same, same.copy(), 0.0) == (True, 0.0, 100.0)
    zeros = np.zeros((2, 3), np.float32)
    assert compare(zeros, zeros, 0.0) == (True, 0.0, 100.0)


def test_the_error_is_relative_to_the_largest_output() -> None:
    expected = outputs([1, 2, -200], [1, 2, 3])
    got = expected.copy()
    got[1, 0] += 2
    passed, error, _ = compare(expected, got, 0.02)
    assert error == pytest.approx(0.01)
    assert passed
    assert not compare(expected, got, 0.009)[0]


def test_outputs_of_extreme_size_are_compared_without_overflow() -> None:
    largest = float(np.finfo(np.float32).max)
    passed, error, _ = compare(outputs([largest, -largest]), outputs([-largest, largest]), 0.1)
    assert not passed
    assert error == pytest.approx(2)


@pytest.mark.parametrize(
    ("gap", "allowed", "passed"),
    [
        (0.010, 0.0075, True),  # closer than twice the tolerance: may swap
        (0.010, 0.0101, True),
        (0.030, 0.0100, False),  # clearly apart: a swap is a mistake
        (0.500, 0.0100, False),
    ],
)
def test_swapped_classes(gap: float, allowed: float, passed: bool) -> None:
    expected = outputs([1.0, 1.0 - gap, 0.0])
    got = outputs([1.0 - gap / 2 - 0.001, 1.0 - gap / 2 + 0.001, 0.0])
    verdict, _, agreement = compare(expected, got, allowed)
    assert verdict is passed
    assert agreement == 0


def test_agreement_is_the_share_of_equal_classes() -> None:
    expected = np.eye(4, dtype=np.float32)
    got = expected.copy()
    got[3] = [1, 0, 0, 0]
    assert compare(expected, got, 0.1)[::2] == (False, 75.0)


def test_networks_with_one_output_are_compared_too() -> None:
    assert compare(outputs([1], [2]), outputs([1], [2]), 1e-6) == (True, 0.0, 100.0)


@settings(deadline=None)
@given(st.floats(2.0**-24, 1e-2))
def test_tolerances_grow_with_the_noise_and_the_roundoff_and_tell_precisions_apart(noise: float) -> None:
    single, half, brain = (tolerance(noise, precision) for precision in ("fp32", "fp16", "bf16"))
    assert noise < single < half < brain
    assert tolerance(2 * noise, "fp32") == pytest.approx(2 * single)
    # One bf16 rounding, in units of the noise of float32, is far outside of what fp32 allows.
    assert single < noise * UNIT_ROUNDOFF["bf16"] / UNIT_ROUNDOFF["fp32"] / 8
    assert set(ALLOWANCE) == set(UNIT_ROUNDOFF)


def network() -> nn.Module:
    torch.manual_seed(0)
    return VGG(((8, 8), (16, 16)), (32,), input_shape=SHAPE, num_classes=10).eval()


def some_inputs(count: int = 40) -> Floats:
    return np.random.default_rng(0).normal(size=(count, *SHAPE)).astype(np.float32)


def run(model: nn.Module, inputs: Floats) -> Floats:
    with torch.inference_mode():
        return model(torch.from_numpy(inputs)).numpy()  # type: ignore[no-any-return]


def test_rounding_noise_is_the_distance_to_double_precision() -> None:
    model, inputs = network(), some_inputs()
    exact = network().double()(torch.from_numpy(inputs).double()).detach().numpy()
    expected = np.abs(run(model, inputs) - exact).max() / np.abs(exact).max()
    assert rounding_noise(model, inputs) == pytest.approx(max(expected, 2.0**-24))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_rounding_noise_is_never_below_one_rounding() -> None:
    assert rounding_noise(nn.Sequential(nn.Flatten()), some_inputs()) == UNIT_ROUNDOFF["fp32"]
    silent = network()
    for parameter in silent.parameters():
        nn.init.zeros_(parameter)
    assert rounding_noise(silent, some_inputs()) == UNIT_ROUNDOFF["fp32"]


def test_a_network_that_computes_nan_has_no_tolerance_that_lets_it_pass() -> None:
    model, inputs = network(), some_inputs(2)
    with torch.no_grad():
        model.get_parameter("classifier.0.weight").fill_(math.nan)
    allowed = tolerance(rounding_noise(model, inputs), "fp32")
    assert not compare(run(model, inputs), run(model, inputs), allowed)[0]


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    export_onnx(network(), SHAPE, path, opset=18, ir_version=10)
    return path


def test_the_onnx_hop_passes_the_same_network_and_refuses_another(onnx_file: Path) -> None:
    model, inputs = network(), some_inputs(6)
    allowed = tolerance(rounding_noise(model, inputs), "fp32")
    good = onnx_hop("net", onnx_file, inputs, {OUTPUT: run(model, inputs)}, allowed)
    assert good.passed
    assert good.error is not None
    assert good.error <= allowed
    assert (good.images, good.agreement, good.hop) == (6, 100, "torch → ONNX")
    with torch.no_grad():
        model.get_parameter("features.0.weight")[0] *= 1.001
    assert not onnx_hop("net", onnx_file, inputs, {OUTPUT: run(model, inputs)}, allowed).passed


@pytest.mark.skipif(util.find_spec("openvino") is None, reason="OpenVINO is not installed")
def test_an_engine_in_fp32_passes_and_one_in_bf16_does_not_pass_for_it(onnx_file: Path, tmp_path: Path) -> None:
    model, inputs = network(), some_inputs()
    expected, noise = {OUTPUT: run(model, inputs)}, rounding_noise(model, inputs)
    path = tmp_path / convert("openvino", Conversion(onnx_file, tmp_path), tmp_path).path
    strict = tolerance(noise, "fp32")
    single = engine_hop("net", "openvino", path, inputs, expected, strict, precision="fp32")
    assert single.passed, single
    assert single.images == 40
    engine = open_engine("openvino", str(path), 1, "bf16")
    in_use = engine.describe()["precision_in_use"]
    engine.close()
    if in_use != "bf16":
        pytest.skip(f"This CPU has no bf16: OpenVINO runs {in_use}.")
    brain = engine_hop("net", "openvino", path, inputs, expected, strict, precision="bf16")
    assert not brain.passed, brain
    assert brain.error is not None
    assert brain.error > 8 * strict
    assert brain.error <= tolerance(noise, "bf16")


@pytest.mark.parametrize(
    ("before", "after", "images", "passed"),
    [
        (90.0, 90.0, 1000, True),
        (90.0, 97.0, 1000, True),
        (90.0, 89.0, 1000, True),  # within what a thousand images can tell
        (90.0, 85.0, 1000, False),
        (90.0, 10.0, 1000, False),
        (90.0, 0.0, 1000, False),
        (99.0, 97.0, 10_000, False),
        (100.0, 0.0, 10, False),
        (10.0, 10.0, 10, True),
        (90.0, math.nan, 1000, False),
    ],
)
def test_fine_tuning_fails_when_accuracy_falls_by_more_than_chance(
    before: float, after: float, images: int, passed: bool
) -> None:
    shares = [Accuracy({"top-1": Interval(share, 0, 100)}, images) for share in (before, after)]
    hop = tuning_hop("net", "pruned → fine-tuned", *shares)
    assert hop.passed is passed
    assert hop.error is None
    assert f"{before:.2f} → {after:.2f}" in hop.detail


@pytest.mark.parametrize(
    ("wrong", "value", "passed"), [(0, 1.0, True), (2, 1.0, True), (3, 1.0, False), (0, math.nan, False)]
)
def test_what_a_runtime_quantised_itself_is_judged_by_what_it_gets_wrong(
    wrong: int, value: float, passed: bool
) -> None:
    exact = np.eye(10, dtype=np.float32)
    held = exact.copy()
    held[:wrong] = np.roll(held[:wrong], 1, axis=1)
    hop = own_int8_hop("conv", "litert", exact, exact * np.float32(value), (exact, held, np.arange(10)), 20)
    assert hop.passed == passed
    assert f"100.00 → {100 - 10 * wrong:.2f} %, allowed 20 points" in hop.detail


@pytest.mark.parametrize("passed", [True, False])
def test_the_pruning_hop_is_the_proofs_verdict(passed: bool) -> None:
    hop = pruning_hop("net", Proof(passed, 3e-16, 1e-14, "features.2", "features.0", 3, (1, 3)))
    assert (hop.passed, hop.error, hop.tolerance, hop.images) == (passed, 3e-16, 1e-14, 3)
    assert "features.2" in hop.detail
