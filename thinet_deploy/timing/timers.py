"""Where networks are timed: files in, milliseconds out, and what these belong to; for a device: devices/timer.py.

What is measured, and how, is said by those who ask: staircase.py for layers, stages/latency.py for whole networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..artifact import hash_json
from ..environment import fingerprint, machine_id
from ..interfaces import Array, Progress
from ..on_device import runner
from ..on_device.turns import turns
from ..registry import made_by
from .latency import EngineLatency, EngineRef, explained, measure_engines

LAYERS = "Measuring layers"


class Timer(Protocol):
    """A machine that networks are timed on."""

    @property
    def device(self) -> str | None:
        """Its board or processor, for people; None for this machine."""

    @property
    def machine(self) -> str:
        """12 hex digits over what decides its speed."""

    def version(self, runtime: str) -> str:
        """A runtime there and its version, such as "openvino 2026.4.1"."""

    def layers(self, folder: Path, asked: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        """Time small networks.

        Args:
            folder: has their ONNX files.
            asked: JSON-ready, what `turns.turns` takes; paths are relative to the folder.
            progress: to report to.

        Returns:
            What `turns.turns` gives.

        Raises:
            MissingError: the runtime is not installed there.
            ThinetDeployError: a network cannot be run there, or the machine cannot be reached any more.
        """

    def engines(
        self, refs: Sequence[EngineRef], inputs: Mapping[str, Array], how: Mapping[str, Any], progress: Progress
    ) -> list[EngineLatency]:
        """Time engines of one runtime in turn.

        Args:
            refs: what to measure; the first may be asked for again, until it is forgotten.
            inputs: arrays by input name, batch first.
            how: threads, rounds and seconds; see `latency.measure_engines`, also for errors.
            progress: to report to.
        """

    def forget(self, ref: EngineRef) -> None:
        """Nothing is going to be compared with this engine any more."""


@dataclass(frozen=True)
class LocalTimer:
    """This machine."""

    @property
    def device(self) -> None:
        """None."""

    @property
    def machine(self) -> str:
        """See `environment.machine_id`; clocks that were set otherwise make another one."""
        facts = fingerprint()
        clocks = [facts["cpu"][name] for name in ("governor", "turbo") if facts["cpu"][name] is not None]
        return hash_json([machine_id(facts), *clocks])[:12] if clocks else machine_id(facts)

    def version(self, runtime: str) -> str:
        """Of the toolchain, which is the runtime's."""
        return made_by(runtime)

    def layers(self, folder: Path, asked: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        """See `Timer`."""
        paths = {name: {**each, "path": str(folder / each["path"])} for name, each in asked["networks"].items()}

        def on_turn(done: int, total: int, what: str) -> None:
            progress(LAYERS, done, total, what)

        with explained(f"Timing a layer on {asked['engine']['runtime']}"), runner.Worker() as worker:
            return turns(worker.ask, {**asked, "networks": paths}, on_turn)

    def engines(
        self, refs: Sequence[EngineRef], inputs: Mapping[str, Array], how: Mapping[str, Any], progress: Progress
    ) -> list[EngineLatency]:
        """See `Timer`."""
        return measure_engines(refs, inputs, **how, progress=progress)

    def forget(self, ref: EngineRef) -> None:
        """Nothing is kept."""


HERE = LocalTimer()
