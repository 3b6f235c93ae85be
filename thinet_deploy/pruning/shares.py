"""Which channels can go at all where an operation needs equal shares of them in each of its parts."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import torch

from .labels import FIXED, Balance, Draft

Cell = tuple[tuple[int, ...], ...]  # how often a channel is in each block of each constraint


def removable(draft: Draft) -> tuple[list[list[int]], dict[int, Cell]]:
    """The channels that may go.

    Args:
        draft: what the operations demanded; channels that cannot keep their cardinality constraints are frozen in it.

    Returns:
        Roots that are connected, for each of the connected parts; and root → its cell: as many channels of every cell
        must go, and those of one cell may replace one another.
    """
    constraints = _feasible(draft)
    producers = [draft.roots(draft.sites[site].labels) for site in draft.producers]
    parts = _parts([*producers, *(draft.roots(each.blocks) for each in constraints)])
    cells = _cells(constraints, draft)
    for part in parts:
        if (why := _hopeless(part, cells, constraints, draft)) is not None:
            draft.freeze(torch.tensor(part), why)
    return [part for part in parts if not draft.reason(part[0])], cells


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


def _cells(constraints: Iterable[Balance], draft: Draft) -> dict[int, Cell]:
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


def _hopeless(part: list[int], cells: dict[int, Cell], constraints: Sequence[Balance], draft: Draft) -> str | None:
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
