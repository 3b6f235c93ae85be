"""Presets as recipes: pruned to the papers' widths a network is the thin architecture; what does not fit is refused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from thinet_deploy import pipeline
from thinet_deploy.errors import InputError, ModelError, UnknownNameError
from thinet_deploy.models.loading import MODELS, build_model
from thinet_deploy.models.presets import PRESETS, build_preset, preset_widths
from thinet_deploy.models.weights import load_weights
from thinet_deploy.options import HEAD_REPLACED, FixedPreset, Options, Preset, make_options
from thinet_deploy.pruning.selection import keep_count
from thinet_deploy.stages.job import load_job

Cli = Callable[..., Any]
KEPT = {"thinet-conv": 0.5, "thinet-70": 0.7, "thinet-50": 0.5, "thinet-30": 0.3}


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 32×32 images."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split in ("train", "val"):
        for label, name in enumerate(("dark", "light")):
            (folder / split / name).mkdir(parents=True)
            for index in range(6):
                noise = random.integers(0, 100, (32, 32, 3)) + 130 * label
                Image.fromarray(noise.astype(np.uint8)).save(folder / split / name / f"{index}.png")
    return folder


# ---------------------------------------------------------------------------------------------- widths


def test_options_know_the_presets() -> None:
    assert set(get_args(Preset)) == set(PRESETS)
    assert set(HEAD_REPLACED) == {name for name, preset in PRESETS.items() if preset.table.get("gap")}
    assert set(get_args(FixedPreset)) < set(PRESETS) < set(MODELS)


@pytest.mark.parametrize("preset", PRESETS)
def test_widths_are_those_of_the_architecture(preset: str) -> None:
    for network in PRESETS[preset].networks:
        dense = on_meta(partial(build_model, network, input_shape=None, num_classes=3, seed=0))
        thin = on_meta(partial(build_preset, preset, num_classes=5, network=network))
        widths = preset_widths(preset, dense)
        convs = {name: module for name, module in dense.named_modules() if isinstance(module, nn.Conv2d)}
        for name, module in convs.items():
            assert len(thin.get_parameter(f"{name}.weight")) == widths.get(name, module.out_channels)
        if preset in KEPT:
            kept = {name: keep_count(convs[name].out_channels, KEPT[preset]) for name in widths}
            assert widths == kept, "int(C·r), as in the papers"
        assert len(widths) == {"vgg16": 13 if preset == "thinet-tiny" else 10}.get(network, len(widths))


def test_torchvisions_networks_fit(zoo: ModuleType) -> None:
    vgg, resnet = (on_meta(partial(zoo.get_model, name, weights=None)) for name in ("vgg16", "resnet50"))
    assert preset_widths("thinet-tiny", vgg)["features.28"] == 256
    widths = preset_widths("thinet-70", resnet)
    assert (len(widths), widths["layer1.0.conv1"], widths["layer4.2.conv2"]) == (32, 44, 358)


def test_what_does_not_fit_is_refused() -> None:
    dense = on_meta(partial(build_model, "resnet20", input_shape=None, num_classes=3, seed=0))
    with pytest.raises(
        ModelError, match="thinet-70 is made from resnet50-caffe or resnet50, and this network"
    ) as found:
        preset_widths("thinet-70", dense)
    assert "--keep" in found.value.hint
    with pytest.raises(UnknownNameError, match="thinet-70"):
        preset_widths("thinet-7O", dense)
    with pytest.raises(UnknownNameError, match="thinet-tiny"):
        build_preset("thinet-tyni")


# ---------------------------------------------------------------------------------------------- recipes


def test_pruned_with_a_new_head_a_vgg_is_tiny(photos: Path, tmp_path: Path) -> None:
    options = make_options(
        {"model": "vgg16-cifar", "preset": "thinet-tiny", "data": photos, "out": tmp_path / "run", "epochs": 0}
        | {"method": "random", "reconstruction": "none"}
    )
    folder = pipeline.prune(options)
    architecture = build_preset("thinet-tiny", (3, 32, 32), 2, network="vgg16-cifar")
    load_weights(architecture, folder / "model.safetensors")
    assert architecture.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_build_ships_tiny_and_the_table_says_so(photos: Path, tmp_path: Path) -> None:
    options = make_options(
        {"model": "vgg16-cifar", "preset": "thinet-tiny", "data": photos, "target": "ios", "out": tmp_path / "run"}
        | {"epochs": 0, "finetune_epochs": 1, "controls": "none", "method": "random", "reconstruction": "none"}
    )
    done = pipeline.build(options)
    labels = [row.label for row in done.table.rows]
    assert labels == ["Original", "ThiNet-Tiny (its head as it was)", "ThiNet-Tiny"]
    assert all(hop.passed for hop in done.hops)
    architecture = build_preset("thinet-tiny", (3, 32, 32), 2, network="vgg16-cifar")
    load_weights(architecture, done.run / "gap" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "preset", "recipe"),
    [
        ("vgg16-cifar", "thinet-tiny", "best"),
        ("vgg16-cifar", "thinet-tiny", "iccv2017"),
        ("resnet50", "thinet-70", "best"),
        ("resnet50-caffe", "thinet-30", "iccv2017"),
    ],
)
def test_every_recipe_leads_to_the_architecture(
    model: str, preset: str, recipe: str, photos: Path, tmp_path: Path
) -> None:
    options = make_options(
        {"model": model, "preset": preset, "data": photos, "recipe": recipe, "out": tmp_path / "run"}
        | {"epochs": 0, "input_shape": (3, 32, 32)}
        | ({} if recipe == "best" else {"layer_epochs": 0})
    )
    folder = pipeline.prune(options)
    architecture = build_preset(preset, (3, 32, 32), 2, network=model)
    load_weights(architecture, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preset", "thinet-50"], "thinet-50 is made from resnet50-caffe or resnet50"),
        (["--preset", "thinet-tiny", "--macs", "2x"], "--preset thinet-tiny says the width of every layer"),
        (["--preset", "thinet-tiny", "--keep-layer", "features.0=0.7"], "so there is no --keep-layer"),
        (["--preset", "thinet-tiny", "--ignore", "features.0"], "so there is no --ignore"),
        (["--preset", "thinet-tiny", "--feasibility"], "--preset thinet-tiny says them all"),
    ],
)
def test_presets_refuse_other_networks_and_other_widths(
    options: list[str], words: str, photos: Path, cli: Cli, tmp_path: Path
) -> None:
    done = cli("prune", "--model", "vgg16-cifar", "--data", photos, "--out", tmp_path / "run", *options)
    assert done.code == 2
    assert words in done.err
    assert not (tmp_path / "run" / "dense").exists()


def test_a_layer_that_has_to_stay_whole_is_named_before_any_training(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from thinet_deploy.models.vgg import VGG16, VGG\n"
        "class Mixed(VGG):\n"
        "    def forward(self, x):\n"
        "        x = self.features[:6](x).softmax(1)\n"
        "        return self.classifier(self.avgpool(self.features[6:](x)).flatten(1))\n"
        "def make(num_classes):\n"
        "    return Mixed(VGG16, (512,), input_shape=(3, 32, 32), num_classes=num_classes, norm=True)\n"
    )
    model = f"{tmp_path / 'net.py'}:make"
    options = Options(model=model, preset="thinet-tiny", data=photos, out=tmp_path / "run")
    assert load_job(options).widths["features.3"] == 16
    with pytest.raises(ModelError, match=r"--preset thinet-tiny prunes features.3, which stays whole: .*softmax"):
        pipeline.prune(options)


def test_titles() -> None:
    def titles(**given: Any) -> list[str]:
        options = make_options(given)
        return [options.title(), options.title(head=True), options.title(head=True, alone=True)]

    assert titles(keep=0.3) == ["ThiNet-Conv (r=0.3)", "ThiNet-GAP", "ThiNet-GAP (r=0.3)"]
    assert titles(preset="thinet-tiny") == ["ThiNet-Tiny (its head as it was)", *["ThiNet-Tiny"] * 2]
    assert titles(preset="thinet-70") == ["ThiNet-70"] * 3
    assert titles(keep=0.3, gcos=True) == ["ThiNet-Conv (r=0.3, gcos)", "ThiNet-GAP (gcos)", "ThiNet-GAP (r=0.3, gcos)"]
    assert titles(preset="thinet-tiny", gcos_layer={"features.2*": 4})[1] == "ThiNet-Tiny (gcos)"
    several = make_options({"preset": "thinet-70", "method": "apoz,random"})
    assert several.title(method="random") == "ThiNet-70 (random)"
    with pytest.raises(InputError):
        make_options({"preset": "thinet-71"})
