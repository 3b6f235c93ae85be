"""Channel groups: which convolution's filters can go, and who consumes them.

Found in the ATen graph of `torch.export`, by following each convolution's output through operations that
keep channels apart until exactly one consumer reads it. A region that is not understood stays whole, and
says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import UnionType

import torch
from torch import fx, nn

from ..errors import ModelError

# Elementwise or spatial operations: every output channel depends on the same input channel only.
_PER_CHANNEL = frozenset(
    {
        *(
            "relu",
            "relu_",
            "relu6",
            "leaky_relu",
            "leaky_relu_",
            "elu",
            "elu_",
            "gelu",
            "silu",
            "silu_",
            "mish",
            "mish_",
        ),
        *("hardswish", "hardswish_", "hardsigmoid", "hardtanh", "hardtanh_", "sigmoid", "tanh", "softplus", "clamp"),
        *("dropout", "dropout_", "feature_dropout", "contiguous", "clone", "alias"),
        *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "pad"),
    }
)
_FLATTEN = frozenset({"flatten", "view", "reshape"})


@dataclass(frozen=True)
class ChannelGroup:
    """Filters that one producer makes and one consumer reads.

    Attributes:
        producer: module name of the convolution whose filters can go.
        norms: module names of the BatchNorms in between, sliced along.
        consumer: module name of the convolution or linear layer whose inputs go with them.
        channels: number of filters now.
        spread: inputs of the consumer per channel: 1 for a convolution, 49 after flattening a 7×7 map.
        map_size: height and width of the producer's output, in pixels.
    """

    producer: str
    norms: tuple[str, ...]
    consumer: str
    channels: int
    spread: int
    map_size: tuple[int, int]


@dataclass(frozen=True)
class ChannelGraph:
    """All channel groups, in the order of execution, and what stays whole.

    Attributes:
        groups: front to back.
        whole: module name of a convolution (or of the module that calls one) → why its filters stay.
        joins: whether branches meet anywhere (residual, concatenation): such a network is not plain.
    """

    groups: tuple[ChannelGroup, ...]
    whole: dict[str, str]
    joins: bool

    def group(self, producer: str) -> ChannelGroup:
        """The group whose producer has this module name."""
        return next(group for group in self.groups if group.producer == producer)


class _NotUnderstoodError(Exception):
    """Why a convolution's filters stay."""


def channel_graph(model: nn.Module, input_shape: tuple[int, int, int]) -> ChannelGraph:
    """Find the channel groups of a network for images of shape (channels, height, width).

    Raises:
        ModelError: `torch.export` cannot trace the network, or it has no convolution.
    """
    trace = _trace(model, input_shape)
    groups, whole = list[ChannelGroup](), dict[str, str]()
    for node in trace.nodes:
        if _operation(node) != "conv2d":
            continue
        try:
            groups.append(trace.follow(node))
        except _NotUnderstoodError as reason:
            whole[_module(node) or node.name] = str(reason)
    if not groups and not whole:
        raise ModelError("The network has no 2-D convolution, so there are no filters to prune.")
    calls = [node for node in trace.nodes if node.op == "call_function"]
    joins = any(sum(source.op == "call_function" for source in node.all_input_nodes) > 1 for node in calls)
    return ChannelGraph(tuple(groups), whole, joins)


def _trace(model: nn.Module, input_shape: tuple[int, int, int]) -> _Trace:
    parameter = next(model.parameters(), torch.empty(0))
    example = torch.zeros(2, *input_shape, dtype=parameter.dtype, device=parameter.device)
    try:
        program = torch.export.export(model.eval(), (example,))
    except Exception as error:  # torch.export raises many kinds of error for a network it cannot trace
        raise ModelError(
            f"torch.export cannot trace the network for inputs of {'x'.join(map(str, input_shape))}: "
            f"{(str(error).strip() or type(error).__name__).splitlines()[0]}",
            hint="Check --input-shape, and that forward() takes one image tensor and has no data-dependent branches.",
        ) from error
    return _Trace(model, list(program.graph.nodes), program.graph_signature.inputs_to_parameters)


