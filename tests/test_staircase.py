"""Layers timed by a real engine: what is measured and kept, and budgets of time. No time is asserted."""

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from mixed_layers import Mixed
from torch import nn

from thinet_deploy import pipeline
from thinet_deploy.artifact import read_json, write_json
from thinet_deploy.counting import count
from thinet_deploy.environment import cache_folder
from thinet_deploy.errors import GateError, InputError
from thinet_deploy.interfaces import Precision, Progress, silent
from thinet_deploy.on_device import runner, sensors
from thinet_deploy.on_device.turns import layer_time
from thinet_deploy.options import Options
from thinet_deploy.pruning.plan import load_plan
from thinet_deploy.stages.latency import Bench
from thinet_deploy.timing import budget as latency_budget
from thinet_deploy.timing import staircase, timers
from thinet_deploy.timing.budget import Measured
from thinet_deploy.timing.layer_networks import LayerShape, layers_of
from thinet_deploy.timing.staircase import Engine, Points, Task
from thinet_deploy.timing.surfaces import Timing

Cli = Callable[..., Any]
MakeOptions = Callable[..., Options]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("runtime", staircase.RUNTIMES)
def test_a_real_engine_times_layers(runtime: str, precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(runtime, reason=f"{runtime} is not installed")
    monkeypatch.setattr(staircase, "SECONDS", 0.002)
    monkeypatch.setattr(staircase, "ROUNDS", 3)
    tasks: list[Task] = [(each.shape, each.ins, each.outs) for each in layers_of(Mixed(), (3, 16, 16))]
    tasks += [(tasks[-1][0], 1, 1), (tasks[1][0], 1, 4)]
    found = Engine(runtime, precision=precision).time(tasks)
    assert len(found) == len(tasks)
    assert all(each.ms > 0 and each.spread_ms >= 0 for each in found)


@dataclass
class Simulated:
    """A worker whose runs take a millisecond, or whatever they like."""

    luck: random.Random | None = None
    opened: Counter[str] = field(default_factory=Counter)

    def __call__(self) -> Any:
        return nullcontext(self)

    def ask(self, op: str, **given: Any) -> dict[str, Any]:
        if op == "open":
            self.opened[given["path"]] += 1
        shaken = 1.0 if self.luck is None else self.luck.uniform(0.5, 2.0)
        return {"calls": 10, "seconds": 0.01, "samples_ms": [shaken] * given.get("count", 1)}


@pytest.fixture
def undisturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever runs beside this test does not count."""
    for name in ("BUSY", "STOLEN", "OTHERS"):
        monkeypatch.setattr(sensors, name, math.inf)
    monkeypatch.setattr(staircase, "UNSURE", math.inf)


def test_turns_that_somebody_disturbed_do_not_count() -> None:
    found = {"layer": [3.0, 9.0, 3.02, 3.01, 8.0], "frame": [1.0, 1.01, 2.8, 1.0, 2.9]}
    ms, spread_ms, network_ms = layer_time(found, ("layer", "frame"))
    assert network_ms == pytest.approx(3.01)
    assert ms == pytest.approx(2.01)
    assert spread_ms == pytest.approx(0.03)
    assert layer_time(found, ("layer", None)) == pytest.approx((3.01, 0.02, 3.01))
    swallowed, *_ = layer_time({"layer": [1.0] * 3, "frame": [1.2] * 3}, ("layer", "frame"))
    assert swallowed > 0, "a frame that was slower than its layer says nothing of a negative time"


def test_a_layer_that_is_cheap_beside_its_frame_is_not_therefore_disturbed() -> None:
    network_ms, agreeing, apart = 1.0, 0.03, 0.3
    assert not staircase._timing(0.05, agreeing, network_ms, busy=False).disturbed, "turns agree to within 3 %"
    assert staircase._timing(0.05, apart, network_ms, busy=False).disturbed
    assert not staircase._timing(0.9, 0.1, network_ms, busy=False).disturbed
    assert staircase._timing(0.9, agreeing, network_ms, busy=True).disturbed


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize("steady", [True, False])
def test_a_layer_that_is_known_gets_no_further_turns(steady: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staircase, "UNSURE", 0.2)
    worker = Simulated(None if steady else random.Random(0))
    monkeypatch.setattr(runner, "Worker", worker)
    layers = layers_of(Mixed(), (3, 16, 16))
    found = Engine("openvino").time([(each.shape, each.ins, each.outs) for each in layers])
    assert len(worker.opened) == 2 * len(layers) - 1, "each in its frame and the frame; the first one needs none"
    turns = set(worker.opened.values())
    assert turns == {staircase.ROUNDS_AT_LEAST} if steady else staircase.ROUNDS in turns
    assert all(each.spread_ms == 0 for each in found) == steady
    assert any(each.disturbed for each in found) != steady, "turns that do not agree"


class Hot(sensors.Watch):
    """Of a machine that throttles in so many rounds."""

    left = 0

    def summary(self) -> dict[str, Any]:
        type(self).left -= 1
        return {"throttled": ["cpu0 core_throttle_count rose by 1"] if self.left >= 0 else [], "warnings": []}


def test_a_round_of_a_machine_that_throttles_does_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    worker = Simulated()
    monkeypatch.setattr(runner, "Worker", worker)
    monkeypatch.setattr(sensors, "Watch", Hot)
    tasks = [(each.shape, each.ins, each.outs) for each in layers_of(Mixed(), (3, 16, 16))]
    monkeypatch.setattr(Hot, "left", 2)
    Engine("openvino").time(tasks)
    assert set(worker.opened.values()) == {staircase.ROUNDS_AT_LEAST + 2}
    monkeypatch.setattr(Hot, "left", 3)
    with pytest.raises(GateError, match=r"throttled in each of 3 attempts \(cpu0 .* rose by 1\)") as raised:
        Engine("openvino").time(tasks)
    assert raised.value.hint.startswith("Cool it")
    asked = {
        "engine": {"runtime": "openvino"},
        "networks": {"0": {"path": "0.onnx", "what": "conv"}},
        "pairs": [["0", None]],
    }
    write_json(tmp_path / "asked.json", {"layers": {**asked, "rounds": 3, "at_least": 3, "seconds": 1, "steady": 1}})
    monkeypatch.setattr(Hot, "left", 3)
    assert runner.main(["trial", str(tmp_path / "asked.json")]) == 4, "device_timer takes that for a hot device"
    assert "throttled in each of 3 attempts" in capfd.readouterr().out


class Shared(sensors.Watch):
    """Of a machine that computes for others too."""

    def summary(self) -> dict[str, Any]:
        return {"throttled": [], "warnings": ["unstable because other programs used 50% of the processors' time"]}


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize(("watch", "disturbed"), [(sensors.Watch, False), (Shared, True)])
def test_a_layer_that_was_timed_beside_other_programs_is_marked(
    watch: type[sensors.Watch], disturbed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runner, "Worker", Simulated())
    monkeypatch.setattr(sensors, "Watch", watch)
    tasks: list[Task] = [(each.shape, each.ins, each.outs) for each in layers_of(Mixed(), (3, 16, 16))]
    assert {timing.disturbed for timing in Engine("openvino").time(tasks)} == {disturbed}


def test_a_point_of_a_busy_machine_gives_way_to_one_of_a_quiet_machine(tmp_path: Path) -> None:
    path, task = tmp_path / "points.json", (LayerShape("linear", (1, 1), (1, 1), (1, 1), (0, 0, 0, 0), 1, (1, 1)), 4, 4)
    busy, worse, quiet = Timing(2.0, 0.1, disturbed=True), Timing(3.0, 0.1, disturbed=True), Timing(1.0, 0.1)
    first, second = Points(path), Points(path)
    first.add(task, worse)
    first.add(task, busy)
    first.add(task, worse)
    first.save()
    assert Points(path).of == {task[0]: {(4, 4): busy}}
    second.add(task, quiet)
    second.add(task, busy)
    second.save()
    first.save()
    assert Points(path).of == {task[0]: {(4, 4): quiet}}, "not even in another process's file"


def test_of_two_points_of_a_busy_machine_the_better_known_stays() -> None:
    """The faster one may be that whose frame was disturbed, for a layer's time is a difference."""
    points, task = Points(), (LayerShape("linear", (1, 1), (1, 1), (1, 1), (0, 0, 0, 0), 1, (1, 1)), 4, 4)
    swallowed, known = Timing(0.1, 0.9, disturbed=True), Timing(1.0, 0.1, disturbed=True)
    for each in (swallowed, known, swallowed):
        points.add(task, each)
    assert points.of[task[0]] == {(4, 4): known}


def test_points_are_kept_and_a_damaged_file_is_measured_anew(tmp_path: Path) -> None:
    path, shape = tmp_path / "points.json", LayerShape("conv", (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), 1, (8, 8))
    first, second = Points(path), Points(path)
    first.of[shape][16, 8] = Timing(1.5, 0.1)
    first.save()
    second.of[shape][16, 16] = Timing(3.0)
    second.save()
    assert Points(path).of == {shape: {(16, 8): Timing(1.5, 0.1), (16, 16): Timing(3.0)}}, "nobody's points are lost"
    for damage in ("", "{}", "[1]", '{"x": 1}', path.read_text()[:-20]):
        path.write_text(damage)
        assert not Points(path).of
    (tmp_path / "file").write_text("")
    Points(tmp_path / "file" / "points.json").save()  # cannot be written: costs time, and nothing else


def test_points_belong_to_machine_runtime_and_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    monkeypatch.setenv("THINET_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    shape = LayerShape("linear", (1, 1), (1, 1), (1, 1), (0, 0, 0, 0), 1, (1, 1))
    points = Points.on(Engine("openvino"))
    points.of[shape][4, 4] = Timing(1.0)
    points.save()
    assert Points.on(Engine("openvino")).of[shape]
    assert not Points.on(Engine("openvino", threads=2)).of
    monkeypatch.setattr(timers, "made_by", lambda runtime: f"{runtime} 99.9")
    assert not Points.on(Engine("openvino")).of


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture
def swift(brief: Path) -> Path:
    """See `brief`; on OpenVINO."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    return brief


@pytest.mark.usefixtures("undisturbed")
def test_the_command_shows_keeps_and_draws(cli: Cli, tiny: Path, tmp_path: Path, swift: Path) -> None:
    asked = ("staircase", "--model", f"{tiny / 'net.py'}:plain", "--round-to", "4", "--out", tmp_path / "stairs")
    done = cli(*asked)
    assert done.code == 0, done.err
    for part in ("features.0", "conv 3x3 on 8x8", "linear", "the whole network", "All layers together", "o"):
        assert part in done.out
    (kept,) = (swift / "staircase").iterdir()
    before = kept.read_bytes()
    found = json.loads(cli(*asked, "--json").out)
    assert kept.read_bytes() == before, "nothing was measured again"
    assert {name for row in found["layers"] for name in row["names"]} == {
        *("features.0", "features.2", "features.5"),
        *("classifier.0", "classifier.3"),
    }
    assert sum(row["share"] for row in found["layers"]) == pytest.approx(1)
    assert found["factor"] == pytest.approx(found["whole_ms"] / found["layers_ms"])
    assert all(len(row[side]["widths"]) == len(row[side]["ms"]) for row in found["layers"] for side in _SIDES)
    for row in found["layers"]:
        surface, points = row["surface"], {(spot["ins"], spot["outs"]): spot["ms"] for spot in row["measured"]}
        for side, fixed in (("along_ins", row["outs"]), ("along_outs", row["ins"])):
            widths, along = row[side]["widths"], side == "along_ins"
            assert row[side]["ms"] == [points[(width, fixed) if along else (fixed, width)] for width in widths]
        assert len(surface["ms"]) == len(surface["outs"])
        assert all(len(line) == len(surface["ins"]) for line in surface["ms"])
        for ins, outs in points.keys() & {(row["ins"], each) for each in surface["outs"]}:
            through = surface["ms"][surface["outs"].index(outs)][surface["ins"].index(ins)]
            assert through == pytest.approx(points[ins, outs], rel=1e-9), "but for the rounding of the patch"
    assert any(
        len({spot["ins"] for spot in row["measured"]}) > 1 < len(row["surface"]["outs"]) for row in found["layers"]
    )
    text = (tmp_path / "stairs" / "staircase.svg").read_text()
    assert ET.fromstring(text).tag.endswith("svg")
    assert 'href="http' not in text


_SIDES = ("along_ins", "along_outs")


def test_an_engine_or_a_target_elsewhere_is_refused(cli: Cli, tmp_path: Path, tiny: Path) -> None:
    done = cli("staircase", "--model", f"{tiny / 'net.py'}:plain", "--target", "jetson")
    assert done.code == 2
    assert "cannot be timed here" in done.err


# ---------------------------------------------------------------------------------------------- budgets of time

TIMED = {"target": "cpu", "preset": "thinet-conv", "epochs": 1, "round_to": 4}


def test_where_time_is_work_a_budget_of_time_is_met(
    tiny_options: MakeOptions, tmp_path: Path, swift: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way but for the clock: layers and networks take a millisecond per 1,000 multiply-accumulates."""

    def layers(self: Engine, tasks: Sequence[Task], progress: Progress = silent) -> list[Timing]:
        work = (math.prod((*shape.kernel, *shape.map_size, i, o)) / shape.groups for shape, i, o in tasks)
        return [Timing(each / 1000, 0.0) for each in work]

    @contextmanager
    def meter(self: Bench, original: nn.Module) -> Iterator[Callable[[nn.Module], Measured]]:
        def measure(thin: nn.Module) -> Measured:
            before, after = (count(model, self.input_shape).macs / 1000 for model in (original, thin))
            return Measured(after, before, before / after, before / after, before / after)

        yield measure

    monkeypatch.setattr(Engine, "time", layers)
    monkeypatch.setattr(Bench, "meter", meter)
    options = tiny_options(tmp_path / "run", **{**TIMED, "round_to": 1}, speedup="1.5x")
    report = read_json(pipeline.prune(options) / "report.json")
    asked = report["macs"]["before"] / 1.5
    assert 0.8 * asked <= report["macs"]["after"] <= (1 + latency_budget.SLACK) * asked
    widths = load_plan(tmp_path / "run" / "thin" / "plan.json").widths
    assert {name: after for name, (_, after) in widths.items()}.items() <= report["timing"]["best"]["widths"].items()
    assert widths


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_budget_of_time_on_a_real_engine(
    precision: Precision, tiny_options: MakeOptions, tmp_path: Path, swift: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision == "int8":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    monkeypatch.setattr(latency_budget, "SLACK", 1e9)  # so small a network gets as fast as the machine's mood lets it
    options = tiny_options(tmp_path / "run", **TIMED, speedup="4x", precision=precision)
    report = read_json(pipeline.prune(options) / "report.json")
    timing = report["timing"]
    assert (timing["runtime"], timing["precision"], timing["speedup"]) == ("openvino", precision, "4x")
    assert 1 <= len(timing["trials"]) <= 2 + latency_budget.CORRECTIONS
    assert timing["best"] in timing["trials"]
    after = {each["producer"]: each["after"] for each in report["layers"]}
    assert after.items() <= timing["best"]["widths"].items()
    assert report["macs"]["after"] <= report["macs"]["before"]
    (kept,) = (swift / "staircase").iterdir()
    assert f"-{precision}-" in kept.name


@pytest.mark.slow
def test_an_impossible_budget_ends_with_the_smallest_time(
    tiny_options: MakeOptions, tmp_path: Path, swift: Path
) -> None:
    options = tiny_options(tmp_path / "run", **TIMED, latency="1us")
    with pytest.raises(GateError, match=r"The budget of 0.001 ms cannot be reached: .* takes \d"):
        pipeline.prune(options)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"macs": "2"}, r"--macs is 2: it is not in one of the forms below"),
        ({"latency": "8"}, r"--latency is 8: it is not in one of the forms below"),
        ({"latency": "8ms", "macs": "2x"}, "--latency and --macs are 2 budgets"),
        ({"latency": "8ms", "speedup": "2x"}, "--latency and --speedup are 2 budgets"),
        ({"speedup": "2x", "recipe": "iccv2017"}, "with --recipe iccv2017 there are none"),
        ({"speedup": "2x", "method": "apoz"}, "with --method apoz there are none"),
        ({"speedup": "2x", "target": "cpu", "precision": "fp16"}, "fp16"),
        ({"speedup": "1x"}, "something faster than the original"),
        ({"speedup": "2x"}, "Layers for raspberry-pi-5 cannot be timed here"),
    ],
)
def test_what_does_not_go_with_a_budget_of_time(
    given: dict[str, str], words: str, tiny_options: MakeOptions, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        pipeline.prune(tiny_options(tmp_path / "run", **given))


@pytest.mark.parametrize(("text", "ms"), [("8ms", 8.0), ("800us", 0.8), ("0.5s", 500.0)])
def test_times_in_words(text: str, ms: float) -> None:
    assert Options(latency=text).most_ms == ms
    assert Options(latency=text).widths == text
