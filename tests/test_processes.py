"""Pruning and building in several processes is that of one. This file is also the program that the processes run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from thinet_deploy import pipeline, registry
from thinet_deploy.artifact import read_json
from thinet_deploy.cli import app as cli
from thinet_deploy.data.dataset import ImageSet
from thinet_deploy.data.preprocess import Augment, Preprocess
from thinet_deploy.errors import ModelError
from thinet_deploy.options import make_options
from thinet_deploy.parallel import Team, join, leave
from thinet_deploy.pruning.budget import Wish, uniform
from thinet_deploy.pruning.calibration import Sample
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.layerwise import prunable
from thinet_deploy.pruning.oneshot import Method, prune_once
from thinet_deploy.pruning.plan import load_plan
from thinet_deploy.pruning.proof import prove
from thinet_deploy.pruning.trace import example_inputs
from thinet_deploy.shared_run import SharedRun
from thinet_deploy.stages import deploy as deploy_stage
from thinet_deploy.stages import prune as prune_stage

PROCESSES, TIMEOUT_S, SEEDS, SHAPE = 2, 200, 4, (3, 8, 8)
# Unequal shares; fewer images than two batches; one process without any.
COUNTS = [41, 3, 1]
METHODS = {
    "elimination": Method(),
    "symmetric": Method(targets="symmetric"),
    "thinet": Method("thinet", "scale"),
    "apoz": Method("apoz", "none"),
    "taylor": Method("taylor", "none"),
}
# A network without dropout or BatchNorm, which differ between processes: so that all of a build is the same.
NETWORK = """
from torch import nn

def make(num_classes):
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 10, 3, padding=1), nn.ReLU(),
                        nn.MaxPool2d(2), nn.Conv2d(10, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                        nn.Linear(32, num_classes))
    net.input_shape = (1, 8, 8)
    return net
"""


class Residual(nn.Module):
    """A block with a shortcut and BatchNorm, then plain layers, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 14, 3)
        self.b = nn.Conv2d(14, 12, 3, padding=2)
        self.norm, self.twice, self.head = nn.BatchNorm2d(14), nn.Conv2d(12, 12, 1), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.b(F.relu(self.norm(self.a(x)))))
        return self.head(F.relu(self.twice(F.relu(self.twice(x)))).mean((2, 3)))  # type: ignore[no-any-return]


def pruned(seed: int, count: int, method: Method) -> dict[str, torch.Tensor]:
    """What stays of a random network, and its weights then."""
    torch.manual_seed(seed)
    model = Residual().eval()
    nn.init.uniform_(model.norm.weight, 0.5, 1.5)
    graph = channel_graph(model, example_inputs(model, SHAPE))
    groups = prunable(graph)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    preprocess = Preprocess(resize=(8, 8), crop=(8, 8), augment=Augment())
    images = ImageSet(np.arange(count) % 5, lambda indices: pixels[indices], preprocess)
    sample = Sample(images, np.arange(count), 16, seed)
    done = prune_once(model, graph, groups, lambda _: uniform(groups, 0.5, Wish()), sample, SHAPE, method)
    curves = {f"curve {name}": torch.from_numpy(curve.error) for name, curve in done.curves.items()}
    return {**done.model.state_dict(), **curves, "kept": torch.from_numpy(done.kept)}


def all_pruned() -> dict[str, dict[str, torch.Tensor]]:
    """By seed, number of images and method."""
    many = {f"{seed} 41 {name}": pruned(seed, 41, method) for seed in range(SEEDS) for name, method in METHODS.items()}
    return many | {f"0 {count} elimination": pruned(0, count, Method()) for count in COUNTS}


def options(folder: Path, out: str, **changes: Any) -> Any:
    """Of a build of NETWORK, trained elsewhere."""
    usual = {"data": folder / "data", "model": f"{folder / 'net.py'}:make", "target": "raspberry-pi-5"}
    usual |= {"weights": folder / "dense.safetensors", "finetune_epochs": 2, "out": folder / out}
    return make_options({**usual, **changes})


BUILDS: dict[str, dict[str, Any]] = {"best": {"recipe": "best", "macs": "2x"}, "iccv2017": {"recipe": "iccv2017"}}


