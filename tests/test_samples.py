"""samples.py: intervals cover as often as they claim, percentiles have enough samples, drifts and steps are found."""

import json
import math
import random
import statistics
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinet_deploy.on_device import samples


@pytest.mark.parametrize("n", [6, 7, 15, 40])
def test_the_interval_covers_the_median_as_often_as_it_says(n: int) -> None:
    draw, repetitions = random.Random(n), 2000
    inside = 0
    for _ in range(repetitions):
        _, low, high = samples.median_interval([draw.lognormvariate(0, 1) for _ in range(n)])
        assert low is not None
        assert high is not None
        inside += low <= 1.0 <= high
    slack = 4 * math.sqrt(0.95 * 0.05 / repetitions)
    assert inside / repetitions >= 0.95 - slack


def test_the_interval_is_the_narrowest_exact_one() -> None:
    for n in (6, 11, 50, 401):
        k = next(k for k in range(1, n) if sum(math.comb(n, i) for i in range(k + 1)) * 2 > 0.05 * 2**n)
        assert samples.median_interval(range(n)) == (statistics.median(range(n)), k - 1, n - k)
    assert samples.median_interval([3.0, 1.0, 2.0, 5.0, 4.0]) == (3.0, None, None)
    with pytest.raises(ValueError, match="at least one"):
        samples.median_interval([])


@pytest.mark.parametrize(
    ("n", "known"), [(63, 0), (64, 1), (129, 1), (130, 2), (661, 2), (662, 3), (6635, 3), (6636, 4)]
)
def test_percentiles_are_hidden_below_their_least_number_of_samples(n: int, known: int) -> None:
    found = samples.summarize([1.0 + i / n for i in range(n)])["percentiles_ms"]
    assert list(found) == ["p90", "p95", "p99", "p99.9"][:known]


def test_percentiles_are_samples_with_the_right_share_below() -> None:
    found = samples.summarize([float(i) for i in range(1, 10001)])["percentiles_ms"]
    assert found == {"p90": 9000.0, "p95": 9500.0, "p99": 9900.0, "p99.9": 9990.0}


def test_a_steady_series_has_no_warning_and_an_unsteady_one_says_why() -> None:
    draw = random.Random(1)
    steady = [draw.gauss(10, 0.05) for _ in range(300)]
    assert samples.summarize(steady)["warnings"] == []
    assert "coefficient of variation" in samples.summarize([draw.gauss(10, 1) for _ in range(300)])["warnings"][0]
    (warning,) = samples.summarize([sample * (1 + i / 300 * 0.05) for i, sample in enumerate(steady)])["warnings"]
    assert "median changed by +2" in warning
    assert "there are 5 samples only" in samples.summarize([1.0] * 5)["warnings"][0]


def test_too_few_samples_to_see_a_change_are_said_to_be_so() -> None:
    (few,) = samples.summarize([1.0] * 9)["warnings"]
    assert few == "a change over time would not be seen because there are 9 samples only; at least 10 are needed"
    assert samples.summarize([1.0] * 10)["warnings"] == []


def test_one_sample_is_a_median_without_an_interval() -> None:
    found = samples.summarize_rounds([[2.5]])
    assert (found["n"], found["median_ms"], found["interval_ms"], found["percentiles_ms"]) == (1, 2.5, None, {})
    assert found["warnings"] == ["no interval because there is 1 sample only; at least 6 are needed"]
    assert found["coefficient_of_variation"] is None
    json.dumps(found, allow_nan=False)


# A step or a drift of two to five standard deviations of a single sample.
@pytest.mark.parametrize("n", [120, 3000])
@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_a_step_is_caught_wherever_it_is(n: int, place: float) -> None:
    draw = np.random.default_rng(n)
    for _ in range(50):
        series = draw.normal(10, 0.1, n)
        series[int(n * place) :] += 0.3
        change, at = samples.shift(series.tolist())
        assert 0.01 < change < 0.05
        assert abs(at - place) < 0.2


@pytest.mark.parametrize("n", [120, 3000])
@pytest.mark.parametrize("slope", [0.5, -0.5])
def test_a_drift_is_caught(n: int, slope: float) -> None:
    draw = np.random.default_rng(n)
    for _ in range(50):
        change, _ = samples.shift((draw.normal(10, 0.1, n) + np.linspace(0, slope, n)).tolist())
        assert change * slope > 0


