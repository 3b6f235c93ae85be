"""A user's own training, preprocessing and mistakes, on a tiny network of the user's own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import thinet_deploy
from thinet_deploy import pipeline
from thinet_deploy.artifact import read_json
from thinet_deploy.bundle import read_manifest, verify_bundle
from thinet_deploy.errors import DataError, ModelError
from thinet_deploy.models.loading import load_function
from thinet_deploy.options import Options
from thinet_deploy.pipeline import build

pytestmark = pytest.mark.usefixtures("quick_module")
MakeOptions = Callable[..., Options]


TRAINER = """
import json, pathlib, torch
LOG = pathlib.Path(__file__).with_name("calls")
def fit(model, images, epochs, lr, *, stage, {more}):
    with LOG.open("a") as log:
        log.write(json.dumps([stage, epochs, lr, model.training, len(images), list({names})]) + "\\n")
    if {fails!r} in stage:
        raise RuntimeError("out of coffee")
    for parameter in model.parameters():
        parameter.data += 1e-3 * torch.randn_like(parameter)
"""


@pytest.mark.parametrize(("more", "names"), [("seed", "(seed,)"), ("**rest", "sorted(rest)")])
def test_the_users_trainer_trains_every_network(
    more: str, names: str, tiny_options: MakeOptions, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(TRAINER.format(more=more, names=names, fails="nowhere"))
    asked = {"recipe": "iccv2017", "target": "ios", "lr": 0.3, "finetune_lr": 0.1}
    asked["trainer"] = f"{tmp_path / 'own.py'}:fit"
    done = build(tiny_options(tmp_path / "run", **asked))
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    given = [0] if more == "seed" else ["batch_size", "seed", "teacher"]
    assert [call[:3] for call in calls] == [
        ["Training the original", 2, 0.3],
        ["Fine-tuning, layer features.0", 1, pytest.approx(0.1)],
        ["Fine-tuning, layer features.2", 1, pytest.approx(0.1)],
        ["Fine-tuning Original, 4 epochs more", 4, 0.1],
        ["Fine-tuning ThiNet-Conv (r=0.5)", 1, 0.1],
        ["Fine-tuning ThiNet-GAP", 1, 0.1],
        ["Training from scratch", 6, 0.3],
    ]
    assert all(call[4:] == [36, given] for call in calls)
    if more == "seed":
        again = build(tiny_options(tmp_path / "again", **asked))
        weights = [(run / "gap" / "model.safetensors").read_bytes() for run in (done.run, again.run)]
        assert weights[0] == weights[1], "torch's generator is seeded for the trainer"


def test_a_changed_trainer_trains_anew(tiny_options: MakeOptions, tmp_path: Path) -> None:
    own, calls = tmp_path / "own.py", tmp_path / "calls"
    options = tiny_options(tmp_path / "run", recipe="iccv2017", trainer=f"{own}:fit")
    own.write_text(TRAINER.format(more="seed", names="()", fails="nowhere"))
    pipeline.prune(options)
    pipeline.prune(options)
    assert len(calls.read_text().splitlines()) == 3
    own.write_text(own.read_text() + "# changed\n")
    pipeline.prune(options)
    assert len(calls.read_text().splitlines()) == 6


def test_a_failing_trainer_ends_in_one_message(
    tiny_options: MakeOptions, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    (tmp_path / "own.py").write_text(TRAINER.format(more="seed", names="()", fails="features.2"))
    asked = tiny_options(tmp_path / "run", target="ios")
    arguments = ["--target", "ios", "--model", asked.model, "--data", asked.data, "--out", asked.out, "--epochs", 1]
    arguments += ["--recipe", "iccv2017", "--layer-epochs", 1]
    done = cli("build", *arguments, "--trainer", f"{tmp_path / 'own.py'}:fit")
    assert done.code == 2
    message = " ".join(done.err.split())
    assert "own.py:fit failed in Fine-tuning, layer features.2: RuntimeError: out of coffee" in message
    assert "Traceback" not in done.err
    assert 'own.py", line 8, in fit' in (tmp_path / "run" / "logs" / "trainer.log").read_text()
    assert (tmp_path / "run" / "dense").is_dir(), "finished stages are kept"
    assert not (tmp_path / "run" / "prune").exists()


@pytest.mark.parametrize("form", ["model", "model, images, rate", "model, images, *, momentum"])
def test_a_trainer_that_cannot_be_called_is_found_first(form: str, tiny_options: MakeOptions, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(f"def fit({form}): ...")
    with pytest.raises(ModelError, match=r"own.py:fit cannot be called as fit\(model, images, …\): "):
        build(tiny_options(tmp_path / "run", trainer=f"{tmp_path / 'own.py'}:fit"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("network", "change"), [("plain", {"trainer": "nowhere.py:fit"}), ("residual", {"preset": "thinet-gap"})]
)
def test_what_cannot_work_is_found_before_anything_is_written(
    network: str, change: dict[str, Any], tiny_options: MakeOptions, tmp_path: Path
) -> None:
    for work in (build, pipeline.prune):
        with pytest.raises(ModelError, match=r"nowhere\.py|no fully connected head"):
            work(tiny_options(tmp_path / "run", network, **change))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_found_before_the_training(tiny_options: MakeOptions, tmp_path: Path) -> None:
    seen: list[str] = []
    with pytest.raises(ModelError, match="batch size is frozen"):
        build(tiny_options(tmp_path / "run", "frozen_batch"), lambda stage, *_: seen.append(stage))
    assert [stage for stage in seen if "Training the" in stage] == []
    assert not (tmp_path / "run" / "dense").exists()


def test_the_users_preprocessing_goes_into_plan_and_bundle(tiny_options: MakeOptions, tmp_path: Path) -> None:
    file = tmp_path / "pre.toml"
    file.write_text('resize = [10, 9]\ncrop = [8, 8]\ncolour = "GRAY"\nrange = "0..255"\nmean = [100]\nstd = [50]\n')
    done = build(tiny_options(tmp_path / "run", target="ios", preprocess=file))
    wanted = {"resize": [10, 9], "crop": [8, 8], "colour": "GRAY", "range": "0..255", "mean": [100.0], "std": [50.0]}
    for stage in ("prune", "conv", "gap"):
        assert wanted.items() <= read_json(done.run / stage / "plan.json")["preprocess"].items()
    assert wanted.items() <= read_json(done.bundle / "preprocess.json").items()
    assert wanted.items() <= read_manifest(done.bundle).preprocess.items()


def own_training(run: Path, tiny: Path) -> nn.Module:
    """What a user writes: the public API and a plain loop."""
    torch.manual_seed(0)
    plan: Any = thinet_deploy.load_plan(run / "thin" / "plan.json")
    fresh: Any = load_function(f"{tiny / 'net.py'}:plain", "factory")(num_classes=3)
    thin: nn.Module = thinet_deploy.load_thin(plan, fresh, run / "thin" / "model.safetensors")
    data = thinet_deploy.load_folder(tiny / "data", plan.preprocess)
    optimizer = torch.optim.SGD(thin.train().parameters(), 0.05)
    for epoch in range(2):
        for inputs, labels in data.train.training_batches(8, seed=0, stage="mine", epoch=epoch):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(thin(torch.from_numpy(inputs)), torch.from_numpy(labels))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return thin


def test_prune_own_training_build(
    tiny_options: MakeOptions,
    tmp_path: Path,
    tiny: Path,
    cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, file = tmp_path / "run", tmp_path / "mine.pth"
    monkeypatch.chdir(tiny)
    assert pipeline.prune(tiny_options(run, data=Path("data"), model="net.py:plain")) == run / "thin"
    monkeypatch.chdir(tmp_path)  # the paths given to prune were relative to another folder
    assert {p.name for p in (run / "thin").iterdir()} == {"plan.json", "model.safetensors", "model.pt2", "report.json"}
    torch.save(nn.Linear(3, 3).state_dict(), file)
    before = sorted(p for p in run.rglob("*") if p.is_file())
    wrong = cli("build", "--from", run, "--weights", file)
    assert wrong.code == 2
    assert "another architecture" in wrong.err
    assert sorted(p for p in run.rglob("*") if p.is_file()) == before, "nothing was broken"
    stored = run / ".records" / "thin-options.json"
    options = stored.read_text()
    for damage in (options[:40], "[]", '{"keep": 7}', '{"kep": 0.5}'):
        stored.write_text(damage)
        damaged = cli("build", "--from", run, "--weights", file)
        assert damaged.code == 2
        assert "options.json is damaged, or of another version" in damaged.err
        assert "`thinet-deploy prune` again" in damaged.err
    stored.write_text(options)
    thin = own_training(run, tiny)
    torch.save(thin.state_dict(), file)
    right = cli("build", "--from", run, "--weights", file, "--json")
    assert right.code == 0, right.err
    document = json.loads(right.out)
    assert [row["label"] for row in document["table"]["rows"]] == ["Original", "ThiNet-GAP (r=0.5), own training"]
    assert all(hop["passed"] for hop in document["parity"])
    assert verify_bundle(Path(document["bundle"]))["exit_code"] == 0
    thin_again = cli("build", "--from", run, "--weights", file, "--target", "ios", "--json")
    assert json.loads(thin_again.out)["table"]["target"] == "ios"


def test_a_folder_with_one_image_of_each_class_is_refused_before_anything_is_trained(
    tiny_options: MakeOptions, workplace: Path
) -> None:
    for spare in (each for folder in (workplace / "data" / "train").iterdir() for each in sorted(folder.iterdir())[1:]):
        spare.unlink()
    with pytest.raises(DataError, match="No image can be held out of 2: every class has one image alone"):
        build(tiny_options(workplace / "run", data=workplace / "data"))
    assert not (workplace / "run").exists()
