"""What a budget counts: what ships, with the head that it gets; and which grid leaves room to choose widths."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import nn

from thinet_deploy.artifact import read_json
from thinet_deploy.errors import InputError
from thinet_deploy.options import Options
from thinet_deploy.pipeline import prune
from thinet_deploy.pruning.budget import Wish, cost, softened, some
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.plan import load_plan
from thinet_deploy.pruning.trace import example_inputs, named_tensors

MakeOptions = Callable[..., Options]
BUDGET_BYTES = 3000


def size_of(weights: Path) -> int:
    """By the papers' rule."""
    tensors = load_file(weights)
    return sum(4 * tensor.numel() for name, tensor in tensors.items() if name.endswith(".weight"))


def test_a_budget_is_of_the_network_with_its_new_head(tiny_options: MakeOptions, tmp_path: Path) -> None:
    """The fully connected head has 1680 bytes, the new one 96; 2304 are in a layer that stays."""
    asked = {"epochs": 1, "size": f"{BUDGET_BYTES / 2**20:.9f}MB", "round_to": 1}
    folder = prune(tiny_options(tmp_path / "run", **asked))
    assert load_plan(folder / "plan.json").head is not None
    assert BUDGET_BYTES - 400 < size_of(folder / "model.safetensors") <= BUDGET_BYTES
    with pytest.raises(InputError, match="asks for no less than the original has with its new head"):
        prune(tiny_options(tmp_path / "run", epochs=1, size="0.0055MB"))


def test_ignored_layers_make_no_others_the_last_ones(tiny_options: MakeOptions, tmp_path: Path) -> None:
    widths = [
        load_plan(prune(tiny_options(tmp_path / name, epochs=1, round_to=1, ignore=ignore)) / "plan.json").widths
        for name, ignore in (("all", ()), ("ignored", ("features.5",)))
    ]
    assert widths[0] == widths[1] != {}
    whole = read_json(tmp_path / "ignored" / "thin" / "report.json")["whole"]
    assert whole["features.5"] == "it was asked to stay (--ignore)"


def test_what_cannot_go_takes_nothing_of_the_grid() -> None:
    convs = (nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())
    model = nn.Sequential(*convs, nn.Flatten(), nn.Linear(32 * 64, 64), nn.ReLU(), nn.Linear(64, 5)).eval()
    graph, tensors = channel_graph(model, example_inputs(model, (3, 8, 8))), dict(named_tensors(model))
    first = [group for group in graph.groups if group.name == "0"]

    def bytes_at(width: int) -> int:
        return cost(tensors, graph, some(graph, first, {"0": width})).size

    wish = Wish(size=bytes_at(20), grid=8, soft=True)
    assert bytes_at(1) > bytes_at(20) / 2, "the head is most of it"
    assert softened(tensors, graph, first, wish).grid == 8
    assert softened(tensors, graph, first, Wish(size=bytes_at(10), grid=8, soft=True)).grid == 4
