"""Residual branches that vanish: what they add becomes their mean, and nothing else of the network changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from thinet_deploy import pipeline
from thinet_deploy.artifact import read_json
from thinet_deploy.counting import count
from thinet_deploy.data.dataset import UNLABELLED, ImageSet
from thinet_deploy.data.preprocess import Preprocess
from thinet_deploy.errors import InputError, ModelError
from thinet_deploy.export import OUTPUT, export_onnx, run_onnx
from thinet_deploy.models.resnet_cifar import resnet_cifar
from thinet_deploy.models.vanished import Constant
from thinet_deploy.models.weights import save_weights
from thinet_deploy.options import Options
from thinet_deploy.pruning.allocation import Costs, Curve, allocate
from thinet_deploy.pruning.budget import Widths, Wish, cost, may_vanish, possible, some
from thinet_deploy.pruning.calibration import Sample
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.graph import ChannelGraph
from thinet_deploy.pruning.oneshot import Method, prune_once
from thinet_deploy.pruning.plan import Plan, load_plan
from thinet_deploy.pruning.proof import prove, randomised
from thinet_deploy.pruning.retrace import settled_plan
from thinet_deploy.pruning.surgery import apply, load_thin
from thinet_deploy.pruning.trace import named_tensors

MakeOptions = Callable[..., Options]
SHAPE = (3, 8, 8)
INPUTS = (torch.zeros(2, *SHAPE),)


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Net(nn.Module):
    """A bottleneck, an inverted residual with a gate, a branch without BatchNorm, one that is added to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.an, self.b, self.bn = (
            nn.Conv2d(8, 6, 1),
            nn.BatchNorm2d(6),
            nn.Conv2d(6, 6, 3, 1, 1),
            nn.BatchNorm2d(6),
        )
        self.c, self.cn = nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.wide, self.deep, self.gate = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, 1, 1, groups=16), Gate(16)
        self.narrow, self.nn = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.d, self.e = nn.Conv2d(8, 10, 3, padding=1), nn.Conv2d(10, 8, 3, padding=1)
        self.f, self.g = nn.Conv2d(8, 10, 3, padding=1), nn.Conv2d(10, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.cn(self.c(torch.relu(self.bn(self.b(torch.relu_(self.an(self.a(x))))))))
        x = self.nn(self.narrow(self.gate(torch.relu(self.deep(nn.functional.silu(self.wide(x))))))) + x
        x = torch.relu(x + self.e(torch.relu(self.d(x))))
        out = self.g(torch.relu(self.f(x)))
        out += x
        return self.head(out.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return randomised(Net(), seed=1).eval()


@pytest.fixture(scope="module")
def graph(net: nn.Module) -> ChannelGraph:
    return channel_graph(net, INPUTS)


def without(graph: ChannelGraph, *ends: str) -> Widths:
    gone = {name for branch in graph.branches if branch.end in ends for name in branch.groups}
    return {group.name: 0 if group.name in gone else len(group.channels) for group in graph.groups}


def plan_of(net: nn.Module, graph: ChannelGraph, *ends: str) -> Plan:
    return settled_plan(net, graph, some(graph, graph.groups, without(graph, *ends)), INPUTS)


def test_branches_are_found_with_all_that_belongs_to_them(graph: ChannelGraph) -> None:
    found = {branch.end: (branch.norm, branch.inside, branch.groups) for branch in graph.branches}
    assert found == {
        "c": ("cn", ("a", "an", "b", "bn"), ("a", "b")),
        "narrow": ("nn", ("wide", "deep", "gate.down", "gate.up"), ("gate.down", "wide")),
        "e": ("", ("d",), ("d",)),
    }, "nothing can be added to a constant in place, so g stays"


class Two(nn.Module):
    """Two branches of one addition, and no shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x))) + self.d(torch.relu(self.c(x)))  # type: ignore[no-any-return]


def test_of_two_branches_that_are_added_one_can_vanish() -> None:
    """Without both there would be no map left, nor the number of images."""
    net = Two().eval()
    graph = channel_graph(net, INPUTS)
    assert [branch.end for branch in graph.branches] == ["b"]
    assert prove(net, graph, plan_of(net, graph, "b"), (torch.randn(3, *SHAPE),), seed=0).passed


def test_without_the_elimination_no_branch_can_vanish(tiny_options: MakeOptions, tmp_path: Path) -> None:
    for given in ({"recipe": "iccv2017"}, {"recipe": "best", "method": "elimination,thinet"}):
        with pytest.raises(InputError, match="--drop-branches asks the error curves"):
            pipeline.prune(tiny_options(tmp_path / "run", drop_branches=True, **given))


@pytest.mark.parametrize("ends", [("c",), ("narrow",), ("e",), ("c", "narrow", "e")])
def test_the_proof_holds_and_finds_a_wrong_constant(net: nn.Module, graph: ChannelGraph, ends: tuple[str, ...]) -> None:
    plan, images = plan_of(net, graph, *ends), torch.randn(3, *SHAPE)
    assert set(plan.vanished) == set(ends)
    proof = prove(net, graph, plan, (images,), seed=0)
    assert proof.passed, proof
    first = plan.vanished[ends[0]]
    wrong = first.model_copy(update={"norm": "nn" if first.norm == "cn" else "cn"})
    others = {**plan.vanished, ends[0]: wrong}
    assert not prove(net, graph, plan.model_copy(update={"vanished": others}), (images,), seed=0).passed


def test_a_branch_that_always_says_the_same_goes_without_a_trace(net: nn.Module, graph: ChannelGraph) -> None:
    constant = copy.deepcopy(net)
    with torch.no_grad():
        constant.c.weight.zero_()  # type: ignore[operator, union-attr]
        constant.e.weight.zero_()  # type: ignore[operator, union-attr]
    thin, images = apply(plan_of(net, graph, "c", "e"), constant), torch.randn(2, *SHAPE)
    with torch.inference_mode():
        torch.testing.assert_close(thin(images), constant(images))
    names = {name for name, module in thin.named_modules() if isinstance(module, Constant)}
    assert names == {"c", "e"}
    assert not any(name.startswith(("a.", "b.", "an.", "bn.", "cn.", "d.")) for name in thin.state_dict())


def test_it_costs_what_is_counted_and_trains(net: nn.Module, graph: ChannelGraph) -> None:
    kept = some(graph, graph.groups, without(graph, "c", "narrow", "e"))
    thin = apply(plan_of(net, graph, "c", "narrow", "e"), net)
    assert count(thin, SHAPE).macs == cost(dict(named_tensors(net)), graph, kept).macs
    thin.train()(torch.randn(2, *SHAPE)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in thin.parameters())


def test_it_is_exported_and_loaded(net: nn.Module, graph: ChannelGraph, tmp_path: Path) -> None:
    plan = plan_of(net, graph, "c", "narrow", "e")
    thin, images = apply(plan, net), torch.randn(2, *SHAPE)
    plan.save(tmp_path / "plan.json")
    save_weights(thin, tmp_path / "model.safetensors")
    again = load_thin(load_plan(tmp_path / "plan.json"), Net(), tmp_path / "model.safetensors")
    done = export_onnx(again, SHAPE, tmp_path / "thin.onnx", opset=18, ir_version=10)
    assert done.operators["Conv"] == 3, "the stem, f and g"
    with torch.inference_mode():
        expected = thin(images).numpy()
        np.testing.assert_array_equal(again(images).numpy(), expected)
    said = run_onnx(tmp_path / "thin.onnx", images.numpy())[OUTPUT]
    np.testing.assert_allclose(said, expected, rtol=1e-4, atol=1e-5)


def test_a_plan_that_names_no_branch_is_refused(net: nn.Module, graph: ChannelGraph) -> None:
    plan = plan_of(net, graph, "e")
    for name in ("nowhere", "head"):
        with pytest.raises(ModelError, match=f"damaged: {name} of the network ends no such branch"):
            apply(plan.model_copy(update={"vanished": {name: plan.vanished["e"]}}), net)


def noise(count: int) -> Sample:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    how = Preprocess(colour="RGB", mean=(0.5,) * 3, std=(0.25,) * 3, resize=(8, 8), crop=(8, 8))
    images = ImageSet(np.full(count, UNLABELLED), lambda indices: pixels[indices], how)
    return Sample(images, np.arange(count), 16, 0)


def test_what_vanishes_says_its_mean(net: nn.Module, graph: ChannelGraph) -> None:
    """In each channel, on the calibration images, what the branch said before it vanished."""
    said: list[torch.Tensor] = []
    hook = net.get_submodule("e").register_forward_hook(lambda _, __, output: said.append(output))
    sample = noise(64)
    with torch.inference_mode():
        net(sample.inputs(sample.chosen))
    hook.remove()
    done = prune_once(net, graph, graph.groups, lambda _: without(graph, "e"), sample, SHAPE, Method())
    thin = apply(settled_plan(net, graph, done.kept, INPUTS), done.model)
    # Behind a ReLU what counts is refitted; 64 positions are looked at, here all there are.
    refitted = thin.get_submodule("e").bias
    assert isinstance(refitted, torch.Tensor)
    symmetric = prune_once(
        net, graph, graph.groups, lambda _: without(graph, "e"), sample, SHAPE, Method(targets="symmetric")
    )
    mean = apply(settled_plan(net, graph, symmetric.kept, INPUTS), symmetric.model).get_submodule("e").bias
    assert isinstance(mean, torch.Tensor)
    torch.testing.assert_close(mean.detach(), said[0].mean((0, 2, 3)), rtol=0.05, atol=0.05)
    assert refitted.shape == mean.shape
    curve = done.curves["d"]
    assert curve.widths[-1] == 0
    assert curve.error[-1] >= curve.error[-2]


def curves_of(graph: ChannelGraph, cheap: str) -> dict[str, Curve]:
    """Every channel loses 1, but a branch that vanishes loses little."""
    made = {}
    ends = {branch.groups[-1]: branch.end for branch in graph.branches}
    for group in graph.groups:
        widths = [*sorted(possible(group, 1), reverse=True), *[0] * (group.name in ends)]
        error = np.array([float(len(group.channels) - width) for width in widths])
        if ends.get(group.name) == cheap:
            error[-1] = error[-2] = error[1:].min() / 10
            error[1:] = error[-1]
        made[group.name] = Curve(np.array(widths), error)
    return made


def test_a_branch_vanishes_where_that_loses_least(net: nn.Module, graph: ChannelGraph) -> None:
    costs, wish = Costs(dict(named_tensors(net)), graph, graph.groups), Wish()
    whole = costs({group.name: len(group.channels) for group in graph.groups})[0]
    gone = costs(without(graph, "c"))[0]
    assert 0 < gone < whole
    wish = Wish(macs=gone)
    free = may_vanish(graph, graph.groups, wish)
    widths = allocate(costs, graph.groups, curves_of(graph, "c"), wish, free)
    assert (widths["a"], widths["b"]) == (0, 0)
    assert costs(widths)[0] <= gone
    assert 0 not in allocate(costs, graph.groups, curves_of(graph, "c"), wish).values()
    asked = Wish(macs=gone, layers={"b": 0.5})
    assert "c" not in {branch.end for branch in may_vanish(graph, graph.groups, asked)}


def test_every_block_of_a_resnet_can_vanish() -> None:
    """Also the last before a shortcut that takes every other pixel: what it takes are the same channels as before."""
    model, inputs = resnet_cifar(20, num_classes=4).eval(), (torch.zeros(2, 3, 32, 32),)
    graph = channel_graph(model, inputs)
    assert len(graph.branches) == 9
    assert all(branch.end.endswith("conv2") and len(branch.groups) == 1 for branch in graph.branches)
    for branch in graph.branches:
        plan = settled_plan(model, graph, some(graph, graph.groups, without(graph, branch.end)), inputs)
        assert prove(model, graph, plan, (torch.randn(2, 3, 32, 32),), seed=0).passed


def test_the_whole_way(tiny: Path, tiny_options: MakeOptions, tmp_path: Path) -> None:
    """Pruned, trained, exported, verified, continued."""
    how = {"model": f"{tiny / 'net.py'}:residual", "macs": "12x", "drop_branches": True, "round_to": 1}
    options = tiny_options(tmp_path / "run", **how)
    report = read_json(pipeline.prune(options) / "report.json")
    assert 0 in [layer["after"] for layer in report["layers"]]
    assert report["proof"]["passed"]
    done = pipeline.build(options)
    assert all(hop.passed for hop in done.hops)
