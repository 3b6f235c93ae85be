"""Layers with too many inputs for their moments, against brute force on what every channel says."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Net, conv
from torch import nn
from torch.nn import functional as F

from thinet_deploy.data.dataset import ImageSet
from thinet_deploy.data.preprocess import Augment, Preprocess
from thinet_deploy.pruning import wide as wide_module
from thinet_deploy.pruning.by_channel import ChannelSums, centred_by_channel, saying_by_channel
from thinet_deploy.pruning.calibration import Sample
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.elimination import Part, eliminate
from thinet_deploy.pruning.graph import ChannelGraph
from thinet_deploy.pruning.moments import Moments
from thinet_deploy.pruning.oneshot import Method, prune_once
from thinet_deploy.pruning.reconstruction import Ridge, Solver
from thinet_deploy.pruning.retrace import settled_plan
from thinet_deploy.pruning.surgery import apply
from thinet_deploy.pruning.trace import example_inputs
from thinet_deploy.pruning.wide import within_reach

CHANNELS, SIZE, FILTERS, ROWS = 5, 3, 4, 60


@dataclass(frozen=True)
class Problem:
    """Rows of a linear layer, what its channels say (rows, filters, channels), and other targets."""

    weight_cso: torch.Tensor
    inputs: torch.Tensor
    said: torch.Tensor
    targets: torch.Tensor

    def moments(self, targets: torch.Tensor, steps: list[int]) -> Moments:
        """Gathered in batches that begin at `steps`."""
        sums = ChannelSums(self.weight_cso)
        parts = (each.tensor_split(steps) for each in (self.inputs[:, None], targets))
        for some, wanted in zip(*parts, strict=True):
            sums.add(some, wanted)
        return sums.moments()


def problem(seed: int) -> Problem:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(FILTERS, CHANNELS, SIZE, generator=rng)
    mix = torch.randn(CHANNELS * SIZE, CHANNELS * SIZE, generator=rng)
    inputs = torch.randn(ROWS, CHANNELS * SIZE, generator=rng) @ mix + 2
    said = torch.einsum("ncs,ocs->noc", inputs.view(ROWS, CHANNELS, SIZE), weight)
    targets = said.sum(2) + torch.randn(ROWS, FILTERS, generator=rng)
    return Problem(weight.permute(1, 2, 0), inputs, said, targets)


def least_squares(case: Problem, kept: list[int]) -> tuple[float, torch.Tensor]:
    """Error per row and factors of the best t ≈ b_o + Σ_c α_c y_oc over some channels, on the rows themselves."""
    design = (case.said - case.said.mean(0))[:, :, kept].flatten(0, 1).double()
    wanted = (case.targets - case.targets.mean(0)).flatten().double()
    factors = torch.linalg.lstsq(design, wanted[:, None]).solution[:, 0]
    return float((wanted - design @ factors).square().sum()) / ROWS, factors


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, ROWS), max_size=4).map(sorted))
def test_moments_are_those_of_what_the_channels_say(seed: int, steps: list[int]) -> None:
    case = problem(seed)
    moments = case.moments(case.targets, steps)
    assert moments.count == ROWS
    said = case.said.double()
    assert torch.allclose(moments.squares[0], torch.einsum("noc,nod->cd", said, said), rtol=1e-4, atol=1e-2)
    assert torch.allclose(
        moments.cross[0, 0].float(), torch.einsum("no,noc->c", case.targets, case.said), rtol=1e-3, atol=1e-1
    )
    own = saying_by_channel(moments, case.weight_cso, torch.ones(1, FILTERS, dtype=torch.float64))
    expected = case.moments(case.said.sum(2) + 1, steps)
    assert torch.allclose(own.cross, expected.cross, rtol=1e-4, atol=1e-1)
    assert torch.allclose(own.targets, expected.targets, rtol=1e-4, atol=1e-2)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sets(st.integers(0, CHANNELS - 1), min_size=1))
def test_factors_are_those_of_least_squares_with_a_bias_for_every_output(seed: int, chosen: set[int]) -> None:
    case, kept = problem(seed), sorted(chosen)
    stats = centred_by_channel(case.moments(case.targets, [7]), case.weight_cso, intercept=True)
    mask = torch.zeros(1, CHANNELS, dtype=torch.bool)
    mask[0, kept] = True
    found = Solver(stats.covariance, mask, 1e-9)(stats.cross, torch.ones(1, 1, CHANNELS, dtype=torch.float64))
    assert torch.allclose(found[0, 0, kept], least_squares(case, kept)[1], rtol=1e-3, atol=1e-3)


def test_elimination_takes_the_channel_whose_loss_the_others_make_up_for_best() -> None:
    for seed in range(5):
        case = problem(seed)
        own = Problem(case.weight_cso, case.inputs, case.said, case.said.sum(2))
        stats = centred_by_channel(own.moments(own.targets, []), own.weight_cso, intercept=True)
        ones = torch.ones(1, CHANNELS, 1, dtype=torch.float64)
        part = Part(torch.arange(CHANNELS), ones, Ridge(stats.covariance[0], 1e-9).inverse())
        removal = eliminate([part], np.zeros(CHANNELS, dtype=np.int64), CHANNELS, 1)
        left = list(range(CHANNELS))
        for step, gone in enumerate(removal.order):
            errors = {each: least_squares(own, [c for c in left if c != each])[0] for each in left}
            assert errors[gone] == pytest.approx(min(errors.values()), rel=1e-3)
            assert removal.error[step + 1] == pytest.approx(errors[gone], rel=1e-3)
            left.remove(gone)


class Flat(nn.Module):
    """A map of 6×4×4 flattened for a linear layer, channel by channel or pixel by pixel."""

    def __init__(self, *, by_pixel: bool = False, norm: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.by_pixel = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, padding=1), by_pixel
        self.hidden = nn.Linear(96, 8, bias=not norm)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        x = x.permute(0, 2, 3, 1) if self.by_pixel else x
        return self.head(torch.relu(self.norm(self.hidden(x.flatten(1)))))  # type: ignore[no-any-return]


SHAPE = (3, 4, 4)
PIXELS = np.random.default_rng(3).integers(0, 256, (64, 4, 4, 3), dtype=np.uint8)
IMAGES = ImageSet(
    np.arange(64) % 3, lambda indices: PIXELS[indices], Preprocess(resize=(4, 4), crop=(4, 4), augment=Augment())
)


def graph_of(model: nn.Module) -> ChannelGraph:
    return channel_graph(model, example_inputs(model, SHAPE))


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_module, "MOST_INPUTS", 50)


def test_only_what_lies_channel_by_channel_is_within_reach() -> None:
    assert "hidden.weight" in within_reach(graph_of(Flat().eval()))
    assert "hidden.weight" not in within_reach(graph_of(Flat(by_pixel=True).eval()))


def test_what_has_no_images_in_front_or_two_kinds_of_use_is_out_of_reach() -> None:
    """Windows of a map beside the images; a convolution and its transpose with one weight."""
    parts = {"a": conv(3, 4), "b": conv(4, 4), "c": conv(4, 4, bias=False), "d": conv(4, 3)}

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(m.a(x))
        windows = x.view(len(x), 4, 2, 2, 4).movedim(2, 0).flatten(0, 1)
        x = m.b(windows).view(2, len(x), 4, 2, 4).movedim(0, 2).flatten(2, 3)
        return m.d(torch.relu(F.conv_transpose2d(torch.relu(m.c(x)), m.c.weight, padding=1)))  # type: ignore[no-any-return]

    assert within_reach(graph_of(Net(forward, **parts).eval())) == {"a.weight", "d.weight"}


@pytest.mark.parametrize("norm", [False, True])
def test_copies_of_channels_go_without_a_trace(norm: bool) -> None:
    torch.manual_seed(0)
    model = Flat(norm=norm).eval()
    with torch.no_grad():
        hidden = model.hidden.weight.view(8, 6, 16)
        for first, second in ((0, 3), (1, 4), (2, 5)):
            model.b.weight[second], model.b.bias[second] = model.b.weight[first], model.b.bias[first]  # type: ignore[index]
            hidden[:, second] = hidden[:, first] * 0.5  # so that one factor makes up for the other's loss
    graph, inputs = graph_of(model), torch.from_numpy(IMAGES.inputs(np.arange(64)))
    group = graph.group("b")
    sample = Sample(IMAGES, np.arange(64), 16, 0)
    done = prune_once(model, graph, (group,), lambda _: {"b": 3}, sample, SHAPE, Method(ridge=1e-9))
    thin = apply(settled_plan(model, graph, done.kept, example_inputs(model, SHAPE)), done.model)
    assert sorted(np.flatnonzero(done.kept[group.channels]) % 3) == [0, 1, 2]
    with torch.inference_mode():
        assert torch.allclose(thin(inputs), model(inputs), atol=1e-3)


@pytest.mark.parametrize("targets", ["symmetric", "residual"])
@pytest.mark.parametrize("selection", ["elimination", "thinet", "thinet-omp"])
def test_what_is_lost_is_repaired(selection: str, targets: str) -> None:
    torch.manual_seed(1)
    model = Flat().eval()
    graph, inputs = graph_of(model), torch.from_numpy(IMAGES.inputs(np.arange(64)))
    errors = {}
    for kind in ("full", "none"):
        method = Method(selection, kind, targets)  # type: ignore[arg-type]
        sample = Sample(IMAGES, np.arange(64), 16, 0)
        done = prune_once(model, graph, (graph.group("b"),), lambda _: {"b": 4}, sample, SHAPE, method)
        with torch.inference_mode():
            errors[kind] = float((done.model(inputs) - model(inputs)).square().mean())
    assert errors["full"] < 0.8 * errors["none"]
