"""Widths for a budget in milliseconds: predicted from layer times, verified on the engine, and corrected."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import GateError, InputError
from ..pruning.allocation import CostFunction, Curve, Descent, predicted_error
from ..pruning.budget import Widths, Wish, matching, uniform
from ..pruning.graph import Branch, ChannelGroup
from .milliseconds import Milliseconds, fastest, unpaid

CORRECTIONS = 3
NEAR = 0.03  # of the time asked for: nearer is not looked for
SLACK = 0.05  # of it: a network that takes so much longer still counts as within the budget
# What all multiply-accumulates together may be worth, in predicted errors of the network, and how often that range is
# halved to find what leaves the error AS_GOOD as the least, which more may not exceed by that share (docs/adr/0017).
WORTH, HALVINGS = (1.0, 64.0), 6
AS_GOOD = 0.1


@dataclass(frozen=True)
class Measured:
    """A network and the original, measured in turn.

    Attributes:
        ms: of the network.
        original_ms: of the original.
        speedup: the original's over the network's, the median over rounds.
        low, high: its 95 % interval; None with too few rounds.
        warnings: why all that may not hold, such as a busy machine.
    """

    ms: float
    original_ms: float
    speedup: float
    low: float | None = None
    high: float | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Goal:
    """What was asked for: milliseconds, or how many times faster than the original."""

    ms: float | None = None
    speedup: float | None = None

    def excess(self, found: Measured) -> float:
        """How many times longer a network takes than it was asked to; below 1 it is faster."""
        return found.ms / self.ms if self.ms else (self.speedup or 1.0) / found.speedup

    def __str__(self) -> str:
        return f"{self.ms:g} ms" if self.ms else f"{self.speedup:g}x faster"


@dataclass(frozen=True)
class Trial:
    """Widths that were tried on the engine.

    Attributes:
        widths: group's name → channels that stay.
        layers_ms: predicted sum of the layers.
        measured: on the engine.
    """

    widths: Widths
    layers_ms: float
    measured: Measured


@dataclass(frozen=True)
class Found:
    """Widths within a budget.

    Attributes:
        trials: in order; the first is the network with all filters.
        best: the one to take.
        unpaid: group's name → why it stays whole.
        doubts: why the times of layers may not hold that the widths come from.
    """

    trials: tuple[Trial, ...]
    best: Trial
    unpaid: dict[str, str]
    doubts: tuple[str, ...] = ()

    @property
    def factor(self) -> float:
        """Measured time of the network with all filters over the sum of its layers' times."""
        return self.trials[0].measured.ms / self.trials[0].layers_ms


def meet(
    costs: Milliseconds,
    groups: Sequence[ChannelGroup],
    curves: Mapping[str, Curve],
    wish: Wish,
    goal: Goal,
    measure: Callable[[Widths], Measured],
    branches: Sequence[Branch] = (),
    *,
    macs: CostFunction,
) -> Found:
    """Widths that lose least within a budget of time; of errors that are as good, those with more multiply-accumulates.

    For errors are what is lost before training; what it can learn afterwards depends on how much network there is
    (Liu et al., Rethinking the value of network pruning, ICLR 2019, arXiv:1810.05270).

    The sum of layer times is corrected on the whole network by one factor, and after each trial from what was measured
    so far (see `_budget`).

    Args:
        costs: predicted times.
        groups: to prune.
        curves: group's name → its error curve.
        wish: the grid, and keep ratios of some layers.
        goal: the budget.
        measure: makes the network of some widths and measures it beside the original.
        branches: that may vanish, whether it pays to narrow them or not.
        macs: multiply-accumulates at some widths.

    Raises:
        GateError: the budget cannot be reached; the smallest time that can be is named.
        InputError: nothing needs to be pruned for it.
    """
    asked, idle = wish, unpaid(costs, groups, wish)
    idle = {group.name: idle[group.name] for group in groups if group.name in idle and matching(group, wish) is None}
    wish = replace(wish, layers={**wish.layers, **dict.fromkeys(idle, 1.0)})

    def tried(widths: Widths) -> Trial:
        return Trial(widths, costs(widths)[0], measure(widths))

    whole = {group.name: len(group.channels) for group in groups}

    def within(budget: float) -> Widths | None:
        def reached(worth: float) -> Widths | None:
            each = worth / macs(whole)[0]
            return _within(Descent(costs, groups, curves, wish, branches, valued=macs, worth=each), budget)

        return _with_most_macs(reached, curves, macs)

    trials = [tried(whole)]
    if goal.excess(trials[0].measured) <= 1:
        raise InputError(
            f"Nothing has to be pruned for {goal}: with all filters the network takes {trials[0].measured.ms:.4g} ms "
            f"({trials[0].measured.speedup:.3g}x faster than the original).",
            hint="Ask for less time, or for more speed.",
        )
    for _ in range(1 + CORRECTIONS):
        widths = within(_budget(goal, trials)) or fastest(costs, groups, wish, branches)
        if any(widths == trial.widths for trial in trials):
            break
        trials.append(tried(widths))
        if abs(goal.excess(trials[-1].measured) - 1) <= NEAR:
            break
    best = min(trials[1:] or trials, key=lambda trial: _miss(goal, trial))
    if goal.excess(best.measured) > 1 + SLACK:
        least = fastest(costs, groups, wish, branches)
        quick = next((trial for trial in trials if trial.widths == least), None) or tried(least)
        if goal.excess(quick.measured) <= 1 + SLACK:
            # It can be reached, but the corrections were led astray, as by a machine that was busy meanwhile.
            trials += [quick, *_between_them(goal, best, quick, lambda budget: tried(within(budget) or least))]
        else:
            trials += [quick, *_evenly(goal, [best, quick], lambda share: tried(uniform(groups, share, asked)))]
        best = min(trials[1:], key=lambda trial: _miss(goal, trial))
    # What does not pay when it is narrowed may still have gone with its branch.
    stays = {name: why for name, why in idle.items() if best.widths[name]}
    return Found(tuple(trials), best, stays, costs.doubts)


