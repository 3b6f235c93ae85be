"""Budgets: uniform widths that meet what was asked, on a grid too, and never skip a layer silently."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from thinet_deploy import prune
from thinet_deploy.artifact import read_json
from thinet_deploy.counting import count
from thinet_deploy.errors import GateError, InputError, UnknownNameError
from thinet_deploy.options import Options, make_options, parse_layer
from thinet_deploy.pruning.budget import Wish, choose_widths, cost, possible, some, uniform
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.graph import ChannelGraph
from thinet_deploy.pruning.plan import load_plan
from thinet_deploy.pruning.retrace import settled_plan
from thinet_deploy.pruning.surgery import apply
from thinet_deploy.pruning.trace import example_inputs, named_tensors

MakeOptions = Callable[..., Options]
SHAPE = (3, 8, 8)


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 64, 3, padding=1, bias=False), nn.ReLU()),
        *(nn.Conv2d(64, 32, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(32, 20, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 5)),
    )


MODEL = network().eval()
INPUTS = example_inputs(MODEL, SHAPE)
GRAPH: ChannelGraph = channel_graph(MODEL, INPUTS)
TENSORS = dict(named_tensors(MODEL))
FULL = {group.name: len(group.channels) for group in GRAPH.groups}


def thin(widths: dict[str, int]) -> nn.Module:
    return apply(settled_plan(MODEL, GRAPH, some(GRAPH, GRAPH.groups, widths), INPUTS), MODEL)


def test_without_a_budget_widths_are_truncated_as_in_thinet() -> None:
    # 64 channels in front of four groups go by fours: 44 of 64 for 0.7, where others remove half.
    assert uniform(GRAPH.groups, 0.7, Wish()) == {"0": 8, "3": 44, "5": 20, "7": 14}


def test_a_grid_never_skips_a_layer_silently() -> None:
    widths = uniform(GRAPH.groups, 0.5, Wish(grid=8))
    assert widths == {"0": 8, "3": 32, "5": 16, "7": 8}
    assert possible(GRAPH.group("0"), 8) == [8, 12]  # 12 filters: eight of them, or all


@pytest.mark.parametrize("grid", [1, 4, 8, 16])
@pytest.mark.parametrize("factor", [1.5, 2, 3])
def test_a_budget_of_macs_is_met_on_every_grid(grid: int, factor: float) -> None:
    dense = count(MODEL, SHAPE).macs
    widths = choose_widths(TENSORS, GRAPH, GRAPH.groups, Wish(macs=dense / factor, grid=grid))
    macs = count(thin(widths), SHAPE).macs
    assert macs <= dense / factor
    assert all(width % grid == 0 or width == FULL[name] for name, width in widths.items())


def test_the_budget_is_used_up() -> None:
    dense = count(MODEL, SHAPE).macs
    widths = choose_widths(TENSORS, GRAPH, GRAPH.groups, Wish(macs=dense / 2))
    ratio = min(width / FULL[name] for name, width in widths.items())
    wider = uniform(GRAPH.groups, min(1.0, ratio + 0.15), Wish())
    assert count(thin(wider), SHAPE).macs > dense / 2


def test_a_budget_of_size_is_by_the_papers_rule() -> None:
    whole = count(MODEL, SHAPE).parameters * 4
    assert cost(TENSORS, GRAPH, np.ones(GRAPH.channels, dtype=bool)).size == whole
    widths = choose_widths(TENSORS, GRAPH, GRAPH.groups, Wish(size=whole / 2))
    assert count(thin(widths), SHAPE).parameters * 4 <= whole / 2


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=4, max_size=4))
def test_the_predicted_cost_is_the_cost(ratios: list[float]) -> None:
    widths = {
        group.name: uniform([group], ratio, Wish())[group.name]
        for group, ratio in zip(GRAPH.groups, ratios, strict=True)
    }
    predicted, counted = cost(TENSORS, GRAPH, some(GRAPH, GRAPH.groups, widths)), count(thin(widths), SHAPE)
    assert (predicted.macs, predicted.size) == (counted.macs, 4 * counted.parameters)


def test_a_layer_of_its_own_ratio() -> None:
    widths = uniform(GRAPH.groups, 0.5, Wish(layers={"7": 0.9, "nothing.*": 0.1}))
    assert widths == {"0": 6, "3": 32, "5": 16, "7": 18}


def test_a_budget_out_of_reach_says_what_can_be_reached() -> None:
    with pytest.raises(GateError, match="cannot be reached") as error:
        choose_widths(TENSORS, GRAPH, GRAPH.groups, Wish(macs=1.0))
    assert "narrowest" in error.value.what
    assert "--round-to" in error.value.hint


def test_ignored_layers_stay_whole() -> None:
    graph = channel_graph(MODEL, INPUTS, ignore=["3", "7"])
    assert [group.name for group in graph.groups] == ["0", "5"]
    assert "--ignore" in graph.whole["3"]


# ---------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("text", "expected"), [("2x", 500.0), ("2.5x", 400.0), ("3000", 3000.0), ("1.5k", 1500.0), ("3M", 3e6), ("1G", 1e9)]
)
def test_macs_in_words(text: str, expected: float) -> None:
    assert make_options({"macs": text}).most_macs(1000) == expected


def test_size_in_words() -> None:
    assert make_options({"size": "2.5MB"}).most_bytes == 2.5 * 2**20
    assert make_options({}).most_bytes is None


@pytest.mark.parametrize(
    "values", [{"macs": "half"}, {"size": "5"}, {"round_to": 0}, {"round_to": "targets"}, {"keep_layer": {"a": 0.0}}]
)
def test_what_is_no_budget(values: dict[str, Any]) -> None:
    with pytest.raises(InputError) as error:
        make_options(values)
    assert f"--{next(iter(values)).replace('_', '-')}" in error.value.what


def test_one_layers_ratio_in_words() -> None:
    assert parse_layer("layer4.*=0.7") == ("layer4.*", 0.7)
    for wrong in ("layer4", "layer4=", "=0.7x", "0.7"):
        with pytest.raises(InputError, match="PATTERN=R"):
            parse_layer(wrong)


def test_the_grid_of_the_target(tiny_options: MakeOptions, tmp_path: Path) -> None:
    assert make_options({"round_to": "8"}).round_to == 8
    folder = prune(tiny_options(tmp_path / "run", "residual", keep=0.5, round_to="target"))  # cpu: multiples of 16
    assert load_plan(folder / "plan.json").widths == {}  # layers of six filters stay whole
    assert set(read_json(folder / "report.json")["whole"]) >= {"blocks.0.conv1", "blocks.1.conv1"}


def test_no_such_option() -> None:
    with pytest.raises(UnknownNameError, match="round_to"):
        make_options({"round_tp": 8})


# ---------------------------------------------------------------------------------------------- a whole run


def test_a_run_with_a_budget_reports_its_macs(tiny_options: MakeOptions, tmp_path: Path) -> None:
    folder = prune(
        tiny_options(tmp_path / "run", "residual", recipe="iccv2017", macs="1.5x", prune_shortcuts=True, round_to=2)
    )
    report = read_json(folder / "report.json")
    assert report["macs"]["after"] <= report["macs"]["before"] / 1.5
    widths = load_plan(folder / "plan.json").widths
    assert "stem" in widths
    assert all(after % 2 == 0 for _, after in widths.values())
    program = torch.export.load(folder / "model.pt2")  # our own file
    assert program.module()(torch.zeros(3, 1, 8, 8)).shape[0] == 3
    assert str(tmp_path).encode() not in (folder / "model.pt2").read_bytes()
