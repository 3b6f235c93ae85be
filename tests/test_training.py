"""Training is reproducible to the bit and resumable; accuracy is never flattered (design.md, "Random choices")."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import nn

from thinet_deploy.data import ImageSet
from thinet_deploy.errors import InputError, ThinetDeployError
from thinet_deploy.interfaces import Progress
from thinet_deploy.norms import reestimate_norms
from thinet_deploy.preprocess import Augment, Preprocess
from thinet_deploy.store import Checkpoint
from thinet_deploy.tasks.base import Accuracy
from thinet_deploy.tasks.classification import CLASSIFICATION
from thinet_deploy.training import Recipe, evaluate, logits, train

COUNT, CLASSES = 50, 4
RECIPE = Recipe(epochs=4, lr=0.05, batch=16, warmup=1)


class StoppedError(Exception):
    """The process ends here."""


@pytest.fixture(scope="module")
def images() -> ImageSet:
    rng = np.random.default_rng(0)
    labels = np.arange(COUNT) % CLASSES
    pixels = rng.integers(0, 100, (COUNT, 10, 10, 1), np.uint8)
    for image, label in zip(pixels, labels, strict=True):  # a bright corner per class
        image[(label % 2) * 5 :, (label // 2) * 5 :][:5, :5] += 120
    augment = Augment(mirror=True, pad=1)
    preprocess = Preprocess(colour="GRAY", mean=(0.3,), std=(0.3,), resize=(10, 10), crop=(8, 8), augment=augment)
    return ImageSet(labels, lambda indices: pixels[indices], preprocess)


def network() -> nn.Module:
    """With everything whose state or chance could differ: BatchNorm and dropout."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(54, CLASSES)),
    )


def accuracy(outputs: NDArray[np.float32], labels: NDArray[np.int64]) -> Accuracy:
    meter = CLASSIFICATION.meter()
    meter.add([outputs], labels)
    return meter.judge().accuracy


def trained(images: ImageSet, *, seed: int = 1, stage: str = "s", recipe: Recipe = RECIPE) -> nn.Module:
    model = network()
    train(model, images, recipe, seed=seed, stage=stage)
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_training_learns_and_ends_in_eval_mode(images: ImageSet) -> None:
    model = trained(images, recipe=Recipe(epochs=12, lr=0.05, batch=16))
    assert not model.training
    assert evaluate(model, images).main > 90
    assert evaluate(network(), images).main < 60


def test_the_same_seed_gives_the_same_weights_whatever_ran_before(images: ImageSet) -> None:
    first = trained(images)
    torch.rand(17)
    np.random.default_rng().random()
    assert same(first, trained(images))


@pytest.mark.parametrize("change", [{"seed": 2}, {"stage": "t"}])
def test_another_seed_or_stage_gives_other_weights(change: dict[str, object], images: ImageSet) -> None:
    assert not same(trained(images), trained(images, **change))  # type: ignore[arg-type]