def _budget(goal: Goal, trials: Sequence[Trial]) -> float:
    """Milliseconds of layers that are expected to give what was asked for.

    On the line between the two nearest trials on either side of it; with none that is fast enough yet, on the line
    through the network with all filters and the last trial.
    """
    slow = min((each for each in trials if goal.excess(each.measured) > 1), key=lambda each: each.layers_ms)
    fast = [each for each in trials if goal.excess(each.measured) <= 1]
    if fast and (quick := max(fast, key=lambda each: each.layers_ms)).layers_ms < slow.layers_ms:
        return _between(goal, slow, quick)
    whole, last = trials[0], trials[-1]
    high, low = goal.excess(whole.measured), goal.excess(last.measured)
    if last is whole or high <= low or whole.layers_ms <= last.layers_ms:
        return last.layers_ms / low
    slope = (whole.layers_ms - last.layers_ms) / (high - low)
    budget = last.layers_ms + (1 - low) * slope
    return min(max(budget, last.layers_ms / 2), last.layers_ms * 2)


def _between(goal: Goal, slow: Trial, quick: Trial) -> float:
    """Milliseconds of layers on the line through two trials, on either side of what was asked for."""
    high, low = goal.excess(slow.measured), goal.excess(quick.measured)
    return quick.layers_ms + (1 - low) / (high - low) * (slow.layers_ms - quick.layers_ms)


def _between_them(goal: Goal, slow: Trial, quick: Trial, tried: Callable[[float], Trial]) -> list[Trial]:
    """Trials between one that is too slow and one that is not, until another is not."""
    found: list[Trial] = []
    while len(found) < CORRECTIONS and goal.excess(slow.measured) > 1 + SLACK:
        found.append(slow := tried(_between(goal, slow, quick)))
    return found


def _evenly(goal: Goal, before: Sequence[Trial], tried: Callable[[float], Trial]) -> list[Trial]:
    """The narrowest widths of all, and shares of all filters between them and the whole.

    Layers that are too cheap to be timed one by one may pay together.

    Raises:
        GateError: not even the narrowest widths are fast enough; the fastest of all trials is named.
    """
    found, low, high = [tried(0.0)], 0.0, 1.0
    if goal.excess(found[0].measured) > 1 + SLACK:
        raise _out_of_reach(goal, [*before, *found])
    for _ in range(CORRECTIONS):
        found.append(tried(middle := (low + high) / 2))
        low, high = (middle, high) if goal.excess(found[-1].measured) <= 1 else (low, middle)
    return found


def _within(descent: Descent, budget: float) -> Widths | None:
    """Widths for a sum of layer times; None where there are none."""
    try:
        return descent.reach(budget)
    except GateError:
        return None


def _with_most_macs(
    reached: Callable[[float], Widths | None], curves: Mapping[str, Curve], macs: CostFunction
) -> Widths | None:
    """The widths with most multiply-accumulates of those whose error is as good as the least.

    Args:
        reached: widths for what all multiply-accumulates are worth, an error; None where there are none.
        curves: group's name → its error curve.
        macs: multiply-accumulates at some widths.
    """
    if (best := reached(0.0)) is None:
        return None
    error, (low, high) = predicted_error(curves, best), WORTH
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        more = reached(middle * error)
        if more and predicted_error(curves, more) <= (1 + AS_GOOD) * error:
            best, low = max(best, more, key=lambda widths: macs(widths)[0]), middle
        else:
            high = middle
    return best


def _miss(goal: Goal, trial: Trial) -> tuple[bool, float]:
    """How far a trial is from what was asked for; one that is too slow comes after all that are not."""
    excess = goal.excess(trial.measured)
    return excess > 1 + SLACK, abs(excess - 1)


def _out_of_reach(goal: Goal, trials: Sequence[Trial]) -> GateError:
    found = max((trial.measured for trial in trials), key=lambda measured: measured.speedup)
    return GateError(
        f"The budget of {goal} cannot be reached: the fastest network that could be had takes {found.ms:.4g} ms, "
        f"{found.speedup:.3g}x faster than the original with {found.original_ms:.4g} ms.",
        hint="Ask for less, lower --round-to, prune the shortcuts too (--prune-shortcuts), let branches vanish "
        "(--drop-branches), or ignore fewer layers. "
        "`thinet-deploy staircase` shows what widths bring on this engine.",
    )
