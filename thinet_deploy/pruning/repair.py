"""The second pass: every layer is refitted on what really enters it from the pruned, refitted network before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .calibration import Key, Original, Sampling, empty, together
from .geometry import map_size
from .moments import Moments, Positions, at_positions, patches
from .readers import Reader, Use
from .replay import Values
from .wide import Wide

# Values between two layers are kept for all images if they fit in here; else the pass starts from the last that did.
_BYTES = 4 << 30


@dataclass(frozen=True)
class _Seen:
    """What a layer read, until what it should have said is known."""

    key: Key
    reader: Reader
    use: Use
    patches: torch.Tensor
    places: list[Positions]


class Front:
    """How far into the network the work has come, and the values there for all images, if they fit in memory.

    Attributes:
        again: how many operations were executed once more because the values before them did not fit, a batch counted
            as one.
    """

    def __init__(self, wide: Wide, sampling: Sampling, original: Original) -> None:
        """Start at the images.

        Args:
            wide: the network, which is changed between the calls.
            sampling: where to look; the same as in the first pass.
            original: what the layers should say.
        """
        self.wide, self.sampling, self.original = wide, sampling, original
        self.again = 0
        self._start, self._saved = 0, list[Values]()

    def collect(self, wanted: Sequence[Reader], *, rectified: bool = False) -> dict[str, Moments]:
        """Moments of some layers on the network as it stands, with the original's outputs as targets.

        Args:
            wanted: layers; nothing before the first of them may change any more.
            rectified: where a ReLU follows and the original is not positive, be content with what the layer says now,
                as far as that is not positive either. Refitting to such targets never raises the error behind the ReLU
                (Zhang et al., "Accelerating very deep convolutional networks", TPAMI 2016, section 3.2).
        """
        moments = {reader.weight: empty(reader) for reader in wanted}
        calls = [(use, number, reader) for reader in wanted for number, use in enumerate(reader.uses)]
        calls.sort(key=lambda call: call[0].at)
        first, left, saved = calls[0][0].at, _BYTES, list[Values]()
        for index, (images, part, inputs) in enumerate(self.sampling.sample):
            values = _copy(self._saved[index]) if self._saved else self.wide.replay.begin(inputs)
            here, waiting = self._start, list[_Seen]()
            for use, number, reader in calls:
                self.wide.replay.run(values, here, use.at)
                here = use.at
                if here == first and left > 0:
                    saved.append(_copy(values))
                    left -= sum(value.nbytes for value in values.values())
                waiting.append(self._look(use, number, reader, values, part))
                waiting = self._add(waiting, values, moments, images, rectified=rectified)
            while waiting:
                until = min(seen.use.ends for seen in waiting)
                self.wide.replay.run(values, here, until)
                here = until
                waiting = self._add(waiting, values, moments, images, rectified=rectified)
        if left > 0:
            self._start, self._saved = first, saved
        else:
            self.again += first - self._start
        return together(moments)

    def _look(self, use: Use, number: int, reader: Reader, values: Values, part: NDArray[np.int64]) -> _Seen:
        layer, inputs = self.wide.layer(use, values)
        places = self.sampling.places(reader, number, map_size(layer, inputs), part)
        return _Seen((reader.weight, number), reader, use, patches(layer, inputs[: len(part)], places), places)

    def _add(
        self, waiting: list[_Seen], values: Values, moments: dict[str, Moments], images: slice, *, rectified: bool
    ) -> list[_Seen]:
        """Add the rows whose targets are known by now; the others."""
        still = []
        for seen in waiting:
            if seen.use.other is not None and seen.use.other.name not in values:
                still.append(seen)
                continue
            target, other = self.original.at(seen.key, images, len(seen.places[0])), torch.zeros(())
            if seen.use.other is not None:
                rows = values[seen.use.other.name][: images.stop - images.start]
                other = at_positions(rows, seen.places, linear=seen.reader.linear)
            if rectified and seen.use.rectified:
                now = self.wide.say(seen.reader, seen.patches) + other
                target = torch.where(target > 0, target, now.clamp(max=0))
            moments[seen.reader.weight].add(seen.patches, target - other)
        return still


def _copy(values: Values) -> Values:
    """Operations that work in place must not change what was kept."""
    return {name: value.clone() for name, value in values.items()}
