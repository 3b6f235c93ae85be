"""What budgets would cost: predictions that fall in line, from curves that are kept; nothing is pruned."""

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import thinet_deploy.cli.app as commands
from thinet_deploy import pipeline
from thinet_deploy.artifact import read_json
from thinet_deploy.cli.scatter import scatter
from thinet_deploy.errors import GateError, InputError
from thinet_deploy.options import Options
from thinet_deploy.pruning.allocation import Costs, Curve, allocate
from thinet_deploy.pruning.budget import Cost, Wish, possible
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.sweep import sweep
from thinet_deploy.pruning.trace import named_tensors

MakeOptions = Callable[..., Options]
Made = Callable[[Callable[[], Any]], tuple[Any, list[str]]]
Cli = Callable[..., Any]
GOOD = ["--recipe", "best", "--data", "data", "--model", "net.py:tiny", "--epochs", "1", "--out", "run"]


def make() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 24), (24, 12)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)).eval()


# ---------------------------------------------------------------------------------------------- the sweep


@pytest.mark.parametrize("wish", [Wish(), Wish(grid=4), Wish(layers={"2": 0.5})])
def test_each_point_is_what_its_budget_alone_would_get(wish: Wish) -> None:
    model = make()
    graph = channel_graph(model, (torch.zeros(2, 3, 8, 8),))
    groups, random = graph.groups, np.random.default_rng(0)
    curves = {}
    for group in groups:
        widths = np.array(sorted(possible(group, 1), reverse=True))
        curves[group.name] = Curve(widths, np.concatenate([[0.0], random.random(len(widths) - 1).cumsum()]))
    costs = Costs(dict(named_tensors(model)), graph, groups)
    full = costs({group.name: len(group.channels) for group in groups})
    points = sweep(Cost(*map(int, full)), costs, groups, curves, wish)
    whole = points[0]
    assert (whole.budget, whole.error, whole.fewer) == ("original", 0, 1)
    assert len(points) > 5
    for each in points[1:-1]:
        factor = float(each.budget.removesuffix("x"))
        limited = Wish(macs=whole.macs / factor, grid=wish.grid, layers=wish.layers)
        assert each.widths == allocate(costs, groups, curves, limited), each.budget
        assert each.fewer >= factor
    assert [each.macs for each in points] == sorted((each.macs for each in points), reverse=True)
    with pytest.raises(GateError, match=f"narrowest widths {points[-1].macs / 1e6:.3g} of "):
        allocate(costs, groups, curves, Wish(macs=points[-1].macs - 1, grid=wish.grid, layers=wish.layers))


# ---------------------------------------------------------------------------------------------- the stages


def test_errors_grow_from_nothing_and_the_picture_stands_alone(tiny_options: MakeOptions, tmp_path: Path) -> None:
    folder = pipeline.feasibility(tiny_options(tmp_path / "run", recipe="best"))
    report = read_json(folder / "feasibility.json")
    errors = [each["error"] for each in report["points"]]
    assert errors[0] == 0
    assert errors == sorted(errors)
    assert errors[-1] > 0
    assert report["asked"] is None
    text = (folder / "feasibility.svg").read_text()
    assert ET.fromstring(text).tag.endswith("svg")
    assert 'href="http' not in text
    assert "<script" not in text
    assert not {path.name for path in (tmp_path / "run").iterdir()} & {"prune", "thin", "options.json"}


def test_another_budget_takes_neither_the_network_nor_the_images(
    tiny_options: MakeOptions, tmp_path: Path, made: Made
) -> None:
    def ask(**changes: Any) -> tuple[dict[str, Any], list[str]]:
        options = tiny_options(tmp_path / "run", recipe="best", **changes)
        return made(lambda: read_json(pipeline.feasibility(options) / "feasibility.json"))

    first, names = ask()
    assert names == ["dense", "curves", "feasibility"]
    second, names = ask(macs="1.5x")
    assert names == ["feasibility"]
    assert (second["asked"]["budget"], second["points"]) == ("MACs 1.5x", first["points"])
    picture = (tmp_path / "run" / "feasibility" / "feasibility.svg").read_bytes()
    assert ask(macs="1.5x")[1] == []
    third, names = ask(size="2.5kB", round_to=2)
    assert names == ["feasibility"]
    assert third["asked"]["size_bytes"] <= 2560
    assert all(width % 2 == 0 for width in third["asked"]["widths"].values())
    assert ask(macs="1.5x")[1] == ["feasibility"]
    assert (tmp_path / "run" / "feasibility" / "feasibility.svg").read_bytes() == picture, "the same to the byte"
    for changes in ({"calibration_images": 7}, {"ignore": ("*.0",)}):
        assert ask(**changes)[1] == ["curves", "feasibility"], changes
    other, names = ask(preset="thinet-conv")
    assert names == ["curves", "feasibility"]
    assert other["points"][0]["widths"].keys() > first["points"][0]["widths"].keys(), "without a new head more may go"


