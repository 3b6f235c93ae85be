"""Apply a plan: slice parameters, set attributes, replace the head."""

from __future__ import annotations

import copy
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..errors import ModelError
from ..models.shuffle import ShuffledConv2d
from ..models.vanished import Constant, Nothing
from ..models.weights import load_weights
from ..tasks.base import said
from .graph import ChannelGroup
from .plan import GapHead, Plan, Shuffled, Vanished, check_structure, members
from .trace import example_inputs, named_tensors


def apply(plan: Plan, model: nn.Module) -> nn.Module:
    """A thin copy of `model`; the model itself is untouched.

    Raises:
        ModelError: the plan belongs to a network of another structure.
    """
    check_structure(plan, model)
    thin = copy.deepcopy(model)
    places = defaultdict[int, list[str]](list)
    for name, tensor in named_tensors(thin):
        places[id(tensor)].append(name)
    for names in places.values():
        if names[0] in plan.keep:
            _set(thin, names, _sliced(thin, plan, names[0]))
    for owner, values in plan.attributes.items():
        module = thin.get_submodule(owner)
        for attribute, value in values.items():
            sequence = list if isinstance(getattr(module, attribute, None), list) else tuple
            setattr(module, attribute, value if isinstance(value, int) else sequence(value))
    for name, how in plan.shuffled.items():
        owner, _, leaf = name.rpartition(".")
        setattr(thin.get_submodule(owner), leaf, _grouped(thin.get_submodule(name), how))
    for end, branch in plan.vanished.items():
        _vanish(thin, end, branch)
    if plan.head:
        replace_head(thin, plan.head)
    return thin


def _vanish(model: nn.Module, end: str, branch: Vanished) -> None:
    """Put what a branch says when all that its last convolution reads is zero in the place of the branch."""
    conv = model.get_submodule(end)
    assert isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d), "check_structure refuses others"
    weight, rank = conv.weight.detach(), conv.weight.dim() - 2
    said = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach()
    if branch.norm:
        norm = model.get_submodule(branch.norm)
        said = norm.eval()(said.view(1, -1, *[1] * rank)).detach().flatten()
    parts = {end: Constant(said.clone(), rank), **{name: Nothing(rank).to(weight) for name in branch.inside}}
    parts |= {branch.norm: nn.Identity()} if branch.norm else {}
    for name, part in parts.items():
        model.set_submodule(name, part.train(model.training))


def _grouped(conv: nn.Module, how: Shuffled) -> nn.Conv2d:
    """A convolution with the weights that a dense one has within its groups."""
    if not isinstance(conv, nn.Conv2d) or conv.groups > 1:
        raise ModelError("The plan is damaged: it groups what is no dense convolution.", hint="Prune anew.")
    named: dict[str, Any] = {
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "padding_mode": conv.padding_mode,
        "groups": how.groups,
        "bias": conv.bias is not None,
        "device": conv.weight.device,
        "dtype": conv.weight.dtype,
    }
    kind = partial(ShuffledConv2d, shuffle=how.shuffle) if how.shuffle > 1 else nn.Conv2d
    new: nn.Conv2d = kind(conv.in_channels, conv.out_channels, conv.kernel_size, **named)  # type: ignore[arg-type]
    order = torch.arange(conv.in_channels).reshape(how.shuffle, -1).T.flatten()  # the inputs as a shuffle leaves them
    blocks = zip(conv.weight.detach()[:, order].chunk(how.groups), range(how.groups), strict=True)
    share = conv.in_channels // how.groups
    new.weight = nn.Parameter(torch.cat([rows[:, group * share : (group + 1) * share] for rows, group in blocks]))
    if conv.bias is not None:
        new.bias = nn.Parameter(conv.bias.detach().clone())
    return new.train(conv.training)


