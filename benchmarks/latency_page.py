"""docs/latency.md from the results of latency_budgets.py: every figure on that page has a row in results/."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _markdown import head, line
from _record import kept
from latency_budgets import (
    ENGINES,
    FREER,
    MOST,
    NAME,
    NETWORKS,
    ORIGINAL,
    OURS,
    SAME_MACS,
    SAME_TIME,
    TIMES,
    uniform_error,
    verdicts,
)

PAGE = Path(__file__).parents[1] / "docs" / "latency.md"
RUNTIMES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}
TITLES = {"vgg16-gap": "VGG-16-GAP", "resnet50": "ResNet-50", FREER: "ResNet-50, streams and branches too"}
HEAD = """# Budgets of time, met and measured

Made by `benchmarks/latency_page.py` from the results of `benchmarks/latency_budgets.py`, where all samples of every row
are kept with the machine that they come from. Networks at 224×224 with random weights, batch 1, one thread, all
networks of a row in turn in one run; intervals are of 95 %. No trained network says here what is lost: the *predicted
error* stands for it.

- *Arrives*: how many times faster, divided by how many times fewer multiply-accumulates: 1 where all of these arrive
  as time. *Uniform*: uniform widths with as many multiply-accumulates as ours. *At most*: widths that take as long and
  keep as many multiply-accumulates as they can, whatever that loses.
- *Error of uniform*: how many times ours the predicted error is that uniform widths have which take as long; ~: those
  measured were more than 3 % faster, so it is read off between them and the uniform ones of as many
  multiply-accumulates, which are slower.
- *Unstable*: a series moved by more than 2.5 % (coefficient of variation) or changed its median meanwhile. Ratios are
  of networks in turn, so they hold better than milliseconds do. A neighbour on the host moves them
  all the same, by up to a tenth within minutes; intervals are of one measurement ([17](adr/0017-milliseconds.md), at
  its end).
- The rows of VGG-16-GAP, which has no shortcuts, are of an earlier and quieter day than those of ResNet-50.
"""
MEASURED = ["asked", "original, ms", "ours, ms", "faster"]
COLUMNS = [*MEASURED, "arrives", "uniform", "at most", "error of uniform", "unstable"]


def main() -> None:
    """Write the page."""
    rows, parts = kept(NAME, quick=False), [HEAD]
    for network in (*NETWORKS, FREER):
        lines = list(_lines(network, rows))
        if lines:
            parts += [f"## {TITLES[network]}", "", *head("engine", COLUMNS), *lines, ""]
    PAGE.write_text("\n".join([*parts, *_missed(rows)]) + "\n", "utf-8")


def _cases(network: str) -> Iterator[tuple[str, str, str]]:
    """(row's name, engine for people, ratio)."""
    for runtime, precision in ENGINES:
        for ratio in TIMES:
            engine = f"{RUNTIMES[runtime]} {precision.upper() if precision == 'int8' else precision}"
            yield f"{network} {runtime} {precision} {ratio:g}x", engine, f"{ratio:g}×"


def _lines(network: str, rows: dict[str, Any]) -> Iterator[str]:
    for name, engine, ratio in _cases(network):
        row = rows.get(name)
        if row and "refused" in row:
            yield line(engine, [ratio, *[""] * (len(COLUMNS) - 2), row["refused"]])
        elif row:
            yield line(engine, [ratio, *_cells(row["networks"])])


def _cells(found: dict[str, Any]) -> list[str]:
    ours, error = found[OURS], uniform_error(found)
    worse = "" if error is None else f"{error / ours['error']:.3g}×"
    mark = "" if error in {None, found[SAME_TIME]["error"]} else " ~"
    shaky = any(word.startswith("unstable") for part in (found[ORIGINAL], ours) for word in part["summary"]["warnings"])
    return [
        *(_ms(found[name]["summary"]) for name in (ORIGINAL, OURS)),
        _spread(ours["speedup"]),
        *(_spread(found[name]["realised"]) if name in found else "" for name in (OURS, SAME_MACS, MOST)),
        worse + mark,
        "yes" if shaky else "",
    ]


def _ms(summary: dict[str, Any]) -> str:
    low, high = summary["interval_ms"]
    return f"{summary['median_ms']:.4g} [{low:.4g}, {high:.4g}]"


def _spread(values: list[float]) -> str:
    return f"{values[0]:.2f} [{values[1]:.2f}, {values[2]:.2f}]"


def _missed(rows: dict[str, Any]) -> Iterator[str]:
    """What is wished for and these rows do not have."""
    yield from (
        "## What does not hold",
        "",
        "Of: within 5 % of the ratio asked for; less predicted error than uniform widths that take as long, by a tenth",
        "of it at least (both are as fast to within 3 %); more of the multiply-accumulates arrive than with uniform",
        "widths of as many, by the lower end of the ratio's interval, round by round; and of ResNet-50, by the",
        "interval's lower end, 0.95 of them, 0.90 in INT8.",
        "",
    )
    for network in (*NETWORKS, FREER):
        for name, engine, ratio in _cases(network):
            if (row := rows.get(name)) and "refused" not in row:
                bad = [words.removeprefix("NO: ") for words in verdicts(name, row) if words.startswith("NO")]
                if bad:
                    yield f"- {TITLES[network]}, {engine}, {ratio}: not so: {'; '.join(bad)}."


if __name__ == "__main__":
    main()
