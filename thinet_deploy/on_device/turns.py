"""Small networks timed in turn by one process, until each is known: layers for a budget of time.

Python 3.8 and the standard library only: a copy lies beside run.py, so that layers are timed on a device by the same
code as here.
"""

from __future__ import annotations

import math
import random
import statistics
from typing import Any, Callable, Mapping, Sequence

from . import sensors
from .engine import ThrottledError
from .engines import gpus_of

ATTEMPTS = 3  # where the machine throttles
_LEAST_SHARE = 0.05  # of a network's time that is its layer's at least, where the frame's noise says otherwise

Ask = Callable[..., Any]  # of the process that holds the network, see runner.Worker
OnTurn = Callable[[int, int, str], object]  # how many turns are done, of how many at most, and whose it is


def turns(ask: Ask, asked: Mapping[str, Any], on_turn: OnTurn) -> dict[str, Any]:
    """Time networks, all in turn, in each round in another order.

    One process has them all, one after the other, so that opening them costs little. A layer that is known well enough
    has no further turns. A round in which the machine throttled does not count.

    Args:
        ask: of the process that opens them.
        asked: engine: runtime, threads, precision; networks: by name path, batch, shapes, and what it is, for people;
            pairs: a layer's network, and its frame if it has one; rounds: most turns of each; at_least: turns after
            which a layer that is known gets no more of them; seconds: of each turn, warm-up included; steady: relative
            spread of a layer that is known.
        on_turn: told before every turn, and at the end.

    Returns:
        JSON-ready: turns_ms, per network the lower quartile of each of its turns; warnings, why these may not hold,
        such as other programs that the machine ran meanwhile.

    Raises:
        ThrottledError: the machine throttled in every attempt at a round.
    """
    networks, rounds, gpus = asked["networks"], asked["rounds"], gpus_of(asked["engine"]["runtime"])
    watch = sensors.Watch(gpus=gpus)
    found: dict[str, list[float]] = {name: [] for name in networks}
    for number in range(rounds):
        early = number < asked["at_least"]
        unsure = [pair for pair in asked["pairs"] if early or not _known(found, pair, asked["steady"])]
        order = list(dict.fromkeys(name for pair in unsure for name in pair if name is not None))
        random.Random(f"staircase:{number}").shuffle(order)

        def turn(done: int, name: str, before: int = number * len(networks)) -> float:
            on_turn(before + done, rounds * len(networks), networks[name]["what"])
            return _turn(ask, {**asked["engine"], **networks[name]}, asked["seconds"])

        for name, ms in zip(order, _unthrottled(turn, order, gpus)):
            found[name].append(ms)
    on_turn(rounds * len(networks), rounds * len(networks), f"{len(networks)} networks")
    return {"turns_ms": found, "warnings": watch.summary()["warnings"]}


def _unthrottled(turn: Callable[[int, str], float], order: Sequence[str], gpus: sensors.Nvml | None) -> list[float]:
    """A round, once more where the machine throttled meanwhile: such times decide nothing."""
    throttled: list[str] = []
    for _ in range(ATTEMPTS):
        watch, found = sensors.Watch(gpus=gpus), []
        for done, name in enumerate(order):
            found.append(turn(done, name))
            watch.look()
        throttled = watch.summary()["throttled"]
        if not throttled:
            return found
    raise ThrottledError(f"The machine throttled in each of {ATTEMPTS} attempts ({', '.join(throttled)}).")


def _turn(ask: Ask, network: dict[str, Any], seconds: float) -> float:
    """The lower quartile of some runs: see `_undisturbed`."""
    del network["what"]
    ask("open", **network)
    warm = ask("warm", seconds=seconds / 4)
    count = max(3, math.ceil(seconds * 3 / 4 * warm["calls"] / warm["seconds"]))
    return float(statistics.quantiles(ask("time", count=count)["samples_ms"], n=4)[0])


def _known(found: Mapping[str, Sequence[float]], pair: tuple[str, str | None], steady: float) -> bool:
    ms, spread_ms, _ = layer_time(found, pair)
    return spread_ms <= steady * ms


def layer_time(found: Mapping[str, Sequence[float]], pair: tuple[str, str | None]) -> tuple[float, float, float]:
    """A layer's time, from its network's and its frame's, how far the true one may be from it, and the network's.

    Args:
        found: see `turns`.
        pair: the layer's network and its frame.
    """
    network, frame = pair
    both, spread = _undisturbed(found[network])
    around, more = (0.0, 0.0) if frame is None else _undisturbed(found[frame])
    return max(both - around, _LEAST_SHARE * both), spread + more, both


def _undisturbed(turns_ms: Sequence[float]) -> tuple[float, float]:
    """The median of the faster half of the turns, and the range of these.

    Undisturbed turns agree to within a percent. What disturbs one makes it up to three times slower, and no sensor
    tells of a neighbour of a virtual machine: up to nearly half of all turns, where this was measured (docs/adr/0017).
    """
    faster = sorted(turns_ms)[: math.ceil(len(turns_ms) / 2)]
    return statistics.median(faster), faster[-1] - faster[0]
