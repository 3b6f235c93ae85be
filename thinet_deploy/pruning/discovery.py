"""From a network to its channel graph, tried out: numbers in the code that count channels are found on the way."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from ..errors import ModelError, UnknownNameError
from ..seeds import generator
from .attributes import Count
from .graph import STAYS, ChannelGraph
from .grouping import group_channels
from .label_pass import Labels, varies
from .labels import Draft, distinct
from .retrace import RetraceError, settled_plan
from .rules import run
from .trace import Inputs, Trace, arguments, operation, owner, place, trace

# Operations whose arguments are often numbers written in the code.
_NUMBERED = frozenset(
    {"split", "split_with_sizes", "slice", "narrow", "view", "reshape", "expand", "pad", "chunk", "unflatten"}
)


def channel_graph(model: nn.Module, inputs: Inputs, *, ignore: Sequence[str] = ()) -> ChannelGraph:
    """Find the channel groups of a network.

    Args:
        model: any network that `torch.export` can trace; set to eval mode, else untouched.
        inputs: example inputs with a batch of at least 2.
        ignore: patterns of producers that stay whole, such as "layer4.*".

    Raises:
        ModelError: the network cannot be traced, or has no convolution.
        UnknownNameError: a pattern is of no layer's name.
    """
    traced, draft = trace(model, inputs), Draft()
    values = run(traced, draft)
    draft.settle()
    if not any("conv" in operation(node) for node in traced.nodes):
        raise ModelError("The network has no convolution, so there are no filters to prune.")
    names = {site: site.parameter.removesuffix(".weight") for site in draft.producers}
    for pattern in ignore:
        meant = [site for site, name in names.items() if fnmatch.fnmatchcase(name, pattern)]
        if not meant:
            raise UnknownNameError("layer for --ignore", pattern, set(names.values()))
        for site in meant:
            draft.freeze(draft.sites[site].labels, "it was asked to stay (--ignore)")
    return _Trial(model, traced, values, draft, inputs).graph()


class _Trial:
    """Prunes some channels and looks whether the network still does the same; else finds out why."""

    def __init__(
        self, model: nn.Module, traced: Trace, values: dict[str, Labels], draft: Draft, inputs: Inputs
    ) -> None:
        self.model, self.trace, self.values, self.draft, self.inputs = model, traced, values, draft, inputs
        self.literals: list[Count] = []
        self.tried = Counter[type[nn.Module]]()

    def graph(self) -> ChannelGraph:
        while True:
            graph = group_channels(self.model, self.trace, self.values, self.draft, self.literals)
            if not graph.groups:
                return graph
            try:
                settled_plan(self.model, graph, _some_channels(graph), self.inputs)
            except RetraceError as error:
                self._repair(error, graph)
            else:
                return graph

    def _repair(self, error: RetraceError, graph: ChannelGraph) -> None:
        """Learn which numbers of the modules that ran count channels; else let stay what reaches the failure."""
        for module in error.modules:
            kind = type(self.model.get_submodule(module))
            alike = [name for name, each in self.model.named_modules() if type(each) is kind]
            others = [literal for literal in self.literals if literal.module not in alike]
            # First the numbers that surely count channels (not the groups of a shuffle), then all that may.
            for sure in (True, False)[self.tried[kind] :]:
                self.tried[kind] += 1
                if found := [literal for name in alike for literal in self._literals(name, graph, sure=sure)]:
                    self.literals = others + found
                    return
        self._freeze(error)

    def _literals(self, module: str, graph: ChannelGraph, *, sure: bool) -> Iterator[Count]:
        """Integer attributes of a module that equal the number of channels that its operations work on.

        If `sure` is asked for, only of channels that are whole cells, whose number does not depend on the choice.
        """
        counted: dict[int, torch.Tensor] = {}
        for node in self.trace.nodes:
            if owner(node) == module and node.op == "call_function":
                for labels in self._lines(node):
                    if not sure or self._whole_cells(labels, graph):
                        counted.setdefault(len(labels), labels)
        for name, value in vars(self.model.get_submodule(module)).items():
            if isinstance(value, int) and not isinstance(value, bool) and value in counted:
                yield Count(module, name, None, counted[value])
            elif isinstance(value, list | tuple):
                parts = self._parts(module, value)
                for index, item in enumerate(value):
                    if isinstance(item, int) and not isinstance(item, bool) and item in counted:
                        yield Count(module, name, index, parts.get(index, counted[item]))

    def _parts(self, module: str, sizes: Sequence[object]) -> dict[int, torch.Tensor]:
        """Index → labels of that part, where a module splits into parts of just these sizes (some may be equal)."""
        for node in self.trace.nodes:
            if owner(node) == module and operation(node) in {"split", "split_with_sizes"}:
                given = arguments(node)
                if given.get("split_sizes") == list(sizes):
                    lines = [_line(part, int(given["dim"])) for part in self.values[node.name]]
                    return {index: line for index, line in enumerate(lines) if bool(self.draft.roots(line).any())}
        return {}

    def _whole_cells(self, labels: torch.Tensor, graph: ChannelGraph) -> bool:
        channels = {
            root: channel
            for axis in graph.axes
            for root, channel in zip(
                self.draft.roots(self.draft.sites[axis.site].labels).tolist(), axis.channels.tolist(), strict=True
            )
        }
        mine = np.array([channels.get(root, STAYS) for root in distinct(self.draft.roots(labels))])
        return not any(
            0 < np.isin(cell := group.channels[group.cells == number], mine).sum() < len(cell)
            for group in graph.groups
            for number in np.unique(group.cells)
        )

    def _lines(self, node: fx.Node) -> Iterator[torch.Tensor]:
        """Labels along the dimensions over which the channels of a node's inputs and outputs vary."""
        for each in [*node.all_input_nodes, node]:
            labels = self.values.get(each.name)
            for tensor in labels if isinstance(labels, list) else [labels]:
                if not isinstance(tensor, torch.Tensor):
                    continue
                for dim in range(tensor.dim()):
                    if varies(tensor, dim) and len(distinct(self.draft.roots(line := _line(tensor, dim)))) > 1:
                        yield line

    def _freeze(self, error: RetraceError) -> None:
        """Let stay what reaches the operations with numbers before the failure, or else ever more around it."""
        for module in [*error.modules, ""]:
            inside = [node for node in self.trace.nodes if node.op == "call_function" and _within(node, module)]
            direct = [node for node in inside if owner(node) == module]
            at_line = [node for node in inside if place(node).endswith(f"({error.line})")]
            there = [node for node in at_line if place(node) == error.place]
            numbered = [node for node in direct if operation(node) in _NUMBERED]
            for nodes in (
                *(_numbers_before(there), there),
                *(_numbers_before(at_line), at_line, numbered, direct, inside),
            ):
                if self._hold(nodes):
                    return
        raise ModelError(
            f"The network cannot be pruned: {error.what} ({error.line or 'place unknown'}).",
            hint="Name the layers to leave whole with --ignore.",
        )

    def _hold(self, nodes: Iterable[fx.Node]) -> bool:
        """Freeze the channels that reach some nodes; whether any of them could go before."""
        held = False
        for node in nodes:
            for line in self._lines(node):
                self.draft.freeze(line, f"{place(node)} works with a fixed number of channels")
                held = True
        return held


def _numbers_before(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The operations with numbers through which channels came from their producers."""
    found, seen, todo = [], set(nodes), [source for node in nodes for source in node.all_input_nodes]
    while todo:
        node = todo.pop()
        if node in seen or "conv" in operation(node) or operation(node) == "linear":
            continue
        seen.add(node)
        if operation(node) in _NUMBERED:
            found.append(node)
        else:
            todo += node.all_input_nodes
    return found


def _within(node: fx.Node, module: str) -> bool:
    name = owner(node)
    return not module or name == module or name.startswith(f"{module}.")


def _line(labels: torch.Tensor, dim: int) -> torch.Tensor:
    return labels.movedim(dim, 0).flatten(1)[:, 0] if labels.dim() > 1 else labels


def _some_channels(graph: ChannelGraph) -> NDArray[np.bool_]:
    """A trial: about three fifths of each group, other ones in every cell."""
    kept = np.zeros(graph.channels, dtype=bool)
    for group in graph.groups:
        share = max(1, round(group.steps * 0.6)) / group.steps
        rng = generator("trial", group.name)
        for cell in np.unique(group.cells):
            members = group.channels[group.cells == cell]
            kept[rng.permutation(members)[: round(len(members) * share)]] = True
    return kept
