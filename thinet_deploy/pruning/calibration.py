"""One pass over the data: second moments of what the consumers read, and what the original says where it is sampled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from ..data.dataset import ImageSet
from ..errors import NOT_FINITE, ModelError
from ..interfaces import Progress, silent
from ..parallel import join
from ..seeds import generator
from .geometry import map_size
from .moments import Moments, Positions, at_positions, output_size, patches, positions
from .readers import Reader, Use
from .replay import Values
from .wide import Wide

# A layer is sampled at so many positions in all, if time (rows × width² multiplications) and memory (rows × width
# numbers) allow it, but at five or more for each input; refitted by channel, it has many outputs to go by at each.
_ROWS, _WORK, _NUMBERS = 130_000, 20_000_000_000, 75_000_000
_ROWS_PER_INPUT, _ROWS_BY_CHANNEL = 5, 1024
_WORTH = 1 / 3
# Bytes of what the original says, and of the values that the second pass keeps between two layers.
_SAID, BETWEEN, _FEWEST_IMAGES = 2 << 30, 1 << 30, 32

Key = tuple[str, int]  # weight, number of its call


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

    def shuffled(self) -> Sample:
        """The same images in another order, so that the first of them are a fair sample of all."""
        return replace(self, chosen=generator(self.seed, "calibration", "order").permutation(self.chosen))

    def batches(self) -> Iterator[tuple[slice, NDArray[np.int64]]]:
        """Of the images of this process: their place among these, and indices."""
        mine = join().mine(self.chosen)
        for start in range(0, len(mine), self.batch):
            part = mine[start : start + self.batch]
            yield slice(start, start + len(part)), part

    def inputs(self, part: NDArray[np.int64]) -> torch.Tensor:
        """The network's inputs for some indices."""
        return torch.from_numpy(self.images.inputs(part))


@dataclass(frozen=True)
class Call:
    """A layer, the number of one of its calls, and that call."""

    reader: Reader
    number: int
    use: Use

    @property
    def key(self) -> Key:
        """(weight, number)."""
        return self.reader.weight, self.number

    @staticmethod
    def all(readers: Iterable[Reader]) -> list[Call]:
        """The calls of some layers, in the order of execution."""
        calls = [Call(reader, number, use) for reader in readers for number, use in enumerate(reader.uses)]
        return sorted(calls, key=lambda call: call.use.at)


