"""Rounding with error feedback: identities, and that it says more than rounding to the nearest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinet_deploy.pruning.moments import Centred, centred
from thinet_deploy.pruning.rounding import corrected_shift, nearest, output_error, refitted, steps_of, with_feedback
from thinet_deploy.pruning.sums import Sums

Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Centred, torch.Tensor]


def layer(seed: int, *, quantised_inputs: float = 0.0, groups: int = 1, inputs: int = 36, filters: int = 8) -> Layer:
    """A layer behind a ReLU, with inputs that depend on each other: weight, bias, rows, moments, targets' variance."""
    noise = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs // 3, groups * inputs, generator=noise)
    rows = torch.relu(torch.randn(3000, inputs // 3, generator=noise) @ mixing + 0.5).view(3000, groups, inputs)
    weight = torch.randn(groups, filters, inputs, generator=noise, dtype=torch.float64)
    shift = torch.randn(groups, filters, generator=noise, dtype=torch.float64)
    targets = torch.einsum("ngd,god->ngo", rows.double(), weight) + shift
    read = torch.round(rows / quantised_inputs) * quantised_inputs if quantised_inputs else rows
    sums = Sums(groups, inputs, filters)
    sums.add(read, targets.flatten(1).float())
    return weight, shift, read, centred(sums.moments()), targets.var(0, correction=0)


def error(whole: torch.Tensor, step: torch.Tensor, shift: torch.Tensor | None, made: Layer) -> float:
    weight = whole * step[..., None]
    return output_error(weight, corrected_shift(weight, made[3]) if shift is None else shift, made[3], made[4])


@pytest.mark.parametrize("most", [7, 63, 127])
@pytest.mark.parametrize("groups", [1, 3])
def test_feedback_and_bias_lower_the_error(most: int, groups: int) -> None:
    made = layer(0, groups=groups)
    weight, shift, _, moments, _ = made
    step = steps_of(weight, most)
    plain = nearest(weight, step, most)
    naive, unbiased = error(plain, step, shift, made), error(plain, step, None, made)
    fed = error(with_feedback(weight, moments.covariance, step, most), step, None, made)
    assert fed < 0.5 * unbiased <= 0.5 * naive


def test_weights_refitted_to_quantised_inputs_say_more_still() -> None:
    made = layer(1, quantised_inputs=0.6)
    weight, shift, _, moments, _ = made
    step = steps_of(weight, 127)
    fed = with_feedback(weight, moments.covariance, step, 127)
    better = with_feedback(refitted(weight, moments), moments.covariance, step, 127)
    naive = error(nearest(weight, step, 127), step, shift, made)
    assert error(better, step, None, made) < error(fed, step, None, made) < naive


def test_the_error_is_that_of_the_outputs() -> None:
    made = layer(2)
    weight, shift, rows, _, _ = made
    step = steps_of(weight, 7)
    whole = nearest(weight, step, 7)
    exact = torch.einsum("ngd,god->ngo", rows.double(), weight) + shift
    got = torch.einsum("ngd,god->ngo", rows.double(), whole * step[..., None]) + shift
    assert error(whole, step, shift, made) == pytest.approx(float((exact - got).square().mean(0).sum()), rel=1e-4)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([1, 7, 127]))
def test_steps_are_whole_and_within_bounds(seed: int, most: int) -> None:
    weight, _, _, moments, _ = layer(seed, inputs=12, filters=3)
    weight[0, 0] = 0
    step = steps_of(weight, most)
    for whole in (nearest(weight, step, most), with_feedback(weight, moments.covariance, step, most)):
        assert torch.equal(whole, whole.round())
        assert float(whole.abs().max()) <= most
    assert not nearest(weight, step, most)[0, 0].any(), "an empty filter stays empty"


def test_inputs_that_do_not_depend_on_each_other_are_rounded_to_the_nearest() -> None:
    weight = torch.randn(1, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    covariance = torch.diag(torch.arange(1.0, 10, dtype=torch.float64))[None]
    step = steps_of(weight, 7)
    assert torch.equal(with_feedback(weight, covariance, step, 7), nearest(weight, step, 7))


def test_weights_on_the_grid_stay_and_the_refit_on_exact_inputs_changes_nothing() -> None:
    weight, shift, _, moments, _ = layer(3)
    step = steps_of(weight, 127)
    grid = nearest(weight, step, 127) * step[..., None]
    assert torch.equal(with_feedback(grid, moments.covariance, step, 127) * step[..., None], grid)
    assert torch.allclose(refitted(weight, moments), weight, atol=1e-4)
    assert torch.allclose(corrected_shift(weight, moments), shift, atol=1e-4)


def test_inputs_that_never_change_do_no_harm() -> None:
    weight = torch.randn(1, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step = steps_of(weight, 7)
    nothing = torch.zeros(1, 6, 6, dtype=torch.float64)
    assert torch.equal(with_feedback(weight, nothing, step, 7), nearest(weight, step, 7))
