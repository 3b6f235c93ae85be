"""Pruned networks of torchvision: the exported ONNX file equals torch and has exactly the planned widths."""

from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from thinet_deploy.export import export_onnx
from thinet_deploy.pruning.budget import Wish, some, uniform
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.proof import prove
from thinet_deploy.pruning.retrace import settled_plan
from thinet_deploy.pruning.surgery import apply
from thinet_deploy.pruning.trace import example_inputs

SHAPE = (3, 64, 64)
FAST = ["resnet18", "mobilenet_v2", "squeezenet1_1"]
SLOW = [
    *("densenet121", "googlenet", "efficientnet_b0", "regnet_y_400mf", "shufflenet_v2_x0_5", "mnasnet0_5"),
    *("resnext50_32x4d", "mobilenet_v3_small", "convnext_tiny", "vgg11_bn"),
]


def make(zoo: ModuleType, name: str) -> nn.Module:
    extra = {"init_weights": True, "aux_logits": False} if name == "googlenet" else {}
    torch.manual_seed(0)
    model: nn.Module = zoo.get_model(name, weights=None, num_classes=10, **extra).eval()
    return model


def widths(tensors: list[tuple[int, ...]]) -> Counter[tuple[int, ...]]:
    return Counter(shape for shape in tensors if len(shape) == 4)


def check(zoo: ModuleType, name: str, folder: Path) -> None:
    model = make(zoo, name)
    inputs = example_inputs(model, SHAPE)
    graph = channel_graph(model, inputs)
    kept = some(graph, graph.groups, uniform(graph.groups, 0.5, Wish()))
    plan = settled_plan(model, graph, kept, inputs)
    images = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    assert prove(model, graph, plan, (images,), seed=0).passed
    thin = apply(plan, model)
    for producer, (_, after) in plan.widths.items():
        assert len(thin.get_parameter(f"{producer}.weight")) == after

    export_onnx(thin, SHAPE, folder / "thin.onnx", opset=20, ir_version=10)
    weights = [tuple(tensor.dims) for tensor in onnx.load(folder / "thin.onnx").graph.initializer]
    planned = widths([tuple(tensor.shape) for tensor in thin.parameters()])
    assert not planned - widths(weights)  # the exporter adds constants of its own
    session = onnxruntime.InferenceSession(folder / "thin.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"input": images.numpy()})
    with torch.inference_mode():
        expected = thin(images).numpy()
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", FAST)
def test_the_onnx_of_a_pruned_network(zoo: ModuleType, name: str, tmp_path: Path) -> None:
    check(zoo, name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_the_onnx_of_more_pruned_networks(zoo: ModuleType, name: str, tmp_path: Path) -> None:
    check(zoo, name, tmp_path)