@pytest.mark.parametrize("n", [10, 11, 15, 20])
def test_a_short_series_that_doubles_half_way_is_caught(n: int) -> None:
    series = np.random.default_rng(n).normal(10, 0.1, n)
    series[n // 2 :] *= 2
    change, at = samples.shift(series.tolist())
    assert change == pytest.approx(1, abs=0.1)
    assert at == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("n", [10, 11, 12, 15, 18])
def test_the_exact_chances_of_short_series(n: int) -> None:
    """Counted over all orders, by the sets of ranks that a beginning can have."""
    sets = np.arange(1 << n)
    has = (sets[:, None] >> np.arange(n)) & 1 == 1
    counts, sums = has.sum(1), has @ np.arange(1, n + 1)

    def chance(least: int) -> float:
        ways, near = np.zeros(1 << n), abs(2 * sums - counts * (n + 1)) < least
        ways[0] = 1
        for taken in range(1, n + 1):
            mine = sets[counts == taken]
            for rank in range(n):
                with_it = mine[has[mine, rank]]
                ways[with_it] += ways[with_it ^ (1 << rank)]
            ways[mine] *= near[mine]
        return 1 - float(ways[-1]) / math.factorial(n)

    least = samples.PROVEN[n]
    assert chance(least) <= samples.SHIFT_CHANCE < chance(least - 1)


@pytest.mark.parametrize("n", [9, 10, 15, 20, 30, 90, 2000])
def test_a_steady_series_rarely_cries_wolf(n: int) -> None:
    draw = np.random.default_rng(n)
    heavy_tailed = (draw.lognormal(0, 0.5, n).tolist() for _ in range(1000))
    assert sum(samples.shift(series)[0] != 0 for series in heavy_tailed) <= 20, "1 % is claimed: 10 of 1,000"
    # Neighbours that resemble each other, as in a real series, are no evidence either.
    if n == 2000:
        noise = draw.normal(0, 0.3, (200, n))
        for at in range(1, n):
            noise[:, at] += 0.5 * noise[:, at - 1]
        assert sum(samples.shift((10 + row).tolist())[0] != 0 for row in noise) <= 6


def test_too_little_or_too_even_a_series_has_no_shift() -> None:
    for series in ([1.0], [1.0, 2.0], [1.0] * 50, [1.0, 2.0] * 30):
        assert samples.shift(series) == (0.0, 0.0)
    assert samples.shift([10.0] * 30 + [10.05] * 30) == (0.0, 0.0), "half a percent is no news"
    assert samples.shift([0.0] * 30 + [1.0] * 30) == (1.0, 0.5), "also by a clock that is too coarse"


@pytest.mark.parametrize(("share", "n"), [(0.5, 15), (0.9, 64), (0.95, 130), (0.99, 662), (0.9, 1000)])
def test_the_interval_covers_a_quantile_as_often_as_it_says(share: float, n: int) -> None:
    draw, repetitions = np.random.default_rng(n), 1000
    truth = math.exp(NormalDist().inv_cdf(share))  # of a log-normal distribution
    inside = 0
    for _ in range(repetitions):
        _, low, high = samples.quantile_interval(draw.lognormal(0, 1, n).tolist(), share)
        assert low is not None
        assert high is not None
        inside += low <= truth <= high
    assert inside / repetitions >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / repetitions)


def test_the_highest_percentile_covers_too() -> None:
    share, n, repetitions = 0.999, 6636, 1000
    values = np.sort(np.random.default_rng(5).random((repetitions, n)), axis=1)
    low, high = samples._ranks(n, share, 0.95)
    assert low is not None
    assert high is not None
    inside = float(((values[:, low - 1] <= share) & (share <= values[:, high - 1])).mean())
    assert inside >= 0.95 - 0.03


@given(n=st.integers(6, 400), share=st.sampled_from([0.1, 0.5, 0.9, 0.99]))
def test_ranks_are_the_narrowest_exact_ones(n: int, share: float) -> None:
    below = np.cumsum([math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n)])
    low, high = samples._ranks(n, share, 0.95)
    first = [k + 1 for k in range(n) if below[k] <= 0.025]
    last = [k + 1 for k in range(n) if 1 - below[k] <= 0.025]
    assert low == (max(first) if first else None)
    assert high == (min(last) if last else None)


def test_percentiles_come_with_their_intervals() -> None:
    found = samples.summarize([float(i) for i in range(1, 1001)])
    assert set(found["percentile_intervals_ms"]) == set(found["percentiles_ms"]) == {"p90", "p95", "p99"}
    low, high = found["percentile_intervals_ms"]["p90"]
    assert 875 < low < 900 < high < 925


def test_frames_that_come_too_late_are_counted() -> None:
    warnings = samples.summarize([5.0] * 10 + [40.0], fps=30)["warnings"]
    assert "too slow for 30 frames a second: 1 of 11 runs took longer than 33.33 ms" in warnings


def test_a_throttled_or_senseless_series_is_invalid() -> None:
    fine = samples.summarize([1.0] * 10)
    quiet: dict[str, Any] = {"throttled": None, "warnings": []}
    assert samples.judged(fine, quiet, finite=True) == fine
    hot = samples.judged(fine, {"throttled": ["temperature"], "warnings": ["busy"]}, finite=False)
    assert hot["invalid"] == ["the machine throttled: temperature", "the outputs hold NaN or infinity"]
    assert hot["warnings"] == ["busy"]


