"""One pass of labels through a network: the state of it, and the table of rules that operations look up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from .labels import FIXED, Book, Site
from .trace import Trace, arguments, operation, place, shape

Labels = Any  # a label tensor, a list of them for operations with several outputs, or None
Rule = Callable[["Pass", fx.Node, dict[str, Any]], Labels]

RULES: dict[str, Rule] = {}


class Pass:
    """One pass of labels through a network."""

    def __init__(self, trace: Trace, book: Book) -> None:
        self.trace, self.book = trace, book
        self.values: dict[str, Labels] = {}

    def step(self, node: fx.Node) -> None:
        """Give a node's outputs their labels."""
        if node.op == "call_function":
            rule = _rule(node)
            given = arguments(node) if hasattr(node.target, "_schema") else {}
            self.values[node.name] = rule(self, node, given)
        elif node.op == "output":
            for source in node.all_input_nodes:
                self.freeze(source, "its filters are outputs of the network")
        elif not self.trace.parameter(node):
            self.values[node.name] = fixed(node)

    def of(self, node: object) -> Labels:
        """Labels of a node, of a list of nodes, or of a Python number (FIXED)."""
        if isinstance(node, list | tuple):
            return [self.of(each) for each in node]
        if not isinstance(node, fx.Node):
            return torch.tensor(FIXED)
        if node.name not in self.values:
            self.values[node.name] = self._waiting(node)
        return self.values[node.name]

    def _waiting(self, node: fx.Node) -> torch.Tensor:
        """Labels of a parameter that an elementwise or shape operation reads."""
        name, size = self.trace.parameter(node), shape(node)
        long = [dim for dim, length in enumerate(size) if length > 1]
        if len(long) != 1:
            self.book.whole(name, "an elementwise operation")
            return torch.tensor(FIXED).expand(size)
        labels = self.book.parameter(Site(name, long[0]), size[long[0]])
        return labels.reshape([length if dim == long[0] else 1 for dim, length in enumerate(size)])

    def freeze(self, node: fx.Node, why: str) -> None:
        """Freeze all channels of a node, a list's too."""
        labels = self.of(node)
        for each in labels if isinstance(labels, list) else [labels]:
            if each is not None:
                self.book.freeze(lean(each), why)

    def same_along(self, labels: torch.Tensor, dims: Sequence[int], why: str, *, mixed: bool = False) -> torch.Tensor:
        """Unify labels along dimensions; those dimensions get size 1."""
        dims = [dim % labels.dim() for dim in dims]
        if any(varies(labels, dim) for dim in dims):
            short = lean(labels)
            (self.book.mix if mixed else self.book.unify)(first_of(short, dims).expand(short.shape), short, why)
        return first_of(labels, dims)


def _rule(node: fx.Node) -> Rule:
    name = operation(node)
    if name in RULES:
        return RULES[name]
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return RULES["pointwise"]
    return unknown


def register(*names: str) -> Callable[[Rule], Rule]:
    """Make a function the rule of some operations."""

    def add(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return add


def unknown(run: Pass, node: fx.Node, _: dict[str, Any]) -> Labels:
    """The rule of operations that have none: what reaches them stays."""
    for source in node.all_input_nodes:
        if run.trace.parameter(source):
            run.book.whole(run.trace.parameter(source), place(node))
        else:
            run.freeze(source, f"its output enters {place(node)}, which is not understood")
    return fixed(node)


@register("_assert_tensor_metadata", "_guards_fn", "sym_constrain_range_for_size", "_assert_scalar")
def _nothing(_: Pass, __: fx.Node, ___: dict[str, Any]) -> Labels:
    return None


def fixed(node: fx.Node) -> Labels:
    """FIXED in the shape of a node's outputs."""

    def one(value: object) -> Labels:
        if isinstance(value, torch.Tensor):
            return torch.tensor(FIXED).expand(value.shape)
        return [one(each) for each in value] if isinstance(value, list | tuple) else None

    return one(node.meta.get("val"))


def varies(labels: torch.Tensor, dim: int) -> bool:
    """Whether labels differ along a dimension."""
    if labels.dim() == 0 or labels.shape[dim] < 2 or labels.stride(dim) == 0:
        return False
    return not torch.equal(labels.narrow(dim, 0, 1).expand(labels.shape), labels)


def first_of(labels: torch.Tensor, dims: Iterable[int]) -> torch.Tensor:
    """The labels at index 0 of some dimensions, which get size 1."""
    for dim in dims:
        labels = labels.narrow(dim, 0, 1)
    return labels


def lean(*labels: torch.Tensor) -> Any:
    """Tensors of one shape without the dimensions along which none of them varies; those get size 1."""
    dims = [dim for dim in range(labels[0].dim()) if not any(varies(each, dim) for each in labels)]
    thin = [first_of(each, dims) for each in labels]
    return thin[0] if len(thin) == 1 else thin
