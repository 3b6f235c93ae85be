"""gcos in a whole network: the grouped network says what the reordered, masked one says."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from nets import Net
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from thinet_deploy.artifact import read_json
from thinet_deploy.data.dataset import ImageSet
from thinet_deploy.data.preprocess import Preprocess
from thinet_deploy.errors import ModelError
from thinet_deploy.export import export_onnx, run_onnx
from thinet_deploy.models.presets import build_preset
from thinet_deploy.models.vgg import VGG
from thinet_deploy.models.weights import save_weights
from thinet_deploy.options import Options
from thinet_deploy.pipeline import build, prune
from thinet_deploy.pruning.calibration import Sample
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.gcos import Grouped, check, default_groups, group_convolutions, possible
from thinet_deploy.pruning.partition import Layer, Partition, by_position
from thinet_deploy.pruning.plan import Plan, load_plan
from thinet_deploy.pruning.surgery import apply, load_thin
from thinet_deploy.pruning.trace import example_inputs

SHAPE = (3, 16, 16)
PREPROCESS = Preprocess(colour="RGB", mean=(0.5,) * 3, std=(0.25,) * 3, resize=(16, 16), crop=(16, 16))


def network(*, norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = VGG(((8, 8), (16, 16), (16, 16, 24)), (12,), input_shape=SHAPE, num_classes=5, norm=norm)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
                module.running_mean.uniform_(-0.3, 0.3)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
            elif isinstance(module, nn.Conv2d) and module.bias is not None:
                module.bias.uniform_(-0.2, 0.2)
    return model.eval()


def sample(count: int = 40) -> Sample:
    pixels: NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3)).astype(np.uint8)
    return Sample(ImageSet(np.zeros(count, np.int64), lambda rows: pixels[rows], PREPROCESS), np.arange(count), 8, 0)


def grouped(model: nn.Module, wanted: dict[str, int] | None = None, **changes: object) -> Grouped:
    graph = channel_graph(model, (torch.zeros(2, *SHAPE),))
    wanted = default_groups(model, graph) if wanted is None else wanted
    return group_convolutions(model, graph, wanted, sample(), SHAPE, **changes)  # type: ignore[arg-type]


def said(model: nn.Module) -> torch.Tensor:
    images = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.inference_mode():
        output: torch.Tensor = copy.deepcopy(model).double()(images)
    return output


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


@pytest.mark.parametrize("norm", [False, True])
def test_the_grouped_network_says_what_the_masked_one_says(norm: bool) -> None:
    model = network(norm=norm)
    before = said(model)
    done = grouped(model)
    thin = apply(done.plan, done.model)
    torch.testing.assert_close(said(thin), said(done.model), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(said(model), before, rtol=0, atol=0, msg="the original was changed")
    groups = [conv.groups for conv in convolutions(thin).values()]
    assert groups == [1, 1, 2, 2, 4, 4, 4], "2 groups on the second smallest maps, 4 on the smallest"
    assert [getattr(conv, "shuffle", 1) for conv in convolutions(thin).values()] == [1, 1, 1, 2, 2, 4, 4]
    assert all(0 < share <= 1 for share in done.explained.values())


def test_it_leaves_a_quarter_of_the_weights_where_there_are_four_groups() -> None:
    thin = apply((done := grouped(network())).plan, done.model)
    for name, conv in convolutions(network()).items():
        mine = convolutions(thin)[name]
        assert mine.weight.numel() * mine.groups == conv.weight.numel()


def test_a_plan_and_weights_bring_it_back(tmp_path: Path) -> None:
    done = grouped(network(norm=True))
    thin = apply(done.plan, done.model)
    done.plan.save(tmp_path / "plan.json")
    save_weights(thin, tmp_path / "model.safetensors")
    torch.manual_seed(5)
    fresh = VGG(((8, 8), (16, 16), (16, 16, 24)), (12,), input_shape=SHAPE, num_classes=5, norm=True)
    again = load_thin(load_plan(tmp_path / "plan.json"), fresh, tmp_path / "model.safetensors")
    torch.testing.assert_close(said(again), said(thin), rtol=0, atol=0)


def test_groups_by_error_stay_nearer_than_groups_by_position() -> None:
    model = network()
    chosen = grouped(model)
    plain = grouped(model, choose_by=lambda layer, groups: by_position(len(layer.sources), len(layer.cross), groups))
    error = [float((said(each.model) - said(model)).square().mean()) for each in (chosen, plain)]
    assert error[0] < error[1]


def test_the_same_with_any_batch_size() -> None:
    model = network()
    graph = channel_graph(model, (torch.zeros(2, *SHAPE),))
    plans = []
    for batch in (1, 8):
        images = sample()
        mine = Sample(images.images, images.chosen, batch, 0)
        plans.append(group_convolutions(model, graph, {"features.7": 2, "features.10": 4}, mine, SHAPE).plan)
    assert plans[0] == plans[1]


def test_what_cannot_be_grouped_is_refused_with_the_reason() -> None:
    model = network()
    graph = channel_graph(model, (torch.zeros(2, *SHAPE),))
    assert possible(model, graph, {"features.0": 3, "features.5": 6, "features.7": 3}) == {
        "features.0": 1,
        "features.5": 4,
        "features.7": 2,
    }
    with pytest.raises(ModelError, match=r"features\.7 cannot have 3 groups, only 2: .* equal share"):
        check(model, graph, {"features.7": 3})


def test_a_weight_that_a_function_reads_is_not_grouped() -> None:
    model = Net(
        lambda m, x: m.b(F.conv2d(m.a(x), m.w, padding=1)),
        a=nn.Conv2d(1, 8, 3),
        b=nn.Conv2d(8, 8, 3),
        w=nn.Parameter(torch.rand(8, 8, 3, 3)),
    )
    graph = channel_graph(model, example_inputs(model, (1, 8, 8)))
    assert possible(model, graph, {"w": 2, "b": 2})["w"] == 1


def test_a_damaged_plan_is_refused() -> None:
    plan = Plan.model_validate(
        {**grouped(network()).plan.model_dump(), "shuffled": {"features.1": {"groups": 2, "shuffle": 1}}}
    )
    with pytest.raises(ModelError, match="no dense convolution"):
        apply(plan, network())


# ---------------------------------------------------------------------------------------------- in a build


def test_a_shuffle_becomes_operations_that_every_runtime_has(tmp_path: Path) -> None:
    model = network(norm=True)
    thin = apply((done := grouped(model)).plan, done.model).eval()
    export_onnx(thin, SHAPE, tmp_path / "thin.onnx", opset=18, ir_version=10)
    kinds = {node.op_type for node in onnx.load(tmp_path / "thin.onnx").graph.node}
    plain = {"Conv", "Relu", "MaxPool", "Reshape", "Transpose", "Gemm", "Flatten", "Shape", "Concat", "Identity"}
    assert {"Reshape", "Transpose", "Conv"} <= kinds <= {*plain, "AveragePool", "BatchNormalization"}
    images = np.random.default_rng(3).normal(size=(2, *SHAPE)).astype(np.float32)
    with torch.inference_mode():
        expected = thin(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(run_onnx(tmp_path / "thin.onnx", images)["logits"], expected, rtol=1e-4, atol=1e-5)


def test_a_build_groups_proves_and_ships(tiny_options: Callable[..., Options], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    options = tiny_options(tmp_path / "run", preset="thinet-conv", keep=1.0, gcos=True)
    done = build(options)
    hops = {hop.hop: hop for hop in done.hops if hop.model == "conv"}
    assert hops["masked → grouped"].passed
    assert (hops["masked → grouped"].error or 0) < 1e-12
    steps = [entry.step for entry in done.table.ledger]
    assert steps.index("convolutions grouped (gcos)") > steps.index("pruned")
    report = read_json(tmp_path / "run" / "gcos" / "report.json")
    assert {name: row["groups"] for name, row in report["groups"].items()} == {"features.2": 2, "features.5": 4}
    plan = load_plan(tmp_path / "run" / "conv" / "plan.json")
    assert plan.shuffled["features.5"].shuffle == 2
    assert report["macs"]["after"] < report["macs"]["before"]


def test_what_is_to_stay_whole_is_not_grouped(tiny_options: Callable[..., Options], tmp_path: Path) -> None:
    options = tiny_options(tmp_path / "run", preset="thinet-conv", keep=1.0, gcos=True, ignore=("features.5",))
    folder = prune(options)
    assert list(read_json(folder / "report.json")["groups"]) == ["features.2"]


def test_a_pattern_that_names_nothing_says_what_there_is(cli: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    start = ["prune", "--data", tiny / "data", "--model", f"{tiny / 'net.py'}:plain", "--epochs", 1, "--out", tmp_path]
    done = cli(*start, "--gcos-layer", "layer4*=4")
    assert (done.code, "no convolution has such a name" in done.err) == (2, True)
    assert "features.0, features.2, features.5" in done.err
    done = cli(*start, "--gcos-layer", "features.0")
    assert (done.code, "PATTERN=GROUPS" in done.err) == (2, True)


def test_on_thinet_tiny_it_leaves_what_the_papers_print() -> None:
    """2.66 MB: 696,496 weights (thinet.md, section 2), in the layout of the architecture to train from scratch."""
    torch.manual_seed(0)
    shape = (3, 224, 224)
    model = build_preset("thinet-tiny", shape, 1000).eval()
    graph = channel_graph(model, (torch.zeros(2, *shape),))
    pixels: NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3)).astype(np.uint8)
    preprocess = PREPROCESS.model_copy(update={"resize": (224, 224), "crop": (224, 224)})
    images = Sample(ImageSet(np.zeros(2, np.int64), lambda rows: pixels[rows], preprocess), np.arange(2), 2, 0)
    done = group_convolutions(model, graph, default_groups(model, graph), images, shape, choose_by=shuffled)
    thin, scratch = apply(done.plan, done.model), build_preset("thinet-tiny", shape, 1000, gcos=True)
    assert sum(layer.weight.numel() for layer in thin.modules() if isinstance(layer, nn.Conv2d | nn.Linear)) == 696_496
    assert {name: each.shape for name, each in thin.state_dict().items()} == {
        name: each.shape for name, each in scratch.state_dict().items()
    }
    thin.load_state_dict(scratch.state_dict())
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(thin(x), scratch.eval()(x))


def shuffled(layer: Layer, groups: int) -> Partition:
    return by_position(len(layer.sources), len(layer.cross), groups, shuffled_from=int(layer.sources.max()) + 1)
