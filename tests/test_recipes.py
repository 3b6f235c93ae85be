"""The recipes: the papers' and the best one, from options to the files of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from thinet_deploy import pipeline
from thinet_deploy.artifact import read_json
from thinet_deploy.errors import InputError, UnknownNameError
from thinet_deploy.options import make_options
from thinet_deploy.pruning.plan import load_plan
from thinet_deploy.pruning.surgery import load_thin
from thinet_deploy.stages.job import load_job

MakeOptions = Callable[..., Any]


def pruned(options: Any) -> tuple[Path, dict[str, Any]]:
    folder = pipeline.prune(options)
    return folder, read_json(folder / "report.json")


def test_the_best_recipe_prunes_at_once_and_keeps_a_ledger(tiny_options: MakeOptions, tmp_path: Path) -> None:
    options = tiny_options(tmp_path / "run", recipe="best", calibration_images=40)
    folder, report = pruned(options)
    assert report["epochs"] == 0
    assert [entry["step"] for entry in report["ledger"]][:2] == ["pruned", "reconstructed"]
    for entry in report["ledger"]:
        for figure in entry["figures"].values():
            assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 100
    kept = [entry for entry in report["ledger"] if "not kept" not in entry["step"]]
    assert report["accuracy"]["figures"] == kept[-1]["figures"]
    assert report["proof"]["passed"]
    assert report["macs"]["after"] < report["macs"]["before"]
    job = load_job(options)
    thin = load_thin(load_plan(folder / "plan.json"), job.fresh(), folder / "model.safetensors")
    assert thin(torch.zeros(2, *job.input_shape)).shape == (2, len(job.data.classes))


def test_allocated_widths_cost_no_more_than_the_keep_ratio_asked_for(tiny_options: MakeOptions, tmp_path: Path) -> None:
    best = pruned(tiny_options(tmp_path / "best", recipe="best"))[1]
    uniform = pruned(tiny_options(tmp_path / "uniform", recipe="best", method="random", reconstruction="none"))[1]
    assert best["macs"]["after"] <= uniform["macs"]["after"] < best["macs"]["before"]
    assert uniform["ledger"][0]["step"] == "pruned"


def test_the_same_run_twice_keeps_the_same_filters(tiny_options: MakeOptions, tmp_path: Path) -> None:
    plans = [pruned(tiny_options(tmp_path / name, recipe="best"))[0] / "plan.json" for name in ("one", "two")]
    assert plans[0].read_text() == plans[1].read_text()


@pytest.mark.parametrize("method", ["thinet-omp", "weight-sum", "apoz", "taylor", "random"])
def test_every_method_goes_layer_by_layer_too(method: str, tiny_options: MakeOptions, tmp_path: Path) -> None:
    report = pruned(tiny_options(tmp_path / "run", recipe="iccv2017", method=method, reconstruction="none"))[1]
    assert report["epochs"] == len(report["layers"]) > 0
    assert all(layer["error"] == layer["error_scaled"] for layer in report["layers"])


def test_layer_by_layer_the_ledger_has_every_step_of_every_layer(tiny_options: MakeOptions, tmp_path: Path) -> None:
    report = pruned(tiny_options(tmp_path / "run", "residual", recipe="iccv2017", layer_epochs=None))[1]
    layers, steps = report["layers"], [entry["step"] for entry in report["ledger"]]
    names = [layer["producer"].partition(",")[0] for layer in layers]
    told = [[step.removeprefix(name) for step in steps if step.startswith(name)] for name in names]
    assert sum(map(len, told)) == len(steps), "of each layer, in its order"
    between = [" pruned", " reconstructed", " fine-tuned, 1 epoch"]
    assert all(each in (between, between[:2]) for each in told)
    assert between in told
    assert told[-1] == between[:2], "what follows the last layer is the fine-tuning at the end"
    for entry in report["ledger"]:
        assert 0 <= entry["figures"]["top-1"]["low"] <= entry["figures"]["top-1"]["high"] <= 100
    last = [step.endswith("reconstructed") for step in steps].index(True)
    assert report["ledger"][last]["figures"]["top-1"]["value"] == layers[0]["accuracy_pruned"]
    assert report["accuracy"]["figures"] == report["ledger"][-1]["figures"]


def test_the_later_paper_chooses_by_adding(tiny_options: MakeOptions, tmp_path: Path) -> None:
    by_recipe = pruned(tiny_options(tmp_path / "recipe", recipe="tpami2019"))[0] / "plan.json"
    by_method = pruned(tiny_options(tmp_path / "method", recipe="iccv2017", method="thinet-omp"))[0] / "plan.json"
    assert by_recipe.read_text() == by_method.read_text()


def test_what_only_the_best_recipe_can_do_is_refused_elsewhere(tiny_options: MakeOptions, tmp_path: Path) -> None:
    for wrong in ({"method": "elimination"}, {"reconstruction": "full"}):
        with pytest.raises(InputError, match="layer by layer") as found:
            load_job(tiny_options(tmp_path / "run", recipe="iccv2017", **wrong))
        assert "--recipe best" in found.value.hint
    with pytest.raises(UnknownNameError, match="tpami2019"):
        make_options({"recipe": "tpami2018"})
    with pytest.raises(UnknownNameError, match="taylor"):
        make_options({"method": "tailor"})


def test_fine_tuning_after_the_best_recipe_learns_from_the_original(
    tiny_options: MakeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from thinet_deploy.stages import tools

    teachers: dict[str, bool] = {}
    from thinet_deploy.training import train

    def watch(model: Any, images: Any, recipe: Any, **given: Any) -> None:
        teachers[given["stage"]] = given["teacher"] is not None
        train(model, images, recipe, **given)

    monkeypatch.setattr(tools, "train", watch)
    pipeline.build(tiny_options(tmp_path / "run", recipe="best"))
    assert teachers["Fine-tuning ThiNet-Conv (r=0.5)"]
    assert not teachers["Fine-tuning Original, 2 epochs more"], "it learns from the labels"
    assert not teachers["Training the original"]
    assert not teachers["Training from scratch"]


def test_what_a_layer_too_wide_to_refit_reads_stays_whole_and_says_so(
    tiny_options: MakeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = pruned(tiny_options(tmp_path / "all", recipe="best"))[1]
    names = {layer["producer"] for layer in everything["layers"]}
    narrowest = min(layer["before"] for layer in everything["layers"])
    monkeypatch.setattr("thinet_deploy.pruning.wide.MOST_INPUTS", 9 * narrowest)
    by_channel = pruned(tiny_options(tmp_path / "by channel", recipe="best"))[1]
    assert {layer["producer"] for layer in by_channel["layers"]} == names
    monkeypatch.setattr("thinet_deploy.pruning.wide._spans", lambda graph: {})
    some = pruned(tiny_options(tmp_path / "some", recipe="best"))[1]
    left = {layer["producer"] for layer in some["layers"]}
    assert left < names
    for name in names - left:
        assert "too many inputs" in some["whole"][name]


def test_several_methods_get_a_row_each_and_the_first_ships(tiny_options: MakeOptions, tmp_path: Path) -> None:
    options = tiny_options(tmp_path / "run", method="elimination,random", preset="thinet-conv", target="ios")
    done = pipeline.build(options)
    assert [row.label for row in done.table.rows] == [
        "Original",
        "Original, 1 epoch more",
        "ThiNet-Conv (r=0.5, elimination)",
        "ThiNet-Conv (r=0.5, random)",
        "Train from scratch",
    ]
    assert [hop.passed for hop in done.hops if hop.hop == "masked → pruned"] == [True, True]
    plans = [(done.run / stage / "plan.json").read_text() for stage in ("conv", "conv-random")]
    assert plans[0] != plans[1]
    ledger = [(entry.network, entry.step) for entry in done.table.ledger]
    assert ("ThiNet-Conv (r=0.5, random)", "reconstructed") in ledger
    assert ledger[0] == ("Original", "trained here")
    assert ledger[-1] == ("Train from scratch", "4 epochs")
    report = read_json(pipeline.prune(options) / "report.json")
    assert list(report["methods"]) == ["elimination", "random"]
    assert report["methods"]["elimination"]["accuracy"] == report["accuracy"]


def test_the_papers_train_an_epoch_per_layer_and_two_in_front_of_a_pool(
    tiny_options: MakeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int, float, str]] = []

    def watch(model: Any, images: Any, recipe: Any, **given: Any) -> None:
        seen.append((given["stage"], recipe.epochs, recipe.lr, recipe.schedule))

    monkeypatch.setattr("thinet_deploy.stages.tools.train", watch)
    usual = {"model": f"{Path(__file__).with_name('tiny_nets.py')}:plain", "recipe": "iccv2017", "controls": "none"}
    given = tiny_options(tmp_path / "run").model_dump(include={"data", "out"})
    papers = make_options({**usual, **given, "target": "ios"})
    assert (papers.batch_size, papers.finetune_lr) == (128, 1e-3)
    pipeline.build(papers)
    stages = {stage: rest for stage, *rest in seen}
    assert stages["Fine-tuning, layer features.0"] == [1, 1e-3, "constant"]
    assert stages["Fine-tuning ThiNet-Conv (r=0.5)"] == [12, 1e-3, "steps"]
    assert not any("features.2" in stage for stage in stages), "the last one is followed by the fine-tuning at the end"


def test_settings_of_training(tiny_options: MakeOptions, tmp_path: Path) -> None:
    load_job(tiny_options(tmp_path / "run", train={"precision": "bf16", "ema": "0.99", "optimizer": "adamw"}))
    with pytest.raises(UnknownNameError, match="momentum"):
        load_job(tiny_options(tmp_path / "run", train={"momentun": 0.5}))
    with pytest.raises(UnknownNameError, match="setting of --train"):
        load_job(tiny_options(tmp_path / "run", train={"lr": 0.5}))
    with pytest.raises(InputError, match="precision=int3"):
        load_job(tiny_options(tmp_path / "run", train={"precision": "int3"}))
    for wrong in ({"momentum": -1}, {"label_smoothing": "2"}, {"temperature": 0}, {"clip": 0}, {"distill": 5}):
        with pytest.raises(InputError, match=f"--train {next(iter(wrong))}="):
            load_job(tiny_options(tmp_path / "run", train=wrong))


def test_batchnorms_are_re_estimated_in_the_ledger_and_kept_where_held_out_images_gain(
    tiny_options: MakeOptions, tmp_path: Path
) -> None:
    report = pruned(tiny_options(tmp_path / "run", "residual", method="random", reconstruction="none"))[1]
    steps = [entry["step"] for entry in report["ledger"]]
    assert steps[0] == "pruned"
    assert steps[1].startswith("BatchNorm statistics re-estimated")
    last = report["ledger"][1 if "not kept" not in steps[1] else 0]
    assert report["accuracy"]["figures"] == last["figures"]
