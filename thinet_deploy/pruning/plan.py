"""The plan: which filters stay, as data. A thin model is plan.json + model.safetensors, never a pickle."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from ..artifact import hash_json, write_bytes
from ..data.preprocess import Preprocess
from ..errors import InputError, ModelError
from .graph import STAYS, ChannelGraph, ChannelGroup, Channels, Consumer
from .trace import named_tensors

Indices = tuple[int, ...]


class GapHead(BaseModel):
    """Global average pooling instead of the fully connected head (ThiNet-GAP).

    Attributes:
        features: channels of the last convolution.
        classes: outputs of the one linear layer left.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    features: int
    classes: int


class Shuffled(BaseModel):
    """A convolution that becomes a grouped one (gcos).

    Attributes:
        groups: of the convolution.
        shuffle: groups of the convolution before, whose channels are dealt out to its own; 1 if that has none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    groups: int = Field(ge=2)
    shuffle: int = Field(ge=1)


class Vanished(BaseModel):
    """A residual branch that says only its mean.

    Attributes:
        norm: module of the BatchNorm behind its last convolution, which goes too; "" without one.
        inside: modules of its other layers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    norm: str
    inside: tuple[str, ...]


class Plan(BaseModel):
    """What stays of a network; applied to a fresh model of the same structure by `surgery.apply`.

    Attributes:
        format: names the file's kind.
        version: of the format.
        structure: fingerprint of the model the plan belongs to (parameter names and shapes).
        weights: fingerprint of the values it was made from; a plan fits other values too, such as fine-tuned ones.
        keep: parameter or buffer name → dimension → indices that stay, in the order in which they stand then.
        grouped: weight of a grouped convolution → groups; its inputs in `keep` are counted over all groups.
        attributes: module name → attribute → new value, such as out_channels.
        widths: module name of every producer → (filters before, filters after).
        shuffled: module name → how a convolution without groups becomes one with groups, after all else.
        vanished: module of a residual branch's last convolution → how the branch vanishes.
        head: the new head, if it was replaced.
        preprocess: how images become the network's input.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["thinet-deploy/plan"] = "thinet-deploy/plan"
    version: Literal[2] = 2
    structure: str
    weights: str = ""
    keep: dict[str, dict[int, Indices]] = Field(default_factory=dict)
    grouped: dict[str, int] = Field(default_factory=dict)
    attributes: dict[str, dict[str, int | Indices]] = Field(default_factory=dict)
    widths: dict[str, tuple[int, int]] = Field(default_factory=dict)
    shuffled: dict[str, Shuffled] = Field(default_factory=dict)
    vanished: dict[str, Vanished] = Field(default_factory=dict)
    head: GapHead | None = None
    preprocess: Preprocess | None = None

    def save(self, path: Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_bytes(path, self.model_dump_json(indent=1).encode())

    def then(self, cut: Plan) -> Plan:
        """The plan that does `self` first and then `cut`, a plan for the network that `self` leaves."""
        keep = {name: dict(dims) for name, dims in self.keep.items()}
        for name, dims in cut.keep.items():
            mine = keep.setdefault(name, {})
            for dim, indices in dims.items():
                mine[dim] = tuple(mine[dim][i] for i in indices) if dim in mine else indices
        attributes = {name: dict(values) for name, values in self.attributes.items()}
        for name, values in cut.attributes.items():
            attributes.setdefault(name, {}).update(values)
        widths = {**self.widths}
        for name, (before, after) in cut.widths.items():
            widths[name] = (widths[name][0] if name in widths else before, after)
        return self.model_copy(
            update={
                "keep": keep,
                "grouped": {**self.grouped, **cut.grouped},
                "attributes": attributes,
                "widths": widths,
                "shuffled": {**self.shuffled, **cut.shuffled},
                "vanished": {**self.vanished, **cut.vanished},
                "head": cut.head or self.head,
            }
        )

    def since(self, before: Plan) -> Plan:
        """The plan that leads from what `before` leaves to what `self` leaves: before.then(self.since(before)) = self.

        `before` keeps everything that `self` keeps.
        """
        keep: dict[str, dict[int, Indices]] = {}
        for name, dims in self.keep.items():
            keep[name] = {}
            for dim, indices in dims.items():
                places = before.keep.get(name, {}).get(dim)
                where = {index: place for place, index in enumerate(places)} if places is not None else None
                keep[name][dim] = tuple(where[index] for index in indices) if where else indices
        return self.model_copy(update={"keep": keep})


def fingerprint(model: nn.Module) -> str:
    """Hash of a model's structure: names and shapes of parameters and buffers, not their types or values."""
    return hash_json([[name, list(tensor.shape)] for name, tensor in sorted(model.state_dict().items())])


