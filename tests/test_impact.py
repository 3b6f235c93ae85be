"""What a group's error costs at the outputs: exact where nothing follows, and nothing of the trial stays."""

from typing import Any

import numpy as np
import pytest
import torch
from small_networks import NETWORKS, SHAPE, Plain, graph_of, network, sample
from torch import nn
from torch.nn import functional as F

from thinet_deploy.pruning import impact
from thinet_deploy.pruning.impact import impacts
from thinet_deploy.pruning.layerwise import prunable
from thinet_deploy.pruning.oneshot import Method, weigh
from thinet_deploy.pruning.trace import named_tensors
from thinet_deploy.pruning.wide import Wide


class Last(nn.Module):
    """A layer whose only reader is the last one."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.scale = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.conv(x)).mean((2, 3))) * self.scale  # type: ignore[no-any-return]


@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_in_front_of_the_last_layer_the_curve_is_the_share_of_the_outputs_that_is_lost(scale: float) -> None:
    model, images = Last(scale).eval(), sample(24)
    graph = graph_of(model)
    done = weigh(model, graph, (graph.group("conv"),), images, SHAPE, Method(ridge=1e-9))
    inputs = torch.from_numpy(images.images.inputs(images.chosen))
    with torch.inference_mode():
        read = F.relu(model.conv(inputs)).mean((2, 3)).double()
        said = model(inputs).double()
    stay = done.removals["conv"].order[6:]
    known = torch.cat([read[:, stay.copy()], torch.ones(len(read), 1)], 1)
    rest = said - known @ torch.linalg.lstsq(known, said).solution
    lost = float(rest.square().sum() / (said - said.mean(0)).square().sum())
    # The trial sees eight images of those that the refit saw.
    assert done.curves["conv"].at(2) == pytest.approx(lost, rel=0.5)
    assert done.curves["conv"].at(8) == 0


def test_what_the_trial_holds_does_not_grow_with_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    run = impact._Trial._run

    def counted(trial: impact._Trial, values: Any, count: int) -> list[torch.Tensor]:
        seen.append(count)
        return run(trial, values, count)

    monkeypatch.setattr(impact._Trial, "_run", counted)
    monkeypatch.setattr(impact, "BETWEEN", 0)
    model, images = Last(1).eval(), sample(100)
    graph = graph_of(model)
    weigh(model, graph, (graph.group("conv"),), images, SHAPE, Method())
    assert sum(seen) == 2 * impact._FEWEST, "once for the outputs, once without the channels"


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_is_as_it_was_after_the_trials(name: str) -> None:
    model = network(name)
    graph = graph_of(model)
    wide = weigh(model, graph, prunable(graph), sample(), SHAPE, Method()).wide
    for (tensor, one), (_, two) in zip(named_tensors(wide.model), named_tensors(model), strict=True):
        assert torch.equal(one, two), tensor
    assert all(bool(kept.all()) for kept in wide.kept.values())
    assert not wide.replay.read
    assert not wide.silent


def test_a_group_of_which_nothing_is_read_costs_nothing() -> None:
    model = Plain().eval()
    nn.init.zeros_(model.b.weight)  # reads nothing of what `a` says
    graph = graph_of(model)
    done = weigh(model, graph, prunable(graph), sample(), SHAPE, Method())
    assert not done.curves["a"].error.any()
    costs = impacts(Wide.of(model, graph, SHAPE, 16), sample(), prunable(graph), done.moments, done.removals, 1e-3)
    assert "a" not in costs
    assert np.isfinite(list(costs.values())).all()
