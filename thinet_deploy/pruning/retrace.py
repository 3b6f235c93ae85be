"""The second trace: a pruned network has to put the same channels together as the original.

Python code may shuffle channels, or count them with fixed numbers. So the pruned network is traced again, with the
labels of the filters that stay: consumers get their inputs in the order in which these arrive, and whatever does not
stand where it stood is found, with its place in the code.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from ..errors import ModelError
from .graph import ChannelGraph
from .label_pass import Labels, lean
from .labels import FIXED, PARAMETER, Check, Draft, MismatchError, Site
from .plan import Plan, plan_channels
from .rules import run
from .surgery import apply
from .trace import Inputs, Trace, arguments, operation, place, trace

# Operations that take parts of a dimension.
_TAKING = frozenset({"slice", "split", "split_with_sizes", "chunk", "narrow", "select", "unbind", "tensor_split"})
_TORCH = str(Path(torch.__file__).parent)


@dataclass
class RetraceError(Exception):
    """The pruned network does not run, or does something else than the original.

    Attributes:
        modules: of the user's own code that were running, the innermost first.
        line: "file.py:12" in it, if known.
        what: went wrong.
        place: the operation, with its line; "" if it is not known.
    """

    modules: list[str]
    line: str
    what: str
    place: str = ""


def settled_plan(model: nn.Module, graph: ChannelGraph, kept: NDArray[np.bool_], inputs: Inputs) -> Plan:
    """The plan that keeps some channels, every dimension in the order in which channels arrive there.

    Raises:
        RetraceError: the pruned network does not run, or mixes channels up.
    """
    plan = plan_channels(model, graph, kept)
    thin = apply(plan, model)
    try:
        traced = trace(thin, inputs)
    except ModelError as error:
        raise _failure(thin, inputs, str(error)) from error
    keep = {
        axis.site: list(plan.keep[axis.site.parameter][axis.site.dim])
        for axis in graph.axes
        if axis.site.dim in plan.keep.get(axis.site.parameter, {})
    }
    try:
        orders = _orders(graph, keep, traced)
    except MismatchError as error:
        if (aligned := _aligned(graph, plan, keep, traced)) == keep:
            raise _mismatch(thin, error) from error
        try:
            orders = _orders(graph, aligned, traced)
        except MismatchError as other:
            raise _mismatch(thin, other) from other
    ordered = {name: dict(dims) for name, dims in plan.keep.items()}
    for site, order in orders.items():
        ordered[site.parameter][site.dim] = tuple(order)
    return plan.model_copy(update={"keep": ordered})


def _orders(graph: ChannelGraph, keep: Mapping[Site, list[int]], pruned: Trace) -> dict[Site, list[int]]:
    """For every site of `keep` its indices in the order in which channels arrive; MismatchError as `settled_plan`."""
    book = Check(graph.draft, keep)
    _same_parts(graph, book, pruned, run(pruned, book))
    _same_numbers(graph, pruned)
    return book.orders()


def _aligned(graph: ChannelGraph, plan: Plan, keep: Mapping[Site, list[int]], pruned: Trace) -> dict[Site, list[int]]:
    """`keep`, with the filters of later producers in the order in which they meet those of earlier ones.

    A layer whose channels are added to shuffled ones has to make them in the shuffled order. A filter of a grouped
    convolution stays in its group.
    """
    met = Draft(producers=list(graph.draft.producers))
    run(pruned, met)
    aligned, belongs = dict(keep), dict[int, int]()  # what the pruned network puts together → the original's channel
    for site in sorted(graph.draft.producers, key=lambda site: site in keep):
        if site not in met.sites:
            continue
        channels = graph.draft.roots(graph.draft.sites[site].labels).tolist()
        places = [met.find(label) for label in met.sites[site].labels.tolist()]
        kept = keep.get(site, list(range(len(channels))))
        if site in keep:
            size = len(kept) // plan.grouped.get(site.parameter, 1)
            blocks = (slice(start, start + size) for start in range(0, len(kept), size))
            kept = [each for block in blocks for each in _placed(kept[block], places[block], channels, belongs)]
            aligned[site] = kept
        for index, where in zip(kept, places, strict=True):
            belongs.setdefault(where, channels[index])
    return aligned


def _placed(kept: list[int], places: list[int], channels: list[int], belongs: Mapping[int, int]) -> list[int]:
    """The filters that belong to some places there, the others in their own order."""
    left, order = list(kept), dict[int, int]()
    for position, where in enumerate(places):
        fitting = [index for index in left if channels[index] == belongs.get(where)]
        if fitting:
            order[position] = fitting[0]
            left.remove(fitting[0])
    return [order[position] if position in order else left.pop(0) for position in range(len(kept))]


def _same_parts(graph: ChannelGraph, book: Check, pruned: Trace, after: Mapping[str, Labels]) -> None:
    """Parts taken of channels have to be the same parts: what happens to each by itself leaves no trace in labels.

    Raises:
        MismatchError: a slice or split takes other channels than those that are left of it, or the groups of a
            normalisation are other ones.
    """
    taken = _pairs_of(graph.trace, pruned, lambda node: operation(node) in _TAKING)
    normed = _pairs_of(graph.trace, pruned, lambda node: operation(node) == "group_norm")
    if not taken and not normed:
        return
    before, left = run(graph.trace, Check(graph.draft, {})), book.left()
    roots = {graph.draft.find(label) for label in left}
    for one, other in taken:
        parts = [part & roots for part in _channels(graph.draft, before[one.name])]
        if parts != _channels(graph.draft, after[other.name]):
            raise _at(other, f"{place(other)} takes other channels than before")
    for one, other in normed:
        groups = [part & left for part in _norm_groups(one, before)]
        if [part for part in groups if part] != [part for part in _norm_groups(other, after) if part]:
            raise _at(other, f"{place(other)} puts other channels into a group than before")


def _same_numbers(graph: ChannelGraph, pruned: Trace) -> None:
    """Raise MismatchError where Python computed another number for an elementwise operation, as from a shape."""
    for one, other in _pairs_of(graph.trace, pruned, _elementwise):
        if _numbers(one) != _numbers(other):
            raise _at(other, f"{place(other)} works with {_numbers(other)} where it was {_numbers(one)}")


def _pairs_of(ours: Trace, theirs: Trace, which: Callable[[fx.Node], bool]) -> list[tuple[fx.Node, fx.Node]]:
    """Operations of a kind in both networks, in order; none where these differ, of which the proof will tell."""
    mine, others = (
        [node for node in each.nodes if node.op == "call_function" and which(node)] for each in (ours, theirs)
    )
    alike = [operation(node) for node in mine] == [operation(node) for node in others]
    return list(zip(mine, others, strict=True)) if alike else []


def _elementwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _numbers(node: fx.Node) -> list[float]:
    """The plain numbers among an operation's arguments."""
    return [each for each in arguments(node).values() if isinstance(each, int | float)]


