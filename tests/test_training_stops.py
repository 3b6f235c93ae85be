"""A training that is killed goes on as if it had not been; one that diverges says so, and spoils no checkpoint."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_training import COUNT, RECIPE, StoppedError, corners, network, same, stop_after, trained
from torch import nn

from thinet_deploy.data.dataset import ImageSet
from thinet_deploy.errors import ThinetDeployError
from thinet_deploy.store import Checkpoint
from thinet_deploy.training import Recipe, train


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return corners()


WAYS = {
    "sgd": RECIPE,
    "adamw": replace(RECIPE, optimizer="adamw", lr=0.01, schedule="steps", label_smoothing=0.1),
    "ema": replace(RECIPE, ema=0.9, momentum=0),
    "bf16": replace(RECIPE, precision="bf16", ema=0.99, optimizer="adamw"),
    "fp16": replace(RECIPE, precision="fp16"),
}


@pytest.mark.parametrize(
    ("way", "done"), [("sgd", 1), ("sgd", 2), ("sgd", 3), ("sgd", 4), *((way, 2) for way in WAYS), ("ema", 4)]
)
def test_resuming_gives_the_weights_of_training_without_a_break(
    way: str, done: int, images: ImageSet, tmp_path: Path
) -> None:
    expected, path, recipe = network(), tmp_path / "checkpoint.safetensors", WAYS[way]
    train(expected, images, recipe, seed=1, stage="s", teacher=network())
    with pytest.raises(StoppedError):
        train(
            network(),
            images,
            recipe,
            seed=1,
            stage="s",
            teacher=network(),
            checkpoint=Checkpoint(path, "key"),
            progress=stop_after(done),
        )
    torch.manual_seed(99)
    resumed, seen = network(), list[int]()
    for parameter in resumed.parameters():
        nn.init.zeros_(parameter)  # nothing of a fresh network may shine through
    train(
        resumed,
        images,
        recipe,
        seed=1,
        stage="s",
        teacher=network(),
        checkpoint=Checkpoint(path, "key"),
        progress=lambda stage, now, total, note="": seen.append(now),
    )
    assert same(resumed, expected)
    steps = images.training_steps(RECIPE.batch)
    assert sorted(set(seen)) == list(range(done * steps, RECIPE.epochs * steps + 1)) or done == RECIPE.epochs


def test_a_checkpoint_of_other_inputs_is_ignored(images: ImageSet, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    train(network(), images, RECIPE, seed=5, stage="s", checkpoint=Checkpoint(path, "other"))
    model = network()
    train(model, images, RECIPE, seed=1, stage="s", checkpoint=Checkpoint(path, "key"))
    assert same(model, trained(images))


MESSAGE = r"diverged: .+ of stage x .+ in epoch \d of 6, step \d of 4, at a learning rate of (\S+)\."


@pytest.mark.parametrize("lr", [1e12, math.nan])
def test_divergence_is_an_error_with_advice(lr: float, images: ImageSet, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "c.safetensors", "key")
    recipe = Recipe(epochs=6, lr=lr, batch=16, clip=math.inf)
    with pytest.raises(ThinetDeployError, match=MESSAGE) as caught:
        train(network(), images, recipe, seed=1, stage="stage x", checkpoint=checkpoint)
    assert "--lr" in caught.value.hint
    saved = checkpoint.load()
    assert saved is None or all(tensor.isfinite().all() for tensor in saved[0].values())


class Fuse(nn.Module):
    """Lets some batches through; after them, values or gradients are no numbers."""

    def __init__(self, batches: int, value: float = math.nan, *, backward: bool = False) -> None:
        super().__init__()
        self.left, self.value, self.backward_too = batches, value, backward

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.left -= self.training
        if self.left >= 0:
            return values
        if self.backward_too:
            values.register_hook(lambda gradient: gradient * self.value)  # type: ignore[no-untyped-call]
            return values * 1
        return values * self.value


@pytest.mark.parametrize(
    ("fuse", "what"), [(Fuse(6), "loss .+ is nan"), (Fuse(6, math.inf, backward=True), "gradient")]
)
def test_divergence_is_seen_at_its_step_and_costs_nothing_of_the_checkpoint(
    fuse: Fuse, what: str, images: ImageSet, tmp_path: Path
) -> None:
    checkpoint, model = Checkpoint(tmp_path / "c.safetensors", "key"), nn.Sequential(network(), fuse)
    with pytest.raises(ThinetDeployError, match=rf"the {what}.* in epoch 2 of 4, step 3 of 4, at a .+ of 0\.0"):
        train(model, images, RECIPE, seed=1, stage="s", checkpoint=checkpoint)
    assert all(parameter.isfinite().all() for parameter in model.parameters())  # no step was made with it
    expected, saved = nn.Sequential(network(), Fuse(4)), checkpoint.load()
    with pytest.raises(StoppedError):
        train(expected, images, RECIPE, seed=1, stage="s", progress=stop_after(1))
    assert saved is not None
    assert saved[1]["epochs"] == 1
    assert all(torch.equal(saved[0][f"model.{name}"], tensor) for name, tensor in expected.state_dict().items())


def test_a_loss_that_is_no_number_from_the_start_is_not_blamed_on_the_rate(images: ImageSet) -> None:
    with pytest.raises(ThinetDeployError, match="epoch 1 of 4, step 1 of 4") as caught:
        train(nn.Sequential(network(), Fuse(0)), images, RECIPE, seed=1, stage="s")
    assert "weights and images" in caught.value.hint
    assert "--lr" not in caught.value.hint
    with pytest.raises(ThinetDeployError, match="epoch 1 of 4, step 2 of 4") as caught:
        train(nn.Sequential(network(), Fuse(1)), images, replace(RECIPE, precision="fp16"), seed=1, stage="s")
    assert "--lr" in caught.value.hint
    assert "bf16" in caught.value.hint


def test_weights_that_a_last_step_spoiled_are_not_saved(images: ImageSet, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "c.safetensors", "key")
    recipe = Recipe(epochs=1, lr=math.inf, batch=COUNT)
    with pytest.raises(ThinetDeployError, match="weights of s are not finite in epoch 1 of 1, step 1 of 1"):
        train(network(), images, recipe, seed=1, stage="s", checkpoint=checkpoint)
    assert checkpoint.load() is None