@dataclass(frozen=True)
class Sampling:
    """Where the layers of a network are sampled; the same places in every pass.

    Attributes:
        sample: the images.
        images: weight → how many of them, from the first, are looked at; never falling from front to back.
        most: weight → positions in each of these.
    """

    sample: Sample
    images: Mapping[str, int]
    most: Mapping[str, int]

    @staticmethod
    def of(wide: Wide, sample: Sample) -> Sampling:
        """As many images as there is room for between two layers, and as many positions in them as pay.

        The large maps in front are so looked at in fewer images, at more positions in each.
        """
        readers = list(wide.readers.values())
        rows = {each.weight: _rows(wide, each) for each in readers}
        share = min(1.0, _SAID / max(1, sum(4 * rows[each.weight] * each.filters for each in readers)))
        images, most, enough = {}, {}, len(sample.chosen)
        for each in reversed(readers):
            fewest = _ROWS_BY_CHANNEL if each.weight in wide.spans else _ROWS_PER_INPUT * each.inputs
            wanted = max(fewest, int(share * rows[each.weight]))
            room = max(_FEWEST_IMAGES, BETWEEN // max(1, wide.replay.held(each.uses[0].at)))
            enough = min(enough, room, wanted)
            images[each.weight], most[each.weight] = enough, -(-wanted // enough)
        return Sampling(sample, images, most)

    def share(self, reader: Reader, images: slice) -> int:
        """How many images of a batch are looked at in a layer: the first ones of it."""
        team = join()
        mine = len(range(team.rank, self.images[reader.weight], team.size))
        return int(max(0, min(mine, images.stop) - images.start))

    def places(self, call: Call, size: tuple[int, int], part: NDArray[np.int64]) -> list[Positions]:
        """Output positions of a layer's call, whose map is of that size, for each of some images."""
        key = (self.sample.seed, call.reader.weight, call.number)
        return [positions(size, self.most[call.reader.weight], *key, int(image)) for image in part]


def _rows(wide: Wide, reader: Reader) -> int:
    filters = reader.filters // reader.blocks
    if span := wide.spans.get(reader.weight):
        work = filters * (reader.inputs // span) ** 2
    else:
        work = reader.blocks * reader.inputs * max(reader.inputs, filters)
    return min(_ROWS, _WORK // work, _NUMBERS // max(reader.blocks * reader.inputs, reader.filters))


@dataclass
class Original:
    """What the original says: (weight, call) → rows (images · positions, filters), behind BatchNorm and addition.

    The rows are of this process's images; in all processes the keys are the same, in the same order.
    """

    rows: dict[Key, torch.Tensor]

    def worth(self) -> dict[str, float]:
        """Weight → what a unit of squared error of that layer counts for, beside those of other readers of a group.

        An error matters less where values are large, though not in proportion. What it means for the outputs is another
        question (`impact`).
        """
        return {weight: max(_variance(rows), 1e-12) ** -_WORTH for (weight, _), rows in self.rows.items()}

    def at(self, key: Key, start: int, places: list[Positions]) -> torch.Tensor:
        """The rows of the images from number `start` on, one for each of their places."""
        count = len(places[0])
        return self.rows[key][start * count : (start + len(places)) * count]


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
        Moments by weight, without targets (`Wide.own` gives them); and the outputs of all layers.

    Raises:
        ModelError: a layer says NaN or infinity.
    """
    seen, nodes = _Observation(wide, sampling, consumers), len(wide.replay.trace.nodes)
    last = max(sampling.images.values(), default=0)
    for images, part in sampling.sample.batches():
        if images.start < last:
            progress("Gathering statistics", images.start, last)
            values = wide.replay.begin(sampling.sample.inputs(part))
            wide.replay.run(values, 0, nodes, seen.of(images, part))
    progress("Gathering statistics", last, last, f"{last} images")
    moments = together({name: each.moments() for name, each in seen.gathered.items()})
    rows = {key: torch.cat(each) for key, each in seen.rows.items()}
    _check_finite(rows)
    return moments, Original(rows)


def _check_finite(rows: Mapping[Key, torch.Tensor]) -> None:
    """Raise ModelError, in all processes, for the first layer that says no numbers."""
    broken = total(torch.tensor([float(not bool(each.isfinite().all())) for each in rows.values()]))
    for (weight, _), found in zip(rows, broken.tolist(), strict=True):
        if found:
            raise ModelError(
                f"What {weight.removesuffix('.weight')} says of calibration images is not finite (NaN or infinite), "
                "so nothing can be fitted to it.",
                hint=NOT_FINITE,
            )


class _Observation:
    """Looks at what layers read and say while the network runs.

    Attributes:
        gathered: weight of a consumer → what its moments are made from.
        rows: (weight, call) → rows of the images so far.
    """

    def __init__(self, wide: Wide, sampling: Sampling, consumers: Collection[str]) -> None:
        self.wide, self.sampling = wide, sampling
        self.gathered = {name: wide.gathering(wide.readers[name], targets=False) for name in consumers}
        calls = Call.all(wide.readers.values())
        self.rows = {call.key: [torch.empty(0, call.reader.filters)] for call in calls}
        nodes = wide.replay.trace.nodes
        self._begins = {nodes[call.use.at]: call for call in calls if call.reader.weight in self.gathered}
        self._ends: defaultdict[fx.Node, list[Call]] = defaultdict(list)
        for call in calls:
            self._ends[nodes[call.use.ends]].append(call)

    def of(self, images: slice, part: NDArray[np.int64]) -> Callable[[fx.Node, Values], None]:
        """What to do at every node while these images run."""

        def see(node: fx.Node, values: Values) -> None:
            call = self._begins.get(node)
            if call and (count := self.sampling.share(call.reader, images)):
                _, read = look(self.wide, self.sampling, call, values, part[:count])
                self.gathered[call.reader.weight].add(read)
            for call in self._ends.get(node, ()):
                if count := self.sampling.share(call.reader, images):
                    self._note(call, values[node.name][:count], part[:count])

        return see

    def _note(self, call: Call, value: torch.Tensor, part: NDArray[np.int64]) -> None:
        """Keep what a layer says of some images at the places where it is sampled."""
        linear = call.reader.linear
        places = self.sampling.places(call, output_size(value, linear=linear), part)
        self.rows[call.key].append(at_positions(value, places, linear=linear))


def look(
    wide: Wide, sampling: Sampling, call: Call, values: Values, part: NDArray[np.int64]
) -> tuple[list[Positions], torch.Tensor]:
    """Where a layer is sampled for the images `part`, the first of a batch, and what it reads there."""
    layer, inputs = wide.layer(call.reader, call.use, values)
    places = sampling.places(call, map_size(layer, inputs), part)
    return places, patches(layer, inputs[: len(part)], places)


def together(moments: dict[str, Moments]) -> dict[str, Moments]:
    """Sums over the images of this process become sums over all; the same in each."""
    for _, each in sorted(moments.items()):  # in all processes in the same order
        each.count = int(total(torch.tensor(each.count)))
        for sums in (each.patches, each.squares, each.targets, each.cross):
            total(sums)
    return moments


def total(sums: torch.Tensor) -> torch.Tensor:
    """A sum over the rows of this process becomes, in place, the sum over those of all processes."""
    return join().sum_(sums)


def _variance(rows: torch.Tensor) -> float:
    """Summed over columns, of the rows of all processes."""
    count = float(total(torch.tensor(float(len(rows)))))
    mean = total(rows.sum(0, dtype=torch.float64)) / count
    return float(total((rows - mean.float()).square().sum(dtype=torch.float64))) / max(count - 1, 1)
