"""Residual branches that can vanish: nothing but an addition reads them, so a constant can stand in their place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import fx, nn

from .graph import Branch, ChannelGroup
from .readers import Reader, readers
from .trace import Trace, operation

# What still runs when the layers before it are gone, whatever the shapes are.
_INDIFFERENT = frozenset(
    {
        *("relu", "relu_", "relu6", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "elu", "gelu", "tanh"),
        *("silu", "silu_", "hardswish", "hardswish_", "sigmoid", "hardsigmoid", "hardsigmoid_", "mul", "dropout"),
        *("mean", "adaptive_avg_pool2d"),
    }
)
_LAYERS = frozenset({"conv1d", "conv2d", "conv3d", "batch_norm", "_native_batch_norm_legit_no_training"})


def branches(model: nn.Module, trace: Trace, groups: Sequence[ChannelGroup]) -> tuple[Branch, ...]:
    """All that can vanish, in the order of execution.

    Args:
        model: the network.
        trace: of it.
        groups: its channel groups.
    """
    found: dict[int, Branch] = {}  # one at each addition: two constants have no map to be spread over
    for end in readers(trace):
        if _ends_a_branch(trace, end) and (branch := _branch(model, trace, groups, end)):
            found.setdefault(end.uses[0].ends, branch)
    return tuple(found.values())


def _ends_a_branch(trace: Trace, reader: Reader) -> bool:
    """A convolution, alone in what it does, that goes into an addition and can say a mean."""
    use = reader.uses[0]
    if len(reader.uses) > 1 or use.other is None or reader.linear or reader.transposed:
        return False
    addition = trace.nodes[use.ends]
    # A constant is smaller than the sum, so nothing can be added to it in place.
    in_place = operation(addition) == "add_" and addition.args[0] is not use.other
    return bool(reader.norm or reader.bias) and reader.weight.endswith(".weight") and not in_place


def _branch(model: nn.Module, trace: Trace, groups: Sequence[ChannelGroup], end: Reader) -> Branch | None:
    """The branch that a layer ends; None if others need something of it, or if it cannot be told how it would run."""
    unread = _unread(trace, end)
    modules = list(dict.fromkeys(_modules(trace, unread)))
    kinds = {operation(node) for node in unread}
    replaced = all(
        model.get_submodule(name) is not model and not any(model.get_submodule(name).children()) for name in modules
    )
    if not modules or not replaced or not kinds <= _INDIFFERENT | _LAYERS or _needed(trace, unread, modules):
        return None
    weights = {f"{name}.weight" for name in modules} | {end.weight}
    inner = [group for group in groups if set(group.producers) & set(modules)]
    closed = all(
        set(group.producers) <= set(modules) and {each.weight for each in group.consumers} <= weights for group in inner
    )
    last = [group for group in inner if any(each.weight == end.weight for each in group.consumers)]
    if not closed or len(last) != 1 or not _all_of_it(last[0], end):
        return None
    names = [group.name for group in inner if group is not last[0]]
    norm = end.norm.weight.rpartition(".")[0] if end.norm else ""
    return Branch(end.name, norm, tuple(modules), (*names, last[0].name))


def _unread(trace: Trace, end: Reader) -> set[fx.Node]:
    """Operations whose results reach nothing but this layer."""
    at, found = end.uses[0].at, {trace.nodes[end.uses[0].at]}
    for node in reversed(trace.nodes[:at]):
        if node.op == "call_function" and node.users and found.issuperset(node.users):
            found.add(node)
    return found - {trace.nodes[at]}


def _modules(trace: Trace, unread: set[fx.Node]) -> Iterator[str]:
    """Owners of the parameters that these operations read."""
    for node in trace.nodes:
        if node in unread:
            yield from (name.rpartition(".")[0] for each in node.all_input_nodes if (name := trace.parameter(each)))


def _needed(trace: Trace, unread: set[fx.Node], modules: Sequence[str]) -> bool:
    """Whether a parameter of these modules is read elsewhere, or a layer has a weight that is none of theirs."""
    for node in trace.nodes:
        mine = [name for each in node.all_input_nodes if (name := trace.parameter(each))]
        if node not in unread and any(name.rpartition(".")[0] in modules for name in mine):
            return True
        if node in unread and operation(node) in _LAYERS and not mine:
            return True
    return False


def _all_of_it(group: ChannelGroup, end: Reader) -> bool:
    """Whether the layer reads channels of this group only."""
    mine = [each for each in group.consumers if each.weight == end.weight]
    return all(bool(np.isin(each.channels, group.channels).all()) for each in mine)
