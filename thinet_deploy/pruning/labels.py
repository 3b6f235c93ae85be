"""Labels: which channels go together, found by letting every filter's label run through the network.

A label is a number; the label tensor of a value has its shape and says for each element whose channel it is.
`FIXED` marks elements that are nobody's channel, such as those of the input image. The rules tell a `Book` what
the operations demand of labels: `Draft` collects it; `Check` verifies that a pruned network demands nothing else.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

FIXED = 0
# Labels from here on are indices of parameters that wait for the channels they meet.
PARAMETER = 1 << 40


class Site(NamedTuple):
    """A dimension of a parameter or buffer."""

    parameter: str
    dim: int

    @property
    def module(self) -> str:
        """Name of the parameter's module."""
        return self.parameter.rpartition(".")[0]


@dataclass(frozen=True)
class Use:
    """The channels along a site.

    Attributes:
        labels: one per index; for the inputs of a grouped convolution, over all of its groups.
        groups: of that convolution, else 1.
        place: operation and line.
    """

    labels: torch.Tensor
    groups: int = 1
    place: str = ""


@dataclass(frozen=True)
class Balance:
    """Blocks of channels that have to keep equal numbers.

    Attributes:
        blocks: labels, (blocks, size).
        place: operation and line.
        every: whether there are as many blocks whatever goes, as with the groups of a convolution.
    """

    blocks: torch.Tensor
    place: str
    every: bool = False


class Book(Protocol):
    """What the rules tell of labels; `place` is the operation and its line."""

    def define(self, site: Site, size: int) -> torch.Tensor:
        """Labels of the channels that a producer's weight makes, shape (size,)."""

    def produces(self, site: Site) -> bool:
        """Whether a weight is known as a producer; thinned to one input per group, it looks like a depthwise one."""

    def use(self, site: Site, labels: torch.Tensor, place: str, groups: int = 1) -> None:
        """Channels meet the indices of a parameter."""

    def parameter(self, site: Site, size: int) -> torch.Tensor:
        """Labels of a parameter's indices that wait for channels, shape (size,)."""

    def whole(self, parameter: str, place: str) -> None:
        """An operation reads a parameter in a way that nothing of it can go."""

    def unify(self, one: torch.Tensor, other: torch.Tensor, place: str) -> None:
        """Elements of two tensors stand at the same index; a FIXED one holds the other."""

    def mix(self, one: torch.Tensor, other: torch.Tensor, place: str) -> None:
        """As `unify`, because an operation computes one from the other: they go together or stay."""

    def freeze(self, labels: torch.Tensor, why: str) -> None:
        """These channels have to stay."""

    def balance(self, blocks: torch.Tensor, place: str, *, every: bool = False) -> None:
        """Every row of `blocks` has to keep as many channels as the others; `every`: at least one."""


