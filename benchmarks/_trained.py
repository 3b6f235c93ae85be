"""Trained networks and the images to judge them by, for measurements; none of it is part of the product.

The files lie in shared/data beside the repository. The two archives are unpacked once, into $THINET_CACHE or
~/.cache/thinet-deploy. `python benchmarks/_trained.py` checks the accuracies below and prints what the command line
takes, such as

    thinet-deploy build --model benchmarks/_trained.py:resnet20 --weights … --data …

The factories give untrained networks, as --model asks for (the control from scratch is made by them too);
`trained_resnet20` and `trained_squeezenet1_1` give the trained ones.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from thinet_deploy.artifact import hash_json
from thinet_deploy.data import Dataset, load_folder
from thinet_deploy.interfaces import Progress, silent
from thinet_deploy.models.vgg import VGG
from thinet_deploy.models.weights import load_weights, save_weights
from thinet_deploy.preprocess import Augment, Preprocess, load_preprocess
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


# --- ResNet-20 -------------------------------------------------------------------------------------------------------


class Padding(nn.Module):
    """A shortcut without parameters: every `stride`-th pixel, and zero channels, half of them on either side.

    Args:
        stride: of the subsampling.
        more: channels that the output has more than the input.
    """

    def __init__(self, stride: int, more: int) -> None:
        super().__init__()
        self.stride, self.more = stride, more

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        """Shape (n, c, h, w) → (n, c + more, h / stride, w / stride)."""
        sparse = x_nchw[:, :, :: self.stride, :: self.stride]
        return F.pad(sparse, (0, 0, 0, 0, self.more // 2, self.more // 2))


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut.

    Args:
        before: channels of the input.
        width: channels of the output.
        stride: of the first convolution.
    """

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity() if width == before else Padding(stride, width - before)

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        """Shape (n, before, h, w) → (n, width, h / stride, w / stride)."""
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x_nchw)))))
        return torch.relu(out + self.shortcut(x_nchw))


class ResNet20(nn.Module):
    """The ResNet-20 of He et al. (2016), section 4.2, for 32×32 images; names of akamaster/pytorch_resnet_cifar10."""

    input_shape = (3, 32, 32)

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        """Shape (n, 3, 32, 32) → (n, classes)."""
        x_nchw = torch.relu(self.bn1(self.conv1(x_nchw)))
        scores: torch.Tensor = self.linear(self.layer3(self.layer2(self.layer1(x_nchw))).mean((2, 3)))
        return scores


def resnet20(num_classes: int = 10) -> nn.Module:
    """An untrained ResNet-20 for 32×32 images in colour."""
    return ResNet20(num_classes)


def trained_resnet20() -> nn.Module:
    """87.08 % on the 10,000 test images of `cifar10`; in eval mode."""
    model = resnet20()
    load_weights(model, RESNET20_WEIGHTS)
    return model.eval()


# --- SqueezeNet v1.1 -------------------------------------------------------------------------------------------------


class Fire(nn.Module):
    """A squeeze layer and the two expand layers that it feeds, concatenated.

    Args:
        before: channels of the input.
        squeeze: channels in between.
        expand: channels of each expand layer.
    """

    def __init__(self, before: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(before, squeeze, 1)
        self.expand1x1, self.expand3x3 = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        """Shape (n, before, h, w) → (n, 2 · expand, h, w)."""
        x_nchw = torch.relu(self.squeeze(x_nchw))
        return torch.cat([torch.relu(self.expand1x1(x_nchw)), torch.relu(self.expand3x3(x_nchw))], 1)


class SqueezeNet(nn.Module):
    """SqueezeNet v1.1 (Iandola et al., 2016, and the authors' repository) for 227×227 images; pools round up."""

    input_shape = (3, 227, 227)

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 2)
        self.fire2, self.fire3 = Fire(64, 16, 64), Fire(128, 16, 64)
        self.fire4, self.fire5 = Fire(128, 32, 128), Fire(256, 32, 128)
        self.fire6, self.fire7 = Fire(256, 48, 192), Fire(384, 48, 192)
        self.fire8, self.fire9 = Fire(384, 64, 256), Fire(512, 64, 256)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.dropout = nn.Dropout(0.5)
        self.conv10 = nn.Conv2d(512, num_classes, 1)

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        """Shape (n, 3, 227, 227) → (n, classes)."""
        x_nchw = self.pool(torch.relu(self.conv1(x_nchw)))
        x_nchw = self.pool(self.fire3(self.fire2(x_nchw)))
        x_nchw = self.pool(self.fire5(self.fire4(x_nchw)))
        x_nchw = self.fire9(self.fire8(self.fire7(self.fire6(x_nchw))))
        return torch.relu(self.conv10(self.dropout(x_nchw))).mean((2, 3))


