"""ThiNet's greedy loops over sampled rows against their Gram forms (thinet.md, section 1), removal and addition.

Both get the same rows and must choose the same channels; making the Gram matrix is part of the Gram form's time. At
full size the loops would take minutes to an hour: a few of their steps are run whole, each from the channels that the
Gram form has chosen until then, its choice is compared with the Gram form's, and the time of all steps is
*estimated* between those. All steps' choices are compared as well: at full size with loops over the same rows that
keep a running sum, or a residual (`removals`, `additions`), in a smaller case with the published ones.

Seconds are CPU time with one BLAS thread, so that other work on the machine hardly shows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # is read when numpy is imported

import numpy as np
from _record import keep
from numpy.typing import NDArray

from thinet_deploy.pruning.selection import thinet, thinet_omp

Rows = NDArray[np.float64]
# Rows by columns, the channels removed or added until now, those left → the one that comes next.
Step = Callable[[Rows, list[int], list[int]], int]


def removal_as_printed(rows: Rows, removed: list[int], left: list[int]) -> int:
    """A step of ICCV 2017, algorithm 1: equation 6 anew for T ∪ {j}, for every channel j left."""
    costs = [float(np.square(rows[:, [*removed, j]].sum(1)).sum()) for j in left]
    return left[int(np.argmin(costs))]


def removal_by_sums(rows: Rows, removed: list[int], left: list[int]) -> int:
    """The same with Σ_{t∈T} x̂_t taken once a step, and columns that lie together in memory."""
    base = rows[:, removed].sum(1)
    costs = [float(np.square(base + rows[:, j]).sum()) for j in left]
    return left[int(np.argmin(costs))]


def addition(rows: Rows, added: list[int], left: list[int]) -> int:
    """A step of TPAMI 2019: refit by least squares on the rows, then (x̂_jᵀρ)² / x̂_jᵀx̂_j for every channel left."""
    target = rows.sum(1)
    residual = target - rows[:, added] @ np.linalg.lstsq(rows[:, added], target)[0] if added else target
    gains = [float((rows[:, j] @ residual) ** 2 / (rows[:, j] @ rows[:, j])) for j in left]
    return left[int(np.argmax(gains))]


def removals(rows: Rows, count: int) -> list[int]:
    """The first channels of algorithm 1, over rows, with Σ_{t∈T} x̂_t carried from step to step."""
    base, left, removed = np.zeros(len(rows)), list(range(rows.shape[1])), []
    for _ in range(count):
        removed.append(left[int(np.argmin([float(np.square(base + rows[:, j]).sum()) for j in left]))])
        base += rows[:, removed[-1]]
        left.remove(removed[-1])
    return removed


def additions(rows: Rows, count: int) -> list[int]:
    """The first channels of TPAMI 2019, over rows, with the residual carried along by orthogonal columns."""
    residual, left, added = rows.sum(1), list(range(rows.shape[1])), list[int]()
    sizes, basis = np.square(rows).sum(0), np.empty((len(rows), count), order="F")
    for number in range(count):
        added.append(left[int(np.argmax([float((rows[:, j] @ residual) ** 2 / sizes[j]) for j in left]))])
        column, known = rows[:, added[-1]].copy(), basis[:, :number]
        for _ in range(2):  # once more, for what the first time rounds
            column -= known @ (known.T @ column)
        basis[:, number] = column / np.linalg.norm(column)
        residual -= basis[:, number] * (basis[:, number] @ residual)
        left.remove(added[-1])
    return added


def some_rows(count: int, channels: int) -> Rows:
    """Correlated columns of different sizes, each of them together in memory (which favours the loops)."""
    rng = np.random.default_rng(0)
    rows = np.empty((count, channels), order="F")
    shared = rng.standard_normal((count, 8)) @ rng.standard_normal((8, channels)) * 0.2
    for j in range(channels):
        rows[:, j] = (rng.standard_normal(count) + shared[:, j]) * rng.uniform(0.1, 2)
    return rows


def removal_order(gram: Rows) -> list[int]:
    """Channels in the order in which the Gram form removes them, the last one included."""
    kept = [set(thinet(gram, count).tolist()) for count in range(len(gram), 0, -1)]
    return [(more - fewer).pop() for more, fewer in pairwise(kept)] + list(kept[-1])


def addition_order(gram: Rows) -> list[int]:
    """Channels in the order in which the Gram form adds them."""
    kept = [set[int](), *(set(thinet_omp(gram, count).tolist()) for count in range(1, len(gram) + 1))]
    return [(more - fewer).pop() for fewer, more in pairwise(kept)]


def timed_steps(step: Step, rows: Rows, order: list[int], numbers: list[int]) -> dict[int, float]:
    """Seconds of some steps, by number; each has to choose what the Gram form chose there."""
    seconds = {}
    for number in numbers:
        done = order[:number]
        left = sorted(set(order) - set(done))
        start = time.process_time()
        choice = step(rows, done, left)
        seconds[number] = time.process_time() - start
        if choice != order[number]:
            raise SystemExit(f"{step.__name__}, step {number}: {choice}, but the Gram form chose {order[number]}.")
    return seconds


def estimate(seconds: dict[int, float]) -> float:
    """Of all steps from 0 to the last timed one, linear between timed ones."""
    numbers = sorted(seconds)
    return float(np.interp(np.arange(numbers[-1] + 1), numbers, [seconds[number] for number in numbers]).sum())


@dataclass(frozen=True)
class Rule:
    """A greedy rule: its Gram form, the order in which that chooses, loops over rows, and a faster one of all steps."""

    gram_form: Callable[[Rows, int], NDArray[np.int64]]
    order: Callable[[Rows], list[int]]
    loops: tuple[Step, ...]
    whole: Callable[[Rows, int], list[int]]


RULES = {
    "removal": Rule(thinet, removal_order, (removal_as_printed, removal_by_sums), removals),
    "addition": Rule(thinet_omp, addition_order, (addition,), additions),
}


def measure(rule: Rule, rows: Rows, numbers: list[int], rounds: int) -> dict[str, Any]:
    """Seconds of the Gram form and of the loops' steps from 0 to the last of `numbers`, with the ratios."""
    count, channels = numbers[-1] + 1, rows.shape[1]
    gram_seconds = []
    for _ in range(rounds):
        start = time.process_time()
        rule.gram_form(rows.T @ rows, channels - count)
        gram_seconds.append(time.process_time() - start)
    typical, order = statistics.median(gram_seconds), rule.order(rows.T @ rows)
    steps = {loop.__name__: timed_steps(loop, rows, order, numbers) for loop in rule.loops}
    totals = {loop: estimate(seconds) for loop, seconds in steps.items()}
    for loop, total in totals.items():
        print(
            f"{loop}: about {total:.0f} s for {count} steps, of which {len(numbers)} were run and chose the same; "
            f"Gram form {typical:.3f} s, {total / typical:.0f}× faster."
        )
    ratio = {loop: total / typical for loop, total in totals.items()}
    if (chosen := rule.whole(rows, count)) != order[:count]:
        at = next(number for number in range(count) if chosen[number] != order[number])
        raise SystemExit(f"{rule.whole.__name__}, step {at}: {chosen[at]}, but the Gram form chose {order[at]}.")
    print(f"{rule.whole.__name__}: all {count} steps chose the same.")
    found = {"gram_seconds": gram_seconds, "step_seconds": steps, "estimated_seconds": totals, "ratio": ratio}
    return {**found, "steps_compared": count}


def main() -> None:
    """Measure, print the ratios, keep the samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works")
    quick = parser.parse_args().quick
    small_shape, shape, rounds = ((500, 16), (2000, 32), 2) if quick else ((5000, 64), (100_000, 512), 3)
    small = some_rows(*small_shape)
    for rule in RULES.values():
        order = rule.order(small.T @ small)
        for loop in rule.loops:
            timed_steps(loop, small, order, list(range(small_shape[1])))
    print(f"{small_shape[0]} rows, {small_shape[1]} channels, all steps: the same channels in the same order.")

    rows = some_rows(*shape)
    last = shape[1] // 2 - 1
    numbers = sorted({0, 1, last // 8, last // 2, last})
    result = {name: measure(rule, rows, numbers, rounds) for name, rule in RULES.items()}
    sizes = {"rows": shape[0], "channels": shape[1], "steps": last + 1, "steps_run": numbers}
    machine = {"blas_threads": 1, "load_average": os.getloadavg()}
    checked = {"rows": small_shape[0], "channels": small_shape[1], "steps": small_shape[1], "same": True}
    print(keep("selection", {**sizes, **machine, "complete_case": checked, **result}, quick=quick))


if __name__ == "__main__":
    main()
