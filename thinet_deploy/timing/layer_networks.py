"""The layers of a network as small ONNX networks of any width, to be timed on an engine.

A layer alone would be timed with the engine's change of memory layout in front of it and behind it, which in a network
its neighbours save. So it lies between a cheap layer that makes its inputs from one channel, and a mean over the map;
the same network without it is its *frame*, whose time is subtracted.

What a shortcut reads (1×1, with a stride), the block beside it reads as well. Alone behind a layer its stride would be
moved there: OpenVINO then leaves out most of that layer, and computes the shortcut in float32 where all is in INT8. So
its input has a second reader, which takes the maximum over the map, in the frame too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

INPUT = "x"
_OPSET, _IR = 17, 8
_DIFFERENT = 509  # weights; the same ones again take as long, and a file with them is small on its way to a device


@dataclass(frozen=True)
class LayerShape:
    """What a layer's time depends on beside its widths.

    Attributes:
        kind: "conv", "depthwise" (inputs and outputs are one) or "linear".
        kernel, stride, dilation: (height, width); (1, 1) for a linear layer.
        pads: top, left, bottom, right.
        groups: of a grouped convolution; 1 for the others, depthwise too.
        map_size: (height, width) of its input; (rows, 1) for a linear layer.
        reads_image: whether it reads the network's input: nothing lies in front of it then.
    """

    kind: Literal["conv", "depthwise", "linear"]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, int, int, int]
    groups: int
    map_size: tuple[int, int]
    reads_image: bool = False

    @property
    def is_shortcut(self) -> bool:
        """Whether it looks at some positions only, as a residual block's shortcut does: see the top of this file."""
        return self.kind == "conv" and self.kernel == (1, 1) != self.stride and not self.reads_image

    def __str__(self) -> str:
        size = "x".join(map(str, self.map_size))
        if self.kind == "linear":
            return "linear" if self.map_size == (1, 1) else f"linear, {self.map_size[0]} rows"
        many = f", {self.groups} groups" if self.groups > 1 else ""
        strided = f" /{self.stride[0]}" if self.stride != (1, 1) else ""
        return f"{self.kind} {'x'.join(map(str, self.kernel))}{strided}{many} on {size}"


@dataclass(frozen=True)
class Layer:
    """A layer of a network.

    Attributes:
        name: of its module.
        shape: see `LayerShape`.
        ins, outs: channels now.
        calls: how often it runs for one input.
    """

    name: str
    shape: LayerShape
    ins: int
    outs: int
    calls: int


def layers_of(model: nn.Module, input_shape: tuple[int, int, int]) -> list[Layer]:
    """Two-dimensional convolutions and linear layers in the order in which they run, from one pass of a zero image.

    Depthwise convolutions with several filters per channel are left out: their groups would go with their inputs.
    """
    image = torch.zeros(1, *input_shape)
    shapes: dict[nn.Module, list[LayerShape]] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        shapes.setdefault(module, []).append(_shape(module, inputs[0].shape, reads_image=inputs[0] is image))

    mine = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [module.register_forward_pre_hook(note) for module in mine if not _multiplies(module)]
    try:
        with torch.inference_mode():
            model.eval()(image)
    finally:
        for hook in hooks:
            hook.remove()
    names = {module: name for name, module in model.named_modules()}
    return [
        Layer(names[module], shape, *_widths(module), calls)
        for module, each in shapes.items()
        for shape, calls in Counter(each).items()  # a head may read maps of several sizes
    ]


