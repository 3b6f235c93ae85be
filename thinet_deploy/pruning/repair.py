"""The second pass: every layer is refitted on what really enters it from the pruned, refitted network before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .calibration import Call, Original, Sampling, look, together, total
from .moments import Centred, Moments, Positions, at_positions
from .readers import Reader
from .reconstruction import Solve
from .replay import Values, copied
from .sums import Gathering, product
from .wide import Wide

ROUNDS = 3  # of refitting to what counts behind a ReLU


@dataclass
class _Batch:
    """Some images, and how far the work has come with them.

    Attributes:
        images: their place among all.
        part: their indices.
        values: in front of operation `here`; none at the start.
        here: index in the trace.
    """

    images: slice
    part: NDArray[np.int64]
    values: Values = field(default_factory=dict)
    here: int = 0


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a layer read, until what it is added to is known."""

    call: Call
    places: list[Positions]
    patches: Tensor


class Front:
    """How far into the network the work has come, and the values there.

    Images wait at the start until there is room for their values: early in the network, where maps are large, few
    images are looked at (`Sampling.images`), and none passes through an operation twice but where layers that read
    the same channels are looked at together.
    """

    def __init__(self, wide: Wide, sampling: Sampling, original: Original) -> None:
        """Start at the images.

        Args:
            wide: the network, which is changed between the calls.
            sampling: where to look; the same as in the first pass.
            original: what the layers should say.
        """
        self.wide, self.sampling, self.original = wide, sampling, original
        self._batches = [_Batch(images, part) for images, part in sampling.sample.batches()]

    def collect(self, wanted: Sequence[Reader], *, keep: bool = False) -> tuple[dict[str, Moments], Rows]:
        """Moments of some layers on the network as it stands, with the original's outputs as targets.

        Args:
            wanted: layers; nothing before the first of them may change any more.
            keep: keep the rows of the first one given.

        Returns:
            Moments by weight, and the rows kept.
        """
        gathered = {each.weight: self.wide.gathering(each, keep=keep and each is wanted[0]) for each in wanted}
        rows, calls = Rows(self.wide, wanted[0], gathered[wanted[0].weight]), Call.all(wanted)
        for batch in self._batches:
            if mine := [call for call in calls if self.sampling.share(call.reader, batch.images)]:
                for seen, target, other in self._visit(batch, mine, calls[0]):
                    gathered[seen.call.reader.weight].add(seen.patches, target - other)
                    if keep and seen.call.reader is wanted[0]:
                        rows.add(target, other)
        return together({name: each.moments() for name, each in gathered.items()}), rows

    def _visit(self, batch: _Batch, calls: list[Call], first: Call) -> Iterator[tuple[_Seen, Tensor, Tensor]]:
        """What the layers read, what the original said there, and what is added to it, zeros if nothing is.

        The values in front of the first call stay, for the images that are looked at there.
        """
        values = batch.values or self.wide.replay.begin(self.sampling.sample.inputs(batch.part))
        here, waiting = batch.here, list[_Seen]()
        if self.sampling.share(first.reader, batch.images):
            self.wide.replay.run(values, here, first.use.at)
            here = batch.here = first.use.at
            batch.values = values
        begins, ends = {call.use.at for call in calls}, {call.use.ends for call in calls if call.use.other}
        for stop in sorted(begins | ends):
            if stop > here and (stop in begins or waiting):
                values = copied(values) if values is batch.values else values
                self.wide.replay.run(values, here, stop)
                here = stop
            waiting += [self._look(call, batch, values) for call in calls if call.use.at == stop]
            known = [seen for seen in waiting if seen.call.use.other is None or seen.call.use.other.name in values]
            waiting = [seen for seen in waiting if seen not in known]
            for seen in known:
                yield seen, *self._say(seen, batch, values)

    def _look(self, call: Call, batch: _Batch, values: Values) -> _Seen:
        part = batch.part[: self.sampling.share(call.reader, batch.images)]
        return _Seen(call, *look(self.wide, self.sampling, call, values, part))

    def _say(self, seen: _Seen, batch: _Batch, values: Values) -> tuple[Tensor, Tensor]:
        call, places = seen.call, seen.places
        target = self.original.at(call.key, batch.images.start, places)
        if call.use.other is None:
            return target, torch.zeros_like(target)
        return target, at_positions(values[call.use.other.name][: len(places)], places, linear=call.reader.linear)


class Rows:
    """What a layer read at its places on the network as it now stands, and what it should say there.

    The number of rows is bounded, however many images there are.
    """

    def __init__(self, wide: Wide, reader: Reader, gathered: Gathering) -> None:
        """Without targets yet; these come in the order of the rows gathered."""
        self.wide, self.reader, self._gathered = wide, reader, gathered
        nothing = torch.empty(0, reader.filters)  # a process may have no image
        self._targets, self._others = [nothing], [nothing]

    def add(self, target: Tensor, other: Tensor) -> None:
        """What the original said (n, filters), and what is added to what this layer says, (n, filters)."""
        self._targets.append(target)
        self._others.append(other)

    def rectified(self, stats: Centred) -> Centred:
        """The statistics with targets as they count behind a ReLU.

        Where the original is not positive, be content with what the layer says now, as far as that is not positive
        either. Refitting to such targets never raises the error behind the ReLU (Zhang et al., "Accelerating very
        deep convolutional networks", TPAMI 2016, section 3.2).
        """
        sums, cross = torch.zeros_like(stats.target), torch.zeros_like(stats.cross)
        targets, others, start = torch.cat(self._targets), torch.cat(self._others), 0
        for patches in self._gathered.pieces:
            target, other = targets[start : start + len(patches)], others[start : start + len(patches)]
            start += len(patches)
            now = self.wide.say(self.reader, patches) + other
            wanted = torch.where(target > 0, target, now.clamp(max=0)) - other
            aims = wanted.view(len(wanted), *stats.target.shape) - stats.target.float()
            sums += aims.sum(0, dtype=torch.float64)
            columns = patches - stats.mean.float()
            for block in range(len(cross)):
                cross[block] += product(aims[:, block].T, columns[:, block].T)
        count = int(total(torch.tensor(start)))
        moved = total(sums) / count if self.reader.norm or self.reader.bias else torch.zeros_like(sums)
        return replace(stats, target=stats.target + moved, cross=total(cross) / count)


def repair(front: Front, reader: Reader, solver: Callable[[Centred], Solve]) -> None:
    """Let a layer say again what the original says, to what now enters it; all before it is as it stays.

    Args:
        front: of the network.
        reader: the layer.
        solver: finds its weights, given the statistics.
    """
    wide = front.wide
    again = reader.uses[0].rectified and reader.weight not in wide.spans
    found, rows = front.collect([reader], keep=again)
    stats = wide.centred(reader, found[reader.weight])
    solve = solver(stats)
    wide.refit(reader, stats, solve)
    # With fewer rows than inputs the layer already says what it should on all of them.
    for _ in range(ROUNDS if again and found[reader.weight].count >= stats.mean.shape[1] else 0):
        wide.refit(reader, rows.rectified(stats), solve)