@dataclass
class Draft:
    """A Book of a network as it is: a union-find with reasons.

    Attributes:
        sites: parameter dimensions that channels run along; complete after `settle`.
        producers: sites whose indices are filters, in the order of execution.
        balances: cardinality constraints.
    """

    sites: dict[Site, Use] = field(default_factory=dict)
    producers: list[Site] = field(default_factory=list)
    balances: list[Balance] = field(default_factory=list)
    _waiting: dict[Site, torch.Tensor] = field(default_factory=dict)
    _met: dict[int, int] = field(default_factory=dict)
    _whole: dict[str, str] = field(default_factory=dict)
    _parent: dict[int, int] = field(default_factory=dict)
    _frozen: dict[int, str] = field(default_factory=lambda: {FIXED: "it belongs to no filter"})
    _mixed: dict[int, str] = field(default_factory=dict)
    _next: int = FIXED + 1
    _next_parameter: int = PARAMETER

    def define(self, site: Site, size: int) -> torch.Tensor:
        """See Book. A weight that is called again makes the same channels again."""
        if site not in self.sites:
            self.sites[site] = Use(torch.arange(self._next, self._next + size))
            self._next += size
        if site not in self.producers:
            self.producers.append(site)
        return self.sites[site].labels

    def produces(self, site: Site) -> bool:
        """See Book."""
        return site in self.producers

    def use(self, site: Site, labels: torch.Tensor, place: str, groups: int = 1) -> None:
        """See Book."""
        if site in self.sites:
            self.unify(self.sites[site].labels, labels, place)
        else:
            self.sites[site] = Use(labels, groups, place)

    def parameter(self, site: Site, size: int) -> torch.Tensor:
        """See Book."""
        if site not in self._waiting:
            self._waiting[site] = torch.arange(self._next_parameter, self._next_parameter + size)
            self._next_parameter += size
        return self._waiting[site]

    def whole(self, parameter: str, place: str) -> None:
        """See Book."""
        self._whole.setdefault(parameter, place)

    def unify(self, one: torch.Tensor, other: torch.Tensor, place: str) -> None:
        """See Book."""
        for a, b in _pairs(one, other):
            if FIXED in {a, b}:
                self._hold(max(a, b), f"{place} puts it beside values that are no filter's")
                continue
            if a >= PARAMETER > b or b >= PARAMETER > a:
                self._met.setdefault(max(a, b), min(a, b))
            first, second = sorted((self.find(a), self.find(b)))
            if first != second:
                self._parent[second] = first
                for reasons in (self._frozen, self._mixed):
                    if second in reasons:
                        reasons.setdefault(first, reasons.pop(second))

    def mix(self, one: torch.Tensor, other: torch.Tensor, place: str) -> None:
        """See Book."""
        self.unify(one, other, place)
        for label in distinct(one):
            self._mixed.setdefault(self.find(label), f"{place} mixes its channels")

    def freeze(self, labels: torch.Tensor, why: str) -> None:
        """See Book."""
        for label in distinct(labels):
            self._hold(label, why)

    def balance(self, blocks: torch.Tensor, place: str, *, every: bool = False) -> None:
        """See Book."""
        self.balances.append(Balance(blocks, place, every))

    def find(self, label: int) -> int:
        """The label that stands for all that go together with this one."""
        root = label
        while (above := self._parent.get(root, root)) != root:
            root = above
        while (above := self._parent.get(label, label)) != root:
            self._parent[label], label = root, above
        return root

    def roots(self, labels: torch.Tensor) -> torch.Tensor:
        """`find` of every element; FIXED where it has to stay."""
        found = {label: self.find(label) for label in distinct(labels)}
        flat = [FIXED if found[label] in self._frozen else found[label] for label in labels.flatten().tolist()]
        return torch.tensor(flat, dtype=torch.int64).reshape(labels.shape)

    def reason(self, label: int) -> str:
        """Why a channel has to stay; "" if it does not."""
        return self._frozen.get(self.find(label), "")

    def mixed(self, label: int) -> str:
        """Which operation ties a channel to others of its producer; "" if none does."""
        return self._mixed.get(self.find(label), "")

    def settle(self) -> None:
        """Make sites of the parameters that waited for channels, once all operations have run."""
        member = {self.find(label): label for use in self.sites.values() for label in use.labels.tolist()}
        for site, indices in self._waiting.items():
            labels = [self._met.get(index, member.get(self.find(index), FIXED)) for index in indices.tolist()]
            if any(labels):
                self.use(site, torch.tensor(labels), "an elementwise operation")
        for site, use in self.sites.items():
            if site.parameter in self._whole:
                self.freeze(use.labels, f"{self._whole[site.parameter]} reads {site.parameter} whole")

    def _hold(self, label: int, why: str) -> None:
        self._frozen.setdefault(self.find(label), why)


class MismatchError(Exception):
    """A pruned network puts channels together that did not stand together in the original."""