def _multiplies(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels != module.out_channels


def _widths(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def _shape(module: nn.Module, inputs: torch.Size, *, reads_image: bool) -> LayerShape:
    if not isinstance(module, nn.Conv2d):
        rows = inputs[1:-1].numel()
        return LayerShape("linear", (1, 1), (1, 1), (1, 1), (0, 0, 0, 0), 1, (rows, 1), reads_image)
    kernel, stride, dilation = (tuple(each) for each in (module.kernel_size, module.stride, module.dilation))
    depthwise = module.groups == module.in_channels == module.out_channels > 1
    kind: Literal["conv", "depthwise"] = "depthwise" if depthwise else "conv"
    groups, size = 1 if depthwise else module.groups, (inputs[2], inputs[3])
    return LayerShape(kind, kernel, stride, dilation, _pads(module), groups, size, reads_image)  # type: ignore[arg-type]  # pairs


def _pads(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    if conv.padding == "valid":
        return 0, 0, 0, 0
    if conv.padding == "same":  # what is odd goes behind, as torch does it
        total = [dilation * (kernel - 1) for dilation, kernel in zip(conv.dilation, conv.kernel_size, strict=True)]
        before = [each // 2 for each in total]
        return before[0], before[1], total[0] - before[0], total[1] - before[1]
    height, width = (int(each) for each in conv.padding)
    return height, width, height, width


def image_of(shape: LayerShape, ins: int) -> tuple[tuple[int, ...], int]:
    """Shape of one input of the networks below, without the batch, and the batch."""
    channels = max(ins, 2 if shape.kind == "linear" else 1) if shape.reads_image else 1
    return ((channels,), shape.map_size[0]) if shape.kind == "linear" else ((channels, *shape.map_size), 1)


def framed(shape: LayerShape, ins: int, outs: int) -> onnx.ModelProto:
    """The layer in its frame."""
    return _network(shape, ins, outs)


def frame(shape: LayerShape, ins: int) -> onnx.ModelProto:
    """The frame alone."""
    return _network(shape, ins, None)


class _Nodes:
    """An ONNX graph in the making. Weights are small and random: zeros and denormal numbers would take other times."""

    def __init__(self) -> None:
        self._weights = np.random.default_rng(0).normal(0, 0.1, _DIFFERENT)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.given: list[onnx.ValueInfoProto] = []

    def add(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        """A node; the name of what it gives."""
        name = f"y{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def weigh(self, operator: str, source: str, *size: int, **attributes: Any) -> str:
        """A layer with weights of this size, and the ReLU behind it."""
        name = f"w{len(self.constants)}"
        for suffix, values in (("", np.resize(self._weights, size)), ("b", np.full(size[0], 0.1))):
            self.constants.append(numpy_helper.from_array(values.astype(np.float32), name + suffix))
        return self.add("Relu", [self.add(operator, [source, name, f"{name}b"], **attributes)])

    def end(self, name: str, *size: int) -> None:
        """An output of the graph."""
        self.given.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, size))


def _network(shape: LayerShape, ins: int, outs: int | None) -> onnx.ModelProto:
    made, linear, before = _Nodes(), shape.kind == "linear", INPUT
    if linear:
        ins = max(ins, 2)  # OpenVINO 2026.4 refuses a linear layer with one input behind another
    if not shape.reads_image:
        before = made.weigh("Gemm", INPUT, ins, 1, transB=1) if linear else made.weigh("Conv", INPUT, ins, 1, 1, 1)
    last = before if outs is None else _layer(made, shape, before, ins, outs)
    size, batch = image_of(shape, ins)
    channels = ins if outs is None else outs
    if linear:
        made.end(last, batch, channels)
    else:
        made.end(made.add("GlobalAveragePool", [last]), 1, channels, 1, 1)
    if shape.is_shortcut:
        made.end(made.add("GlobalMaxPool", [before]), 1, ins, 1, 1)
    taken = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [batch, *size])
    graph = helper.make_graph(made.nodes, "layer", [taken], made.given, made.constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)


def _layer(made: _Nodes, shape: LayerShape, before: str, ins: int, outs: int) -> str:
    if shape.kind == "linear":
        return made.weigh("Gemm", before, outs, ins, transB=1)
    groups = ins if shape.kind == "depthwise" else shape.groups
    how = {"pads": shape.pads, "strides": shape.stride, "dilations": shape.dilation, "group": groups}
    return made.weigh("Conv", before, outs, ins // groups, *shape.kernel, **how)
