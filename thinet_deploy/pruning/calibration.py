"""One pass over the data: second moments of what the consumers read, and what the original says where it is sampled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from ..data import ImageSet
from ..interfaces import Progress, silent
from ..parallel import join
from .geometry import map_size
from .moments import Moments, Positions, at_positions, patches, positions
from .readers import Reader, Use
from .replay import Values
from .wide import Wide

# A layer is sampled at this many positions in all, if memory and time allow it: in wide layers the moments take
# rows × width² operations, and the original's outputs are kept.
_ROWS, _ROWS_PER_INPUT = 130_000, 10
_WORTH = 1 / 3
_NUMBERS_PER_LAYER, _BYTES = 75_000_000, 2 << 30


@dataclass(frozen=True)
class Sample:
    """Calibration images, and how they are looked at.

    Attributes:
        images: the set they are from.
        chosen: indices in it.
        batch: images that run together.
        seed: of the positions.
    """

    images: ImageSet
    chosen: NDArray[np.int64]
    batch: int
    seed: int

    @property
    def mine(self) -> NDArray[np.int64]:
        """The images that this process looks at."""
        return join().mine(self.chosen)

    def __iter__(self) -> Iterator[tuple[slice, NDArray[np.int64], torch.Tensor]]:
        """Batches: their place among this process's images, indices, and inputs."""
        mine = self.mine
        for start in range(0, len(mine), self.batch):
            part = mine[start : start + self.batch]
            yield slice(start, start + len(part)), part, torch.from_numpy(self.images.inputs(part))


@dataclass(frozen=True)
class Sampling:
    """Where the layers of a network are sampled; the same places in every pass.

    Attributes:
        sample: the images.
        most: weight → positions in each image.
    """

    sample: Sample
    most: Mapping[str, int]

    @staticmethod
    def of(wide: Wide, sample: Sample) -> Sampling:
        """As many positions as pay: at least ten rows per input of a layer, on large networks not many more."""
        rows = {
            each.weight: min(_ROWS, _NUMBERS_PER_LAYER // max(each.inputs, each.filters))
            for each in wide.readers.values()
        }
        share = min(1.0, _BYTES / sum(4 * rows[each.weight] * each.filters for each in wide.readers.values()))
        return Sampling(
            sample,
            {
                each.weight: -(
                    -max(_ROWS_PER_INPUT * each.inputs, int(share * rows[each.weight])) // len(sample.chosen)
                )
                for each in wide.readers.values()
            },
        )

    def places(self, reader: Reader, number: int, size: tuple[int, int], part: NDArray[np.int64]) -> list[Positions]:
        """Output positions of a layer's call, for each image of a batch."""
        key = (self.sample.seed, reader.weight, number)
        return [positions(size, self.most[reader.weight], *key, int(image)) for image in part]


Key = tuple[str, int]  # weight, number of its call


@dataclass
class Original:
    """What the original says: (weight, call) → rows (images · positions, filters), behind BatchNorm and addition.

    The rows are of this process's images; in all processes the keys are the same, in the same order.
    """

    rows: dict[Key, torch.Tensor]

    def worth(self) -> dict[str, float]:
        """Weight → what a unit of squared error of that layer counts for, beside those of other layers.

        An error matters less where values are large, though not in proportion: later layers repair early errors, and
        nothing repairs the last ones. Measured on ResNet-20 (benchmarks/reconstruction.py): neither absolute errors
        (exponent 0) nor relative ones (1) put the widths best.
        """
        return {weight: max(_variance(rows), 1e-12) ** -_WORTH for (weight, _), rows in self.rows.items()}

    def at(self, key: Key, images: slice, count: int) -> torch.Tensor:
        """The rows of some images, `count` for each, in float64."""
        return self.rows[key][images.start * count : images.stop * count].double()


def observe(
    wide: Wide, sampling: Sampling, consumers: Collection[str], progress: Progress = silent
) -> tuple[dict[str, Moments], Original]:
    """Run the original once.

    Args:
        wide: the network, untouched so far.
        sampling: where to look.
        consumers: weights of the layers whose moments are wanted.
        progress: to report to.

    Returns:
        Moments by weight, whose targets are the layer's own outputs behind its BatchNorm, without what it is added to;
        and the outputs of all layers.
    """
    begins: dict[int, tuple[Reader, int, Use]] = {}
    ends: defaultdict[int, list[tuple[Reader, int]]] = defaultdict(list)
    for reader in wide.readers.values():
        for number, use in enumerate(reader.uses):
            begins[use.at] = reader, number, use
            ends[use.ends].append((reader, number))
    index = {node: number for number, node in enumerate(wide.replay.trace.nodes)}
    moments = {name: empty(wide.readers[name]) for name in consumers}
    rows: dict[Key, list[torch.Tensor]] = {  # empty ones first: a process may have no image
        (each.weight, number): [torch.zeros(0, each.filters)]
        for each in wide.readers.values()
        for number in range(len(each.uses))
    }
    places: dict[Key, list[Positions]] = {}

    def looking(part: NDArray[np.int64]) -> Callable[[fx.Node, Values], None]:
        def see(node: fx.Node, values: Values) -> None:
            if begun := begins.get(index[node]):
                reader, number, use = begun
                layer, inputs = wide.layer(use, values)
                places[reader.weight, number] = sampling.places(reader, number, map_size(layer, inputs), part)
                if reader.weight in moments:
                    mine = patches(layer, inputs[: len(part)], places[reader.weight, number])
                    moments[reader.weight].add(mine, wide.say(reader, mine))
            for reader, number in ends.get(index[node], ()):
                value = values[node.name][: len(part)]
                seen = at_positions(value, places[reader.weight, number], linear=reader.linear)
                rows[reader.weight, number].append(seen.float())

        return see

    for images, part, inputs in sampling.sample:
        progress("Calibrating", images.start, len(sampling.sample.mine))
        wide.replay.run(wide.replay.begin(inputs), 0, len(index), looking(part))
    progress("Calibrating", len(sampling.sample.mine), len(sampling.sample.mine))
    return together(moments), Original({key: torch.cat(each) for key, each in rows.items()})


def _variance(rows: torch.Tensor) -> float:
    """Summed over columns, of the rows of all processes."""
    team = join()
    count = float(team.sum_(torch.tensor(float(len(rows)))))
    mean = team.sum_(rows.sum(0, dtype=torch.float64)) / count
    return float(team.sum_((rows - mean.float()).square().sum(dtype=torch.float64))) / max(count - 1, 1)


def together(moments: dict[str, Moments]) -> dict[str, Moments]:
    """Make the sums of each process's images those of all, in place."""
    team = join()
    for _, each in sorted(moments.items()):  # in all processes in the same order
        each.count = int(team.sum_(torch.tensor(each.count)))
        for sums in (each.patches, each.squares, each.targets, each.cross, each.energy):
            team.sum_(sums)
    return moments


def empty(reader: Reader) -> Moments:
    """Moments of a layer, without rows."""
    return Moments.empty(reader.blocks, reader.inputs, reader.filters // reader.blocks)