def squeezenet1_1(num_classes: int = 1000) -> nn.Module:
    """An untrained SqueezeNet v1.1."""
    return SqueezeNet(num_classes)


def trained_squeezenet1_1(classes: tuple[int, ...] = PHOTOS10) -> nn.Module:
    """Trained on ImageNet, with the scores of these of its classes alone; in eval mode.

    A class's score depends on its own filter of conv10 only, so that comparing ten scores is having ten filters.
    """
    whole = load_file(SQUEEZENET_WEIGHTS)
    for name in ("conv10.weight", "conv10.bias"):
        whole[name] = whole[name][list(classes)].clone()
    model = squeezenet1_1(len(classes))
    model.load_state_dict(whole)
    return model.eval()


def photos10_weights() -> Path:
    """A file of `trained_squeezenet1_1` for --weights, written when it is missing."""
    path = cache() / "squeezenet1_1-photos10.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_weights(trained_squeezenet1_1(), path)
    return path


# --- VGG for CIFAR-10 ------------------------------------------------------------------------------------------------

VGG_STAGES = ((32, 32), (64, 64), (96, 96), (128, 128))  # 37.4 M multiply-accumulates
VGG_RECIPES = {
    False: Recipe(epochs=40, lr=0.1, batch=128, warmup=2, precision="bf16"),
    True: Recipe(epochs=30, lr=0.1, batch=128, warmup=2, precision="bf16"),
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
    return cache() / f"{name}-cifar10-{hash_json([VGG_STAGES, asdict(recipe)])[:8]}.safetensors"


def trained_vgg(*, norm: bool, progress: Progress = silent) -> nn.Module:
    """Trained on `cifar10`, some 15 minutes on two cores where no other call has done it; in eval mode."""
    name, recipe, path = "vgg_bn" if norm else "vgg", VGG_RECIPES[norm], vgg_weights(norm=norm)
    torch.manual_seed(0)
    model = (vgg_bn if norm else vgg)().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if not path.is_file():
        checkpoint = Checkpoint(path.with_suffix(".checkpoint"), path.stem)
        train(model, cifar10().train, recipe, seed=0, stage=name, checkpoint=checkpoint, progress=progress)
        save_weights(model, path)
        path.with_suffix(".checkpoint").unlink()
    load_weights(model, path)
    return model.eval()  # type: ignore[no-any-return]


# Networks for CIFAR-10, trained.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": trained_resnet20,
    "vgg_bn": partial(trained_vgg, norm=True),
    "vgg": partial(trained_vgg, norm=False),
}


# --- images ----------------------------------------------------------------------------------------------------------


def cache() -> Path:
    """Where unpacked archives lie: outside the repository, for they are large and not ours to give."""
    return Path(os.environ.get("THINET_CACHE") or Path.home() / ".cache" / "thinet-deploy")


def unpacked(name: str) -> Path:
    """The folder of an archive NAME.zip, unpacked when it is missing; whole or not there, whenever it is stopped."""
    place = cache() / name
    if place.is_dir():
        return place
    cache().mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=cache(), prefix=f".{name}-"))
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
        top1 = evaluate(model, data.test).top1
        print(f"--model {Path(__file__)}:{name} --weights {weights} --data {cache() / data.name}{more}")
        print(f"  top-1 {top1:.2f} % of {len(data.test):,} test images", end="; ")
        print(f"{loaded - start:.0f} s to load, {time.perf_counter() - loaded:.0f} s to test")
        if abs(top1 - expected) > slack:
            raise SystemExit(f"{name}: expected was {expected} %.")


if __name__ == "__main__":
    main()
