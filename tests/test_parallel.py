"""Training in several processes is that of one. This file is also the program that the processes run."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from thinet_deploy.data.dataset import ImageSet
from thinet_deploy.data.preprocess import Augment, Preprocess
from thinet_deploy.errors import MissingError, ThinetDeployError
from thinet_deploy.parallel import Team, join, leave
from thinet_deploy.store import Checkpoint
from thinet_deploy.training import Recipe, logits, train

COUNT, CLASSES, PROCESSES, TIMEOUT_S = 50, 4, 2, 300
# 50 = 15 + 15 + 15 + 5: shares of 8 and 7, and of 3 and 2 images. With 16: a last batch of 2, too small to share.
PLAIN = Recipe(epochs=3, lr=0.05, batch=15, warmup=1, label_smoothing=0.1)
SMALL = Recipe(epochs=2, lr=0.01, batch=16, optimizer="adamw", ema=0.9)


class StoppedError(Exception):
    """The process ends here."""


def images() -> ImageSet:
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 255, (COUNT, 10, 10, 1), np.uint8), np.arange(COUNT) % CLASSES
    augment = Augment(mirror=True, pad=1)
    preprocess = Preprocess(colour="GRAY", mean=(0.3,), std=(0.3,), resize=(10, 10), crop=(8, 8), augment=augment)
    return ImageSet(labels, lambda indices: pixels[indices], preprocess)


def network(*, norms: bool = False) -> nn.Module:
    torch.manual_seed(0)
    middle = (nn.BatchNorm2d(6), nn.Dropout(0.2)) if norms else ()
    return nn.Sequential(nn.Conv2d(1, 6, 3), *middle, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, CLASSES))


class Bad(nn.Module):
    """Turns all that one process computes into NaN."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values * (math.nan if os.environ.get("RANK", "0") == "1" else 1)


def stop(stage: str, done: int, total: int, note: str = "") -> None:
    """Ends the process after two of three epochs."""
    if done * 3 >= total * 2:
        raise StoppedError


def main(folder: Path) -> None:
    """What each process does: train in several ways, and write what became of it."""
    rank = join().rank
    ways = {"plain": (PLAIN, False), "small": (SMALL, False), "norms": (PLAIN, True)}
    for name, (recipe, norms) in ways.items():
        model, checkpoint = network(norms=norms), Checkpoint(folder / f"{name}.checkpoint", "key")
        train(model, images(), recipe, seed=1, stage="s", teacher=network(), checkpoint=checkpoint)
        save_file(model.state_dict(), folder / f"{name}-{rank}")
        again = network(norms=norms)  # all of it comes from the checkpoint
        train(again, images(), recipe, seed=1, stage="s", teacher=network(), checkpoint=checkpoint)
        save_file(again.state_dict(), folder / f"{name}-again-{rank}")
    model, half = network(), Checkpoint(folder / "half", "key")
    train(model, images(), PLAIN, seed=1, stage="s", teacher=network(), checkpoint=half)
    save_file(model.state_dict(), folder / f"half-{rank}")
    save_file({"logits": logits(network(), images())}, folder / f"logits-{rank}")
    try:
        train(nn.Sequential(network(), Bad()), images(), PLAIN, seed=1, stage="s")
    except ThinetDeployError as error:
        (folder / f"error-{rank}").write_text(str(error))
    leave()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    folder = tmp_path_factory.mktemp("processes")
    half = Checkpoint(folder / "half", "key")
    with pytest.raises(StoppedError):  # one process leaves them a training to finish
        train(network(), images(), PLAIN, seed=1, stage="s", teacher=network(), checkpoint=half, progress=stop)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, __file__, folder], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return folder


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(got, dict(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "recipe"), [("plain", PLAIN), ("small", SMALL)])
def test_two_processes_learn_what_one_learns(name: str, recipe: Recipe, folder: Path) -> None:
    model = network()
    train(model, images(), recipe, seed=1, stage="s", teacher=network())
    start = nn.utils.parameters_to_vector(network().parameters())
    assert (nn.utils.parameters_to_vector(model.parameters()) - start).abs().max() > 0.003
    assert_close(load_file(folder / f"{name}-0"), model.state_dict())


