"""Convolutions and linear layers as least squares see them: what they read, and where what they say counts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .trace import Trace, arguments, operation, shape

_NORMS = frozenset({"batch_norm", "_native_batch_norm_legit_no_training"})
_ADDITIONS = frozenset({"add", "add_"})


@dataclass(frozen=True)
class Norm:
    """The BatchNorm that alone reads a layer: names of its tensors; `eps` as in torch."""

    weight: str
    bias: str
    mean: str
    var: str
    eps: float


@dataclass(frozen=True)
class Use:
    """One call of a layer.

    Attributes:
        at: index of its operation in the trace.
        inputs: node that it reads.
        ends: index of the operation whose value counts: of an addition, of the BatchNorm, or of the layer itself.
        other: the other operand of the addition, whose own drift the layer can repair; None without an addition.
        given: the operation's arguments by name; tensors stand as nodes.
        rectified: whether a ReLU alone reads the value that counts, so that it matters only where it is positive.
    """

    at: int
    inputs: fx.Node
    ends: int
    other: fx.Node | None
    given: Mapping[str, Any]
    rectified: bool


@dataclass(frozen=True)
class Reader:
    """A convolution or linear layer.

    Attributes:
        weight: name of its weight.
        bias: name of its bias; "" without one.
        norm: the BatchNorm behind it, if that is all that reads it.
        uses: its calls, in order.
        linear: whether it is a linear layer, whose channels come last.
        transposed: whether it is a transposed convolution.
        blocks: groups of a convolution.
        inputs: of each filter: channels of its block × kernel.
        filters: in all.
    """

    weight: str
    bias: str
    norm: Norm | None
    uses: tuple[Use, ...]
    linear: bool
    transposed: bool
    blocks: int
    inputs: int
    filters: int

    @property
    def name(self) -> str:
        """Of the module, as far as it has one."""
        return self.weight.removesuffix(".weight")


def readers(trace: Trace, *, residual: bool = True) -> list[Reader]:
    """All layers of a network whose weight is a parameter of its own, in the order of execution.

    Args:
        trace: of the network.
        residual: whether what a layer says counts behind the addition that it goes into.
    """
    shared = _shared_norms(trace)
    index = {node: number for number, node in enumerate(trace.nodes)}
    calls: defaultdict[str, list[_Call]] = defaultdict(list)
    for node in trace.nodes:
        kind = operation(node)
        if not (kind.startswith(("conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d")) or kind == "linear"):
            continue
        given = arguments(node)
        weight, bias = trace.parameter(given["weight"]), trace.parameter(given.get("bias"))
        if weight and (bias or given.get("bias") is None):
            calls[weight].append(_call(trace, node, index, shared, residual=residual))
    return [_reader(trace, weight, each) for weight, each in calls.items() if _alike(each)]


def _alike(calls: Sequence[_Call]) -> bool:
    """Whether one layer can stand for all calls: not where a convolution is also used transposed (tied weights)."""
    return (
        len({("stride" in use.given, "output_padding" in use.given, use.given.get("groups")) for use, _ in calls}) == 1
    )


def _shared_norms(trace: Trace) -> set[str]:
    """Weights of the BatchNorms that run more than once."""
    norms = [node for node in trace.nodes if operation(node) in _NORMS]
    uses = Counter(trace.parameter(arguments(node)["weight"]) for node in norms)
    return {weight for weight, count in uses.items() if count > 1}


_Call = tuple[Use, Norm | None]


def _call(trace: Trace, node: fx.Node, index: Mapping[fx.Node, int], shared: set[str], *, residual: bool) -> _Call:
    """One call of a layer: as far as the BatchNorm and the addition that alone read it."""
    given, last, norm = arguments(node), node, _norm_behind(trace, node)
    if norm and norm.weight not in shared:
        last = next(iter(node.users))
    else:
        norm = None
    other: fx.Node | None = None
    if residual and (addition := _addition_behind(last)) is not None:
        other = next(each for each in addition.all_input_nodes if each is not last)
        last = addition
    return Use(index[node], given["input"], index[last], other, given, _rectified(last)), norm


def _reader(trace: Trace, weight: str, calls: Sequence[_Call]) -> Reader:
    """A layer from its calls; what several share is judged where they end, before any BatchNorm."""
    uses, norm = tuple(use for use, _ in calls), calls[0][1]
    if len(uses) > 1:
        uses = tuple(replace(use, ends=use.at, other=None, rectified=False) for use in uses)
        norm = None
    given = uses[0].given
    size, blocks = shape(given["weight"]), int(given.get("groups", 1))
    transposed = "output_padding" in given
    filters = size[1] * blocks if transposed else size[0]
    return Reader(
        weight,
        trace.parameter(given.get("bias")),
        norm,
        uses,
        linear="stride" not in given,
        transposed=transposed,
        blocks=blocks,
        inputs=size.numel() // filters,
        filters=filters,
    )


def _norm_behind(trace: Trace, node: fx.Node) -> Norm | None:
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    if reader is None or operation(reader) not in _NORMS:
        return None
    given = arguments(reader)
    weight, bias, mean, var = (
        trace.parameter(given[each]) for each in ("weight", "bias", "running_mean", "running_var")
    )
    return Norm(weight, bias, mean, var, float(given["eps"])) if weight and bias and mean and var else None


def _rectified(node: fx.Node) -> bool:
    return len(node.users) == 1 and operation(next(iter(node.users))) in {"relu", "relu_"}


def _addition_behind(node: fx.Node) -> fx.Node | None:
    """The addition of equal shapes that alone reads a value."""
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    if reader is None or operation(reader) not in _ADDITIONS or reader.kwargs.get("alpha", 1) != 1:
        return None
    sides = reader.args[:2]
    tensors = [each for each in sides if isinstance(each, fx.Node) and isinstance(each.meta.get("val"), torch.Tensor)]
    same = len(tensors) == 2 and tensors[0] is not tensors[1] and shape(tensors[0]) == shape(tensors[1])
    return reader if same else None
