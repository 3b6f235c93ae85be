"""What budgets would cost: the widths of several at once, and the error that the curves predict for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .allocation import Costs, Curve, Descent, predicted_error
from .budget import Cost, Widths, Wish, uniform
from .graph import Branch, ChannelGroup

# Times fewer multiply-accumulates; as far as they can be reached.
FACTORS = (1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)


@dataclass(frozen=True)
class Point:
    """A network that could be had.

    Attributes:
        budget: what was asked for, for people.
        macs: multiply-accumulates for one input.
        fewer: the original's divided by these.
        size_bytes: of the weights, by the papers' rule.
        error: predicted, reconstructed and without training: the sum of the curves, a share of the outputs' variance.
        widths: group's name → channels that stay.
    """

    budget: str
    macs: int
    fewer: float
    size_bytes: int
    error: float
    widths: Widths


def point(budget: str, whole: Cost, costs: Costs, curves: Mapping[str, Curve], widths: Widths) -> Point:
    """What widths cost, and what they lose; `whole`: what the original costs."""
    macs, size = costs(widths)
    error = predicted_error(curves, widths)
    return Point(budget, int(macs), whole.macs / macs, int(size), error, widths)


def sweep(
    whole: Cost,
    costs: Costs,
    groups: Sequence[ChannelGroup],
    curves: Mapping[str, Curve],
    wish: Wish,
    branches: Sequence[Branch] = (),
) -> list[Point]:
    """The original, some budgets below it, and the least that can be reached; the most multiply-accumulates first.

    Args:
        whole: what the original costs, with a head that the others may not have.
        costs: of the network.
        groups: to prune.
        curves: group's name → its curve, as shares of all of them (see `oneshot.weigh`).
        wish: the grid, and keep ratios of some layers; its budget is not looked at.
        branches: that may vanish.
    """
    descent = Descent(costs, groups, curves, wish, branches)
    most = costs(uniform(groups, 1.0, wish))[0]
    narrowest = {**uniform(groups, 0.0, wish), **{name: 0 for branch in branches for name in branch.groups}}
    found = dict[str, Widths]()
    for factor in FACTORS:
        if costs(narrowest)[0] < whole.macs / factor <= most:
            found[f"{factor:g}x"] = descent.reach(whole.macs / factor)
    found["narrowest"] = narrowest
    widths_of_all = {group.name: len(group.channels) for group in groups}
    original = Point("original", whole.macs, 1.0, whole.size, 0.0, widths_of_all)
    return [original, *(point(budget, whole, costs, curves, widths) for budget, widths in found.items())]
