"""The papers' thin networks (thinet.md, section 2): architectures to build, and widths to prune a dense network to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, UnknownNameError
from .resnet import resnet50, resnet50_caffe
from .vgg import GCOS, Stages, vgg16, vgg16_bn, vgg16_cifar

# Networks that are built from a table of widths. The papers' own come first.
VGGS: dict[str, Callable[..., nn.Module]] = {"vgg16": vgg16, "vgg16_bn": vgg16_bn, "vgg16-cifar": vgg16_cifar}
RESNETS: dict[str, Callable[..., nn.Module]] = {"resnet50-caffe": resnet50_caffe, "resnet50": resnet50}

CONV: Stages = ((32, 32), (64, 64), (128, 128, 128), (256, 256, 256), (512, 512, 512))
TINY: Stages = ((16, 16), (32, 32), (64, 64, 64), (128, 128, 128), (128, 128, 256))


@dataclass(frozen=True)
class Preset:
    """A thin network of the papers.

    Attributes:
        networks: the dense networks that it can be made from, by name.
        table: its widths and its head, as arguments of their factories.
    """

    networks: Mapping[str, Callable[..., nn.Module]]
    table: Mapping[str, Any]


PRESETS = {
    "thinet-conv": Preset(VGGS, {"stages": CONV}),
    "thinet-gap": Preset(VGGS, {"stages": CONV, "gap": True}),
    "thinet-tiny": Preset(VGGS, {"stages": TINY, "gap": True}),
    "thinet-70": Preset(RESNETS, {"inner": (44, 89, 179, 358)}),
    "thinet-50": Preset(RESNETS, {"inner": (32, 64, 128, 256)}),
    "thinet-30": Preset(RESNETS, {"inner": (19, 38, 76, 153)}),
}


def build_preset(
    name: str,
    input_shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    *,
    network: str | None = None,
    gcos: bool = False,
) -> nn.Module:
    """A thin architecture with fresh weights.

    Args:
        name: of the preset.
        input_shape: channels, height and width; None for the dense network's own.
        num_classes: number of outputs; None for the dense network's own.
        network: the dense network that it is made from; None for the papers': VGG-16, or ResNet-50 with the stride in
            the first convolution of a block.
        gcos: group convolutions with channel shuffle, in the layout `vgg.GCOS`.

    Raises:
        UnknownNameError: no such preset.
        ModelError: it is not made from this network, or this network has no layout for gcos.
    """
    preset = _preset(name)
    if network not in (None, *preset.networks):
        raise _does_not_fit(name, f"{network} is none of them")
    network = network or next(iter(preset.networks))
    return build_table(network, input_shape, num_classes, gcos=gcos, **preset.table)


def build_table(
    network: str,
    input_shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    *,
    gcos: bool = False,
    **table: Any,
) -> nn.Module:
    """A network of `VGGS` or `RESNETS` with other widths, another head, or groups.

    Raises:
        ModelError: gcos for something else than a VGG-16.
    """
    factory = {**VGGS, **RESNETS}.get(network)
    if gcos:
        if network not in VGGS:
            raise ModelError(
                f"There is no layout of group convolutions for {network}.",
                hint=f"--gcos goes with {', '.join(VGGS)}, and with the presets made from them, such as thinet-tiny.",
            )
        table["groups"] = GCOS
    assert factory is not None
    given = {"input_shape": input_shape, "num_classes": num_classes}
    return factory(**{key: value for key, value in given.items() if value is not None}, **table)


def preset_widths(name: str, model: nn.Module) -> dict[str, int]:
    """Convolution → filters that stay, to make a preset from a dense network.

    Args:
        name: of the preset.
        model: the dense network, with any number of classes; its convolutions have to be named and sized as in one of
            the preset's networks (torchvision's are).

    Raises:
        UnknownNameError: no such preset.
        ModelError: it is not made from this network.
    """
    preset = _preset(name)
    mine = _filters(model)
    for factory in preset.networks.values():
        with torch.device("meta"):
            whole, thin = _filters(factory()), _filters(factory(**preset.table))
        if mine == whole:
            return {layer: filters for layer, filters in thin.items() if filters < whole[layer]}
    raise _does_not_fit(name, "this network's convolutions have other names or widths")


def _filters(model: nn.Module) -> dict[str, int]:
    return {name: module.out_channels for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise UnknownNameError("preset", name, PRESETS)
    return PRESETS[name]


def _does_not_fit(name: str, why: str) -> ModelError:
    return ModelError(
        f"The preset {name} is made from {' or '.join(_preset(name).networks)}, and {why}.",
        hint="Give one of these as --model, or prune any network by --keep, --macs or --size instead of --preset.",
    )
