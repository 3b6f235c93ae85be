"""What narrower groups cost at the network's outputs: tried once for each group, on a few images.

An error in one layer matters more than the same error in another, and no rule on what layers say puts that right for
every network: the cube root of a variance is good for ResNets, and takes SqueezeNet's last layers away. So each group
is narrowed alone, its consumers are refitted, and the outputs are compared with the original's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from ..interfaces import Progress, silent
from .calibration import BETWEEN, Sample, total
from .elimination import Removal
from .graph import ChannelGroup, Consumer
from .moments import Moments
from .reconstruction import Solve, Solver
from .replay import Values, copied
from .weighing import channels_read, others
from .wide import Wide

# Images for a group: each costs about half of a run, so that all together cost about a tenth of the first pass.
_SHARE, _FEWEST = 1 / 5, 8
_LEFT = 1 / 4  # of a group's channels
_SEEN = 0.01  # of the error of the narrowest width: what is lost with less of it is rounding
# Of an error in the first layer, what later layers leave once they are refitted, beside one in the last layer.
_UNREPAIRED = 1 / 2


@dataclass(frozen=True)
class _Batch:
    """Some images: how many, their values at the place that was reached, and the original's outputs."""

    count: int
    values: Values
    outputs: list[torch.Tensor]


def impacts(
    wide: Wide,
    sample: Sample,
    groups: Sequence[ChannelGroup],
    moments: Mapping[str, Moments],
    removals: Mapping[str, Removal],
    ridge: float,
    progress: Progress = silent,
) -> dict[str, float]:
    """Group's name → what a unit of its removal's error costs: a share of the outputs' variance.

    Args:
        wide: the network, untouched so far, and left so.
        sample: in the order in which images are taken from it.
        groups: each is narrowed alone.
        moments: weight → of what its consumers read.
        removals: group's name → order in which channels go, and the error.
        ridge: of the consumers' regression.
        progress: to report to.
    """
    trial = _Trial(wide, sample, groups)
    order = {name: number for number, name in enumerate(wide.readers)}
    found = {}
    for number, group in enumerate(sorted(groups, key=lambda each: _first(wide, each))):
        progress("Measuring what errors cost", number, len(groups), group.name)
        gone = _gone(group, removals[group.name])
        if error := float(removals[group.name].error[len(gone)]):
            trial.go(_first(wide, group))
            with _narrowed(wide, group, gone, others(groups, group), moments, ridge):
                lost = trial.lost()
            place = max(order[each.weight] for each in group.consumers) / max(1, len(order) - 1)
            found[group.name] = lost / error * (_UNREPAIRED + (1 - _UNREPAIRED) * place)
    progress(
        "Measuring what errors cost", len(groups), len(groups), f"at the outputs, of {len(groups)} groups of filters"
    )
    return found


def _first(wide: Wide, group: ChannelGroup) -> int:
    return min(use.at for each in group.consumers for use in wide.readers[each.weight].uses)


def _gone(group: ChannelGroup, removal: Removal) -> NDArray[np.int64]:
    """Three quarters of the channels, more if that many say nothing."""
    seen = int(np.argmax(removal.error >= _SEEN * removal.error[-1]))
    count = max(seen, int(len(group.channels) * (1 - _LEFT)))
    return np.sort(removal.order[: min(count, len(removal.order))])


@contextmanager
def _narrowed(
    wide: Wide,
    group: ChannelGroup,
    gone: NDArray[np.int64],
    beside: NDArray[np.int64],
    moments: Mapping[str, Moments],
    ridge: float,
) -> Iterator[None]:
    """The network without some channels of a group, whose consumers are refitted to say what they said."""
    consumers = {each.weight: each for each in group.consumers}
    readers = [wide.readers[name] for name in consumers]
    with wide.restoring(readers):
        own = {each.weight: wide.own(each, moments[each.weight]) for each in readers}
        wide.remove(group, gone)
        for each in readers:
            stats = wide.centred(each, wide.among(each, own.pop(each.weight)))
            held = _held(wide, consumers[each.weight], beside)
            wide.refit(each, stats, _solver(stats.covariance, wide.counting(each), held, ridge))
        yield


