"""Which inputs and filters of a convolution form groups, so that what it says changes least (gcos).

The papers' gcos, group convolution with shuffling (TPAMI 2019), leaves open how groups are found; this is this
project's own way. ThiNet's objective decides, the error of what the layer says: a filter in group g is refitted to
the inputs of g alone, and what it then lacks, Σ_oo − B_og (Σ_gg + λI)⁻¹ B_ogᵀ, is known from second moments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..seeds import generator
from .elimination import Part
from .reconstruction import Ridge

MOST_GROUPS = 8  # sets of groups are enumerated
_STARTS, _TURNS = 8, 20
_IMPROVED = 3
_ROUNDS = 4

Assignment = NDArray[np.int64]


@dataclass(frozen=True)
class Partition:
    """Equal groups of a convolution.

    Attributes:
        groups: how many.
        inputs: input channel → its group, (C,).
        filters: filter → its group, (O,).
    """

    groups: int
    inputs: Assignment
    filters: Assignment


@dataclass(frozen=True)
class Layer:
    """What is known of a convolution that is to be grouped.

    Attributes:
        covariance: Σ of its inputs, (C · s, C · s), with s = kernel positions.
        cross: B, of what it should say with its inputs, (O, C · s).
        sources: input channel → group of the convolution that makes it, (C,); all 0 if that has none. Every group gets
            as many channels of each source, so that a plain channel shuffle brings them there.
        ridge: λ as a share of the inputs' mean variance.
    """

    covariance: torch.Tensor
    cross: torch.Tensor
    sources: Assignment
    ridge: float

    @property
    def size(self) -> int:
        """Kernel positions s."""
        return len(self.covariance) // len(self.sources)


def choose(layer: Layer, groups: int, seed: int) -> Partition:
    """The best partition found: several starts by what single channels say, the best of them improved by the error.

    Args:
        layer: C, O and the channels of each source are multiples of `groups`.
        groups: 2 to MOST_GROUPS.
        seed: of the starts.
    """
    starts = {part.filters.tobytes(): part for part in _starts(layer, groups, seed)}.values()
    first = sorted(starts, key=lambda part: -_gain(layer, part))[:_IMPROVED]
    return max((_improved(layer, part) for part in first), key=lambda part: _gain(layer, part))


def _improved(layer: Layer, part: Partition) -> Partition:
    """Inputs for its filters, filters for these inputs, and so on, as long as that gains."""
    gained = _gain(layer, part)
    for _ in range(_ROUNDS):
        inputs = _inputs_for(layer, part.filters, part.groups)
        gains = _gains(layer, inputs, part.groups)
        filters = balanced(gains, np.zeros(len(gains), np.int64))
        now = float(gains[np.arange(len(gains)), filters].sum())
        if now <= gained * (1 + 1e-9):
            break
        gained, part = now, Partition(part.groups, inputs, filters)
    return part


def by_position(inputs: int, filters: int, groups: int, *, shuffled_from: int = 1) -> Partition:
    """The partition of an ordinary grouped convolution: by position, or behind a channel shuffle of so many groups."""
    order = np.arange(inputs).reshape(shuffled_from, -1).T.flatten()
    where = np.empty(inputs, np.int64)
    where[order] = np.arange(inputs) * groups // inputs
    return Partition(groups, where, np.arange(filters) * groups // filters)


def explained(layer: Layer, part: Partition) -> float:
    """Share of what the ungrouped layer would say of its targets that the grouped one says."""
    ridge = Ridge(layer.covariance.clone(), layer.ridge)
    whole = float((layer.cross * ridge.solve(layer.cross.T).T).sum())
    return _gain(layer, part) / whole if whole > 0 else 1.0


def balanced(gain_ng: NDArray[np.float64], kinds: Assignment) -> Assignment:
    """The assignment of n things to groups with the highest total gain; each group gets as many of every kind.

    Exact: as long as moving things round a cycle of groups gains, they are moved (cycle cancelling, Klein 1967).
    """
    assigned = np.empty(len(gain_ng), np.int64)
    for kind in np.unique(kinds):
        mine = np.flatnonzero(kinds == kind)
        assigned[mine] = _best_of_equal_sizes(gain_ng[mine])
    return assigned


def _best_of_equal_sizes(gain_ng: NDArray[np.float64]) -> Assignment:
    count, groups = gain_ng.shape
    assigned: Assignment = np.arange(count) * groups // count
    slack = 1e-12 * max(1e-300, float(np.abs(gain_ng).max(initial=0.0)))
    while True:
        moves = gain_ng - gain_ng[np.arange(count), assigned][:, None]  # what moving each thing to each group gains
        best = np.stack([moves[assigned == group].max(0) for group in range(groups)])
        cycle = _gaining_cycle(best - slack)
        if not cycle:
            return assigned
        movers = []
        for here, there in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
            mine = np.flatnonzero(assigned == here)
            movers.append((mine[np.argmax(moves[mine, there])], there))
        for thing, there in movers:
            assigned[thing] = there


def _gaining_cycle(gain_gg: NDArray[np.float64]) -> list[int]:
    """Groups round which moves gain in total, found by Bellman and Ford's relaxation; none if there are not."""
    groups = len(gain_gg)
    total, before = np.zeros(groups), np.full(groups, -1)
    changed = -1
    for _ in range(groups):
        reached = total[:, None] + gain_gg
        np.fill_diagonal(reached, -np.inf)
        better = np.flatnonzero(reached.max(0) > total)
        changed = int(better[0]) if len(better) else -1
        if changed < 0:
            return []
        before[better] = reached.argmax(0)[better]
        total[better] = reached.max(0)[better]
    for _ in range(groups):  # so far back that it is on the cycle
        changed = int(before[changed])
    cycle, here = [changed], int(before[changed])
    while here != changed:
        cycle.append(here)
        here = int(before[here])
    return cycle[::-1]


