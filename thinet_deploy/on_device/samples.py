"""What can be said of a series of times: median, percentiles, intervals, whether it was steady, and ratios.

Python 3.8 and the standard library only: a copy lies beside run.py in every bundle. Nothing assumes a distribution.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import statistics
from typing import Any, Mapping, Sequence

# Fewest samples from which a percentile is known at 99 % confidence; with fewer it is not given.
PERCENTILES = ((90.0, 64), (95.0, 130), (99.0, 662), (99.9, 6636))
STEADY_VARIATION, STEADY_SHIFT = 0.025, 0.01
SHIFT_BLOCKS, SHIFT_CHANCE = 60, 0.01
# Blocks → Pettitt's statistic from which a change is proven, by its exact distribution (all orders alike). The usual
# approximation asks for more than up to 15 blocks can reach; of fewer than 10 not even sorted ones prove anything.
PROVEN = {10: 25, 11: 29, 12: 34, 13: 39, 14: 44, 15: 49, 16: 54, 17: 59, 18: 65, 19: 71, 20: 76}
LAUNCH_SHARE = 0.8  # of the computing's time, from which the GPU may wait for its work


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float | None, float | None]:
    """Median and its confidence interval from order statistics, without assuming a distribution.

    The interval runs from the k-th smallest to the k-th largest sample, k as large as the binomial
    distribution (n, 1/2) allows. It supposes independent samples. Both ends are None where no such
    interval exists: below 6 samples at 95 %.
    """
    ordered, n = sorted(samples), len(samples)
    if not n:
        raise ValueError("a median needs at least one sample")
    k, tail = 0, 0.0
    while k < n // 2:
        tail += math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
        if 2 * tail > 1 - confidence:
            break
        k += 1
    middle = statistics.median(ordered)
    return (middle, ordered[k - 1], ordered[n - k]) if k else (middle, None, None)


@functools.lru_cache(maxsize=256)
def _ranks(n: int, share: float, confidence: float) -> tuple[int | None, int | None]:
    """Ranks, counted from 1, of the samples between which a quantile lies; None where no sample is sure enough."""
    tail, below, low, high = (1 - confidence) / 2, 0.0, None, None
    for k in range(n):
        ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        below += math.exp(ways + k * math.log(share) + (n - k) * math.log(1 - share))  # P(at most k lie below)
        if below <= tail:
            low = k + 1
        elif high is None and 1 - below <= tail:
            high = k + 1
            break
    return low, high


def quantile_interval(
    samples: Sequence[float], share: float, confidence: float = 0.95
) -> tuple[float, float | None, float | None]:
    """A quantile (the sample with `share` of all at or below it) and its interval from order statistics.

    No distribution is assumed, but that samples are independent. An end is None where there are too few for it.
    Source: H. A. David and H. N. Nagaraja, Order Statistics, 3rd edition, section 7.1.
    """
    ordered, n = sorted(samples), len(samples)
    low, high = _ranks(n, share, confidence)
    value = ordered[max(1, math.ceil(n * share - 1e-9)) - 1]
    return value, low and ordered[low - 1], high and ordered[high - 1]


def quantile_over_rounds(
    rounds: Sequence[Sequence[float]], share: float, confidence: float = 0.95
) -> tuple[float, float | None, float | None]:
    """A quantile and its interval where samples of a round depend on each other, and rounds do not.

    How much the rounds differ in their shares of samples below the quantile says how well that share is known; the
    interval lies between the quantiles of the shares on either side. An end is None where there are too few samples.
    Source: R. S. Woodruff, Confidence intervals for medians and other position measures, JASA 47 (1952), 635-646.
    """
    ordered, n = sorted(itertools.chain.from_iterable(rounds)), sum(map(len, rounds))
    value = ordered[max(1, math.ceil(n * share - 1e-9)) - 1]
    apart = math.fsum((sum(sample <= value for sample in taken) - share * len(taken)) ** 2 for taken in rounds)
    free = len(rounds) - 1
    error = max(math.sqrt(len(rounds) / free * apart) / n, math.sqrt(share * (1 - share) / n))
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    t = z * (1 + (z**2 + 1) / (4 * free) + (5 * z**4 + 16 * z**2 + 3) / (96 * free**2))  # Student's, to 1 % from 5 on
    low, high = math.floor(n * (share - t * error)), math.ceil(n * (share + t * error))
    return value, ordered[low - 1] if low >= 1 else None, ordered[high - 1] if high <= n else None


def shift(samples: Sequence[float]) -> tuple[float, float]:
    """Relative change of the median at the likeliest place, and that place as a share; (0, 0) where none is proven.

    Pettitt's rank test of one change point (Applied Statistics 28, 1979, 126-135) over the medians of up to 60 blocks
    of neighbours, which keeps the machine's short-lived moods from counting as evidence. It finds steps and drifts.
    Proven: by chance in less than 1 of 100 steady series, and a change of more than 1 %.
    """
    size = max(1, math.ceil(len(samples) / SHIFT_BLOCKS))
    blocks = [statistics.median(samples[at : at + size]) for at in range(0, len(samples), size)]
    ordered, n = sorted(blocks), len(blocks)
    ranks = (bisect.bisect_left(ordered, block) + bisect.bisect_right(ordered, block) + 1 for block in blocks)
    walk = [abs(total) for total in itertools.accumulate(rank - n - 1 for rank in ranks)][:-1]
    furthest = max(walk, default=0)
    if n < min(PROVEN) or furthest < _proven(n):
        return 0.0, 0.0
    # The walk's peak proves that there is a change; in units of its own spread it also says where.
    at = max(range(1, n), key=lambda t: walk[t - 1] / math.sqrt(t * (n - t)))
    before, after = statistics.median(blocks[:at]), statistics.median(blocks[at:])
    change = after / before - 1 if before else math.copysign(1, after)  # a coarse clock can read 0
    return (change, at / n) if abs(change) > STEADY_SHIFT else (0.0, 0.0)


def _proven(blocks: int) -> float:
    """Pettitt's statistic from which a change is proven."""
    return PROVEN.get(blocks) or math.sqrt(-math.log(SHIFT_CHANCE / 2) * (blocks**3 + blocks**2) / 6)


