"""What the trace says of a network's layers: which ones ran on what, how large their maps are, where branches meet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from .label_pass import Labels, varies
from .labels import FIXED, PARAMETER
from .trace import Trace, arguments, operation, shape

CONVOLUTIONS = frozenset(f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3))
_ADDITIONS = frozenset({"add", "add_", "sub", "sub_"})


@dataclass(frozen=True)
class LayerCall:
    """A convolution or linear layer that ran.

    Attributes:
        weight: name of its weight.
        dim: of the weight that counts inputs.
        number: 0 for the first time that this weight is used, 1 for the second …
        inputs: labels of its input channels.
        depthwise: whether every channel is worked on by itself: by a group of its own, or by a linear layer that runs
            along positions.
        positions: of the map that its weight is used at, for one image.
        needed: whether an output comes from it; not from what only training reads.
    """

    weight: str
    dim: int
    number: int
    inputs: torch.Tensor
    depthwise: bool
    positions: int
    needed: bool


def layer_calls(trace: Trace, values: dict[str, Labels]) -> Iterator[LayerCall]:
    """All calls of layers whose weight is a parameter, in the order of execution.

    Args:
        trace: of the network.
        values: the labels of all nodes.
    """
    numbers, needed = Counter[str](), _needed(trace)
    for node in trace.nodes:
        if operation(node) in CONVOLUTIONS or operation(node) == "linear":
            given = arguments(node)
            if weight := trace.parameter(given["weight"]):
                yield _call(node, weight, numbers[weight], values[given["input"].name], needed=node in needed)
                numbers[weight] += 1


def _needed(trace: Trace) -> set[fx.Node]:
    """What an output comes from; operations in place, such as add_, count as such."""
    needed = {node for node in trace.nodes if node.op == "output" or operation(node).endswith("_")}
    for node in reversed(trace.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return needed


def _call(node: fx.Node, weight: str, number: int, inputs: Labels, *, needed: bool) -> LayerCall:
    given, linear, transposed = arguments(node), operation(node) == "linear", "transpose" in operation(node)
    along = linear and not varies(inputs, -1) and any(varies(inputs, dim) for dim in range(inputs.dim() - 1))
    channels = inputs.movedim(-1 if linear else 1, 0).flatten(1)[:, 0]
    groups, size = int(given.get("groups", 1)), shape(given["input"] if transposed else node)
    depthwise = along or groups == len(channels) > 1
    positions = (size[1:-1] if linear else size[2:]).numel()
    return LayerCall(weight, 0 if transposed else 1, number, channels, depthwise, positions, needed)


def map_sizes(trace: Trace) -> dict[str, tuple[int, int]]:
    """Module of a two-dimensional convolution → height and width of its first output."""
    sizes: dict[str, tuple[int, int]] = {}
    for node in trace.nodes:
        if "conv" in operation(node) and len(shape(node)) == 4:
            weight = trace.parameter(node.args[1])
            height, width = shape(node)[2:]
            sizes.setdefault(module_name(weight), (height, width))
    return sizes


def joined(trace: Trace, values: dict[str, Labels]) -> Iterator[torch.Tensor]:
    """Labels of channels that an addition joins."""
    for node in trace.nodes:
        sources = [source for source in node.args[:2] if isinstance(source, fx.Node)]
        if operation(node) in _ADDITIONS and len(sources) == 2:
            one, other = (values.get(source.name) for source in sources)
            if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
                varying = [int(each.flatten()[0]) for each in (one, other) if each.numel()]
                if all(FIXED < label < PARAMETER for label in varying) and varying[0] != varying[1]:
                    yield one


def joins(trace: Trace) -> bool:
    """Whether branches meet: an operation reads two values that were computed, or one and the network's input."""
    computed = {node for node in trace.nodes if node.op == "call_function"}
    images = set(trace.images)
    constant = {node for node in trace.nodes if not (set(node.all_input_nodes) & (computed | images))} - images
    return any(len(set(node.all_input_nodes) - constant) > 1 for node in computed)


def module_name(parameter: str) -> str:
    """A layer's name; a parameter that is used directly keeps its own."""
    return parameter.removesuffix(".weight")