@pytest.mark.parametrize("name", ["plain", "small", "norms"])
def test_all_processes_end_with_the_same_network(name: str, folder: Path) -> None:
    first = load_file(folder / f"{name}-0")
    for other in (f"{name}-1", f"{name}-again-0", f"{name}-again-1"):
        found = load_file(folder / other)
        assert found.keys() == first.keys()
        assert all(torch.equal(tensor, first[key]) for key, tensor in found.items()), other


def test_statistics_of_batchnorm_come_from_both_shares(folder: Path) -> None:
    """Not the same as one process's, but near: the rate of the running average is 0.1 per step."""
    model = network(norms=True)
    train(model, images(), PLAIN, seed=1, stage="s", teacher=network())
    found, expected = load_file(folder / "norms-0"), model.state_dict()
    torch.testing.assert_close(found["1.running_var"], expected["1.running_var"], rtol=0.3, atol=0)


def test_every_process_has_all_outputs(folder: Path) -> None:
    for rank in range(PROCESSES):
        torch.testing.assert_close(load_file(folder / f"logits-{rank}")["logits"], logits(network(), images()))


def test_a_loss_that_is_no_number_in_one_process_stops_both_at_its_step(folder: Path) -> None:
    for rank in range(PROCESSES):
        assert "the loss of s is nan in epoch 1 of 3, step 1 of 4" in (folder / f"error-{rank}").read_text()


def test_two_processes_go_on_from_what_one_left(folder: Path) -> None:
    for rank in range(PROCESSES):
        assert_close(load_file(folder / f"half-{rank}"), load_file(folder / "plain-0"))


def test_one_process_goes_on_from_what_two_left(folder: Path) -> None:
    model = network()
    train(model, images(), PLAIN, seed=1, stage="s", checkpoint=Checkpoint(folder / "plain.checkpoint", "key"))
    assert_close(load_file(folder / "plain-0"), model.state_dict())


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 5, 16, 17])
def test_weighted_shares_make_up_the_mean_of_the_batch(size: int, count: int) -> None:
    values = torch.arange(count, dtype=torch.float64) ** 2
    shares = [Team(rank, size, torch.device("cpu")).share(count) for rank in range(size)]
    assert sum(float(weight * values[rows].sum()) for rows, weight in shares) / size == pytest.approx(values.mean())
    assert all(len(values[rows]) >= min(2, count) for rows, _ in shares)


def test_several_processes_without_accelerate_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("thinet_deploy.parallel.import_module", absent)
    with pytest.raises(MissingError, match="2 processes, but accelerate") as caught:
        train(network(), images(), PLAIN, seed=1, stage="s")
    assert "pip install accelerate" in caught.value.hint


def test_processes_that_do_not_find_each_other_do_not_train_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    lonely = SimpleNamespace(Accelerator=lambda **_: SimpleNamespace(num_processes=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("thinet_deploy.parallel.import_module", lambda name: lonely)
    with pytest.raises(ThinetDeployError, match="in 2 processes, but accelerate connects 1"):
        join()


class Traveller(nn.Module):
    """Notes where it is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.way = list[str]()

    def to(self, device: torch.device) -> Self:  # type: ignore[override]
        self.way.append(str(device))
        return self

    def cpu(self) -> Self:
        return self.to(torch.device("cpu"))


def test_one_process_has_nobody_to_leave() -> None:
    leave()
    assert join().size == 1


def test_networks_come_back_to_the_cpu_whatever_happens() -> None:
    travellers = [Traveller(), Traveller()]
    with pytest.raises(StoppedError), Team(0, 1, torch.device("cuda")).holding(*travellers):
        raise StoppedError
    assert [traveller.way for traveller in travellers] == [["cuda", "cpu"]] * 2


if __name__ == "__main__":
    main(Path(sys.argv[1]))
