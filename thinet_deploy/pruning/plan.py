"""The plan: which filters stay, as data. A thin model is plan.json + model.safetensors, never a pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from ..artifact import hash_json, write_bytes
from ..errors import InputError, ModelError
from ..preprocess import Preprocess
from .graph import ChannelGroup

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


class Plan(BaseModel):
    """What stays of a network; applied to a fresh model of the same structure by `surgery.apply`.

    Attributes:
        format: names the file's kind.
        version: of the format.
        structure: fingerprint of the model the plan belongs to (parameter names and shapes).
        keep: parameter or buffer name → dimension → ordered indices that stay.
        attributes: module name → attribute → new value, such as out_channels.
        widths: module name of every producer → (filters before, filters after).
        head: the new head, if it was replaced.
        preprocess: how images become the network's input.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["thinet-deploy/plan"] = "thinet-deploy/plan"
    version: Literal[1] = 1
    structure: str
    keep: dict[str, dict[int, Indices]] = Field(default_factory=dict)
    attributes: dict[str, dict[str, int]] = Field(default_factory=dict)
    widths: dict[str, tuple[int, int]] = Field(default_factory=dict)
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
            update={"keep": keep, "attributes": attributes, "widths": widths, "head": cut.head or self.head}
        )


def fingerprint(model: nn.Module) -> str:
    """Hash of a model's structure: names and shapes of parameters and buffers, not their types or values."""
    return hash_json([[name, list(tensor.shape)] for name, tensor in sorted(model.state_dict().items())])


def empty_plan(model: nn.Module, preprocess: Preprocess | None = None) -> Plan:
    """The plan that keeps everything."""
    return Plan(structure=fingerprint(model), preprocess=preprocess)


def plan_group(model: nn.Module, group: ChannelGroup, kept: list[int]) -> Plan:
    """The plan that keeps the filters `kept` of one group, and everything else."""
    filters = tuple(kept)
    inputs = tuple(channel * group.spread + k for channel in kept for k in range(group.spread))
    keep: dict[str, dict[int, Indices]] = {}
    attributes: dict[str, dict[str, int]] = {group.producer: {"out_channels": len(filters)}}
    for owner in (group.producer, *group.norms):
        module = model.get_submodule(owner)
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.dim() > 0:
                keep[f"{owner}.{name}"] = {0: filters}
    for norm in group.norms:
        attributes[norm] = {"num_features": len(filters)}
    keep[f"{group.consumer}.weight"] = {1: inputs}
    size = "in_channels" if isinstance(model.get_submodule(group.consumer), nn.Conv2d) else "in_features"
    attributes[group.consumer] = {size: len(inputs)}
    widths = {group.producer: (group.channels, len(filters))}
    return Plan(structure=fingerprint(model), keep=keep, attributes=attributes, widths=widths)


def load_plan(path: Path) -> Plan:
    """Read plan.json.

    Raises:
        InputError: no such file, or no plan of this version.
    """
    try:
        return Plan.model_validate_json(path.read_bytes())
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
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    shapes = {name: tensor.shape for name, tensor in tensors}
    for name, dims in plan.keep.items():
        for dim, indices in dims.items():
            size = shapes[name][dim] if name in shapes and 0 <= dim < len(shapes[name]) else 0
            if not indices or min(indices) < 0 or max(indices) >= size:
                raise ModelError(
                    f"The plan is damaged: {name} of the network does not have what is to be kept of it.",
                    hint="Write it anew with `thinet-deploy prune`.",
                )
