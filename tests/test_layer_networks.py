"""Layers as small networks: what is found in a network, written for an engine and computed there. Nothing is timed."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from mixed_layers import Mixed
from onnx.reference import ReferenceEvaluator
from torch import nn

from thinet_deploy.interfaces import Precision
from thinet_deploy.on_device.engines import open_engine
from thinet_deploy.timing.layer_networks import LayerShape, frame, framed, image_of, layers_of
from thinet_deploy.timing.staircase import Engine


def test_a_layer_that_reads_maps_of_several_sizes_is_timed_on_each() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            small = nn.functional.max_pool2d(x, 2)
            return sum(self.head(each).sum((2, 3)) for each in (x, small, small.flip(3)))  # type: ignore[no-any-return]

    found = {(str(each.shape), each.calls) for each in layers_of(Pyramid(), (3, 8, 8))}
    assert found == {("conv 3x3 on 8x8", 1), ("conv 3x3 on 4x4", 2)}


def test_layers_of_a_network() -> None:
    found = {layer.name: layer for layer in layers_of(Mixed(), (3, 16, 16))}
    assert list(found) == ["stem", "deep", "pair", "twice", "head"], "a channel multiplier cannot be timed alone"
    assert {name: (each.ins, each.outs, each.calls) for name, each in found.items()} == {
        "stem": (3, 8, 1),
        "deep": (8, 8, 1),
        "pair": (8, 12, 1),
        "twice": (12, 12, 2),
        "head": (24, 5, 1),
    }
    assert found["stem"].shape == LayerShape(
        "conv", (5, 5), (2, 2), (1, 1), (2, 2, 2, 2), 1, (16, 16), reads_image=True
    )
    assert found["deep"].shape == LayerShape("depthwise", (3, 3), (1, 1), (2, 2), (2, 2, 2, 2), 1, (8, 8))
    assert found["pair"].shape.groups == 2
    assert [str(each.shape) for each in found.values()] == [
        "conv 5x5 /2 on 16x16",
        "depthwise 3x3 on 8x8",
        "conv 3x3, 2 groups on 8x8",
        "conv 1x1 on 6x6",
        "linear",
    ]


SHORTCUT = LayerShape("conv", (1, 1), (2, 2), (1, 1), (0, 0, 0, 0), 1, (16, 16))


def test_a_shortcuts_input_has_two_readers_in_its_frame_too() -> None:
    """As in a network; what the other one takes is subtracted with the frame."""
    for network, outputs in ((frame(SHORTCUT, 8), 8), (framed(SHORTCUT, 8, 4), 4)):
        onnx.checker.check_model(network, full_check=True)
        mean, other = ReferenceEvaluator(network).run(None, {"x": np.ones((1, 1, 16, 16), np.float32)})
        assert np.asarray(mean).shape == (1, outputs, 1, 1)
        assert np.asarray(other).shape == (1, 8, 1, 1)


@pytest.mark.parametrize("layer", layers_of(Mixed(), (3, 16, 16)), ids=lambda layer: layer.name)
def test_networks_of_layers_are_sound_and_hold_the_layer(layer: Any) -> None:
    size, batch = image_of(layer.shape, layer.ins)
    image = np.ones((batch, *size), np.float32)
    around = frame(layer.shape, layer.ins)
    inside = framed(layer.shape, layer.ins, layer.outs)
    for network in (around, inside) if not layer.shape.reads_image else (inside,):
        onnx.checker.check_model(network, full_check=True)
        outputs: Any = ReferenceEvaluator(network).run(None, {"x": image})
        found = np.asarray(outputs[0])
        assert found.shape[:2] == (batch, layer.ins if network is around else layer.outs)
        assert np.isfinite(found).all()
    sizes = [tuple(each.dims) for each in inside.graph.initializer if len(each.dims) > 1]
    weight = Mixed().get_parameter(f"{layer.name}.weight")
    assert sizes[-1] == tuple(weight.shape)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_network_of_a_layer_is_small_on_its_way_to_a_device(precision: Precision) -> None:
    shape = LayerShape("conv", (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), 1, (8, 8))
    made = framed(shape, 256, 256)
    weights = [onnx.numpy_helper.to_array(each) for each in made.graph.initializer if len(each.dims) == 4][-1]
    assert len(np.unique(weights.reshape(256, -1), axis=0)) == 256, "no two filters are one"
    whole = Engine("openvino", precision=precision).typed(made).SerializeToString()
    assert len(zlib.compress(whole, 1)) < len(whole) / 20


@pytest.mark.parametrize("kind", ["plain", "depthwise", "linear", "shortcut"])
def test_layers_to_be_timed_in_int8_compute_in_it(kind: str, tmp_path: Path) -> None:
    """What OpenVINO says that it runs; zero points are those of tensors that are never negative.

    A 1×1 convolution with a stride (a ResNet's shortcuts) it runs in float where nothing else reads its input.
    """
    pytest.importorskip("openvino", reason="openvino is not installed")
    if kind == "shortcut":
        made = framed(SHORTCUT, 32, 64)
    else:
        name = {"plain": "twice", "depthwise": "deep", "linear": "head"}[kind]
        layer = next(each for each in layers_of(Mixed(), (3, 16, 16)) if each.name == name)
        made = framed(layer.shape, layer.ins, layer.outs)
    typed = Engine("openvino", precision="int8").typed(made)
    path = tmp_path / "layer.onnx"
    path.write_bytes(typed.SerializeToString())
    assert open_engine("openvino", str(path), 1, "int8").describe()["executed_layers"].keys() <= {"u8", "i8"}
    stored = {each.name: onnx.numpy_helper.to_array(each) for each in typed.graph.initializer}
    zeros = {name: int(value) for name, value in stored.items() if name.endswith(":zero") and not value.shape}
    assert zeros.pop("x:zero") == 128
    assert zeros
    assert not any(zeros.values()), "a ReLU stands behind each layer"