def summarize(samples_ms: Sequence[float], fps: float = 0.0) -> dict[str, Any]:
    """Figures of one series whose samples do not depend on each other, in milliseconds, JSON-ready.

    `warnings` says why they may not hold, `invalid` (empty here) why they do not: see `measure`.
    """
    return _summary(samples_ms, "sample", samples_ms, fps)


def _summary(samples_ms: Sequence[float], part: str, parts_ms: Sequence[float], fps: float) -> dict[str, Any]:
    """Figures of samples, and whether their parts, one after the other, tell of a change."""
    ordered, n = sorted(samples_ms), len(samples_ms)
    middle, low, high = median_interval(ordered)
    mean = statistics.fmean(ordered)
    variation = statistics.stdev(ordered) / mean if n > 1 and mean else None
    known = {f"p{p:g}": quantile_interval(ordered, p / 100) for p, least in PERCENTILES if n >= least}
    return {
        "n": n,
        "min_ms": ordered[0],
        "median_ms": middle,
        "interval_ms": None if low is None else [low, high],
        "interval_over": "samples",
        "mean_ms": mean,
        "coefficient_of_variation": variation,
        "percentiles_ms": {name: value for name, (value, _, _) in known.items()},
        "percentile_intervals_ms": {name: [below, above] for name, (_, below, above) in known.items()},
        "warnings": _warnings(samples_ms, part, parts_ms, variation, fps),
        "invalid": [],
    }