@dataclass
class Check:
    """A Book of a pruned network, against the draft of the original.

    Attributes:
        draft: of the original.
        keep: site → the original's indices that stay.
    """

    draft: Draft
    keep: Mapping[Site, list[int]]
    _uses: dict[Site, torch.Tensor] = field(default_factory=dict)
    _waiting: dict[Site, torch.Tensor] = field(default_factory=dict)
    _met: dict[int, int] = field(default_factory=dict)
    _next: int = PARAMETER

    def define(self, site: Site, size: int) -> torch.Tensor:
        """See Book: the original's labels of the filters that stay."""
        labels = self.draft.sites[site].labels
        if site in self.keep:
            labels = labels[self.keep[site]]
        if len(labels) != size:
            raise MismatchError(f"{site.parameter} has {size} filters where {len(labels)} were expected")
        return labels

    def produces(self, site: Site) -> bool:
        """See Book."""
        return site in self.draft.producers

    def use(self, site: Site, labels: torch.Tensor, place: str, groups: int = 1) -> None:
        """See Book."""
        before = self._uses.setdefault(site, labels)
        if site in self.draft.producers:
            before = self.define(site, len(labels))
        self.unify(before, labels, place)
        if groups > 1:  # which original group a channel belongs to is told by its index there
            original = self.draft.sites[site].labels.reshape(groups, -1)
            for mine, theirs in zip(labels.reshape(groups, -1), original, strict=True):
                if not set(mine.tolist()) <= set(theirs.tolist()):
                    raise MismatchError("channels move from one group of a convolution to another")

    def parameter(self, site: Site, size: int) -> torch.Tensor:
        """See Book."""
        if site not in self._waiting:
            self._waiting[site] = torch.arange(self._next, self._next + size)
            self._next += size
        return self._waiting[site]

    def whole(self, parameter: str, place: str) -> None:
        """See Book."""

    def unify(self, one: torch.Tensor, other: torch.Tensor, place: str) -> None:
        """See Book."""
        if one.shape != other.shape:
            raise MismatchError(f"{place} meets {tuple(other.shape)} where {tuple(one.shape)} was expected")
        for a, b in _pairs(one, other):
            if FIXED in {a, b}:
                if max(a, b) < PARAMETER and not self.draft.reason(max(a, b)):
                    raise MismatchError(f"{place} puts a filter's channel beside values that are no filter's")
            elif a >= PARAMETER or b >= PARAMETER:
                self._met.setdefault(max(a, b), min(a, b))
            elif self.draft.find(a) != self.draft.find(b):
                raise MismatchError(f"{place} puts channels together that did not belong together")

    mix = unify

    def freeze(self, labels: torch.Tensor, why: str) -> None:
        """See Book."""
        for label in distinct(labels):
            if label < PARAMETER and not self.draft.reason(label):
                raise MismatchError(f"a channel that may go enters what it did not: {why}")

    def balance(self, blocks: torch.Tensor, place: str, *, every: bool = False) -> None:
        """See Book: whether blocks stay balanced was decided when the filters were chosen."""

    def left(self) -> set[int]:
        """Labels of all filters that stay."""
        sites = ((site, self.draft.sites[site].labels) for site in self.draft.producers)
        return {label for site, labels in sites for label in labels[self.keep.get(site, slice(None))].tolist()}

    def orders(self) -> dict[Site, list[int]]:
        """For every site of `keep` the original's indices in the order in which their channels arrive.

        Survivors can be permuted, for instance by a channel shuffle between unequal keep sets.

        Raises:
            MismatchError: other channels arrive than those that stay.
        """
        for site, indices in self._waiting.items():
            met = [self._met.get(index, FIXED) for index in indices.tolist()]
            if any(FIXED < label < PARAMETER for label in met):
                self.use(site, torch.tensor(met), "an elementwise operation")
        return {site: self._order(site, kept) for site, kept in self.keep.items()}

    def _order(self, site: Site, kept: list[int]) -> list[int]:
        arriving = self._uses.get(site)
        if site in self.draft.producers or arriving is None:
            return kept
        places: dict[int, deque[int]] = defaultdict(deque)
        for index in kept:
            places[int(self.draft.sites[site].labels[index])].append(index)
        if len(arriving) != len(kept):
            raise MismatchError(f"{len(arriving)} channels enter {site.parameter} where {len(kept)} were expected")
        order = [places[label].popleft() for label in arriving.tolist() if places[label]]
        if len(order) != len(kept):
            raise MismatchError(f"other channels enter {site.parameter} than those that stay")
        return order


def _pairs(one: torch.Tensor, other: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Different pairs of unequal labels at the same element."""
    pairs = torch.stack([one.flatten(), other.flatten()])
    pairs = pairs[:, pairs[0] != pairs[1]]
    yield from dict.fromkeys(zip(*pairs.tolist(), strict=True))


def distinct(labels: torch.Tensor) -> list[int]:
    """The labels that occur, each once."""
    return list(dict.fromkeys(labels.flatten().tolist()))
