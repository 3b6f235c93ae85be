"""Channel groups: which convolution's filters can go, and who consumes them.

Found in the ATen graph of `torch.export`, by following each convolution's output through operations that
keep channels apart until exactly one consumer reads it. A region that is not understood stays whole, and
says why.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from ..errors import ModelError

_CONVOLUTIONS = frozenset({"conv2d"})
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
        *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"),
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
        whole: module name of a convolution → why its filters stay.
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
    nodes, names = _trace(model, input_shape)
    owners = {node: _owner(node, names) for node in nodes if _operation(node) in _CONVOLUTIONS | {"linear"}}
    uses = [owner for owner in owners.values() if owner]
    groups, whole = [], {}
    for node, owner in owners.items():
        if _operation(node) != "conv2d" or owner is None:
            continue
        try:
            groups.append(_follow(node, owner, owners, names, uses))
        except _NotUnderstoodError as reason:
            whole[owner] = str(reason)
    if not groups and not whole:
        raise ModelError("The network has no 2-D convolution, so there are no filters to prune.")
    joins = any(sum(a.op == "call_function" for a in n.all_input_nodes) > 1 for n in nodes if n.op == "call_function")
    return ChannelGraph(tuple(groups), whole, joins)


def _trace(model: nn.Module, input_shape: tuple[int, int, int]) -> tuple[list[fx.Node], dict[str, str]]:
    parameter = next(model.parameters())
    example = torch.zeros(2, *input_shape, dtype=parameter.dtype, device=parameter.device)
    try:
        program = torch.export.export(model.eval(), (example,))
    except Exception as error:  # torch.export raises many kinds of error for a network it cannot trace
        raise ModelError(
            f"torch.export cannot trace the network for inputs of {'x'.join(map(str, input_shape))}: "
            f"{str(error).strip().splitlines()[0]}",
            hint="Check --input-shape, and that forward() takes one image tensor and has no data-dependent branches.",
        ) from error
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return list(program.graph.nodes), names


def _operation(node: fx.Node) -> str:
    """The plain name of an ATen operation: "conv2d" of aten.conv2d.default; "" for other nodes."""
    namespace, _, rest = str(node.target).partition(".")
    return rest.partition(".")[0] if node.op == "call_function" and namespace == "aten" else ""


def _owner(node: fx.Node, names: dict[str, str]) -> str | None:
    """Module that owns the weight of a convolution, linear layer or BatchNorm; None for a computed weight."""
    weight = node.args[1]
    name = names.get(weight.name) if isinstance(weight, fx.Node) else None
    return name.removesuffix(".weight") if name is not None and name.endswith(".weight") else None


def _shape(node: fx.Node) -> torch.Size:
    return node.meta["val"].shape  # type: ignore[no-any-return]


def _argument(node: fx.Node, position: int, name: str, default: int) -> int:
    value = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
    return int(value)  # type: ignore[arg-type]


def _follow(
    conv: fx.Node, producer: str, owners: dict[fx.Node, str | None], names: dict[str, str], uses: list[str]
) -> ChannelGroup:
    """Walk from a convolution to its only consumer."""
    if _argument(conv, 6, "groups", 1) != 1:
        raise _NotUnderstoodError("it is a grouped convolution")
    if uses.count(producer) != 1:
        raise _NotUnderstoodError("it is used more than once")
    channels, norms, node = _shape(conv)[1], list[str](), conv
    while True:
        previous, node = node, _only_user(node)
        if node in owners:
            break
        if _operation(node) == "batch_norm" and (norm := _owner(node, names)):
            norms.append(norm)
        elif not _flattens(previous, node) and (_operation(node) not in _PER_CHANNEL or _shape(node)[1] != channels):
            raise _NotUnderstoodError(f"its output enters {_operation(node) or node.target}, which may mix channels")
    consumer = _consumer(node, previous, owners, uses)
    height, width = _shape(conv)[2:]
    return ChannelGroup(producer, tuple(norms), consumer, channels, _shape(previous)[1] // channels, (height, width))


def _only_user(node: fx.Node) -> fx.Node:
    users = list(node.users)
    if len(users) != 1:
        raise _NotUnderstoodError(f"its output is read by {len(users)} operations (a branch)")
    if users[0].op == "output":
        raise _NotUnderstoodError("its filters are outputs of the network")
    return users[0]


def _flattens(before: fx.Node, node: fx.Node) -> bool:
    """Whether a node turns (n, channels, height, width) into (n, channels · height · width)."""
    return _operation(node) in _FLATTEN and tuple(_shape(node)[1:]) == (_shape(before)[1:].numel(),)


def _consumer(node: fx.Node, previous: fx.Node, owners: dict[fx.Node, str | None], uses: list[str]) -> str:
    """Module name of a consumer whose inputs can go; it reads the channels as inputs, with a weight of its own."""
    consumer = owners[node]
    if consumer is None or uses.count(consumer) != 1 or node.args[0] is not previous:
        raise _NotUnderstoodError("its consumer's weight is shared or computed")
    if _operation(node) == "linear" and len(_shape(previous)) != 2:
        raise _NotUnderstoodError(f"its consumer {consumer} is not applied to channels")
    if _operation(node) != "linear" and _argument(node, 6, "groups", 1) != 1:
        raise _NotUnderstoodError(f"its consumer {consumer} is a grouped convolution")
    return consumer
