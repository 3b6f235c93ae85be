"""Layer times on simulated devices with known stairs and noise: few points tell the surface and the fast widths."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinet_deploy.timing.surfaces import POINTS, Domain, Point, Surface, Timing, fast_widths, stair, wanted

Time = Callable[[int, int], float]


def blocks(step: int) -> Time:
    """A device that works on whole blocks of channels, with something that every call costs."""
    return lambda ins, outs: 0.05 + 1e-4 * (-(-ins // step) * step) * (-(-outs // step) * step)


def watch(time: Time, noise: float = 0.0, seed: int = 0) -> Callable[[Point], Timing]:
    luck = random.Random(seed)
    return lambda point: Timing(time(*point) * (1 + noise * luck.gauss(0, 1)), 2 * noise * time(*point))


def explored(measure: Callable[[Point], Timing], domain: Domain, most: int = POINTS) -> dict[Point, Timing]:
    known: dict[Point, Timing] = {}
    while points := wanted(known, domain, most):
        assert not points & known.keys(), "nothing is measured twice"
        known |= {point: measure(point) for point in sorted(points)}
    return known


def every(widths: int) -> Domain:
    return Domain(tuple(range(1, widths + 1)), tuple(range(1, widths + 1)))


def off(surface: Surface, time: Time, domain: Domain) -> np.ndarray:
    """Relative errors at all widths from a quarter on."""
    ins, outs = (np.array([w for w in side if 4 * w >= side[-1]], float) for side in (domain.ins, domain.outs))
    i, o = (each.ravel() for each in np.meshgrid(ins, outs))
    exact = np.array([time(int(a), int(b)) for a, b in zip(i, o, strict=True)])
    errors: np.ndarray = np.abs(surface(i, o) / exact - 1)
    return errors


@pytest.mark.parametrize(("step", "widths"), [(8, 64), (16, 64), (16, 128)])
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_stairs_are_found_and_the_surface_follows_them(step: int, widths: int, noise: float) -> None:
    domain, time = every(widths), blocks(step)
    known = explored(watch(time, noise), domain)
    assert len(known) < 0.05 * widths * widths
    surface = Surface(known, domain)
    errors = off(surface, time, domain)
    assert errors.mean() < 0.03
    assert np.quantile(errors, 0.95) < 0.10
    for line in surface.lines:
        found = fast_widths(line, domain.outs)
        assert stair(found) == step
        assert set(found) <= set(range(step, widths, step))


def test_a_straight_time_takes_few_points_and_has_no_fast_widths() -> None:
    domain, time = every(512), blocks(1)
    known = explored(watch(time, 0.01), domain)
    assert len(known) < 40
    surface = Surface(known, domain)
    assert off(surface, time, domain).max() < 0.04
    assert [fast_widths(line, domain.outs) for line in surface.lines] == [[], []]


def test_a_device_that_dislikes_odd_widths_has_fast_ones() -> None:
    domain = Domain((64,), tuple(range(1, 65)))
    known = explored(watch(lambda ins, outs: outs * (1.0 if outs % 8 == 0 else 1.6)), domain)
    found = fast_widths(Surface(known, domain).lines[1], domain.outs)
    assert stair(found) == 8


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 16), st.integers(0, 99), st.sampled_from([0.0, 0.02, 0.3]), st.integers(6, 30))
def test_it_ends_within_its_points_and_goes_through_them(step: int, seed: int, noise: float, most: int) -> None:
    domain = Domain(tuple(range(3, 100, 2)), tuple(range(4, 200, 4)))
    known = explored(watch(blocks(step), noise, seed), domain, most)
    assert len(known) <= 6 * most + 1
    surface = Surface(known, domain)
    for (ins, outs), timing in known.items():
        if domain.ins[-1] == ins or domain.outs[-1] == outs:
            assert surface.at(ins, outs) == pytest.approx(max(timing.ms, 0.5 * surface.least_ms))


def test_one_width_and_two_widths_are_surfaces_too() -> None:
    for domain in (Domain((3,), (64,)), Domain((3,), (32, 64)), Domain((32, 64), (64,)), Domain((3, 6), (4, 8))):
        known = explored(watch(blocks(8)), domain)
        surface = Surface(known, domain)
        for i in domain.ins:
            for o in domain.outs:
                assert surface.at(i, o) == pytest.approx(blocks(8)(i, o))


def test_points_of_an_earlier_run_are_not_measured_again() -> None:
    domain, measure = every(64), watch(blocks(16))
    known = explored(measure, domain)
    assert wanted(known, domain) == set()
    part = dict(sorted(known.items())[: len(known) // 2])
    while points := wanted(part, domain):
        assert points <= known.keys()
        part |= {point: known[point] for point in points}


@pytest.mark.parametrize(
    ("widths", "multiple"), [([16, 32, 48], 16), ([24, 40], 8), ([8], None), ([], None), ([3, 7], None)]
)
def test_what_fast_widths_have_in_common(widths: list[int], multiple: int | None) -> None:
    assert stair(widths) == multiple