@dataclass(frozen=True)
class _Trace:
    """The ATen graph of a network.

    Attributes:
        model: the network.
        nodes: of the graph, in the order of execution.
        names: placeholder → parameter name.
    """

    model: nn.Module
    nodes: list[fx.Node]
    names: Mapping[str, str]

    def follow(self, conv: fx.Node) -> ChannelGroup:
        """Walk from a convolution to its only consumer."""
        producer = self._owner(conv, "it", nn.Conv2d)
        if _groups(conv) != 1:
            raise _NotUnderstoodError("it is a grouped convolution")
        channels, norms, node = _shape(conv)[1], list[str](), conv
        while True:
            previous, node = node, _only_user(node)
            if _operation(node) in {"conv2d", "linear"}:
                break
            if _operation(node) == "batch_norm" and _shape(node)[1] == channels:
                norms.append(self._owner(node, "a BatchNorm behind it", nn.BatchNorm2d))
            elif not _flattens(previous, node) and not _keeps_channels(previous, node):
                operation = _operation(node) or node.target
                raise _NotUnderstoodError(f"its output enters {operation}, which may mix channels")
        consumer, spread = self._consumer(node, previous), _shape(previous)[1] // channels
        height, width = _shape(conv)[2:]
        return ChannelGroup(producer, tuple(norms), consumer, channels, spread, (height, width))

    def _consumer(self, node: fx.Node, previous: fx.Node) -> str:
        """Module name of a consumer whose inputs can go; it reads the channels as inputs, with a weight of its own."""
        consumer = self._owner(node, "its consumer", nn.Conv2d | nn.Linear)
        if node.args[0] is not previous or (_operation(node) == "linear" and len(_shape(previous)) != 2):
            raise _NotUnderstoodError(f"its consumer {consumer} is not applied to channels")
        if _operation(node) == "conv2d" and _groups(node) != 1:
            raise _NotUnderstoodError(f"its consumer {consumer} is a grouped convolution")
        return consumer

    def _owner(self, node: fx.Node, role: str, kinds: type[nn.Module] | UnionType) -> str:
        """Name of the module that a node runs: one that is called, once, and whose weight nobody else uses."""
        weight, module = node.args[1], _module(node)
        name = self.names.get(weight.name) if isinstance(weight, fx.Node) else None
        if isinstance(weight, fx.Node) and name is not None and len(weight.users) != 1:
            raise _NotUnderstoodError(f"{role} is used more than once, or its weight is")
        if name != f"{module}.weight" or not isinstance(self.model.get_submodule(module), kinds):
            raise _NotUnderstoodError(f"{role} has no weight of its own: it is shared, computed, or used by a function")
        return module


def _operation(node: fx.Node) -> str:
    """The plain name of an ATen operation: "conv2d" of aten.conv2d.default; "" for other nodes."""
    namespace, _, rest = str(node.target).partition(".")
    return rest.partition(".")[0] if node.op == "call_function" and namespace == "aten" else ""


def _module(node: fx.Node) -> str:
    """Name of the innermost module that was running; "" for the network itself."""
    stack = [name for name, _ in node.meta.get("nn_module_stack", {}).values()]
    return stack[-1] if stack else ""


def _shape(node: fx.Node) -> torch.Size:
    return node.meta["val"].shape  # type: ignore[no-any-return]


def _groups(conv: fx.Node) -> int:
    return int(conv.args[6] if len(conv.args) > 6 else conv.kwargs.get("groups", 1))  # type: ignore[arg-type]


def _only_user(node: fx.Node) -> fx.Node:
    users = list(node.users)
    if len(users) != 1:
        raise _NotUnderstoodError(f"its output is read by {len(users)} operations (a branch)")
    if users[0].op == "output":
        raise _NotUnderstoodError("its filters are outputs of the network")
    return users[0]


def _flattens(before: fx.Node, node: fx.Node) -> bool:
    """Whether a node turns (n, channels, height, width) into (n, channels · height · width)."""
    if _operation(node) not in _FLATTEN or tuple(_shape(node)[1:]) != (_shape(before)[1:].numel(),):
        return False
    sizes = node.args[1] if _operation(node) != "flatten" else (-1,)
    if not isinstance(sizes, Sequence) or sizes[-1] != -1:
        raise _NotUnderstoodError("its output is reshaped to a fixed number of features")
    return True


def _keeps_channels(before: fx.Node, node: fx.Node) -> bool:
    """Whether every output channel depends on the same input channel, and on nothing else."""
    if _operation(node) == "pad" and len(node.args[1]) > 4:  # type: ignore[arg-type]
        return False  # pads the channels too
    alone = _operation(node) in _PER_CHANNEL and node.all_input_nodes == [before]
    return alone and _shape(node)[1] == _shape(before)[1]