def build_all(folder: Path, prefix: str) -> None:
    """Every recipe, measured for moments only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deploy_stage, "TORCH_ROUNDS", 8)
        patch.setattr(deploy_stage, "TORCH_BATCH", 2)
        patch.setattr(registry, "installed", lambda _: False)  # as conftest.py has it in the tests' own process
        for name, changes in BUILDS.items():
            pipeline.build(options(folder, f"{prefix}-{name}", **changes))


def waiting_s(folder: Path) -> float:
    """Processor time that this process takes while the first one works alone for a second."""
    run = SharedRun(folder / "waiting")
    before = time.process_time()
    run.alone("long", {}, lambda place, _: time.sleep(1))
    return time.process_time() - before


def kill_in_training(folder: Path) -> None:
    """The second process is killed in the second epoch of the fine-tuning."""
    average, first = Team.average_gradients, folder / "killed-best" / ".partial" / "conv.safetensors"

    def deadly(self: Team, model: nn.Module) -> None:
        if first.exists() and self.rank:  # there is none of the trial before it
            os.kill(os.getpid(), signal.SIGKILL)
        average(self, model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Team, "average_gradients", deadly)
        build_all(folder, "killed")


def go_on(folder: Path) -> None:
    """Now nobody is killed."""
    build_all(folder, "killed")
    leave()


def fail_alone(folder: Path) -> None:
    """The second process meets an error that the first one does not."""

    def failing(*arguments: Any, **more: Any) -> Any:
        if join().rank:
            raise ModelError("Only here.", hint="Look here.")
        return prove(*arguments, **more)

    data, model, weights = folder / "data", f"{folder / 'net.py'}:make", folder / "dense.safetensors"
    sys.argv = ["thinet-deploy", "prune", f"--data={data}", f"--model={model}", f"--weights={weights}"]
    sys.argv += [f"--out={folder / 'alone'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prune_stage, "prove", failing)
        cli.main()


def work(folder: Path) -> None:
    """What both processes do."""
    rank = join().rank
    for name, tensors in all_pruned().items():
        save_file(tensors, folder / f"{name} {rank}")
    build_all(folder, "two")
    (folder / f"waiting {rank}").write_text(str(waiting_s(folder)))
    leave()


PROGRAMS: dict[str, Callable[[Path], None]] = {
    "work": work,
    "kill": kill_in_training,
    "go on": go_on,
    "fail": fail_alone,
}


TORCHRUN = ("torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}")
ACCELERATE = ("accelerate.commands.launch", "--cpu", f"--num_processes={PROCESSES}", "--num_machines=1")


def launch(*arguments: object, by: Sequence[str] = TORCHRUN) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` in several processes."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    # DETAIL: what one process exchanges is compared with what the others do, not only where the sizes differ.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
    command = [sys.executable, "-m", *by, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@pytest.fixture(scope="module")
def place(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a network and its weights."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "data").symlink_to(tiny / "data")
    (folder / "net.py").write_text(NETWORK)
    space: dict[str, Any] = {}
    exec(NETWORK, space)
    torch.manual_seed(0)
    save_file(space["make"](3).state_dict(), folder / "dense.safetensors")
    return folder


@pytest.fixture(scope="module")
def two(place: Path) -> Path:
    """What two processes wrote."""
    done = launch(__file__, "work", place)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return place


@pytest.fixture(scope="module")
def one(two: Path) -> Path:
    """The same folder, with what one process wrote beside it."""
    build_all(two, "one")
    return two


@pytest.mark.parametrize("by", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate launch"])
def test_two_processes_prune_as_one(by: Sequence[str], place: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    given: list[object] = ["prune", "--data", place / "data", "--model", f"{place / 'net.py'}:make", "--macs", "2x"]
    given += ["--target", "raspberry-pi-5", "--weights", place / "dense.safetensors"]
    two = launch("-m", "thinet_deploy", *given, "--out", tmp_path / "two", by=by)
    assert two.returncode == 0, two.stderr
    alone = cli(*given, "--out", tmp_path / "one")
    assert alone.code == 0, alone.err
    plans = [load_plan(tmp_path / run / "thin" / "plan.json") for run in ("one", "two")]
    assert plans[0] == plans[1]
    weights = [load_file(tmp_path / run / "thin" / "model.safetensors") for run in ("one", "two")]
    torch.testing.assert_close(
        *weights, rtol=1e-2, atol=1e-3
    )  # refits amplify float32 sums in another order: 1.5e-4 seen


@pytest.mark.slow
def test_statistics_of_two_processes_keep_the_filters_of_one(two: Path) -> None:
    """Sums in another order differ in the last bit: where two filters are worth the same, that may decide."""
    differing, decided = 0, 0
    for name, expected in all_pruned().items():
        found = load_file(two / f"{name} 0")
        decided += len(expected["kept"])
        differing += int((found["kept"] != expected["kept"]).sum())
        if torch.equal(found["kept"], expected["kept"]):
            for key in expected.keys() - {"kept"}:
                torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-4, msg=f"{name}: {key}")
    assert differing <= decided / 500, f"{differing} of {decided} decisions differ"


@pytest.mark.slow
def test_both_processes_prune_alike(two: Path) -> None:
    for file in two.glob("* 0"):
        if file.name.startswith("waiting"):
            continue
        first, second = load_file(file), load_file(file.with_name(f"{file.name[:-1]}1"))
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items()), file.name


@pytest.mark.slow
@pytest.mark.parametrize("recipe", BUILDS)
def test_a_build_of_two_processes_is_that_of_one(recipe: str, one: Path) -> None:
    same(one / f"two-{recipe}", one / f"one-{recipe}")


def same(found: Path, expected: Path) -> None:
    """One set of outputs, nothing left over, the same filters, nearly the same weights, and all gates passed."""

    def files(run: Path) -> set[str]:
        return {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}

    assert files(found) == files(expected)
    assert not list(found.rglob(".tmp-*"))
    for stage in ("prune", "conv", "longer"):
        if stage != "longer":  # the original, trained on
            plans = [load_plan(run / stage / "plan.json") for run in (found, expected)]
            assert plans[0] == plans[1]
        weights = [load_file(run / stage / "model.safetensors") for run in (found, expected)]
        torch.testing.assert_close(*weights, rtol=1e-2, atol=1e-3)
    assert all(hop["passed"] for hop in read_json(found / "parity" / "parity.json")["hops"])


@pytest.mark.slow
def test_waiting_takes_no_processor_time(two: Path) -> None:
    assert float((two / "waiting 1").read_text()) < 0.2


@pytest.mark.slow
def test_a_killed_process_ends_the_launch_and_the_next_one_goes_on(one: Path) -> None:
    start = time.monotonic()
    killed = launch(__file__, "kill", one)
    assert "Signal 9" in killed.stderr
    assert time.monotonic() - start < TIMEOUT_S / 2
    assert (one / "killed-best" / ".partial" / "conv.safetensors").exists(), "the first epoch was kept"
    again = launch(__file__, "go on", one)
    assert again.returncode == 0, again.stderr
    for recipe in BUILDS:
        same(one / f"killed-{recipe}", one / f"one-{recipe}")


@pytest.mark.slow
def test_an_error_of_one_process_is_shown_once(place: Path) -> None:
    failed = launch(__file__, "fail", place)
    assert failed.returncode != 0
    assert failed.stderr.count("Only here.") == 1
    assert "Another process" not in failed.stderr
    assert "RuntimeError" not in failed.stderr


@pytest.mark.slow
def test_results_and_errors_of_the_command_line_are_one_document(two: Path) -> None:
    arguments = ("-m", "thinet_deploy", "prune", "--data", two / "data", "--model", f"{two / 'net.py'}:make", "--json")
    done = launch(*arguments, "--epochs", 0, "--out", two / "command")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["folder"] == str(two / "command" / "thin")
    assert done.stderr.count("Pruning: done") == 1
    failed = launch(*arguments, "--data", two / "nowhere", "--out", two / "command")
    assert json.loads(failed.stdout)["exit_code"] == 2
    assert failed.stderr.count("There is no folder") == 1


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_shares_are_all_images_once(size: int, count: int) -> None:
    images: NDArray[np.int64] = np.arange(count) + 10
    shares = [Team(rank, size, torch.device("cpu")).mine(images) for rank in range(size)]
    assert sorted(np.concatenate(shares)) == images.tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](Path(sys.argv[2]))