def _warnings(
    samples_ms: Sequence[float], part: str, parts_ms: Sequence[float], variation: float | None, fps: float
) -> list[str]:
    found, n, (change, place) = [], len(samples_ms), shift(parts_ms)
    if variation is not None and variation > STEADY_VARIATION:
        found.append(f"unstable because the coefficient of variation is {variation:.1%}, above {STEADY_VARIATION:.1%}")
    if change:
        found.append(f"unstable because the median changed by {change:+.1%} after {place:.0%} of the runs")
    if n < 6:
        found.append(f"no interval because there {_are(n, 'sample')} only; at least 6 are needed")
    elif len(parts_ms) < min(PROVEN):
        few = f"there {_are(len(parts_ms), part)} only; at least {min(PROVEN)} are needed"
        found.append(f"a change over time would not be seen because {few}")
    late = sum(sample > 1000 / fps for sample in samples_ms) if fps else 0
    if late:
        found.append(f"too slow for {fps:g} frames a second: {late} of {n} runs took longer than {1000 / fps:.4g} ms")
    return found


def _are(number: int, what: str) -> str:
    return f"is 1 {what}" if number == 1 else f"are {number} {what}s"


def summarize_rounds(rounds_ms: Sequence[Sequence[float]], fps: float = 0.0) -> dict[str, Any]:
    """`summarize` all samples, but judge by rounds, which lie apart: neighbouring samples share the machine's state.

    Changes are sought among the rounds' medians. Of 6 rounds or more come median and interval, which is their whole
    range where the median changed meanwhile, for then they depend on each other too, and percentiles' intervals.
    """
    if len(rounds_ms) == 1:
        return summarize(rounds_ms[0], fps)
    medians = [statistics.median(taken) for taken in rounds_ms]
    summary = _summary([sample for taken in rounds_ms for sample in taken], "round", medians, fps)
    middle, low, high = median_interval(medians)
    if low is not None:
        over = "rounds"
        if shift(medians)[0]:
            low, high, over = min(medians), max(medians), "range of rounds"
        summary.update(median_ms=middle, interval_ms=[low, high], interval_over=over)
        known = {f"p{p:g}": p / 100 for p, _ in PERCENTILES if f"p{p:g}" in summary["percentiles_ms"]}
        intervals = {name: list(quantile_over_rounds(rounds_ms, share)[1:]) for name, share in known.items()}
        summary.update(percentile_intervals_ms=intervals)
    elif summary["interval_ms"]:
        few = f"there {_are(len(rounds_ms), 'round')} only; at least 6 are needed"
        summary["warnings"].append(f"the interval is of runs, which is too narrow, because {few}")
    return summary


def ratio_interval(
    rounds_a: Sequence[Sequence[float]], rounds_b: Sequence[Sequence[float]], confidence: float = 0.95
) -> tuple[float, float | None, float | None]:
    """Ratio a / b of interleaved series: of the medians in each round, then median and interval of those.

    The interval is their whole range where the ratio itself changed meanwhile: see `summarize_rounds`.
    """
    if len(rounds_a) != len(rounds_b):
        raise ValueError(f"interleaved series have equally many rounds, not {len(rounds_a)} and {len(rounds_b)}")
    ratios = [statistics.median(a) / statistics.median(b) for a, b in zip(rounds_a, rounds_b)]
    middle, low, high = median_interval(ratios, confidence)
    changed = low is not None and shift(ratios)[0]
    return (middle, min(ratios), max(ratios)) if changed else (middle, low, high)


def judged(summary: dict[str, Any], machine: Mapping[str, Any], *, finite: bool) -> dict[str, Any]:
    """A summary with what the machine's sensors and the outputs say about it: `warnings`, and why it is `invalid`."""
    invalid = [f"the machine throttled: {', '.join(machine['throttled'])}"] if machine["throttled"] else []
    invalid += [] if finite else ["the outputs hold NaN or infinity"]
    return {**summary, "warnings": [*summary["warnings"], *machine["warnings"]], "invalid": invalid}


def launch_warnings(launch_ms: float | None, compute_ms: float | None) -> list[str]:
    """What to know of a GPU that waits for the host, which launches its work; nothing where neither is known."""
    if launch_ms is None or compute_ms is None or launch_ms <= LAUNCH_SHARE * compute_ms:
        return []
    return [f"bound by the host, which takes {launch_ms:.3g} ms to launch what the GPU computes in {compute_ms:.3g} ms"]