def epoch_of(
    images: ImageSet, size: int, *, seed: int = 1, stage: str = "s", epoch: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    batches = list(images.training_batches(size, seed=seed, stage=stage, epoch=epoch))
    assert [len(labels) for _, labels in batches][:-1] == [size] * (len(batches) - 1)
    return np.concatenate([inputs for inputs, _ in batches]), np.concatenate([labels for _, labels in batches])


@pytest.mark.parametrize("size", [1, 7, 50, 64])
def test_order_and_augmentation_do_not_depend_on_the_batch_size(size: int, images: ImageSet) -> None:
    (inputs, labels), (expected, expected_labels) = epoch_of(images, size), epoch_of(images, 16)
    np.testing.assert_array_equal(inputs, expected)
    np.testing.assert_array_equal(labels, expected_labels)


@pytest.mark.parametrize("change", [{"seed": 2}, {"stage": "t"}, {"epoch": 1}])
def test_order_and_augmentation_depend_on_seed_stage_and_epoch(change: dict[str, object], images: ImageSet) -> None:
    assert (epoch_of(images, 16)[1] != epoch_of(images, 16, **change)[1]).any()  # type: ignore[arg-type]


def test_an_epoch_shows_every_image_once(images: ImageSet) -> None:
    plain = images.preprocess.model_copy(
        update={"augment": Augment(mirror=False), "resize": (10, 10), "crop": (10, 10)}
    )
    inputs, labels = epoch_of(ImageSet(images.labels, images.read, plain), 16)
    expected = plain.normalise(images.read(np.arange(COUNT)))
    order = [int(np.flatnonzero((expected == image).all((1, 2, 3)))[0]) for image in inputs]
    assert sorted(order) == list(range(COUNT))
    np.testing.assert_array_equal(labels, images.labels[order])
    assert order != sorted(order)


def test_an_image_is_augmented_alike_wherever_it_stands_in_the_data(images: ImageSet) -> None:
    first = epoch_of(images, 16)[0]
    seen = list(range(COUNT))
    other = ImageSet(images.labels, lambda indices: images.read(np.asarray(seen)[indices]), images.preprocess)
    np.testing.assert_array_equal(epoch_of(other, 16)[0], first)


def stop_after(epochs: int) -> Progress:
    def progress(stage: str, done: int, total: int, note: str = "") -> None:
        if done == epochs * total // RECIPE.epochs and note:
            raise StoppedError

    return progress


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


def test_the_rate_rises_and_then_falls_to_nothing(images: ImageSet) -> None:
    def moved(epochs: int) -> float:
        """How far the last of some epochs takes the weights."""
        recipe = Recipe(epochs=6, lr=0.05, batch=64, warmup=2, momentum=0, weight_decay=0)
        states: dict[int, nn.Module] = {}
        model = network()

        def progress(stage: str, done: int, total: int, note: str = "") -> None:
            states[done] = copy.deepcopy(model)

        train(model, images, recipe, seed=1, stage="s", progress=progress)
        before, after = (nn.utils.parameters_to_vector(states[i].parameters()) for i in (epochs - 1, epochs))
        return float((after - before).detach().norm())

    steps = [moved(epochs) for epochs in (1, 3, 6)]
    assert steps[0] < steps[1] / 4
    assert steps[2] < steps[1] / 4
    assert min(steps) > 0


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


def test_half_precision_trains_to_finite_weights(images: ImageSet) -> None:
    """A step whose gradient overflows is left out, not taken for divergence."""
    model = network()
    train(model, images, replace(RECIPE, precision="fp16"), seed=1, stage="s")
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not same(model, network())


def plain() -> nn.Module:
    """Without BatchNorm and dropout: alike in training and eval mode."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, CLASSES))


def by_hand(images: ImageSet, recipe: Recipe, optimizer: torch.optim.Optimizer, model: nn.Module) -> list[nn.Module]:
    """The weights after every step of a plain loop, with the cosine of the papers' rate and the usual loss."""
    states, steps = list[nn.Module](), images.training_steps(recipe.batch)
    for epoch in range(recipe.epochs):
        batches = images.training_batches(recipe.batch, seed=1, stage="s", epoch=epoch)
        for step, (inputs, labels) in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * 0.5 * (1 + math.cos(math.pi * (epoch + step / steps) / recipe.epochs))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(
                model(torch.from_numpy(inputs)), torch.from_numpy(labels), label_smoothing=recipe.label_smoothing
            )
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            states.append(copy.deepcopy(model))
    return states


def close(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_training_is_torchs_own_loop(name: str, images: ImageSet) -> None:
    recipe = Recipe(epochs=3, lr=0.01, batch=16, label_smoothing=0.1, optimizer=name)  # type: ignore[arg-type]
    model, expected = plain(), plain()
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(expected.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
        if name == "sgd"
        else torch.optim.AdamW(expected.parameters(), 0.01, weight_decay=5e-4)
    )
    train(model, images, recipe, seed=1, stage="s")
    close(model, by_hand(images, recipe, optimizer, expected)[-1])


def test_the_average_is_that_of_a_plain_loop(images: ImageSet) -> None:
    recipe, model, start = Recipe(epochs=4, lr=0.05, batch=16, ema=0.5), plain(), plain()
    train(model, images, recipe, seed=1, stage="s")
    average = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    optimizer = torch.optim.SGD(start.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    decays = list[float]()
    for step, state in enumerate(by_hand(images, recipe, optimizer, start)):
        decays.append(min(0.5, (1 + step) / (10 + step)))
        for name, tensor in state.state_dict().items():
            average[name] = decays[-1] * average[name] + (1 - decays[-1]) * tensor
    assert decays[0] == 0.1
    assert decays[-1] == 0.5
    torch.testing.assert_close(dict(model.state_dict()), average, rtol=1e-5, atol=1e-6)


def test_the_average_takes_the_statistics_of_batchnorm_along(images: ImageSet) -> None:
    """With a decay of nearly nothing it is the last state; with more, both weights and statistics lag behind."""
    last, lagging = trained(images), trained(images, recipe=replace(RECIPE, ema=0.8))
    torch.testing.assert_close(trained(images, recipe=replace(RECIPE, ema=1e-12)).state_dict(), last.state_dict())
    assert torch.equal(lagging[1].num_batches_tracked, last[1].num_batches_tracked)  # type: ignore[index]
    for name in ("0.weight", "1.running_mean", "1.running_var"):
        assert not torch.allclose(lagging.state_dict()[name], last.state_dict()[name], rtol=1e-3)


def rates(images: ImageSet, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The learning rate of every step."""
    seen, step = list[float](), torch.optim.SGD.step

    def spy(self: torch.optim.SGD) -> None:
        seen.append(self.param_groups[0]["lr"])
        step(self)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    train(plain(), images, recipe, seed=1, stage="s")
    return seen


def test_the_rate_falls_to_a_tenth_after_each_third(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(epochs=6, lr=0.1, batch=25, schedule="steps")
    expected = [0.1] * 4 + [0.01] * 4 + [0.001] * 4
    assert rates(images, recipe, monkeypatch) == pytest.approx(expected)
    # After the warm-up, as without it.
    assert rates(images, replace(recipe, warmup=1), monkeypatch)[2:] == pytest.approx(expected[2:])


def test_bf16_learns_and_leaves_fp32_weights(images: ImageSet) -> None:
    model = trained(images, recipe=Recipe(epochs=12, lr=0.05, batch=16, precision="bf16"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert evaluate(model, images).main > 90
    assert not same(model, trained(images, recipe=Recipe(epochs=12, lr=0.05, batch=16)))


class Watcher(nn.Module):
    """Notes what a network sees, and in which mode."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, list[torch.Tensor]()

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.seen.append(values.clone())
        assert self.training == torch.is_grad_enabled()
        return self.inner(values)  # type: ignore[no-any-return]


def test_the_teacher_sees_the_same_images_in_eval_mode_and_stays_as_it_is(images: ImageSet) -> None:
    student, teacher = Watcher(network()), Watcher(network()).eval()
    before = copy.deepcopy(teacher.state_dict())
    train(student, images, RECIPE, seed=1, stage="s", teacher=teacher.train())
    assert len(student.seen) == len(teacher.seen) == 1 + 16, "one look for parts in common, then every step"
    assert all(map(torch.equal, student.seen, teacher.seen))
    assert not teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_nothing_is_learnt_from_a_teacher_who_knows_no_more(images: ImageSet) -> None:
    model, recipe = plain(), Recipe(epochs=2, lr=0.1, batch=16, distill=1, weight_decay=0)
    train(model, images, recipe, seed=1, stage="s", teacher=plain())
    torch.testing.assert_close(model.state_dict(), plain().state_dict())


def test_images_without_labels_are_learnt_from_the_teacher(images: ImageSet) -> None:
    teacher = trained(images, recipe=Recipe(epochs=12, lr=0.05, batch=16))
    bare = replace(images, labels=np.where(np.arange(COUNT) < 40, -1, images.labels))
    model = network()
    train(model, bare, Recipe(epochs=12, lr=0.05, batch=16), seed=2, stage="s", teacher=teacher)
    assert evaluate(model, images).main > 90


def test_images_without_labels_need_a_teacher(images: ImageSet) -> None:
    model = network()
    with pytest.raises(InputError, match="s: 3 of 50 training images have no label, and there is no teacher"):
        train(model, replace(images, labels=np.r_[[-1] * 3, images.labels[3:]]), RECIPE, seed=1, stage="s")
    assert same(model, network())


@pytest.mark.parametrize("batch", [3, 7, 16, 50, 256])
def test_reestimated_statistics_are_those_of_all_images_at_the_first_batchnorm(batch: int, images: ImageSet) -> None:
    model = trained(images)
    before = copy.deepcopy(model)
    reestimate_norms(model, images, seed=1, stage="s", batch=batch)
    with torch.no_grad():
        values = model[0](torch.from_numpy(images.inputs(np.arange(COUNT)))).double()  # type: ignore[index]
    variance, mean = torch.var_mean(values, (0, 2, 3))
    state = model.state_dict()
    torch.testing.assert_close(state["1.running_mean"].double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state["1.running_var"].double(), variance, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before.state_dict()["1.running_var"], state["1.running_var"], rtol=1e-3)
    assert all(map(torch.equal, before.parameters(), model.parameters()))
    assert not any(module.training for module in model.modules())
    assert model[1].momentum == 0.1  # type: ignore[index]
    train(model, images, RECIPE, seed=1, stage="s")  # nothing that was hooked in is left


def test_reestimation_forgets_damaged_statistics_and_passes_over_idle_norms(images: ImageSet) -> None:
    model, idle = network(), nn.BatchNorm2d(6)
    model[0].idle = idle  # type: ignore[index]
    idle.running_mean.fill_(7)  # type: ignore[union-attr]
    model[1].running_mean.fill_(math.nan)  # type: ignore[index]
    reestimate_norms(model, images, seed=1, stage="s")
    assert model[1].running_mean.isfinite().all()  # type: ignore[index]
    assert (idle.running_mean == 7).all()  # type: ignore[union-attr]
    chosen = copy.deepcopy(model)
    reestimate_norms(chosen, images, seed=1, stage="s", limit=10)
    assert not torch.allclose(chosen[1].running_mean, model[1].running_mean, rtol=1e-3)  # type: ignore[index]


def test_batches_for_statistics_hold_images_of_all_kinds(images: ImageSet) -> None:
    """Images come sorted by class: a second BatchNorm must not see classes one by one."""
    order = np.argsort(images.labels, kind="stable")
    by_class = ImageSet(images.labels[order], lambda indices: images.read(order[indices]), images.preprocess)
    deep = nn.Sequential(network()[:4], nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5))  # type: ignore[index]
    whole = copy.deepcopy(deep)
    reestimate_norms(whole, by_class, seed=1, stage="s", batch=COUNT)
    reestimate_norms(deep, by_class, seed=1, stage="s", batch=13)
    torch.testing.assert_close(deep[2].running_var, whole[2].running_var, rtol=0.15, atol=0)


def test_a_network_without_batchnorm_has_nothing_to_reestimate(images: ImageSet) -> None:
    model = plain()
    reestimate_norms(model, images, seed=1, stage="s", progress=stop_after(0))
    assert same(model, plain())


def test_a_last_image_on_its_own_is_no_batch(images: ImageSet) -> None:
    """BatchNorm on maps of 1x1 cannot be trained on one image: 50 = 7 x 7 + 1."""
    points = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(1, CLASSES))
    train(points, images, Recipe(epochs=1, lr=0.01, batch=7), seed=1, stage="s")


def test_no_epochs_change_nothing(images: ImageSet) -> None:
    model = network()
    train(model, images, Recipe(epochs=0, lr=1), seed=1, stage="s")
    assert same(model, network())
    assert not model.training


@settings(deadline=None)
@given(
    hnp.arrays(np.float32, (12, 7), elements=st.floats(-5, 5, width=16)),
    hnp.arrays(np.int64, 12, elements=st.integers(0, 6)),
)
def test_accuracy_is_the_share_of_labels_ranked_first_or_among_five(
    outputs: NDArray[np.float32], labels: NDArray[np.int64]
) -> None:
    """A class that others equal comes after them: a tie is not knowledge."""
    ranks = [sum(score >= row[label] for score in row) for row, label in zip(outputs, labels, strict=True)]
    result = accuracy(outputs, labels)
    assert result.images == 12
    assert result.figures["top-1"].value == pytest.approx(100 * np.mean([rank <= 1 for rank in ranks]))
    assert result.figures["top-5"].value == pytest.approx(100 * np.mean([rank <= 5 for rank in ranks]))


def test_accuracy_without_ties_is_that_of_torch() -> None:
    outputs = torch.randn(200, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(200) % 10
    result = accuracy(outputs.numpy(), labels.numpy())
    assert result.figures["top-1"].value == pytest.approx(float((outputs.argmax(1) == labels).double().mean() * 100))
    assert result.figures["top-5"].value == pytest.approx(
        float((outputs.topk(5).indices == labels[:, None]).any(1).double().mean() * 100)
    )


@pytest.mark.parametrize("value", [0.0, 3.0, math.nan, math.inf, -math.inf])
def test_a_network_whose_outputs_are_all_alike_knows_nothing(value: float) -> None:
    result = accuracy(np.full((20, 10), value, np.float32), np.arange(20) % 10)
    assert [figure.value for figure in result.figures.values()] == [0, 0]


def test_logits_are_those_of_all_images_in_order_in_eval_mode(images: ImageSet) -> None:
    model = network().train()
    expected = logits(model, images, batch=COUNT)
    assert expected.shape == (COUNT, CLASSES)
    torch.testing.assert_close(logits(model.train(), images, batch=7), expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(torch.from_numpy(images.inputs(np.array([31])))), expected[31:32])
