"""comparison.py: against a baseline, in turn where the samples are there, and what is noise is called noise."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from thinet_deploy import intervals
from thinet_deploy.artifact import write_json
from thinet_deploy.errors import InputError, UnknownNameError
from thinet_deploy.intervals import Interval, accuracy_interval
from thinet_deploy.on_device import samples
from thinet_deploy.reports import comparison, html_plots, texts
from thinet_deploy.reports.comparison import Against, Difference
from thinet_deploy.reports.table import Row, Table, Time, check_machines, setting_of, with_device
from thinet_deploy.store import Run

FIGURES = {"top-1": accuracy_interval(900, 1000), "top-5": accuracy_interval(990, 1000)}
ORIGINAL = Row("original", "Original", FIGURES, 9, 9, Time(9, 8, 10), Time(9, 8, 10), {"ov": Time(8, 7.9, 8.1)}, 800)
CONV = replace(ORIGINAL, name="conv", label="Thin", engines={"ov": Time(4, 3.9, 4.1, 2, 1.9, 2.1)}, size_bytes=400)
CONV = replace(
    CONV,
    forward=Time(4.5, 4, 5, 2, 1.9, 2.1),
    figures={"top-1": accuracy_interval(890, 1000), "top-5": accuracy_interval(990, 1000)},
    drop=Interval(1.0, 0.2, 1.8),
)
PARTS = ("forward", "backward")
LONGER = replace(ORIGINAL, name="longer", label="More epochs", note="the same times")


def finished(folder: Path, *rows: Row, scale: float = 1.0) -> comparison.Run:
    """A run whose raw samples give a ratio of exactly 2 in every round."""
    table = Table("cpu", "net", "photos", 1000, "m", "CPU", 1, 2, 32, ("ov",), rows, (), ships="conv")
    Run(folder)
    write_json(folder / "report" / "table.json", table.to_json())
    pace = [scale * (8 + number / 10) for number in range(9)]
    series = {"original": [[ms, ms] for ms in pace], "conv": [[ms / 2, ms / 2] for ms in pace]}
    shared = {"runtime": "ov", "precision": "fp32", "load_ms": 1.0, "first_ms": 1.0}
    passes = {name: [[each[0]] for each in own] for name, own in series.items()}
    of, both = (
        {name: {"rounds_ms": own, "summary": samples.summarize_rounds(own)} for name, own in each.items()}
        for each in (series, passes)
    )
    models = [{"model": name, **dict.fromkeys(PARTS, own)} for name, own in both.items()]
    engines = [{**shared, "model": name, "samples": own} for name, own in of.items()]
    write_json(folder / "latency" / "latency.json", {"engines": engines, "models": models})
    return comparison.Run(folder, table, folder.name)


def by_row(found: list[Against]) -> dict[str, Against]:
    return {f"{each.run}/{each.row}": each for each in found}


def test_rows_of_one_run_are_compared_round_by_round(tmp_path: Path) -> None:
    name, found = comparison.against([finished(tmp_path / "a", ORIGINAL, CONV, LONGER)], "original")
    assert name == "a/original"
    rows = by_row(found)
    assert rows["a/Thin"].faster["ov"] == Difference(2.0, 2.0, 2.0, 1, in_turn=True)
    assert rows["a/Thin"].accuracy == Difference(-1.0, -1.8, -0.2, 0, in_turn=True)
    assert not Difference(-1.0, -1.8, -0.2, 0, in_turn=True).noise
    assert rows["a/Thin"].smaller == 2.0
    control = rows["a/More epochs"]
    assert control.faster["ov"] == Difference(1.0, 1.0, 1.0, 1, in_turn=True), "it has the original's times"
    assert control.faster["ov"].noise
    assert control.accuracy
    assert control.accuracy.noise


def test_forward_and_backward_are_compared_as_engines_are(tmp_path: Path) -> None:
    runs = [finished(tmp_path / name, ORIGINAL, CONV, LONGER) for name in "ab"]
    rows = by_row(comparison.against(runs, "a/original")[1])
    assert rows["a/Thin"].faster["f./b."] == Difference(2.0, 2.0, 2.0, 1, in_turn=True)
    assert rows["a/More epochs"].faster["f./b."].noise
    assert rows["b/Thin"].faster["f./b."].value == pytest.approx(18 / 13.5), "another run's: by the tables"
    assert not rows["b/Thin"].faster["f./b."].in_turn
    untimed = replace(CONV, forward=None, backward=None)
    (found,) = comparison.against([finished(tmp_path / "c", ORIGINAL, untimed)], "original")[1]
    assert set(found.faster) == {"ov"}
    assert "f./b. (× faster)" in comparison.header(list(rows.values()))
    assert texts.cells(replace(CONV, forward=Time(4.5, 4, 5, 1.0, 0.5, 1.9)), [], [])[3] == "4.50/9.00 ≈"
    (_, line) = csv.DictReader(io.StringIO(texts.to_csv([replace(runs[0].table, rows=(ORIGINAL, CONV))])))
    assert [line[f"torch_{part}"] for part in ("speedup", "speedup_low", "speedup_high")] == ["2", "1.9", "2.1"]


def from_device(processor: str, ms: float) -> dict[str, Any]:
    summary = {"median_ms": ms, "interval_ms": [ms * 0.99, ms * 1.01], "warnings": [], "invalid": []}
    engine = {"runtime": "tensorrt", "precision": "fp16", "fps": 0.0, "summary": summary}
    failed = {"runtime": "onnxruntime", "precision": "fp32", "verdict": "not run"}
    timing = {"processor": processor, "threads": 4, "engines": [engine, {**engine, "fps": 30.0}, failed]}
    return {"latency": timing, "facts": {"machine": "aarch64", "jetson": {"power_mode": "MAXN"}}}


def test_times_on_devices_are_shown_compared_and_never_mixed(tmp_path: Path) -> None:
    runs = [finished(tmp_path / name, ORIGINAL, CONV, LONGER) for name in "ab"]

    def there(*devices: dict[str, Any] | None) -> list[comparison.Run]:
        both = zip(runs, devices, strict=True)
        return [replace(run, table=with_device(run.table, device)) for run, device in both]

    one, other = there(from_device("Orin", 8.0), from_device("Orin", 4.0))
    assert one.table.device == "Orin, aarch64, MAXN, threads: 4"
    assert list(one.table.shipped.engines)[1:] == ["tensorrt fp16, device", "tensorrt fp16 at 30 a second, device"]
    check_machines([one.table, other.table])
    found = by_row(comparison.against([one, other], "a")[1])
    faster = found["b/Thin"].faster["tensorrt fp16, device"]
    assert (faster.value, faster.in_turn, faster.noise) == (2.0, False, False)
    assert found["a/Original"].faster["ov"].in_turn, "this machine's are as they were"
    text = texts.to_markdown([one.table])
    assert "- Device: the network that ships, measured on Orin, aarch64, MAXN, threads: 4." in text
    assert "| tensorrt fp16, device (ms) |" in text
    (*_, line) = csv.DictReader(io.StringIO(texts.to_csv([replace(one.table, rows=one.table.rows[:2])])))
    assert line["tensorrt fp16, device_ms"] == "8.0"
    apart = there(from_device("Orin", 8.0), from_device("Nano", 80.0))
    with pytest.raises(InputError, match="different devices: Orin, aarch64, MAXN, threads: 4; Nano"):
        check_machines([run.table for run in apart])
    slower = by_row(comparison.against(apart, "a")[1])["b/Thin"].faster["tensorrt fp16, device"]
    assert (slower.low, slower.high) == (None, None), "no interval across devices"
    assert with_device(one.table, None) is one.table


def test_another_run_is_compared_with_room_for_another_day(tmp_path: Path) -> None:
    slower = replace(CONV, engines={"ov": Time(4.2, 4.15, 4.25)})
    runs = [finished(tmp_path / "a", ORIGINAL, CONV), finished(tmp_path / "b", ORIGINAL, slower)]
    found = by_row(comparison.against(runs, "a")[1])["b/Thin"].faster["ov"]
    assert not found.in_turn
    assert found.noise, "5 % between two days is no news"
    assert found.low is not None
    assert found.low < 3.9 / 4.25 < found.value < 1


def test_other_threads_and_other_images_do_not_compare(tmp_path: Path) -> None:
    run = finished(tmp_path / "a", ORIGINAL, CONV)
    other = comparison.Run(tmp_path / "b", replace(run.table, threads=8, data="digits"), "b")
    found = by_row(comparison.against([run, other], "a")[1])["b/Thin"]
    assert found.accuracy is None, "its images are others"
    assert (found.faster["ov"].low, found.faster["ov"].in_turn) == (None, False)
    assert comparison.lines([found])[0][2] == "–"
    assert "accuracy_points" not in comparison.to_csv("a", [found])


def test_the_baseline_may_be_a_row_a_label_or_a_run(tmp_path: Path) -> None:
    runs = [finished(tmp_path / name, ORIGINAL, CONV) for name in "ab"]
    names = {"conv": "a/conv", "Thin": "a/conv", "b": "b/conv", "b/original": "b/original"}
    for given, meant in names.items():
        name, found = comparison.against(runs, given)
        assert name == meant
        assert len(found) == 3
    with pytest.raises(UnknownNameError, match="Did you mean 'conv'"):
        comparison.against(runs, "convv")


def test_rows_say_which_run_they_are_of(tmp_path: Path) -> None:
    one, other = finished(tmp_path / "a", ORIGINAL, CONV), finished(tmp_path / "b", ORIGINAL, CONV)
    tables, names = [one.table, replace(other.table, precision="int8")], ["a", "b"]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(texts.render(tables, 160, names))
    text = console.export_text()
    for words in ("a: net on photos → cpu, fp32", "b: net on photos → cpu, int8", "b: Original", "b: f./b.: "):
        assert words in text
    assert text.count("accuracy on 1000 test images") == 1, "what holds for both is said once"
    assert "| b: Original |" in texts.to_markdown(tables, names)
    assert [row["run"] for row in csv.DictReader(io.StringIO(texts.to_csv(tables, names)))] == ["a", "a", "b", "b"]


def test_figures_of_several_tasks_stand_under_their_names(cli: Callable[..., Any], tmp_path: Path) -> None:
    boxes = {"mAP@50": accuracy_interval(700, 1000), "mAP": accuracy_interval(400, 1000)}
    finished(tmp_path / "a", ORIGINAL, CONV)
    finished(tmp_path / "b", replace(ORIGINAL, figures=boxes), replace(CONV, figures=boxes))
    shown = cli("compare", tmp_path / "a", tmp_path / "b", "--format", "html")
    assert (shown.code, shown.err) == (0, "")
    parts = re.findall(r'<section class="papers">.*?</section>', shown.out, re.DOTALL)
    heads = [re.findall(r"<th>(.*?)</th>", part) for part in parts]
    rows = [re.findall(r"<tr><td>(.*?)</tr>", part, re.DOTALL)[0].split("</td><td>") for part in parts]
    one, other = (dict(zip(head, row, strict=True)) for head, row in zip(heads, rows, strict=True))
    assert [one[name] for name in ("top-1", "top-5", "mAP@50", "mAP", "#Param")] == [
        "90.00",
        "99.00",
        "–",
        "–",
        "0.01k",
    ]
    assert [other[name] for name in ("top-1", "top-5", "mAP@50", "mAP", "#Param")] == [
        "–",
        "–",
        "70.00",
        "40.00",
        "0.01k",
    ]


def test_an_invalid_time_is_compared_with_nothing(tmp_path: Path) -> None:
    hot = replace(CONV, engines={"ov": Time(4, 3.9, 4.1, invalid="the machine throttled")})
    (found,) = comparison.against([finished(tmp_path / "a", ORIGINAL, hot)], "original")[1]
    assert set(found.faster) == {"f./b."}


def test_an_invalid_time_is_not_shown_as_a_time() -> None:
    summary = {"median_ms": 4.0, "interval_ms": [3, 5], "invalid": ["the machine throttled: heat"], "warnings": []}
    hot = Time.of(summary, {"ratio": 2.0})
    assert (hot.speedup, hot.invalid) == (None, "the machine throttled: heat")
    row = replace(CONV, engines={"ov": hot}, forward=hot, backward=hot)
    table = Table("cpu", "net", "photos", 1000, "m", "CPU", 1, 2, 32, ("ov",), (row,), (), ships="conv")
    assert texts.cells(row, ["top-1", "top-5"], ["ov"])[5:7] == ["invalid", "invalid"]
    console = Console(file=io.StringIO(), width=160)
    console.print(texts.render([table], 160))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "█" not in text
    assert "Thin on ov: invalid because the machine throttled: heat; measure again." in text
    assert html_plots.accuracy_plot(table) == ""
    assert Table.from_json(json.loads(json.dumps(table.to_json()))) == table
    (line,) = csv.DictReader(io.StringIO(texts.to_csv([table])))
    assert {line[name] for name in ("forward_ms", "backward_ms", "ov_ms", "ov_speedup")} == {""}


def test_an_unstable_time_is_named_under_the_table() -> None:
    shaky = Time.of(
        {"median_ms": 4.0, "interval_ms": [3, 5], "invalid": [], "warnings": ["unstable because busy"]}, None
    )
    rows = (ORIGINAL, replace(CONV, engines={"ov": shaky}, forward=shaky, backward=shaky), LONGER)
    table = Table("cpu", "net", "photos", 1000, "m", "CPU", 1, 2, 32, ("ov",), rows, (), ships="conv")
    (note,) = (note for note in texts.notes_of(table) if "Unstable" in note)
    assert note.endswith("than the intervals say: Thin on torch; Thin on ov.")
    calm = replace(table, rows=(ORIGINAL, CONV, LONGER))
    assert not any("Unstable" in note for note in texts.notes_of(calm))


def test_across_machines_no_interval_is_claimed(tmp_path: Path) -> None:
    a, b = (finished(tmp_path / name, ORIGINAL, CONV) for name in "ab")
    there = replace(b, table=replace(b.table, machine="n"))
    found = by_row(comparison.against([a, there], "a/conv")[1])["b/Thin"].faster["ov"]
    assert (found.value, found.low, found.high, found.in_turn) == (1.0, None, None, False)


def test_a_machine_that_was_set_otherwise_is_said(cli: Callable[..., Any], tmp_path: Path) -> None:
    facts = {"cpu": {"governor": "performance", "turbo": True}, "packages": {"torch": "2", "ov": "1", "ncnn": "1"}}
    fast = setting_of(facts, ["ov"])
    assert fast == {"governor": "performance", "turbo": "on", "torch": "2", "ov": "1"}
    slow = setting_of({"cpu": {"governor": "powersave", "turbo": None}, "packages": {"torch": "2", "ov": "2"}}, ["ov"])
    for name, setting in (("a", fast), ("b", slow), ("c", fast)):
        run = finished(tmp_path / name, ORIGINAL, CONV)
        write_json(run.folder / "report" / "table.json", replace(run.table, setting=setting).to_json())
    notes = ("Measured with governor performance and powersave: times may differ", "Measured with ov 1 and 2: times")
    for output in ("table", "markdown", "html"):
        said = cli("compare", tmp_path / "a", tmp_path / "b", "--format", output).out
        assert all(note in said for note in notes)
        assert "turbo" not in said
        assert "Measured with" not in cli("compare", tmp_path / "a", tmp_path / "c", "--format", output).out
    finished(tmp_path / "d", ORIGINAL, CONV)
    assert "Measured with" not in cli("compare", tmp_path / "a", tmp_path / "d").out, "one of before does not say"


def test_newcombes_interval_is_the_published_one() -> None:
    # Newcombe 1998, table II, example (a): 56/70 - 48/80, method 10: 0.0524 to 0.3339.
    first, second = intervals.accuracy_interval(56, 70), intervals.accuracy_interval(48, 80)
    found = intervals.unpaired_difference(first, second)
    assert (found.value, found.low, found.high) == pytest.approx((20.0, 5.24, 33.39), abs=0.01)


def test_machines_are_not_mixed_unless_told_to(cli: Callable[..., Any], tmp_path: Path) -> None:
    a = finished(tmp_path / "a", ORIGINAL, CONV)
    other = replace(a.table, machine="n", processor="Another CPU")
    write_json(finished(tmp_path / "b", ORIGINAL, CONV).folder / "report" / "table.json", other.to_json())
    refused = cli("compare", tmp_path / "a", tmp_path / "b", "--baseline", "a")
    assert refused.code == 2
    assert "different machines" in refused.err
    assert cli("compare", tmp_path / "a", tmp_path / "b", "--baseline", "a", "--across-machines").code == 0
    check_machines([a.table, a.table])


def test_samples_of_another_version_are_explained(cli: Callable[..., Any], tmp_path: Path) -> None:
    run = finished(tmp_path / "a", ORIGINAL, CONV).folder
    write_json(run / "latency" / "latency.json", {"engines": [{"model": "conv", "runtime": "ov"}]})
    wrong = cli("compare", run, "--format", "html")
    assert wrong.code == 2
    assert "a file that is damaged, or of another version: 'samples'" in wrong.err
    assert cli("compare", run, "--baseline", "original").code == 0, "the table alone still compares"


@pytest.mark.parametrize("text", ["[]", '{"rows": [], "ledger": [], "runtimes": []}'])
def test_a_table_that_is_none_is_explained(cli: Callable[..., Any], tmp_path: Path, text: str) -> None:
    run = finished(tmp_path / "a", ORIGINAL, CONV).folder
    (run / "report" / "table.json").write_text(text)
    wrong = cli("compare", run)
    assert (wrong.code, "table.json is damaged, or of another version" in wrong.err) == (2, True)


def test_runs_of_one_name_are_told_apart(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """thinet-run is what --out is by default."""
    for name in ("a", "b"):
        finished(tmp_path / name / "thinet-run", ORIGINAL, CONV)
    monkeypatch.chdir(tmp_path / "a" / "thinet-run")
    for output in ("table", "markdown", "csv", "html"):
        told = cli("compare", ".", "../../b/thinet-run", "--format", output)
        assert told.code == 0, told.err
        assert "a/thinet-run" in told.out
        assert "b/thinet-run" in told.out
    assert "Against b/thinet-run/conv" in cli("compare", ".", "../../b/thinet-run", "--baseline", "b/thinet-run").out
    ambiguous = cli("compare", ".", "../../b/thinet-run", "--baseline", "thinet-run")
    assert (ambiguous.code, "a/thinet-run" in ambiguous.err) == (2, True)
    assert cli("compare", ".", "../thinet-run").code == 0, "one run twice"


@pytest.mark.parametrize("output", ["table", "markdown", "html"])
def test_a_terminal_of_another_encoding_gets_it_all_the_same(tmp_path: Path, output: str) -> None:
    run = finished(tmp_path / "a", ORIGINAL, CONV).folder
    command = [sys.executable, "-m", "thinet_deploy", "compare", str(run), "--baseline", "original", "--format", output]
    told = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"}, check=False)
    assert told.returncode == 0, told.stderr.decode("cp1252")
    if output != "table":
        assert "≈" in told.stdout.decode()


def test_every_format_has_the_comparison(cli: Callable[..., Any], tmp_path: Path) -> None:
    run = finished(tmp_path / "a", ORIGINAL, CONV, LONGER).folder
    for form in ("table", "markdown", "html"):
        shown = cli("compare", run, "--baseline", "original", "--format", form)
        assert (shown.code, shown.err) == (0, "")
        assert "Against a/original" in shown.out
        assert "≈" in shown.out
    rows = list(csv.DictReader(io.StringIO(cli("compare", run, "--baseline", "original", "--format", "csv").out)))
    thin = next(row for row in rows if (row["model"], row["figure"]) == ("Thin", "ov_times_faster"))
    assert (float(thin["value"]), thin["within_noise"], thin["in_turn"]) == (2.0, "False", "True")
    document = json.loads(cli("compare", run, "--baseline", "original", "--json").out)
    assert document["baseline"] == "a/original"
    assert {row["row"] for row in document["against"]} == {"Thin", "More epochs"}
    wrong = cli("compare", run, "--baseline", "gone")
    assert wrong.code == 2
    assert "no row or run to compare with called 'gone'" in wrong.err
