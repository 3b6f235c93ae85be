"""Trained networks and the images to judge them by, for measurements; none of it is part of the product.

The files lie in shared/data beside the repository. The two archives are unpacked once, into $THINET_CACHE or
~/.cache/thinet-deploy. `python benchmarks/_trained.py` checks the accuracies below and prints what the command line
takes, such as

    thinet-deploy build --model benchmarks/_trained.py:resnet20 --weights … --data …

The factories give untrained networks, as --model asks for (the control from scratch is made by them too);
`trained_resnet20` and `trained_squeezenet1_1` give the trained ones.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from thinet_deploy.artifact import hash_json
from thinet_deploy.data.dataset import Dataset, ImageSet, load_folder
from thinet_deploy.data.preprocess import Augment, Preprocess, load_preprocess
from thinet_deploy.environment import cache_folder
from thinet_deploy.interfaces import Progress, silent
from thinet_deploy.models import squeezenet
from thinet_deploy.models.alexnet import alexnet as caffe_alexnet
from thinet_deploy.models.resnet_cifar import resnet_cifar
from thinet_deploy.models.vgg import VGG
from thinet_deploy.models.weights import load_weights, save_weights
from thinet_deploy.store import Checkpoint
from thinet_deploy.training import Recipe, evaluate, train

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
RESNET20_WEIGHTS = SHARED / "resnet20-cifar10-jpeg.safetensors"
SQUEEZENET_WEIGHTS = SHARED / "squeezenet1_1-imagenet.safetensors"
RESNET20_TOP1, SQUEEZENET_TOP1 = 87.08, 94.0  # percent, as SHARED/README.md says; the second is "about"
# ImageNet's indices of the ten classes of photos10, whose folders are in the same order.
PHOTOS10 = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)

RESNET20_PREPROCESS = Preprocess(
    colour="RGB",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    resize=(32, 32),
    crop=(32, 32),
    augment=Augment(mirror=True, pad=4),
)
SQUEEZENET_FILE = Path(__file__).with_name("_squeezenet1_1.toml")  # for --preprocess
SQUEEZENET_PREPROCESS = load_preprocess(SQUEEZENET_FILE)


def missing() -> str:
    """The files that are not there, for a message; empty when all are."""
    names = ("cifar10-jpeg.zip", "photos10.zip", RESNET20_WEIGHTS.name, SQUEEZENET_WEIGHTS.name)
    absent = [name for name in names if not (SHARED / name).is_file()]
    return f"{SHARED} has no {', '.join(absent)}" if absent else ""


def trained_once(
    model: nn.Module,
    path: Path,
    images: Callable[[], ImageSet],
    recipe: dict[str, Any],
    stage: str,
    progress: Progress = silent,
) -> None:
    """Weights for a fresh model: those of the file, which is trained where no other call has done it; in eval mode."""
    if not path.is_file():
        checkpoint = Checkpoint(path.with_suffix(".checkpoint"), path.stem)
        train(model, images(), Recipe(**recipe), seed=0, stage=stage, checkpoint=checkpoint, progress=progress)
        save_weights(model, path)
        path.with_suffix(".checkpoint").unlink()
    load_weights(model, path)
    model.eval()


# --- ResNet-20 -------------------------------------------------------------------------------------------------------


def resnet20(num_classes: int = 10) -> nn.Module:
    """An untrained ResNet-20 for 32×32 images in colour."""
    return resnet_cifar(20, num_classes=num_classes)


def trained_resnet20() -> nn.Module:
    """87.08 % on the 10,000 test images of `cifar10`; in eval mode."""
    model = resnet20()
    load_weights(model, RESNET20_WEIGHTS)
    return model.eval()


# --- SqueezeNet v1.1 -------------------------------------------------------------------------------------------------


# The file's names → ours, which are torchvision's.
SQUEEZENET_NAMES = {
    "conv1": "features.0",
    **{f"fire{number}": f"features.{place}" for number, place in enumerate((3, 4, 6, 7, 9, 10, 11, 12), 2)},
    "conv10": "classifier.1",
}


def squeezenet1_1(num_classes: int = 1000) -> nn.Module:
    """An untrained SqueezeNet v1.1 for 227×227 images."""
    return squeezenet.squeezenet1_1((3, 227, 227), num_classes)


def trained_squeezenet1_1(classes: tuple[int, ...] = PHOTOS10) -> nn.Module:
    """Trained on ImageNet, with the scores of these of its classes alone; in eval mode.

    A class's score depends on its own filter of conv10 only, so that comparing ten scores is having ten filters.
    """
    whole = load_file(SQUEEZENET_WEIGHTS)
    for name in ("conv10.weight", "conv10.bias"):
        whole[name] = whole[name][list(classes)].clone()
    model = squeezenet1_1(len(classes))
    parts = {name: name.partition(".") for name in whole}
    model.load_state_dict(
        {f"{SQUEEZENET_NAMES[first]}.{rest}": whole[name] for name, (first, _, rest) in parts.items()}
    )
    return model.eval()


def photos10_weights() -> Path:
    """A file of `trained_squeezenet1_1` for --weights, written when it is missing."""
    path = cache_folder() / "squeezenet1_1-photos10-torchvision.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_weights(trained_squeezenet1_1(), path)
    return path


# --- VGG for CIFAR-10 ------------------------------------------------------------------------------------------------

VGG_STAGES = ((32, 32), (64, 64), (96, 96), (128, 128))  # 37.4 M multiply-accumulates
# As keywords: what they do not name may get a setting more without the weights being trained anew.
VGG_RECIPES: dict[bool, dict[str, Any]] = {
    False: {"epochs": 40, "lr": 0.1, "batch": 128, "warmup": 2, "precision": "bf16"},
    True: {"epochs": 30, "lr": 0.1, "batch": 128, "warmup": 2, "precision": "bf16"},
}


def vgg(num_classes: int = 10) -> VGG:
    """An untrained eight-conv VGG for 32×32 images, without BatchNorm."""
    return VGG(VGG_STAGES, (256, 256), input_shape=(3, 32, 32), num_classes=num_classes)


def vgg_bn(num_classes: int = 10) -> VGG:
    """`vgg`, with BatchNorm."""
    return VGG(VGG_STAGES, (256, 256), input_shape=(3, 32, 32), num_classes=num_classes, norm=True)


def vgg_weights(*, norm: bool) -> Path:
    """Where the weights of `trained_vgg` are, once it was called."""
    name, recipe = "vgg_bn" if norm else "vgg", VGG_RECIPES[norm]
    return cache_folder() / f"{name}-cifar10-{hash_json([VGG_STAGES, recipe])[:8]}.safetensors"


def trained_vgg(*, norm: bool, progress: Progress = silent) -> nn.Module:
    """Trained on `cifar10`, some 15 minutes on two cores where no other call has done it; in eval mode."""
    name, recipe, path = "vgg_bn" if norm else "vgg", VGG_RECIPES[norm], vgg_weights(norm=norm)
    torch.manual_seed(0)
    model = (vgg_bn if norm else vgg)().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trained_once(model, path, lambda: cifar10().train, recipe, name, progress)
    return model  # type: ignore[no-any-return]


# --- AlexNet for CIFAR-10 ---------------------------------------------------------------------------------------------

ALEXNET_PREPROCESS = RESNET20_PREPROCESS.model_copy(
    update={"resize": (67, 67), "crop": (67, 67), "augment": Augment(mirror=True, pad=8)}
)
ALEXNET_RECIPE: dict[str, Any] = {"epochs": 12, "lr": 0.02, "batch": 128, "warmup": 1, "precision": "bf16", "clip": 5.0}


def alexnet(num_classes: int = 10) -> nn.Module:
    """An untrained AlexNet, grouped as Caffe's, for 67×67 images."""
    return caffe_alexnet((3, 67, 67), num_classes)