@pytest.mark.parametrize("budget", [{"macs": "1.5x"}, {"size": "2kB"}, {"keep": 0.6}])
def test_pruning_gives_the_widths_that_were_shown(
    budget: dict[str, Any], tiny_options: MakeOptions, tmp_path: Path
) -> None:
    options = tiny_options(tmp_path / "run", recipe="best", **budget)
    asked = read_json(pipeline.feasibility(options) / "feasibility.json")["asked"]
    pruned = read_json(pipeline.prune(options) / "report.json")
    assert {each["producer"]: each["after"] for each in pruned["layers"]}.items() <= asked["widths"].items()
    assert pruned["macs"]["after"] == asked["macs"]


def test_a_budget_out_of_reach_says_what_can_be_reached(tiny_options: MakeOptions, tmp_path: Path) -> None:
    report = read_json(pipeline.feasibility(tiny_options(tmp_path / "run", recipe="best")) / "feasibility.json")
    with pytest.raises(GateError, match="cannot be reached") as found:
        pipeline.feasibility(tiny_options(tmp_path / "run", recipe="best", macs="900x"))
    assert f"narrowest widths {report['points'][-1]['macs'] / 1e6:.3g} of " in found.value.what
    assert "--feasibility" in found.value.hint


@pytest.mark.parametrize(
    ("given", "named"),
    [({"recipe": "iccv2017"}, "--recipe iccv2017"), ({"recipe": "best", "method": "apoz"}, "--method apoz")],
)
def test_without_elimination_there_are_no_curves(
    given: dict[str, str], named: str, tiny_options: MakeOptions, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=named) as found:
        pipeline.feasibility(tiny_options(tmp_path / "run", **given))
    assert "Leave out" in found.value.hint
    assert not (tmp_path / "run").exists()


def test_only_the_images_that_are_needed_are_looked_at(cli: Cli, workplace: Path) -> None:
    assert cli("prune", *GOOD, "--feasibility").code == 0
    weights = workplace / "run" / "dense" / "model.safetensors"
    given = [*GOOD[:-1], "other", "--weights", weights, "--feasibility"]
    done = cli("prune", *given)
    assert (done.code, "Reading training images" in done.err) == (0, False), done.err
    again = cli("prune", *given, "--keep", "0.6")
    assert (again.code, "Reading training images" in again.err) == (0, False), again.err


# ---------------------------------------------------------------------------------------------- what is shown


def test_a_picture_of_characters() -> None:
    lines = scatter(
        [(10, 0.0), (5, 10.0), (2, 40.0)], [(5, 20.0)], [(10, "1x"), (5, "2x"), (5.2, "1.9x")], width=40, height=9
    )
    assert max(map(len, lines)) <= 40
    assert len(lines) == 11
    assert lines[0].startswith(" 40 % │")
    assert lines[8].startswith("  0 % │")
    assert "".join(lines).count("o") == 3
    assert lines[4].count("◆") == 1
    assert lines[-1].split() == ["2x", "1x"], "what has no room is left out"
    flat = scatter([(10, 0.0), (5, 0.0)], [], [], width=30, height=5)
    assert "".join(flat).count("o") == 2


@pytest.mark.parametrize("width", [80, 120])
def test_the_command(width: int, cli: Cli, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "stdout", lambda: Console(width=width))
    done = cli("prune", *GOOD, "--feasibility", "--macs", "1.5x")
    assert done.code == 0, done.err
    assert max(map(len, done.out.splitlines())) <= max(width, 100)
    for part in (
        "original",
        "narrowest",
        "MACs 1.5x ◆",
        "kept with MACs 1.5x",
        "Picture: run/feasibility/feasibility.svg",
    ):
        assert part in done.out
    document = json.loads(cli("prune", *GOOD, "--feasibility", "--macs", "1.5x", "--json").out)
    assert {"folder", "picture", "points", "asked", "images", "producers"} <= set(document)
    assert Path(document["picture"]).is_file()


def test_a_wrong_recipe_ends_as_a_message(cli: Cli, workplace: Path) -> None:
    done = cli("prune", *GOOD, "--recipe", "iccv2017", "--feasibility")
    assert done.code == 2
    assert "Error: --feasibility" in done.err