def test_a_gpu_that_waits_for_the_host_is_no_measure_of_the_gpu() -> None:
    assert samples.launch_warnings(0.79, 1.0) == []
    assert samples.launch_warnings(None, 1.0) == samples.launch_warnings(1.0, None) == []
    (warning,) = samples.launch_warnings(0.9, 1.0)
    assert warning == "bound by the host, which takes 0.9 ms to launch what the GPU computes in 1 ms"


def test_rounds_give_the_interval_where_there_are_enough() -> None:
    rounds = [[float(r), r + 0.5, r + 9.0] for r in range(1, 8)]
    assert samples.summarize_rounds(rounds)["interval_over"] == "rounds"
    assert samples.summarize_rounds(rounds)["interval_ms"] == [1.5, 7.5]
    few = samples.summarize_rounds(rounds[:3])
    assert few["interval_over"] == "samples"
    assert "too narrow, because there are 3 rounds only; at least 6 are needed" in few["warnings"][-1]


def test_the_ratio_is_free_of_what_disturbs_both() -> None:
    draw = random.Random(3)
    pace = [draw.uniform(1, 5) for _ in range(11)]
    rounds_a = [[2 * speed * draw.gauss(1, 0.01) for _ in range(9)] for speed in pace]
    rounds_b = [[speed * draw.gauss(1, 0.01) for _ in range(9)] for speed in pace]
    ratio, low, high = samples.ratio_interval(rounds_a, rounds_b)
    assert low is not None
    assert high is not None
    assert 1.98 < low <= ratio <= high < 2.02
    with pytest.raises(ValueError, match="equally many rounds"):
        samples.ratio_interval(rounds_a, rounds_b[1:])


def test_an_interval_is_the_whole_range_where_the_rounds_say_that_something_changed() -> None:
    draw = random.Random(4)
    steady = [[draw.gauss(8, 0.02) for _ in range(20)] for _ in range(40)]
    assert samples.summarize_rounds(steady)["interval_over"] == "rounds"
    stepped = [*steady[:32], *([sample + 1 for sample in each] for each in steady[32:])]
    medians = [statistics.median(each) for each in stepped]
    high = samples.median_interval(medians)[2]
    assert high is not None
    assert high < 8.1, "by itself it leaves out a fifth of the rounds"
    found = samples.summarize_rounds(stepped)
    assert (found["interval_over"], found["interval_ms"]) == ("range of rounds", [min(medians), max(medians)])
    assert any("the median changed by +12" in warning for warning in found["warnings"])
    ratio = samples.ratio_interval(stepped, [[2.0]] * 40)
    assert ratio[1:] == (min(medians) / 2, max(medians) / 2)


def test_rounds_that_differ_are_no_change_over_time() -> None:
    """As in a real series, where a round's samples share the machine's mood."""
    draw, alarms = np.random.default_rng(5), 0
    for _ in range(400):
        moods = 10 * (1 + 0.03 * draw.standard_normal(15))
        rounds = [(mood * (1 + 0.005 * draw.standard_normal(20))).tolist() for mood in moods]
        alarms += any("the median changed" in warning for warning in samples.summarize_rounds(rounds)["warnings"])
    assert alarms <= 12, "1 % is claimed: 4 of 400"
    few = samples.summarize_rounds([[1.0, 1.1]] * 7)["warnings"]
    assert "a change over time would not be seen because there are 7 rounds only; at least 10 are needed" in few


@pytest.mark.parametrize(("share", "spread", "least"), [(0.9, 0.0, 0.95), (0.9, 0.01, 0.92), (0.95, 0.02, 0.88)])
def test_an_interval_of_a_percentile_knows_that_rounds_differ(share: float, spread: float, least: float) -> None:
    draw, repetitions, covered, pooled = np.random.default_rng(6), 400, 0, 0
    many = np.exp(spread * draw.standard_normal(400_000) + 0.03 * np.abs(draw.standard_normal(400_000)))
    truth, rounds = float(np.quantile(many, share)), list[list[float]]()
    for _ in range(repetitions):
        moods = np.exp(spread * draw.standard_normal((15, 1)))
        rounds = (moods * np.exp(0.03 * np.abs(draw.standard_normal((15, 100))))).tolist()
        _, low, high = samples.quantile_over_rounds(rounds, share)
        covered += (low is None or low <= truth) and (high is None or truth <= high)
        _, low, high = samples.quantile_interval([sample for taken in rounds for sample in taken], share)
        pooled += low is not None and high is not None and low <= truth <= high
    assert covered >= least * repetitions
    assert spread == 0 or pooled < 0.75 * repetitions, "as if all samples were independent"
    found = samples.summarize_rounds(rounds)
    assert found["percentile_intervals_ms"][f"p{100 * share:g}"] == list(
        samples.quantile_over_rounds(rounds, share)[1:]
    )
