"""How near a layer's time is that comes from few turns, as a staircase takes them: layers of ResNet-20 on OpenVINO.

Every layer's network, and its frame, has 70 turns of 30 ms, all in turn, opened anew each time. From successive turns a
layer's time is estimated as `turns.layer_time` does it, and as it was done before, until it is known to within 2.5 %;
what it is compared with comes from all 70. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from _record import keep
from rich.console import Console
from rich.progress import track
from rich.table import Table

from thinet_deploy.models.loading import build_model
from thinet_deploy.on_device import runner
from thinet_deploy.on_device.turns import layer_time
from thinet_deploy.timing.layer_networks import frame, framed, image_of, layers_of
from thinet_deploy.timing.staircase import ROUNDS, ROUNDS_AT_LEAST, STEADY

TURNS, SECONDS, WARM_UP = 70, 0.03, 0.01
Turn = tuple[float, float]  # median and lower quartile of its runs, ms
Estimate = Callable[[Sequence[Turn], Sequence[Turn]], tuple[float, float]]  # of network and frame → ms and spread


def before(network: Sequence[Turn], around: Sequence[Turn]) -> tuple[float, float]:
    """The median of the differences of medians, and about two standard errors."""
    own = [max(one - other, 0.05 * one) for (one, _), (other, _) in zip(network, around, strict=True)]
    middle = statistics.median(own)
    deviation = statistics.median(abs(each - middle) for each in own)
    return middle, 2 * 1.253 * 1.483 * deviation / math.sqrt(len(own))


def now(network: Sequence[Turn], around: Sequence[Turn]) -> tuple[float, float]:
    """As a staircase does it."""
    found = {"network": [low for _, low in network], "frame": [low for _, low in around]}
    return layer_time(found, ("network", "frame"))[:2]


WAYS: dict[str, tuple[Estimate, int, int]] = {
    "before: 3 to 7 turns": (before, 3, 7),
    "before, 3 to 11 turns": (before, 3, 11),
    "now, 3 to 11 turns": (now, 3, 11),
    f"now: {ROUNDS_AT_LEAST} to {ROUNDS} turns": (now, ROUNDS_AT_LEAST, ROUNDS),
}


def measured(turns: int) -> tuple[dict[str, list[Turn]], dict[str, tuple[str, str]]]:
    """Turns of every network by name, and of every layer the names of its network and its frame."""
    files, pairs = dict[str, tuple[Any, Any, int]](), dict[str, tuple[str, str]]()
    layers = layers_of(build_model("resnet20", input_shape=(3, 32, 32), num_classes=10, seed=0), (3, 32, 32))
    for layer in layers:
        if layer.shape.reads_image:
            continue
        for outs in (layer.outs, layer.outs // 2):
            name, around = f"{layer.shape}, {layer.ins} → {outs}", f"{layer.shape}, frame of {layer.ins}"
            files[name] = framed(layer.shape, layer.ins, outs), layer.shape, layer.ins
            files[around] = frame(layer.shape, layer.ins), layer.shape, layer.ins
            pairs[name] = name, around
    found: dict[str, list[Turn]] = {name: [] for name in files}
    with tempfile.TemporaryDirectory() as folder, runner.Worker() as worker:
        asked = {}
        for number, (name, (network, shape, ins)) in enumerate(files.items()):
            path = Path(folder, f"{number}.onnx")
            path.write_bytes(network.SerializeToString())
            image, batch = image_of(shape, ins)
            asked[name] = {"path": str(path), "batch": batch, "shapes": {"x": list(image)}}
        for number in track(range(turns), "Measuring", console=Console(stderr=True)):
            for name in random.Random(number).sample(sorted(files), len(files)):
                worker.ask("open", runtime="openvino", threads=1, precision="fp32", **asked[name])
                warm = worker.ask("warm", seconds=WARM_UP)
                count = max(3, math.ceil(SECONDS * warm["calls"] / warm["seconds"]))
                samples = worker.ask("time", count=count)["samples_ms"]
                found[name].append((statistics.median(samples), statistics.quantiles(samples, n=4)[0]))
    return found, pairs


def undisturbed(turns: Sequence[Turn]) -> float:
    """The lower quartile of the turns' lower quartiles."""
    return statistics.quantiles([low for _, low in turns], n=4)[0]


def estimates(way: str, network: Sequence[Turn], around: Sequence[Turn]) -> Iterator[tuple[float, int]]:
    """A layer's time by a way, and the turns that it took, from every third turn on."""
    estimate, least, most = WAYS[way]
    for start in range(0, len(network) - most, 3):
        turns, ms, spread = least - 1, 0.0, math.inf
        while turns < most and spread > STEADY * ms:
            turns += 1
            ms, spread = estimate(network[start : start + turns], around[start : start + turns])
        yield ms, turns


def main() -> None:
    """Measure, compare, print."""
    parser = argparse.ArgumentParser(description="How near a layer's time is that comes from few turns.")
    parser.add_argument("--quick", action="store_true", help="15 turns: shows that it works")
    quick = parser.parse_args().quick
    found, pairs = measured(15 if quick else TURNS)
    slow = [turn[0] > 1.1 * undisturbed(turns) for turns in found.values() for turn in turns]
    table = Table("way", "median error", "90 %", "over 10 % off", "over 30 % off", "turns")
    figures = dict[str, Any]()
    for way in WAYS:
        errors, turns = list[float](), list[int]()
        for network, around in pairs.values():
            whole, part = undisturbed(found[network]), undisturbed(found[around])
            true, _ = now([(whole, whole)], [(part, part)])
            for ms, number in estimates(way, found[network], found[around]):
                errors.append(abs(ms / true - 1))
                turns.append(number)
        over = {limit: statistics.fmean(error > limit for error in errors) for limit in (0.1, 0.3)}
        figures[way] = {
            "median": statistics.median(errors),
            "p90": statistics.quantiles(errors, n=10)[-1],
            "over_10": over[0.1],
            "over_30": over[0.3],
            "turns": statistics.fmean(turns),
        }
        each = figures[way]
        shares = (f"{each[key]:.1%}" for key in ("median", "p90", "over_10", "over_30"))
        table.add_row(way, *shares, f"{each['turns']:.1f}")
    print(keep("turns", {"figures": figures, "turns_ms": found, "disturbed": statistics.fmean(slow)}, quick=quick))
    print(f"{statistics.fmean(slow):.0%} of the turns were more than a tenth slower than undisturbed ones.")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
