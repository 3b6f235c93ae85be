"""The recipes: the papers' and the best one, from options to the files of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from thinet_deploy import pipeline
from thinet_deploy.artifact import read_json
from thinet_deploy.errors import InputError, UnknownNameError
from thinet_deploy.job import load_job
from thinet_deploy.options import make_options
from thinet_deploy.pruning.plan import load_plan
from thinet_deploy.pruning.surgery import load_thin

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
        assert 0 <= entry["top1_low"] <= entry["top1"] <= entry["top1_high"] <= 100
    assert report["accuracy"]["top1"] == report["ledger"][-1]["top1"]
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
    report = pruned(tiny_options(tmp_path / "run", method=method, reconstruction="none"))[1]
    assert report["epochs"] == len(report["layers"]) > 0
    assert all(layer["error"] == layer["error_scaled"] for layer in report["layers"])


def test_the_later_paper_chooses_by_adding(tiny_options: MakeOptions, tmp_path: Path) -> None:
    by_recipe = pruned(tiny_options(tmp_path / "recipe", recipe="tpami2019"))[0] / "plan.json"
    by_method = pruned(tiny_options(tmp_path / "method", method="thinet-omp"))[0] / "plan.json"
    assert by_recipe.read_text() == by_method.read_text()


def test_what_only_the_best_recipe_can_do_is_refused_elsewhere(tiny_options: MakeOptions, tmp_path: Path) -> None:
    for wrong in ({"method": "elimination"}, {"reconstruction": "full"}):
        with pytest.raises(InputError, match="layer by layer") as found:
            load_job(tiny_options(tmp_path / "run", **wrong))
        assert "--recipe best" in found.value.hint
    with pytest.raises(UnknownNameError, match="tpami2019"):
        make_options({"recipe": "tpami2018"})
    with pytest.raises(UnknownNameError, match="taylor"):
        make_options({"method": "tailor"})


def test_fine_tuning_after_the_best_recipe_learns_from_the_original(
    tiny_options: MakeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from thinet_deploy import tools

    teachers: dict[str, bool] = {}
    from thinet_deploy.training import train

    def watch(model: Any, images: Any, recipe: Any, **given: Any) -> None:
        teachers[given["stage"]] = given["teacher"] is not None
        train(model, images, recipe, **given)

    monkeypatch.setattr(tools, "train", watch)
    pipeline.build(tiny_options(tmp_path / "run", recipe="best"))
    assert teachers["Fine-tuning ThiNet-Conv"]
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