def _sliced(model: nn.Module, plan: Plan, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    tensor: torch.Tensor = getattr(model.get_submodule(owner), leaf).detach()
    dims = {dim: torch.tensor(indices, device=tensor.device) for dim, indices in plan.keep[name].items()}
    if (groups := plan.grouped.get(name, 1)) > 1:  # every group of filters reads inputs of its own
        inputs = dims.pop(1, torch.arange(tensor.shape[1] * groups, device=tensor.device))
        filters = dims.pop(0, torch.arange(tensor.shape[0], device=tensor.device))
        parts = zip(filters.reshape(groups, -1), inputs.reshape(groups, -1), strict=True)
        per_group = tensor.shape[1]
        return torch.cat([tensor[rows][:, columns - group * per_group] for group, (rows, columns) in enumerate(parts)])
    for dim, indices in dims.items():
        tensor = tensor.index_select(dim, indices)
    return tensor


def _set(model: nn.Module, names: list[str], tensor: torch.Tensor) -> None:
    """Put a tensor in all its places: tied weights stay tied."""
    new: torch.Tensor | None = None
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        old = getattr(module, leaf)
        if new is None:
            new = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        setattr(module, leaf, new)


def load_thin(plan: Plan, fresh: nn.Module, weights: Path) -> nn.Module:
    """The thin model of a run: the plan replayed on a fresh model, with the weights from model.safetensors."""
    thin = apply(plan, fresh)
    load_weights(thin, Path(weights))
    return thin.eval()


def fold_scale(model: nn.Module, group: ChannelGroup, plan: Plan, scale: NDArray[np.float64]) -> None:
    """Multiply the consumers' weights by ŵ, one scalar per channel of the group; their biases stay.

    Args:
        model: the thin network, in place.
        group: whose channels are scaled.
        plan: that led to the network.
        scale: per channel of the group, whether it is still there or not.
    """
    tensors = dict(named_tensors(model))
    for consumer in {each.weight: each for each in group.consumers}.values():
        factors = torch.from_numpy(np.append(scale, 1.0)[members(group, consumer, plan)])
        weight = tensors[consumer.weight]
        groups = len(factors) // weight.shape[1] if consumer.dim == 1 else 1
        with torch.no_grad():
            if consumer.dim == 1 and groups > 1:
                shaped = factors.reshape(groups, -1).repeat_interleave(len(weight) // groups, 0)
                shaped = shaped.reshape(*shaped.shape, *[1] * (weight.dim() - 2))
            else:
                shaped = factors.reshape([-1 if dim == consumer.dim else 1 for dim in range(weight.dim())])
            weight.copy_((weight.double() * shaped).to(weight.dtype))


def gap_head(model: nn.Module, input_shape: tuple[int, ...]) -> GapHead | None:
    """The ThiNet-GAP head of a network with `features` and a fully connected `classifier`; None where none fits.

    It is tried on two images: a forward() may pool once more between the two, or have the size of the map written in
    it, as `view(-1, 256 * 6 * 6)` has.
    """
    features, classifier = getattr(model, "features", None), getattr(model, "classifier", None)
    if not isinstance(features, nn.Sequential) or not isinstance(classifier, nn.Sequential):
        return None
    linear = [module for module in classifier if isinstance(module, nn.Linear)]
    if len(linear) < 2 or not len(features):
        return None
    trial, images, maps = copy.deepcopy(model).eval(), example_inputs(model, input_shape), list[Any]()
    last = list(trial.get_submodule("features").children())[-1]  # a forward() may call them one by one
    last.register_forward_hook(lambda _, __, output: maps.append(output))
    with torch.inference_mode():
        expected = said(trial, *images)[0].shape
        if not maps or not isinstance(maps[0], torch.Tensor) or maps[0].dim() != 4:
            return None
        head = GapHead(features=maps[0].shape[1], classes=linear[-1].out_features)
        replace_head(trial, head)
        try:
            return head if said(trial, *images)[0].shape == expected else None
        except Exception:  # noqa: BLE001 - the user's own forward() may raise anything
            return None


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
