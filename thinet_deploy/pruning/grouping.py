"""From labels to channel groups."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import fx, nn

from .branches import branches
from .graph import STAYS, Attribute, Axis, ChannelGraph, ChannelGroup, Channels, Consumer
from .label_pass import Labels
from .labels import FIXED, PARAMETER, Balance, Draft, Site, distinct
from .trace import Trace, arguments, first_names, operation, owner, shape

_CONVOLUTIONS = frozenset(f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3))
_ADDITIONS = frozenset({"add", "add_", "sub", "sub_"})


@dataclass(frozen=True)
class Literal:
    """A number in a module of the user's that was found to count channels.

    Attributes:
        module: its name.
        name: of the attribute.
        index: in a list or tuple; None for a plain number.
        labels: that it counts.
    """

    module: str
    name: str
    index: int | None
    labels: torch.Tensor


def group_channels(
    model: nn.Module, trace: Trace, values: dict[str, Labels], draft: Draft, literals: Sequence[Literal]
) -> ChannelGraph:
    """Number the channels that may go, and gather what belongs to them.

    Args:
        model: the network.
        trace: of it.
        values: the labels of all nodes.
        draft: what the operations demanded; channels that cannot keep their cardinality constraints are frozen in it.
        literals: numbers in the user's modules that count channels.
    """
    constraints = _feasible(draft)
    roots = {site: draft.roots(use.labels) for site, use in draft.sites.items()}
    parts = _parts([roots[site] for site in draft.producers] + [draft.roots(each.blocks) for each in constraints])
    cells = _cells(constraints, draft)
    for part in parts:
        if (why := _hopeless(part, cells, constraints, draft)) is not None:
            draft.freeze(torch.tensor(part), why)
    parts = [part for part in parts if not draft.reason(part[0])]
    roots = {site: draft.roots(use.labels) for site, use in draft.sites.items()}
    numbers = {root: number for number, root in enumerate(root for part in parts for root in part)}

    def channels(labels: torch.Tensor) -> Channels:
        found = draft.roots(labels).flatten().tolist()
        return np.array([numbers.get(root, STAYS) for root in found], dtype=np.int64)

    axes = tuple(
        Axis(site, channels(use.labels), use.groups, site in draft.producers)
        for site, use in draft.sites.items()
        if bool(draft.roots(use.labels).any())
    )
    calls = list(_calls(trace, values, draft))
    consumers = [
        Consumer(call.weight, call.dim, call.number, channels(call.inputs)) for call in calls if not call.depthwise
    ]
    joined = {root for labels in _joined(trace, values) for root in distinct(draft.roots(labels))}
    places = {site: _module_name(site.parameter) for site in draft.producers}
    sizes = _map_sizes(trace)
    groups = []
    for part in parts:
        mine = np.array([numbers[root] for root in part], dtype=np.int64)
        producers = tuple(places[site] for site in draft.producers if np.isin(roots[site].numpy(), part).any())
        cell_numbers = {cell: number for number, cell in enumerate(dict.fromkeys(cells.get(root, ()) for root in part))}
        groups.append(
            ChannelGroup(
                producers=producers,
                channels=mine,
                cells=np.array([cell_numbers[cells.get(root, ())] for root in part], dtype=np.int64),
                consumers=tuple(each for each in consumers if np.isin(each.channels, mine).any()),
                shortcut=not joined.isdisjoint(part),
                map_size=sizes.get(producers[0]),
            )
        )
    groups = [replace(group, shortcut=True) if _is_trunk(group, groups) else group for group in groups]
    attributes = [
        Attribute(module, name, index, counted)
        for module, name, index, labels in [*_attributes(model, trace, draft, calls), *map(_fields, literals)]
        if ((counted := channels(labels)) != STAYS).any()
    ]
    work: Counter[str] = Counter()
    for call in calls:
        work[call.weight] += call.positions
    whole = {}
    for site in draft.producers:
        if FIXED in roots[site] and site.parameter in work:
            whole[places[site]] = _why_whole(draft, draft.sites[site].labels)
    for node in trace.nodes:
        if operation(node) in _CONVOLUTIONS and not trace.parameter(arguments(node)["weight"]):
            whole[owner(node)] = "its weight is computed from other parameters"
    return ChannelGraph(
        tuple(groups),
        branches(model, trace, groups),
        axes,
        tuple(attributes),
        whole,
        len(numbers),
        _joins(trace),
        dict(work),
        draft,
        trace,
    )


def _fields(literal: Literal) -> tuple[str, str, int | None, torch.Tensor]:
    return literal.module, literal.name, literal.index, literal.labels


def _why_whole(draft: Draft, labels: torch.Tensor) -> str:
    reasons = Counter(reason for label in labels.tolist() if (reason := draft.reason(label)))
    reason, count = reasons.most_common(1)[0]
    return reason if count == len(labels) else f"{sum(reasons.values())} of its {len(labels)} filters: {reason}"


# --- cardinality -------------------------------------------------------------------------------------------------


def _feasible(draft: Draft) -> list[Balance]:
    """The constraints that bind; channels of those that cannot be kept are frozen."""
    for each in draft.balances:
        if each.every and any(int(row[0]) != FIXED and len(row.unique()) == 1 for row in draft.roots(each.blocks)):
            draft.freeze(each.blocks, f"{each.place} has groups of a single channel")
    balances = [each for each in draft.balances if not _trivial(draft.roots(each.blocks))]
    changed = True
    while changed:
        changed = False
        for each in balances:
            roots = draft.roots(each.blocks)
            held = (roots == FIXED).sum(1)
            if bool((held != held[0]).any()) and bool(roots.any()):
                draft.freeze(
                    roots[roots != FIXED], f"{each.place} needs equal numbers in each part, and some must stay"
                )
                changed = True
    return [each for each in balances if bool(draft.roots(each.blocks).any())]


def _trivial(roots: torch.Tensor) -> bool:
    """Whether every block goes or stays as one (49 positions of one channel): no constraint."""
    return bool((roots == roots[:, :1]).all())


def _cells(constraints: Iterable[Balance], draft: Draft) -> dict[int, tuple[tuple[int, ...], ...]]:
    """Root → in which blocks of which constraints its members are; equal tuples may replace one another."""
    cells: defaultdict[int, list[tuple[int, ...]]] = defaultdict(list)
    for number, each in enumerate(constraints):
        roots = draft.roots(each.blocks)
        blocks = len(each.blocks)
        members: defaultdict[int, list[int]] = defaultdict(lambda blocks=blocks: [0] * blocks)  # type: ignore[misc]
        for block, row in enumerate(roots.tolist()):
            for root in row:
                members[root][block] += 1
        for root, counts in members.items():
            least = min(counts)
            if root != FIXED and max(counts) > least:
                cells[root].append((number, *(count - least for count in counts)))
    return {root: tuple(signature) for root, signature in cells.items()}


def _hopeless(
    part: list[int], cells: dict[int, tuple[tuple[int, ...], ...]], constraints: Sequence[Balance], draft: Draft
) -> str | None:
    """Why nothing of a group can go."""
    sizes = Counter(cells.get(root, ()) for root in part)
    if math.gcd(*sizes.values()) > 1:
        return None
    if len(part) == 1:
        return draft.mixed(part[0]) or "it is a single filter"
    constrained = [constraints[signature[0][0]].place for signature in sizes if signature]
    return f"{constrained[0] if constrained else 'the network'} leaves no choice of equal shares"


def _parts(lines: Iterable[torch.Tensor]) -> list[list[int]]:
    """Roots that are connected because they appear in one line; in the order of first appearance."""
    parent: dict[int, int] = {}

    def find(root: int) -> int:
        while parent[root] != root:
            parent[root] = parent[parent[root]]
            root = parent[root]
        return root

    for line in lines:
        present = [root for root in dict.fromkeys(line.flatten().tolist()) if root != FIXED]
        for root in present:
            parent.setdefault(root, root)
            parent[find(root)] = find(present[0])
    parts: dict[int, list[int]] = {}
    for root in parent:
        parts.setdefault(find(root), []).append(root)
    return list(parts.values())


# --- what the trace says -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """A convolution or linear layer that ran."""

    node: fx.Node
    weight: str
    dim: int
    number: int
    inputs: torch.Tensor
    depthwise: bool
    positions: int


def _calls(trace: Trace, values: dict[str, Labels], draft: Draft) -> Iterable[_Call]:
    numbers: Counter[str] = Counter()
    for node in trace.nodes:
        kind = operation(node)
        if kind not in _CONVOLUTIONS and kind != "linear":
            continue
        given = arguments(node)
        weight, source = trace.parameter(given["weight"]), given["input"]
        if not weight:
            continue
        groups = int(given.get("groups", 1))
        inputs, dim = values[source.name], -1 if kind == "linear" else 1
        line = inputs.movedim(dim, 0).flatten(1)[:, 0]
        size = shape(source) if "transpose" in kind else shape(node)
        positions = size[1:-1].numel() if kind == "linear" else size[2:].numel()
        yield _Call(
            node,
            weight,
            int("transpose" not in kind),
            numbers[weight],
            line,
            groups == len(line) and groups > 1,
            positions,
        )
        numbers[weight] += 1


def _joined(trace: Trace, values: dict[str, Labels]) -> Iterable[torch.Tensor]:
    """Labels of channels that an addition joins."""
    for node in trace.nodes:
        sources = [source for source in node.args[:2] if isinstance(source, fx.Node)]
        if operation(node) in _ADDITIONS and len(sources) == 2:
            one, other = (values.get(source.name) for source in sources)
            if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
                varying = [int(each.flatten()[0]) for each in (one, other) if each.numel()]
                if all(FIXED < label < PARAMETER for label in varying) and varying[0] != varying[1]:
                    yield one


def _is_trunk(group: ChannelGroup, groups: Sequence[ChannelGroup]) -> bool:
    """Whether a residual block begins here: two of the readers lead to one addition, one of them directly.

    So the stem of a ResNet-50 belongs to its residual streams, though no addition stands behind it.
    """
    home = {producer: each for each in groups for producer in each.producers}
    readers = {name for consumer in group.consumers if (name := _module_name(consumer.weight)) in home}
    for direct in readers:
        todo, seen = [home[name] for name in readers - {direct}], {group.name}
        while home[direct].shortcut and todo:
            each = todo.pop()
            if each is home[direct]:
                return True
            if each.name not in seen:
                seen.add(each.name)
                todo += [home[name] for one in each.consumers if (name := _module_name(one.weight)) in home]
    return False


def _joins(trace: Trace) -> bool:
    """Whether branches meet: an operation reads two values that were computed, or one and the network's input."""
    computed = {node for node in trace.nodes if node.op == "call_function"}
    images = {node for node in trace.nodes if node.op == "placeholder" and not trace.parameter(node)}
    constant = {node for node in trace.nodes if not (set(node.all_input_nodes) & (computed | images))} - images
    return any(len(set(node.all_input_nodes) - constant) > 1 for node in computed)


