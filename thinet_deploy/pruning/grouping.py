"""From labels to channel groups."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import fx, nn

from .branches import branches
from .graph import STAYS, Attribute, Axis, ChannelGraph, ChannelGroup, Channels, Consumer
from .label_pass import Labels
from .labels import FIXED, PARAMETER, Draft, Site, distinct
from .shares import Cell, removable
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
    parts, cells = removable(draft)
    numbers = _Numbers(draft, parts)
    calls = list(_calls(trace, values, draft))
    attributes = (
        Attribute(module, name, index, numbers.of(labels))
        for module, name, index, labels in [*_attributes(model, trace, draft, calls), *map(_fields, literals)]
    )
    work: Counter[str] = Counter()
    for call in calls:
        work[call.weight] += call.positions
    groups = _groups(trace, values, draft, numbers, cells, calls)
    return ChannelGraph(
        tuple(groups),
        branches(model, trace, groups),
        tuple(numbers.axes()),
        tuple(each for each in attributes if (each.channels != STAYS).any()),
        _whole(trace, draft, work),
        numbers.count,
        _joins(trace),
        dict(work),
        draft,
        trace,
    )


class _Numbers:
    """The channels that may go, numbered.

    Attributes:
        parts: roots that go together into a group, for each group.
        count: of the channels.
    """

    def __init__(self, draft: Draft, parts: list[list[int]]) -> None:
        self.draft, self.parts = draft, parts
        self._numbers = {root: number for number, root in enumerate(root for part in parts for root in part)}
        self.count = len(self._numbers)

    def of(self, labels: torch.Tensor) -> Channels:
        """The channels that some labels mean; STAYS where they mean none that may go."""
        found = self.draft.roots(labels).flatten().tolist()
        return np.array([self._numbers.get(root, STAYS) for root in found], dtype=np.int64)

    def axes(self) -> Iterable[Axis]:
        """The dimensions of parameters that hold channels."""
        for site, use in self.draft.sites.items():
            if bool(self.draft.roots(use.labels).any()):
                yield Axis(site, self.of(use.labels), use.groups, site in self.draft.producers)


def _groups(
    trace: Trace,
    values: dict[str, Labels],
    draft: Draft,
    numbers: _Numbers,
    cells: Mapping[int, Cell],
    calls: Iterable[_Call],
) -> list[ChannelGroup]:
    consumers = [
        Consumer(call.weight, call.dim, call.number, numbers.of(call.inputs)) for call in calls if not call.depthwise
    ]
    joined = {root for labels in _joined(trace, values) for root in distinct(draft.roots(labels))}
    made = [(_module_name(site.parameter), draft.roots(draft.sites[site].labels).numpy()) for site in draft.producers]
    sizes, groups = _map_sizes(trace), list[ChannelGroup]()
    for part in numbers.parts:
        mine = numbers.of(torch.tensor(part))
        producers = tuple(name for name, found in made if np.isin(found, part).any())
        kinds = {cell: number for number, cell in enumerate(dict.fromkeys(cells.get(root, ()) for root in part))}
        groups.append(
            ChannelGroup(
                producers=producers,
                channels=mine,
                cells=np.array([kinds[cells.get(root, ())] for root in part], dtype=np.int64),
                consumers=tuple(each for each in consumers if np.isin(each.channels, mine).any()),
                shortcut=not joined.isdisjoint(part),
                map_size=sizes.get(producers[0]),
            )
        )
    return [replace(group, shortcut=True) if _is_trunk(group, groups) else group for group in groups]


def _whole(trace: Trace, draft: Draft, work: Mapping[str, int]) -> dict[str, str]:
    """Layer that ran → why all of its filters, or some, stay."""
    whole = {}
    for site in draft.producers:
        labels = draft.sites[site].labels
        if FIXED in draft.roots(labels) and site.parameter in work:
            whole[_module_name(site.parameter)] = _why_whole(draft, labels)
    for node in trace.nodes:
        if operation(node) in _CONVOLUTIONS and not trace.parameter(arguments(node)["weight"]):
            whole[owner(node)] = "its weight is computed from other parameters"
    return whole


def _fields(literal: Literal) -> tuple[str, str, int | None, torch.Tensor]:
    return literal.module, literal.name, literal.index, literal.labels


def _why_whole(draft: Draft, labels: torch.Tensor) -> str:
    reasons = Counter(reason for label in labels.tolist() if (reason := draft.reason(label)))
    reason, count = reasons.most_common(1)[0]
    return reason if count == len(labels) else f"{sum(reasons.values())} of its {len(labels)} filters: {reason}"


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
