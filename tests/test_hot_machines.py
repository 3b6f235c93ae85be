"""What a machine that throttles measures decides nothing: it is measured again, then refused."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

from thinet_deploy.errors import GateError
from thinet_deploy.on_device.samples import judged
from thinet_deploy.stages.latency import Bench
from thinet_deploy.stages.staircase import Staircase, climb
from thinet_deploy.target import load_profile
from thinet_deploy.timing.budget import Measured
from thinet_deploy.timing.latency import EngineRef, Samples
from thinet_deploy.timing.staircase import Engine


class Hot:
    """A machine that throttles in so many measurements, and is busy in all of them."""

    def __init__(self, times: int, *, finite: bool = True) -> None:
        self.left, self.finite = times, finite

    def engines(self, refs: Sequence[EngineRef], *_: Any) -> list[Any]:
        self.left -= 1
        hot = ["cpu0 core_throttle_count rose by 1"] if self.left >= 0 else []
        machine = {"throttled": hot, "warnings": ["unstable because the machine is busy"]}
        made = [Samples.of([[4.0 if ref.model == "base" else 2.0]] * 10) for ref in refs]
        rows = [replace(own, summary=judged(own.summary, machine, finite=self.finite)) for own in made]
        return [SimpleNamespace(machine=machine, samples=row, median_ms=2.0) for row in rows]

    def layers(self, _: Path, asked: Mapping[str, Any], *__: Any) -> dict[str, Any]:
        """Every layer takes as long, whatever its widths."""
        layers = {layer for layer, _ in asked["pairs"]}
        turns = {name: [2.0 if name in layers else 1.0] * 3 for name in asked["networks"]}
        return {"turns_ms": turns, "warnings": []}

    def version(self, runtime: str) -> str:
        return f"{runtime} 1"

    def forget(self, _: EngineRef) -> None:
        """Nothing is kept."""

    device, machine = None, "hot"


def engine_on(timer: Any) -> Engine:
    return Engine("openvino", timer=timer)


def test_times_of_a_machine_that_throttles_decide_nothing() -> None:
    refs = [EngineRef(name, "openvino", Path(name)) for name in ("base", "thin")]

    def compared(timer: Hot) -> Measured:
        image = np.zeros((1, 3, 8, 8), "float32")
        return Bench(engine_on(timer), load_profile("cpu"), image).compared(refs[0], refs[1])

    found = compared(Hot(2))
    assert found.speedup == 2.0
    assert found.warnings == ("unstable because the machine is busy",), "the report says so"
    hot = r"the machine throttled: cpu0 core_throttle_count rose by 1, in each of 3 attempts"
    with pytest.raises(GateError, match=hot) as raised:
        compared(Hot(3))
    assert raised.value.hint.startswith("Cool it")
    with pytest.raises(GateError, match=r"the outputs hold NaN or infinity, in each of 3") as raised:
        compared(Hot(0, finite=False))
    assert "weights" in raised.value.hint


def test_a_staircase_does_not_end_on_a_time_of_a_hot_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setenv("THINET_CACHE", str(tmp_path))

    def climbed(timer: Hot) -> Staircase:
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)).eval()
        return climb(network, "net", (3, 8, 8), load_profile("cpu"), engine_on(timer))

    found = climbed(Hot(2))
    assert (found.whole_ms, found.warnings) == (2.0, ("unstable because the machine is busy",))
    with pytest.raises(GateError, match="throttled"):
        climbed(Hot(3))