def _map_sizes(trace: Trace) -> dict[str, tuple[int, int]]:
    sizes: dict[str, tuple[int, int]] = {}
    for node in trace.nodes:
        if "conv" in operation(node) and len(shape(node)) == 4:
            weight = trace.parameter(node.args[1])
            height, width = shape(node)[2:]
            sizes.setdefault(_module_name(weight), (height, width))
    return sizes


def _module_name(parameter: str) -> str:
    """A layer's name; a parameter that is used directly keeps its own."""
    return parameter.removesuffix(".weight")


# torch's own modules → their number of channels; of a convolution and a linear layer, one for either dimension.
_NUMBERS: dict[type[nn.Module], str] = {
    nn.modules.batchnorm._NormBase: "num_features",  # noqa: SLF001 - of all batch and instance norms
    nn.GroupNorm: "num_channels",
    nn.LayerNorm: "normalized_shape",
    nn.PReLU: "num_parameters",
}


def _counting(module: nn.Module, site: Site) -> str:
    """The attribute that counts what a dimension of a parameter holds; "" for a module of the user's."""
    if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):  # noqa: SLF001 - of all convolutions
        if not site.parameter.endswith("weight"):
            return ""
        outwards = site.dim == int(getattr(module, "transposed", False))
        return f"{'out' if outwards else 'in'}_{'features' if isinstance(module, nn.Linear) else 'channels'}"
    return next((name for kind, name in _NUMBERS.items() if isinstance(module, kind)), "")


