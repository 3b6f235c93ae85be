"""The HTML report: whole in one file, and in a real browser without a word of complaint, in light and dark."""

import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from thinet_deploy.intervals import Interval
from thinet_deploy.pipeline import build
from thinet_deploy.reports import html as html_report
from thinet_deploy.reports import html_plots
from thinet_deploy.reports.html import Page
from thinet_deploy.reports.table import Table
from thinet_deploy.stages.deployment import Build
from thinet_deploy.timing.layer_times import OTHERS

pytestmark = pytest.mark.usefixtures("quick_module")
SECTIONS = ("contract", "papers", "accuracy", "widths", "layers", "latency", "parity", "ledger", "environment")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")


@pytest.fixture(scope="module")
def built(tiny_options: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A whole build with a contract, of which one line is broken."""
    out = tmp_path_factory.mktemp("html") / "run <&>"
    return build(tiny_options(out, target="cpu", require=("top1>=1", "size<=1kB")))


@pytest.fixture(scope="module")
def page(built: Build) -> str:
    return (built.run / "report" / "report.html").read_text(encoding="utf-8")


def test_a_build_leaves_a_report_and_a_contract(built: Build, page: str) -> None:
    assert [verdict.outcome for verdict in built.verdicts] == ["met", "not met"]
    assert {path.name for path in (built.run / "contract").iterdir()} == {"contract.json", "junit.xml", "summary.md"}
    for section in SECTIONS:
        assert f'<section class="{section}">' in page
    for row in built.table.rows:
        assert html.escape(row.label) in page
        assert (row.drop is None) == (row.name in {"original", "longer", "scratch"}), "paired, image by image"
    assert built.table.shipped.name == "gap"
    assert page.count(">passed<") == len(built.hops)


def test_it_needs_no_other_file(page: str) -> None:
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert "@import" not in page
    assert "<script" not in page
    assert not re.findall(r"url\((?!#)", page)


def test_pictures_follow_the_pages_colours(built: Build) -> None:
    engines = html_report._json(built.run / "latency" / "latency.json")["engines"]
    for picture in (html_plots.accuracy_plot(built.table), html_plots.latency_plot(built.table, engines)):
        ET.fromstring(picture)
        assert "#ab00" not in picture, "every colour of ours has become a variable"
        colours = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", picture))
        assert not colours, colours
        assert "var(--network-0)" in picture
        assert picture == picture.strip() + "\n" or picture.startswith("<svg")


def test_the_same_run_gives_the_same_page(built: Build, page: str) -> None:
    assert html_report.render([Page(built.run, built.table, built.verdicts)]) == page


def test_a_run_without_engines_or_with_lost_files_leaves_sections_out(built: Build, tmp_path: Path) -> None:
    text = html_report.render([Page(tmp_path, built.table)])
    for section in ("contract", "widths", "layers", "latency", "parity", "environment"):
        assert f'<section class="{section}">' not in text
    assert '<section class="papers">' in text


def test_figures_at_the_top_say_that_they_are_unstable_and_nothing_has_no_sign(built: Build) -> None:
    ship = built.table.shipped
    times = {name: replace(time, unstable=True) for name, time in ship.engines.items()}
    row = replace(ship, drop=Interval(0.0, -0.004, 1.5), engines=times)
    table = replace(built.table, rows=tuple(row if each is ship else each for each in built.table.rows))
    notes = {card["what"]: card["note"] for card in html_report._cards(table)}
    assert notes["top-1"].startswith("+0.00 points [-1.50, +0.00] against the original")
    assert all("; unstable, measure again" in notes[runtime] for runtime in times)


def test_a_budget_of_time_is_shown_with_what_was_tried_for_it(built: Build, tmp_path: Path) -> None:
    shutil.copytree(built.run, tmp_path / "run")
    path = next((tmp_path / "run").glob("prune*/report.json"))
    whole: dict[str, Any] = {"ms": 8.0, "original_ms": 8.0, "speedup": 1.0, "low": None, "high": None, "warnings": []}
    first = {**whole, "predicted_ms": 8.0}
    best = {**whole, "predicted_ms": 3.9, "ms": 4.0, "speedup": 2.0, "low": 1.9, "high": 2.1, "warnings": ["busy"]}
    where = {"runtime": "openvino", "threads": 1, "precision": "int8", "factor": 1.0, "doubts": ["old"]}
    timing = {"latency": None, "speedup": "2x", **where, "trials": [first, best], "best": best}
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "timing": timing}), encoding="utf-8")
    text = html_report.render([Page(tmp_path / "run", built.table)])
    assert "Budget of time: 2x faster" in text
    assert "On openvino in int8, threads: 1." in text
    assert '<tr class="ships"><td>trial 1</td><td>3.9</td><td>4</td><td>8</td><td>2 [1.9, 2.1]</td>' in text
    assert ">busy<" in text
    assert ">old<" in text
    assert "Budget of time" not in html_report.render([Page(built.run, built.table)])


def test_layers_have_times_in_both_networks(built: Build, page: str) -> None:
    found = json.loads((built.run / "latency" / "layers.json").read_text(encoding="utf-8"))
    assert found.keys() == {"openvino", "onnxruntime"}
    for networks in found.values():
        assert {"original", "gap"} <= networks.keys()
        for name, layers in networks.items():
            assert all(ms > 0 for ms in layers.values())
            convolutions = {layer for layer in layers if layer.startswith("features.")}
            assert convolutions == {"features.0", "features.2", "features.5"}, name
            assert layers.keys() - convolutions, "what is not a convolution takes time too"
    assert page.count('<section class="layers">') == 2


def layer_rows(page: str) -> list[list[str]]:
    """Of the times of layers: name, both networks' milliseconds, ratio; runtime after runtime."""
    sections = re.findall(r'<section class="layers">.*?</section>', page, re.DOTALL)
    rows = [row for section in sections for row in re.findall(r"<tr><td>.*?</tr>", section, re.DOTALL)]
    return [re.findall(r"<td>(.*?)</td>", row) for row in rows]


def test_layers_of_a_new_head_are_none_of_the_originals(built: Build, page: str) -> None:
    """Both heads have a classifier.0: 512 → 256 in the original, the output layer in ThiNet-GAP."""
    rows = layer_rows(page)
    heads = [(name, dense == "–", thin == "–", ratio) for name, dense, thin, ratio in rows if "classifier" in name]
    old = [("classifier.0", False, True, "–"), ("classifier.3", False, True, "–")]
    assert heads == 2 * [*old, ("classifier.0, new head", True, False, "–")]
    assert [rows[number][0] for number in (len(rows) // 2 - 1, -1)] == 2 * [OTHERS], "what is no layer's comes last"
    conv = layer_rows(html_report.render([Page(built.run, replace(built.table, ships="conv"))]))
    assert "classifier.0" in {name for name, *_ in conv}
    assert not any("new head" in name or "–" in cells for name, *cells in conv), "it kept its head"


def test_a_new_head_is_known_after_a_transfer_too(built: Build, tmp_path: Path) -> None:
    run = Path(shutil.copytree(built.run, tmp_path / "run"))
    (run / "gap").rename(run / "thin-there")
    layers = run / "latency" / "layers.json"
    layers.write_text(layers.read_text(encoding="utf-8").replace('"gap"', '"transferred"'), encoding="utf-8")
    rows = tuple(replace(row, name="transferred") if row.name == "gap" else row for row in built.table.rows)
    page = html_report.render([Page(run, replace(built.table, rows=rows, ships="transferred"))])
    assert "classifier.0, new head" in {name for name, *_ in layer_rows(page)}


def marks(picture: str, table: Table, name: str) -> dict[str, str]:
    """Of a network's marks and caps, where across the picture each stands, and its shape."""
    shapes = dict(re.findall(r'<path id="(m[0-9a-f]+)" d="([^"]*)"', picture))
    ink = re.escape(f"var(--network-{html_plots.colour(table, name)})")
    return {x: shapes[shape] for shape, x in re.findall(rf'<use xlink:href="#(\w+)" x="([0-9.]+)"[^>]*{ink}', picture)}


@pytest.mark.parametrize(("control", "like"), [("longer", "original"), ("scratch", "gap")])
def test_a_control_stands_at_the_time_of_its_architecture(built: Build, control: str, like: str) -> None:
    picture = html_plots.accuracy_plot(built.table)
    one, other = (marks(picture, built.table, name) for name in (control, like))
    assert len(one) == 2, "on two runtimes"
    for x, shape in one.items():
        assert x in other
        assert shape not in other.values(), "or one would hide the other where their accuracies are alike"


def browse(file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr")
    command = [BROWSER, *quiet, f"--user-data-dir={file.parent / 'profile'}", *options, file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@needs_browser
def test_chromium_shows_it_without_complaint(built: Build, page: str, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    done = browse(file, "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr
    assert done.stdout.count("<table") == 8, "contract, papers, widths, layers on two runtimes, latency, parity, ledger"
    assert done.stdout.count("<svg") == 2
    assert "ERR_" not in done.stderr


@pytest.mark.slow
@needs_browser
def test_chromium_shows_the_demo_without_complaint(tmp_path: Path) -> None:
    """The run of `make demo`, undisturbed by what makes the builds of tests quick."""
    makefile = Path(__file__).parents[1].joinpath("Makefile").read_text(encoding="utf-8")
    (options,) = re.findall(r"thinet-deploy (build .*) --out runs/demo", makefile)
    command = [sys.executable, "-m", "thinet_deploy", *options.split(), "--out", str(tmp_path / "run")]
    subprocess.run(command, check=True, capture_output=True, timeout=3600)
    done = browse(tmp_path / "run" / "report" / "report.html", "--dump-dom", f"--screenshot={tmp_path / 'demo.png'}")
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "ERR_" not in done.stderr
    for section in SECTIONS[1:]:  # it has no contract
        assert f'<section class="{section}">' in done.stdout
    assert done.stdout.count("<svg") == 2
    assert "Train from scratch" in done.stdout


@needs_browser
def test_light_and_dark_are_both_there_and_legible(page: str, tmp_path: Path) -> None:
    from PIL import Image

    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    grounds = {}
    for scheme, options in (("light", ()), ("dark", ("--force-dark-mode",))):
        shot = tmp_path / f"{scheme}.png"
        browse(file, *options, "--window-size=1240,3600", f"--screenshot={shot}")
        with Image.open(shot) as image:
            grey = image.convert("L")
            histogram = grey.histogram()
            grounds[scheme] = max(range(256), key=histogram.__getitem__)
            ink = sum(histogram[:128]) if grounds[scheme] > 128 else sum(histogram[128:])
            assert 0.005 < ink / sum(histogram) < 0.3, "text and lines stand out from the ground"
    assert grounds["light"] > 230
    assert grounds["dark"] < 60


def test_a_complaint_of_chromium_would_be_seen(tmp_path: Path) -> None:
    """The test above is not blind."""
    if BROWSER is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    (tmp_path / "bad.html").write_text("<script>nowhere()</script><img src='gone.png'>")
    assert "CONSOLE" in browse(tmp_path / "bad.html", "--dump-dom").stderr


def test_prunings_of_an_earlier_build_in_the_folder_are_left_out(built: Build, tmp_path: Path) -> None:
    run = Path(shutil.copytree(built.run, tmp_path / built.run.name))
    for name in ("prune-thinet", "prune-there"):
        shutil.copytree(run / "prune", run / name)
    assert html_report.render([Page(run, built.table)]) == html_report.render([Page(built.run, built.table)])