def _starts(layer: Layer, groups: int, seed: int) -> list[Partition]:
    """By position, and where alternating between filters and inputs leads from filters that are like some far apart."""
    one_kind = np.zeros(len(layer.cross), np.int64)
    place = np.zeros(len(layer.sources), np.int64)  # among the channels of the same source, as a shuffle brings them
    for source in np.unique(layer.sources):
        mine = np.flatnonzero(layer.sources == source)
        place[mine] = np.arange(len(mine)) * groups // len(mine)
    found = [Partition(groups, place, balanced(_gains(layer, place, groups), one_kind))]
    for number, energy_oc in enumerate(_energies(layer)):
        for start in range(_STARTS):
            filters = balanced(_likeness(energy_oc, groups, generator(seed, "gcos", number, start)), one_kind)
            found.append(_settled(energy_oc, filters, layer.sources, groups))
    return found


def _settled(energy_oc: NDArray[np.float64], filters: Assignment, sources: Assignment, groups: int) -> Partition:
    """Inputs for the filters, filters for these inputs, and so on, by the energies within groups."""

    def inputs_for(filters: Assignment) -> Assignment:
        return balanced(np.stack([energy_oc[filters == group].sum(0) for group in range(groups)], 1), sources)

    for _ in range(_TURNS):
        inputs = inputs_for(filters)
        gains = np.stack([energy_oc[:, inputs == group].sum(1) for group in range(groups)], 1)
        again = balanced(gains, np.zeros(len(filters), np.int64))
        if (again == filters).all():
            break
        filters = again
    return Partition(groups, inputs_for(filters), filters)


def _likeness(energy_oc: NDArray[np.float64], groups: int, random: np.random.Generator) -> NDArray[np.float64]:
    """How like each filter is to those that stand for the groups, (O, G): drawn far apart, as k-means++ draws them."""
    profiles = energy_oc / np.maximum(np.linalg.norm(energy_oc, axis=1, keepdims=True), 1e-300)
    like: NDArray[np.float64] = profiles @ profiles.T
    drawn = [int(random.integers(len(like)))]
    while len(drawn) < groups:
        far = np.maximum(1 - like[:, drawn].max(1), 0) + 1e-12
        far[drawn] = 0
        drawn.append(int(random.choice(len(like), p=far / far.sum())))
    return like[:, drawn]