def weights_fingerprint(model: nn.Module) -> str:
    """Hash of a model's values."""
    tensors = sorted(model.state_dict().items())
    return hash_json(
        [
            [name, hashlib.sha256(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()]
            for name, tensor in tensors
        ]
    )


def empty_plan(model: nn.Module, preprocess: Preprocess | None = None) -> Plan:
    """The plan that keeps everything."""
    return Plan(structure=fingerprint(model), preprocess=preprocess)


def plan_channels(model: nn.Module, graph: ChannelGraph, kept: NDArray[np.bool_]) -> Plan:
    """The plan that keeps some channels of a graph, each dimension in its original order.

    Args:
        model: the network of the graph.
        graph: its channels.
        kept: per channel of the graph, whether it stays.
    """
    assert STAYS == -1
    stays = np.append(kept, True)
    vanished = {each.end: Vanished(norm=each.norm, inside=each.inside) for each in graph.vanished(kept)}
    gone = frozenset(module for each in vanished.values() for module in each.inside)
    cut = [axis for axis in graph.axes if not stays[axis.channels].all()]
    keep: dict[str, dict[int, Indices]] = {}
    for axis in cut:
        # A vanished branch goes as whole layers, and its end loses all of its inputs.
        if axis.site.module not in gone and not (axis.site.module in vanished and axis.site.dim == 1):
            indices = tuple(np.flatnonzero(stays[axis.channels]).tolist())
            keep.setdefault(axis.site.parameter, {})[axis.site.dim] = indices
    return Plan(
        structure=fingerprint(model),
        keep=keep,
        grouped={
            axis.site.parameter: axis.groups for axis in graph.axes if axis.groups > 1 and axis.site.parameter in keep
        },
        attributes=_counts(model, graph, stays, gone),
        widths={
            axis.site.parameter.removesuffix(".weight"): (len(axis.channels), int(stays[axis.channels].sum()))
            for axis in cut
            if axis.producer
        },
        vanished=vanished,
    )


def _counts(
    model: nn.Module, graph: ChannelGraph, stays: NDArray[np.bool_], gone: Collection[str]
) -> dict[str, dict[str, int | Indices]]:
    """Module → attribute → its new value, but for modules that are gone and attributes whose channels all stay or go.

    Args:
        model: the network of the graph.
        graph: its channels.
        stays: per channel, and at last for STAYS, whether it does.
        gone: modules of vanished branches.
    """
    attributes: dict[str, dict[str, int | Indices]] = {}
    for each in graph.attributes:
        count = int(stays[each.channels].sum())
        if count in {0, len(each.channels)} or each.module in gone:
            continue
        mine = attributes.setdefault(each.module, {})
        if each.index is None:
            mine[each.name] = count
        else:
            present = mine.get(each.name, getattr(model.get_submodule(each.module), each.name))
            assert not isinstance(present, int)
            mine[each.name] = (*present[: each.index], count, *present[each.index + 1 :])
    return attributes


def members(group: ChannelGroup, consumer: Consumer, plan: Plan) -> Channels:
    """For each input that a consumer still has under a plan: which of the group's channels it is, or STAYS."""
    indices = plan.keep.get(consumer.weight, {}).get(consumer.dim)
    channels = consumer.channels if indices is None else consumer.channels[list(indices)]
    where = {channel: place for place, channel in enumerate(group.channels.tolist())}
    return np.array([where.get(channel, STAYS) for channel in channels.tolist()], dtype=np.int64)


def load_plan(path: Path) -> Plan:
    """Read plan.json.

    Raises:
        InputError: no such file, or no plan of this version.
    """
    try:
        return Plan.model_validate_json(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"There is no plan at {path}.", hint="`thinet-deploy prune` writes plan.json.") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(
            f"{path} is no plan of this version: {field}: {first['msg']}.",
            hint="Write it anew with `thinet-deploy prune`.",
        ) from error


def check_structure(plan: Plan, model: nn.Module) -> None:
    """Raise ModelError when the plan belongs to a network of another structure, or keeps what that does not have."""
    if plan.structure != fingerprint(model):
        raise ModelError(
            "The plan belongs to another network: parameter names or shapes differ from this model's.",
            hint="Give the --model (and number of classes) with which the plan was made.",
        )
    _check_vanished(plan, model)
    shapes = {name: tensor.shape for name, tensor in named_tensors(model)}
    for name, dims in plan.keep.items():
        for dim, indices in dims.items():
            size = shapes[name][dim] if name in shapes and 0 <= dim < len(shapes[name]) else 0
            size *= plan.grouped.get(name, 1) if dim == 1 else 1
            if not indices or min(indices) < 0 or max(indices) >= size:
                raise ModelError(
                    f"The plan is damaged: {name} of the network does not have what is to be kept of it.",
                    hint="Write it anew with `thinet-deploy prune`.",
                )


def _check_vanished(plan: Plan, model: nn.Module) -> None:
    modules = dict(model.named_modules())
    for end, branch in plan.vanished.items():
        convolution = isinstance(modules.get(end), nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if not convolution or not modules.keys() >= {*branch.inside, *filter(None, [branch.norm])}:
            raise ModelError(
                f"The plan is damaged: {end} of the network ends no such branch.",
                hint="Write it anew with `thinet-deploy prune`.",
            )