def _attributes(
    model: nn.Module, trace: Trace, draft: Draft, calls: Iterable[_Call]
) -> Iterable[tuple[str, str, int | None, torch.Tensor]]:
    """(module, attribute, index, labels that it counts) of torch's own modules."""
    owners = _owners(model)
    for site, use in draft.sites.items():
        for name in owners[site.parameter]:
            module = model.get_submodule(name)
            if found := _counting(module, site):
                yield name, found, 0 if isinstance(module, nn.LayerNorm) else None, use.labels
    for call in calls:
        for name in owners[call.weight]:
            if call.depthwise and isinstance(model.get_submodule(name), nn.modules.conv._ConvNd):  # noqa: SLF001 - of all convolutions
                for attribute in ("in_channels", "groups"):
                    yield name, attribute, None, call.inputs
    yield from _norm_groups(model, trace, draft)


def _owners(model: nn.Module) -> dict[str, list[str]]:
    """Parameter → the modules that hold it; tied weights have several."""
    owners: defaultdict[str, list[str]] = defaultdict(list)
    for each, parameter in first_names(model).items():
        owners[parameter].append(each.rpartition(".")[0])
    return owners


def _norm_groups(model: nn.Module, trace: Trace, draft: Draft) -> Iterable[tuple[str, str, int | None, torch.Tensor]]:
    """As `_attributes`, the number of groups of GroupNorms."""
    for node in trace.nodes:
        if operation(node) == "group_norm" and isinstance(model.get_submodule(owner(node)), nn.GroupNorm):
            given = arguments(node)
            labels = draft.sites.get(Site(trace.parameter(given["weight"]), 0))
            if labels is not None:
                yield owner(node), "num_groups", None, labels.labels.reshape(int(given["num_groups"]), -1)[:, 0]