def _energies(layer: Layer) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How much filter o owes to channel c, (O, C): what c explains by itself, and what is lost without it."""
    channels, filters, size = len(layer.sources), len(layer.cross), layer.size

    def quadratic(blocks_css: torch.Tensor, vectors: torch.Tensor) -> NDArray[np.float64]:
        """v_oc M_cc⁻¹ v_ocᵀ."""
        columns = vectors.view(filters, channels, size).permute(1, 2, 0)
        energies: NDArray[np.float64] = (columns * torch.linalg.solve(blocks_css, columns)).sum(1).T.numpy()
        return energies

    def blocks(matrix: torch.Tensor) -> torch.Tensor:
        return matrix.view(channels, size, channels, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)

    penalised = layer.covariance.clone()
    ridge = Ridge(penalised, layer.ridge)  # adds λ in place
    return quadratic(blocks(penalised), layer.cross), quadratic(blocks(ridge.inverse()), ridge.solve(layer.cross.T).T)


def _columns(layer: Layer, channels: Assignment) -> torch.Tensor:
    return torch.from_numpy((channels[:, None] * layer.size + np.arange(layer.size)).flatten())


def _gains(layer: Layer, inputs: Assignment, groups: int) -> NDArray[np.float64]:
    """What filter o explains of its target from the inputs of group g, (O, G)."""
    gains = []
    for group in range(groups):
        mine = _columns(layer, np.flatnonzero(inputs == group))
        cross = layer.cross[:, mine]
        gains.append((cross * Ridge(layer.covariance[mine][:, mine], layer.ridge).solve(cross.T).T).sum(1).numpy())
    return np.stack(gains, 1)


def _gain(layer: Layer, part: Partition) -> float:
    gains = _gains(layer, part.inputs, part.groups)
    return float(gains[np.arange(len(gains)), part.filters].sum())


def _inputs_for(layer: Layer, filters: Assignment, groups: int) -> Assignment:
    """Inputs for given groups of filters: all see all at first, then the cheapest (channel, group) goes, and so on."""
    ridge = Ridge(layer.covariance.clone(), layer.ridge)
    inverse, whole = ridge.inverse(), ridge.solve(layer.cross.T).T
    channels = torch.arange(len(layer.sources))
    weight = whole.view(len(whole), len(channels), layer.size)
    parts = [Part(channels, weight[torch.from_numpy(filters == group)], inverse) for group in range(groups)]
    rules = _Quota(layer.sources, groups)
    costs = np.stack([_costs(part, len(channels)) for part in parts])
    while (open_ := np.isfinite(costs)).any():
        group, channel = np.unravel_index(int(np.argmin(np.where(open_, costs, np.inf))), costs.shape)
        if not rules.remove(int(channel), int(group)):
            costs[group, channel] = np.inf  # it has to stay, and will have to
            continue
        parts[group].remove(torch.tensor([channel]))
        held = np.isfinite(costs[group])
        costs[group] = np.where(held, _costs(parts[group], len(channels)), np.inf)
    return rules.assignment()


def _costs(part: Part, channels: int) -> NDArray[np.float64]:
    costs = np.full(channels, np.inf)
    left, mine = part.costs()
    costs[left.numpy()] = mine.numpy()
    return costs


class _Quota:
    """Which groups each channel may still go to, so that all can go somewhere and every group gets its share.

    By Hall's theorem that is so as long as no set T of groups is the only place left for more channels of a source than
    |T| times a group's share. Sets are bit masks.
    """

    def __init__(self, sources: Assignment, groups: int) -> None:
        self._sets = np.arange(1 << groups)
        self._within = (self._sets[:, None] & ~self._sets[None, :]) == 0  # [a, b]: a is a part of b
        sizes = np.array([int(each).bit_count() for each in self._sets])
        counts = np.bincount(sources)
        self._sources, self._most = sources, counts[:, None] // groups * sizes
        self._only = np.where(self._sets == self._sets[-1], counts[:, None], 0)  # channels with no place outside a set
        self._places = np.full(len(sources), self._sets[-1])

    def remove(self, channel: int, group: int) -> bool:
        """Take a group from a channel's; False if all could then not go somewhere, and nothing is taken."""
        source, before = self._sources[channel], self._places[channel]
        after = before & ~(1 << group)
        gained = self._within[after] & ~self._within[before]
        only, most = self._only[source], self._most[source]
        if after == 0 or (only[gained] >= most[gained]).any():
            return False
        only[gained] += 1
        self._places[channel] = after
        return True

    def assignment(self) -> Assignment:
        """Each channel's group, when one is left for each."""
        assigned: Assignment = np.log2(self._places).astype(np.int64)
        return assigned
