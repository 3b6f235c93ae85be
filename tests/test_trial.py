"""What fine-tuning is done with, by short trials on held-out training images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from thinet_deploy import pipeline
from thinet_deploy.artifact import read_json
from thinet_deploy.errors import DivergedError
from thinet_deploy.options import Options
from thinet_deploy.parallel import Team
from thinet_deploy.stages.tools import Tools
from thinet_deploy.tasks.classification import Ranked
from thinet_deploy.training import train

MakeOptions = Callable[..., Options]
Attempt = tuple[float, bool]  # learning rate, and whether the original teaches
Weights = dict[str, torch.Tensor]


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[Attempt, int]], list[Attempt]]:
    """Held-out images find so many of a hundred right after each attempt (-1: it diverged); gives those made."""

    def watch(right: dict[Attempt, int]) -> list[Attempt]:
        made: list[Attempt] = []
        ours = Tools.train

        def short(tools: Tools, model: Any, stage: str, epochs: int, lr: float, *more: Any, **how: Any) -> None:
            if not stage.startswith("Trying"):
                ours(tools, model, stage, epochs, lr, *more, **how)
                return
            made.append((lr, how["teacher"] is not None))
            if right[made[-1]] < 0:
                raise DivergedError("The loss is nan.")

        def judge(*_: Any) -> Ranked:
            return Ranked(np.where(np.arange(100) < right[made[-1]], 0, 9))

        monkeypatch.setattr(Tools, "train", short)
        monkeypatch.setattr("thinet_deploy.stages.trial.judge", judge)
        return made

    return watch


@pytest.mark.parametrize(
    ("right", "taken"),
    [
        ({(0.01, True): 80, (0.003, True): 81, (0.03, True): 79, (0.01, False): 81}, (0.01, True)),
        ({(0.01, True): 80, (0.003, True): 81, (0.03, True): 80, (0.01, False): 81}, (0.01, True)),
        ({(0.01, True): 80, (0.003, True): 81, (0.03, True): 81, (0.03, False): 82}, (0.03, True)),
        ({(0.01, True): 80, (0.003, True): 81, (0.03, True): -1, (0.01, False): -1}, (0.01, True)),
        ({(0.01, True): 80, (0.003, True): 95, (0.001, True): 95, (0.003, False): 95}, (0.003, True)),
        ({(0.01, True): 60, (0.003, True): 80, (0.001, True): 95, (0.001, False): 20}, (0.001, True)),
        ({(0.01, True): 60, (0.003, True): 50, (0.03, True): 90, (0.03, False): 99}, (0.03, False)),
        ({(0.01, True): -1, (0.003, True): 60, (0.001, True): 50, (0.003, False): -1}, (0.003, True)),
    ],
)
def test_the_usual_is_taken_unless_a_higher_one_is_better_or_another_clearly(
    right: dict[Attempt, int], taken: Attempt, attempts: Any, tiny_options: MakeOptions, tmp_path: Any
) -> None:
    made = attempts(right)
    done = pipeline.build(tiny_options(tmp_path / "run", finetune_epochs=2, controls="none", target="ios"))
    assert made == list(right)
    told = read_json(done.run / "trial" / "trial.json")
    assert (told["lr"], told["teacher"]) == taken
    assert [(each["lr"], each["teacher"]) for each in told["tried"]] == made
    steps = [entry.step for entry in done.table.ledger if entry.step.startswith("fine-tuned")]
    assert steps
    teacher = ", the original as teacher" if taken[1] else ""
    assert set(steps) == {f"fine-tuned, 2 epochs at {taken[0]:g}{teacher}"}
    assert read_json(done.run / "conv" / "report.json")["lr"] == taken[0]


def test_thin_networks_learn_from_the_original_trained_on(
    attempts: Any, tiny_options: MakeOptions, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts({(0.02, True): 80, (0.02, False): 80})
    teachers, ours = dict[str, Weights | None](), Tools.train

    def noted(tools: Tools, model: Any, stage: str, *more: Any, teacher: Any = None, **how: Any) -> None:
        teachers[stage] = teacher and teacher.state_dict()
        ours(tools, model, stage, *more, teacher=teacher, **how)

    monkeypatch.setattr(Tools, "train", noted)
    done = pipeline.build(tiny_options(tmp_path / "run", finetune_lr=0.02, finetune_epochs=1, target="ios"))
    steps = {entry.network: entry.step for entry in done.table.ledger}
    assert steps["Original, 2 epochs more"] == "fine-tuned, 2 epochs at 0.02", "on the labels"
    assert teachers["Fine-tuning Original, 2 epochs more"] is None
    for label in ("ThiNet-Conv (r=0.5)", "ThiNet-GAP"):
        assert steps[label] == "fine-tuned, 1 epoch at 0.02, the original trained on as teacher"
        teacher = teachers[f"Fine-tuning {label}"]
        assert teacher is not None
        longer = load_file(done.run / "longer" / "model.safetensors")
        assert all(torch.equal(teacher[name], tensor) for name, tensor in longer.items())


def test_a_rate_that_is_given_is_not_tried(attempts: Any, tiny_options: MakeOptions, tmp_path: Any) -> None:
    made = attempts({(0.02, True): 80, (0.02, False): 80})
    pipeline.build(tiny_options(tmp_path / "run", finetune_lr=0.02, controls="none", target="ios"))
    assert made == [(0.02, True), (0.02, False)]


def test_the_first_process_decides_for_all(
    tiny_options: MakeOptions, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would judge by its own floats, and they would go on to train different things."""

    class Second(Team):
        def once(self, work: Callable[[], Any]) -> Any:
            return Ranked(np.zeros(100, np.int64))

    monkeypatch.setattr("thinet_deploy.stages.trial.join", lambda: Second(1, 2, torch.device("cpu")))
    monkeypatch.setattr("thinet_deploy.stages.trial.judge", lambda *_: pytest.fail("this process judges by itself"))
    done = pipeline.build(tiny_options(tmp_path / "run", finetune_lr=0.02, controls="none", target="ios"))
    assert len(read_json(done.run / "trial" / "trial.json")["tried"]) == 2


def test_an_attempt_is_a_tenth_of_the_work(
    tiny_options: MakeOptions, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[int, int]] = set()

    def watch(model: Any, images: Any, recipe: Any, **given: Any) -> None:
        if given["stage"].startswith("Trying"):
            seen.add((recipe.epochs, len(images)))
        train(model, images, recipe, **given)

    monkeypatch.setattr("thinet_deploy.stages.tools.train", watch)
    options = tiny_options(tmp_path / "run", finetune_epochs=2, controls="none", target="ios")
    pipeline.build(options)
    fit = read_json(tmp_path / "run" / "trial" / "trial.json")
    assert seen == {(1, fit["images"])}
    pipeline.build(options.model_copy(update={"finetune_epochs": 20}))
    longer = read_json(tmp_path / "run" / "trial" / "trial.json")
    assert seen == {(1, fit["images"]), (2, longer["images"])}
    assert fit["images"] == longer["images"] // 5
