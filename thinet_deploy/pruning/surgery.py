"""Apply a plan: slice parameters, set attributes, replace the head."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..errors import ModelError
from ..models.weights import load_weights
from .graph import ChannelGroup
from .plan import GapHead, Plan, check_structure


def apply(plan: Plan, model: nn.Module) -> nn.Module:
    """A thin copy of `model`; the model itself is untouched.

    Raises:
        ModelError: the plan belongs to a network of another structure.
    """
    check_structure(plan, model)
    thin = copy.deepcopy(model)
    for name, dims in plan.keep.items():
        owner, _, leaf = name.rpartition(".")
        module = thin.get_submodule(owner)
        tensor = getattr(module, leaf).detach()
        for dim, indices in dims.items():
            tensor = tensor.index_select(dim, torch.tensor(indices, device=tensor.device))
        is_parameter = leaf in dict(module.named_parameters(recurse=False))
        setattr(module, leaf, nn.Parameter(tensor) if is_parameter else tensor)
    for owner, values in plan.attributes.items():
        for attribute, value in values.items():
            setattr(thin.get_submodule(owner), attribute, value)
    if plan.head:
        replace_head(thin, plan.head)
    return thin


def load_thin(plan: Plan, fresh: nn.Module, weights: Path) -> nn.Module:
    """The thin model of a run: the plan replayed on a fresh model, with the weights from model.safetensors."""
    thin = apply(plan, fresh)
    load_weights(thin, weights)
    return thin.eval()


def fold_scale(model: nn.Module, group: ChannelGroup, scale: NDArray[np.float64]) -> None:
    """Multiply the consumer's weights by ŵ, one scalar per (kept) input channel; its bias stays."""
    weight = model.get_submodule(group.consumer).weight
    assert isinstance(weight, nn.Parameter)
    factors = torch.from_numpy(np.repeat(scale, group.spread))
    with torch.no_grad():
        shaped = factors.view(1, -1, *[1] * (weight.dim() - 2))
        weight.copy_((weight.double() * shaped).to(weight.dtype))


def gap_head(model: nn.Module) -> GapHead | None:
    """The ThiNet-GAP head that fits a network with `features` and a fully connected `classifier`; else None."""
    features, classifier = getattr(model, "features", None), getattr(model, "classifier", None)
    if not isinstance(features, nn.Sequential) or not isinstance(classifier, nn.Sequential):
        return None
    linear = [module for module in classifier if isinstance(module, nn.Linear)]
    convs = [module for module in features.modules() if isinstance(module, nn.Conv2d)]
    if len(linear) < 2 or not convs:
        return None
    return GapHead(features=convs[-1].out_channels, classes=linear[-1].out_features)


def replace_head(model: nn.Module, head: GapHead) -> None:
    """Put global average pooling and one linear layer in place of the last pool and the head (ThiNet-GAP).

    As in the papers the pool after the last convolution goes too, so that the average is over its whole map.
    """
    features = getattr(model, "features", None)
    if not isinstance(features, nn.Sequential) or not hasattr(model, "classifier"):
        raise ModelError(
            "ThiNet-GAP needs a network with the parts `features` (nn.Sequential) and `classifier`.",
            hint="Name them so, as torchvision's VGG and AlexNet do, or keep the head with --preset thinet-conv.",
        )
    layers = list(features.children())
    if isinstance(layers[-1], nn.MaxPool2d | nn.AvgPool2d):
        layers.pop()
    model.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
    if hasattr(model, "avgpool"):
        model.avgpool = nn.Identity()
    parameter = next(model.parameters())
    linear = nn.Linear(head.features, head.classes, device=parameter.device, dtype=parameter.dtype)
    # Where the head itself flattened its input, the new one does.
    flatten = [module for module in model.get_submodule("classifier").modules() if isinstance(module, nn.Flatten)]
    model.classifier = nn.Sequential(*flatten[:1], linear)
