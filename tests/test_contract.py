"""contract.py: requirements are read strictly, judged by intervals, and told to CI systems in their own form."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinet_deploy import pipeline
from thinet_deploy.artifact import write_json
from thinet_deploy.errors import InputError, UnknownNameError
from thinet_deploy.intervals import Interval, accuracy_interval
from thinet_deploy.on_device.samples import judged, summarize
from thinet_deploy.options import Options
from thinet_deploy.reports import contract
from thinet_deploy.reports.table import Row, Table, Time
from thinet_deploy.store import Run

TORCH = Time(9, 8, 10)
FIGURES = {"top-1": accuracy_interval(900, 1000), "top-5": accuracy_interval(990, 1000)}
ORIGINAL = Row("original", "Original", FIGURES, 1000, 4000, TORCH, TORCH, {"ov": Time(8, 7, 9)}, 8 << 20)
THIN = replace(
    ORIGINAL,
    name="conv",
    label="Thin",
    figures={"top-1": accuracy_interval(895, 1000), "top-5": accuracy_interval(990, 1000)},
    engines={"ort": Time(1, 1, 1), "ov": Time(4.0, 3.9, 4.1, 2.0, 1.9, 2.1)},
    size_bytes=4 << 20,
    drop=Interval(0.5, -0.2, 1.2),
)


def table(**changes: Any) -> Table:
    thin = replace(THIN, **changes)
    return Table("cpu", "net", "photos", 1000, "m", "CPU", 1, 2, 32, ("ov", "ort"), (ORIGINAL, thin), (), ships="conv")


def outcome(required: str, **changes: Any) -> str:
    (verdict,) = contract.judge([required], table(**changes))
    return verdict.outcome


@pytest.mark.parametrize(
    ("required", "expected"),
    [
        ("latency<=4.2ms", "met"),
        ("latency <= 4ms", "cannot be told apart"),
        ("latency<=3.8ms", "not met"),
        ("latency<=3800us", "not met"),
        ("latency<=0.0041s", "met"),
        ("speedup>=1.8", "met"),
        ("speedup>=2x", "cannot be told apart"),
        ("speedup>=2.2", "not met"),
        ("top1-drop<=1.3", "met"),
        ("top1-drop<=1.0", "cannot be told apart"),
        ("top1>=80%", "met"),
        ("top1>=95", "not met"),
        ("size<=4MB", "met"),
        ("size<=4095kB", "not met"),
        ("size<=0.1GB", "met"),
    ],
)
def test_intervals_decide(required: str, expected: str) -> None:
    assert outcome(required) == expected


@given(limit=st.integers(1, 100_000).map(lambda n: n / 1000))
def test_a_verdict_says_what_its_interval_says(limit: float) -> None:
    (verdict,) = contract.judge([f"latency<={limit}ms"], table())
    assert verdict.low is not None
    assert verdict.high is not None
    assert (verdict.outcome == "met") == (verdict.high <= limit)
    assert (verdict.outcome == "not met") == (verdict.low > limit)
    assert verdict.failed == (verdict.outcome == "not met")


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"latency": "4ms"}, ""),
        ({"latency": "3.75ms"}, ""),  # with the budget's own slack it cannot be told apart
        (
            {"latency": "3ms"},
            r"The budget \(3ms\) was met by the widths, but what ships misses it: 4 \[3.9",
        ),
        ({"speedup": "2x"}, ""),
        ({"speedup": "2.5x"}, r"The budget \(2.5x faster\) was met .* misses it: 2 \[1.9, 2.1\] x; Thin, ov"),
        ({"macs": "2x"}, ""),
    ],
)
def test_what_ships_too_slow_for_its_budget_is_said_to(
    budget: dict[str, str], said: str, tiny_options: Callable[..., Options], tmp_path: Path
) -> None:
    notes = contract.budget_notes(tiny_options(tmp_path, **budget), "ov", table())
    assert len(notes) == bool(said)
    assert re.match(said, " ".join(notes))


def test_int8_may_have_made_a_network_slower(tiny_options: Callable[..., Options], tmp_path: Path) -> None:
    found = replace(table(), precision="int8")
    (note,) = contract.budget_notes(tiny_options(tmp_path, latency="3ms", precision="int8"), "ov", found)
    assert "--max-drop" in note


def test_a_budget_is_judged_on_what_it_was_met_on(tiny_options: Callable[..., Options], tmp_path: Path) -> None:
    budget = tiny_options(tmp_path, latency="3ms")
    assert not contract.budget_notes(budget, "ort", table()), "ort takes 1 ms, ov 4"
    assert not contract.budget_notes(budget, "trt", table()), "it did not run"
    engines = [
        {"runtime": name, "precision": "fp32", "summary": summarize([ms] * 9)} for name, ms in (("ov", 9), ("ort", 2))
    ]
    there = {"latency": {"engines": engines, "threads": 1, "processor": "Pi"}}
    assert not contract.budget_notes(budget, "ort", table(), there)
    (note,) = contract.budget_notes(budget, "ov", table(), there)
    assert "9 ms" in note
    assert "Pi (the device)" in note
    assert not contract.budget_notes(tiny_options(tmp_path, speedup="9x"), "ov", table(), there), "not measured there"


def test_the_first_of_the_targets_runtimes_is_judged() -> None:
    (verdict,) = contract.judge(["latency<=8ms"], table())
    assert "ov, threads: 1, CPU" in verdict.detail


def test_what_was_not_measured_breaks_a_contract_and_is_no_zero() -> None:
    (nothing,) = contract.judge(["latency<=8ms"], table(engines={}))
    assert (nothing.outcome, nothing.value, nothing.failed) == ("not measured", None, True)
    (hot,) = contract.judge(["speedup>=1"], table(engines={"ov": Time(4, 3, 5, invalid="the machine throttled")}))
    assert hot.outcome == "not measured"
    assert "invalid because the machine throttled" in hot.detail
    assert outcome("latency<=8ms", engines={"ov": Time(4, None, None)}) == "cannot be told apart"


def test_with_a_device_its_latency_is_judged() -> None:
    def timed(runtime: str, precision: str, ms: float, hot: bool = False) -> dict[str, Any]:
        machine: dict[str, Any] = {"throttled": ["heat"] if hot else [], "warnings": []}
        summary = judged(summarize([ms] * 10), machine, finite=True)
        return {"runtime": runtime, "precision": precision, "summary": summary, "reason": ""}

    def verdict(*rows: dict[str, Any]) -> contract.Verdict:
        device = {"latency": {"engines": rows, "threads": 4, "processor": "ARM"}}
        (latency, size, faster) = contract.judge(["latency<=8ms", "size<=4MB", "speedup>=1.1x"], table(), device)
        assert faster.outcome == "not measured", "here it is 2, and there the original was not measured"
        assert size.outcome == "met", "the file is the same everywhere"
        return latency

    absent = {"runtime": "ov", "precision": "fp32", "summary": None, "reason": "not installed"}
    found = verdict(absent, timed("ort", "int8", 3), timed("ort", "fp32", 30), timed("else", "fp32", 1))
    assert (found.outcome, found.value) == ("not met", 30.0), "the host's 4 ms do not count"
    assert found.detail == "Thin, ort fp32, threads: 4, ARM (the device)"
    assert verdict(timed("ort", "int8", 3)).outcome == "met"
    found = verdict(timed("ort", "fp32", 30), timed("ov", "fp16", 3))
    assert found.detail.startswith("Thin, ov fp16"), "the first of the target's runtimes, whatever it computes in"
    assert verdict(timed("ov", "fp32", 3, hot=True)).outcome == "not measured"
    assert verdict(absent).detail == "no engine of Thin ran on the device"


def test_a_drop_that_is_not_paired_is_known_less_well() -> None:
    (paired,), (alone,) = (contract.judge(["top1-drop<=1"], t) for t in (table(), table(drop=None)))
    assert alone.value == paired.value == 0.5
    assert alone.high is not None
    assert paired.high is not None
    assert alone.high > paired.high


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fast", "FIGURE<=NUMBER was expected"),
        ("latency<8ms", "FIGURE<=NUMBER was expected"),
        ("latency<=-8ms", "FIGURE<=NUMBER was expected"),
        ("latency>=8ms", "latency is limited by <="),
        ("speedup<=2", "speedup is limited by >="),
        ("latency<=8", "latency is in ms, us, s"),
        ("size<=5ms", "size is in MB, kB, GB"),
    ],
)
def test_what_is_no_requirement_is_explained(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        contract.parse(text)


def test_the_nearest_figure_is_offered() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'latency'"):
        contract.parse("latnecy<=8ms")


def test_ci_systems_are_told_in_their_own_form(tmp_path: Path) -> None:
    required = ["latency<=8ms", "size<=1MB", "top1-drop<=1.0", "speedup>=2.5"]
    verdicts = contract.judge(required, table())
    contract.write(tmp_path, verdicts)
    suite = ET.fromstring((tmp_path / "junit.xml").read_bytes())
    assert {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "4",
        "failures": "2",
        "errors": "0",
        "skipped": "1",
    }
    assert [case.get("name") for case in suite] == required
    assert [case[0].tag for case in suite] == ["system-out", "failure", "skipped", "failure"]
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert summary.startswith("**Contract: 2 of 4 requirements broken**")
    assert "| `size<=1MB` | ❌ not met | 4 MB | Thin, its ONNX file in fp32 |" in summary
    assert len(json.loads((tmp_path / "contract.json").read_text())["verdicts"]) == 4


# -------------------------------------------------------------------------------------------- the command line


def write_run(root: Path, found: Table) -> Path:
    Run(root)
    write_json(root / "report" / "table.json", found.to_json())
    return root


def test_compare_ends_with_1_only_when_something_is_proven_broken(cli: Callable[..., Any], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", table())
    fine = cli("compare", run, "--require", "latency<=8ms", "--require", "top1-drop<=1")
    assert fine.code == 0
    assert "top1-drop<=1: cannot be told apart" in fine.err
    broken = cli("compare", run, "--require", "size<=1MB", "--format", "markdown")
    assert broken.code == 1
    assert "1 of 1 requirements broken" in broken.out
    assert "failure" in (run / "compared" / "junit.xml").read_text()
    assert not (run / "contract").exists(), "which is the build's own"
    document = json.loads(cli("compare", run, "--require", "size<=1MB", "--json").out)
    assert document["contract"][0][0]["outcome"] == "not met"
    for damaged in ("{", "[1]", '{"facts": {}}'):
        (run / "report" / "device.json").write_text(damaged)
        text = cli("compare", run, "--require", "latency<=8ms")
        assert (text.code, "device.json is damaged" in text.err) == (2, True), "the host's times do not stand in for it"
    (run / "report" / "device.json").unlink()
    wrong = cli("compare", run, "--require", "size<=1ms")
    assert wrong.code == 2
    assert "size is in MB, kB, GB" in wrong.err


def test_going_on_from_a_finished_build_says_that_it_is_replaced(tmp_path: Path) -> None:
    assert pipeline._replaced(tmp_path / "none") == ()
    (told,) = pipeline._replaced(write_run(tmp_path / "run", table()))
    assert "had another build" in told
    assert pipeline._replaced(write_run(tmp_path / "own", replace(table(), ships="own"))) == ()


def test_a_run_that_cannot_be_written_to_is_judged_all_the_same(cli: Callable[..., Any], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", table())
    (run / "compared").write_text("in the way")
    for required, code in (("latency<=8ms", 0), ("size<=1MB", 1)):
        told = cli("compare", run, "--require", required)
        assert told.code == code, told.err
        assert "The verdicts are not kept: " in told.err
        assert required in told.err