def _held(wide: Wide, consumer: Consumer, beside: NDArray[np.int64]) -> torch.Tensor:
    """Which coefficients of a consumer are of other groups that are to go, (G, D)."""
    held = torch.from_numpy(np.isin(channels_read(wide, consumer), beside))
    inputs = wide.counting(wide.readers[consumer.weight]).shape[1]
    return held.repeat_interleave(inputs // held.shape[1], 1)


def _solver(covariance_gdd: torch.Tensor, counting_gd: torch.Tensor, held_gd: torch.Tensor, ridge: float) -> Solve:
    """As `Solver`, with the weights of some inputs as they are."""
    free = Solver(covariance_gdd, counting_gd & ~held_gd, ridge)

    def solve(cross_god: torch.Tensor, weight_god: torch.Tensor) -> torch.Tensor:
        stays = weight_god * held_gd[:, None]
        return free(cross_god - stays @ covariance_gdd, weight_god) + stays

    return solve if bool(held_gd.any()) else free


class _Trial:
    """A few images on their way through the network."""

    def __init__(self, wide: Wide, sample: Sample, groups: Sequence[ChannelGroup]) -> None:
        self._replay, self._here = wide.replay, 0
        nodes = self._replay.trace.nodes
        last = next(node for node in nodes if node.op == "output")
        self._outputs = [node for node in last.all_input_nodes if node.meta["val"].is_floating_point()]
        held = max((self._replay.held(_first(wide, each)) for each in groups), default=1)
        most = min(int(_SHARE * len(sample.chosen) / max(1, len(groups))), BETWEEN // max(1, held))
        count = max(_FEWEST, most)
        self._batches = []
        for _, part in replace(sample, chosen=sample.chosen[:count]).batches():
            values = self._replay.begin(sample.inputs(part))
            self._batches.append(_Batch(len(part), values, self._run(values, len(part))))
        self._spread = self._variances()

    def go(self, to: int) -> None:
        """Up to an operation, with all channels."""
        for batch in self._batches:
            self._replay.run(batch.values, self._here, to)
        self._here = to

    def lost(self) -> float:
        """How far the outputs are now from the original's, as a share of their variance, averaged over outputs."""
        sums = torch.zeros(len(self._outputs), dtype=torch.float64)
        for batch in self._batches:
            now = self._run(batch.values, batch.count)
            sums += torch.stack([(a - b).square().sum() for a, b in zip(now, batch.outputs, strict=True)])
        return float((total(sums) / self._spread).mean())

    def _run(self, values: Values, count: int) -> list[torch.Tensor]:
        """Outputs of these images, from where they are."""
        found: dict[fx.Node, torch.Tensor] = {}

        def see(node: fx.Node, values: Values) -> None:
            if node in self._outputs:
                found[node] = values[node.name][:count].double()

        self._replay.run(copied(values), self._here, len(self._replay.trace.nodes), see)
        return [found[node] for node in self._outputs]

    def _variances(self) -> torch.Tensor:
        """Sum of squares of each output around its mean over the images; next to nothing where they say the same."""
        count, found = float(total(torch.tensor(float(sum(each.count for each in self._batches))))), []
        for index, node in enumerate(self._outputs):
            sums, squares = (torch.zeros(node.meta["val"].shape[1:], dtype=torch.float64) for _ in range(2))
            for batch in self._batches:
                sums += batch.outputs[index].sum(0)
                squares += batch.outputs[index].square().sum(0)
            sums, squares = total(sums), total(squares)
            found.append((squares - sums.square() / count).sum().clamp_min(1e-6 * float(squares.sum()) + 1e-12))
        return torch.stack(found)