def trained_alexnet(*, quick: bool = False, progress: Progress = silent) -> nn.Module:
    """Trained on CIFAR-10 at 67×67, some 15 minutes where no other call has done it; `quick`: on a few images."""
    path = cache_folder() / f"alexnet-cifar10-{hash_json(ALEXNET_RECIPE)[:8]}.safetensors"
    torch.manual_seed(0)
    model = alexnet()

    def images() -> Dataset:
        return load_folder(unpacked("cifar10-jpeg"), ALEXNET_PREPROCESS, progress)

    if quick:
        recipe = Recipe(**ALEXNET_RECIPE | {"epochs": 1})
        train(model, few(images(), 256).train, recipe, seed=0, stage="alexnet", progress=progress)
        return model.eval()
    trained_once(model, path, lambda: images().train, ALEXNET_RECIPE, "alexnet", progress)
    return model


# Networks for CIFAR-10, trained.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": trained_resnet20,
    "vgg_bn": partial(trained_vgg, norm=True),
    "vgg": partial(trained_vgg, norm=False),
}


# --- images ----------------------------------------------------------------------------------------------------------


def unpacked(name: str) -> Path:
    """The folder of an archive NAME.zip, unpacked when it is missing; whole or not there, whenever it is stopped."""
    place = cache_folder() / name
    if place.is_dir():
        return place
    cache_folder().mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=cache_folder(), prefix=f".{name}-"))
    try:
        with zipfile.ZipFile(SHARED / f"{name}.zip") as archive:
            archive.extractall(temporary)
        (temporary / name).rename(place)
    except OSError:
        if not place.is_dir():  # else another process was first, and its folder is as good
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return place


def cifar10(progress: Progress = silent) -> Dataset:
    """CIFAR-10 from JPEG files, as ResNet-20 takes it: 50,000 images to train on, 10,000 to test."""
    return load_folder(unpacked("cifar10-jpeg"), RESNET20_PREPROCESS, progress)


def photos10(progress: Progress = silent) -> Dataset:
    """Ten classes of ImageNet, as SqueezeNet takes them: 1,000 images to train on, 400 to test."""
    return load_folder(unpacked("photos10"), SQUEEZENET_PREPROCESS, progress)


def few(data: Dataset, images: int) -> Dataset:
    """So many images to train on, and to test, for a run that shows only that a script works."""
    train, test = (each.view(each.sample(images, seed=0, stage="quick")) for each in (data.train, data.test))
    return Dataset(data.name, data.classes, train, test, data.digest)


def main() -> None:
    """Check the accuracies; print the options for the command line."""
    if absent := missing():
        raise SystemExit(absent)
    for name, model, load, weights, more, expected, slack in (
        ("resnet20", trained_resnet20(), cifar10, RESNET20_WEIGHTS, "", RESNET20_TOP1, 0.005),
        (
            "squeezenet1_1",
            trained_squeezenet1_1(),
            photos10,
            photos10_weights(),
            f" --preprocess {SQUEEZENET_FILE}",
            SQUEEZENET_TOP1,
            1.0,
        ),
    ):
        start = time.perf_counter()
        data = load()
        loaded = time.perf_counter()
        top1 = evaluate(model, data.test).main
        print(f"--model {Path(__file__)}:{name} --weights {weights} --data {cache_folder() / data.name}{more}")
        print(f"  top-1 {top1:.2f} % of {len(data.test):,} test images", end="; ")
        print(f"{loaded - start:.0f} s to load, {time.perf_counter() - loaded:.0f} s to test")
        if abs(top1 - expected) > slack:
            raise SystemExit(f"{name}: expected was {expected} %.")


if __name__ == "__main__":
    main()