def _norm_groups(node: fx.Node, values: Mapping[str, Labels]) -> list[set[int]]:
    """The channels of every group of a normalisation."""
    given = arguments(node)
    labels = values[given["input"].name].movedim(1, 0).flatten(1)[:, 0].reshape(int(given["num_groups"]), -1)
    return [{label for label in group if FIXED < label < PARAMETER} for group in labels.tolist()]


def _at(node: fx.Node, what: str) -> MismatchError:
    error = MismatchError(what)
    error.node = node  # type: ignore[attr-defined]
    return error


def _channels(draft: Draft, labels: Labels) -> list[set[int]]:
    """Of each part, by their roots: which of the filters that are added up gives a sum its label is no matter."""
    parts = labels if isinstance(labels, list) else [labels]
    found = [set(lean(part).unique().tolist()) if part is not None else set() for part in parts]
    return [{draft.find(label) for label in part if FIXED < label < PARAMETER} for part in found]


def _mismatch(model: nn.Module, error: MismatchError) -> RetraceError:
    node = getattr(error, "node", None)
    if not isinstance(node, fx.Node):
        return RetraceError([""], "", str(error))
    stack = [name.partition("@")[0] for name, _ in node.meta.get("nn_module_stack", {}).values()]
    line = place(node).partition(" (")[2].removesuffix(")")
    return RetraceError(_users_own(model, stack), line, str(error), place(node))


def _failure(model: nn.Module, inputs: Inputs, message: str) -> RetraceError:
    """Run the network as it is to see where it fails."""
    stack: list[str] = []
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda _, __, name=name: stack.append(name)))
        hooks.append(module.register_forward_hook(lambda _, __, ___: stack.pop() and None))
    try:
        with torch.inference_mode():
            model(*inputs)
    except Exception as error:  # noqa: BLE001 - the user's own code may raise anything
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_TORCH)]
        line = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        return RetraceError(_users_own(model, stack), line, str(error).splitlines()[0] if str(error) else repr(error))
    finally:
        for hook in hooks:
            hook.remove()
    return RetraceError([""], "", message)


def _users_own(model: nn.Module, stack: list[str]) -> list[str]:
    """The modules whose forward() is not torch's, the innermost first."""
    own = [name for name in stack if not type(model.get_submodule(name)).__module__.startswith("torch.nn.")]
    return own[::-1] or [""]
