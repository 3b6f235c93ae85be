"""ThiNet's greedy removal: the paper's loop over sampled rows against its Gram form (thinet.md, section 1).

Both get the same rows and must give the same channels; the ratio of their times is what counts.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from _record import keep
from numpy.typing import NDArray

from thinet_deploy.pruning.selection import thinet


def direct(rows: NDArray[np.float64], keep_channels: int) -> NDArray[np.int64]:
    """Algorithm 1 as printed: at every step the sum of squares over all rows, for every channel left."""
    left, removed = list(range(rows.shape[1])), np.zeros(len(rows))
    while len(left) > keep_channels:
        costs = [float(np.square(removed + rows[:, j]).sum()) for j in left]
        removed = removed + rows[:, left.pop(int(np.argmin(costs)))]
    return np.array(left)


def gram_form(rows: NDArray[np.float64], keep_channels: int) -> NDArray[np.int64]:
    """The same from the Gram matrix; its making is part of the time."""
    return thinet(rows.T @ rows, keep_channels)


def main() -> None:
    """Measure in turn, print the ratio, keep the samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works")
    quick = parser.parse_args().quick
    rows_n, channels, rounds = (2000, 32, 2) if quick else (20000, 256, 3)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((rows_n, channels)) * rng.uniform(0.1, 2, channels)
    seconds: dict[str, list[float]] = {"direct": [], "gram": []}
    for _ in range(rounds):
        answers = {}
        for name, method in (("direct", direct), ("gram", gram_form)):
            start = time.perf_counter()
            answers[name] = method(rows, channels // 2)
            seconds[name].append(time.perf_counter() - start)
        if not np.array_equal(answers["direct"], answers["gram"]):
            raise SystemExit("The two forms chose different channels.")
    ratio = statistics.median(d / g for d, g in zip(seconds["direct"], seconds["gram"], strict=True))
    path = keep("selection", {"rows": rows_n, "channels": channels, "seconds": seconds, "ratio": ratio}, quick=quick)
    print(f"{rows_n} rows, {channels} channels: same channels, Gram form {ratio:.0f}× faster. {path}")


if __name__ == "__main__":
    main()
