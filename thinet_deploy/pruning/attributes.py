"""Numbers in modules that count channels, such as out_channels: they change with the widths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .calls import LayerCall
from .label_pass import Labels
from .labels import Draft, Site
from .trace import Trace, arguments, first_names, operation, owner

# torch's own modules → their number of channels; of a convolution and a linear layer, one for either dimension.
_NUMBERS: dict[type[nn.Module], str] = {
    nn.modules.batchnorm._NormBase: "num_features",  # noqa: SLF001 - of all batch and instance norms
    nn.LayerNorm: "normalized_shape",
    nn.PReLU: "num_parameters",
}
_CONVOLUTION = nn.modules.conv._ConvNd  # noqa: SLF001 - of all convolutions


@dataclass(frozen=True)
class Count:
    """A number in a module that counts channels.

    Attributes:
        module: its name.
        name: of the attribute.
        index: in a list or tuple; None for a plain number.
        labels: that it counts.
    """

    module: str
    name: str
    index: int | None
    labels: torch.Tensor


def counts(
    model: nn.Module, trace: Trace, values: Mapping[str, Labels], draft: Draft, calls: Iterable[LayerCall]
) -> Iterator[Count]:
    """The numbers of torch's own modules.

    Args:
        model: the network.
        trace: of it.
        values: the labels of all nodes.
        draft: what the operations demanded.
        calls: of its layers.
    """
    owners = _owners(model)
    for site, use in draft.sites.items():
        for name in owners[site.parameter]:
            module = model.get_submodule(name)
            if found := _counting(module, site):
                yield Count(name, found, 0 if isinstance(module, nn.LayerNorm) else None, use.labels)
    for call in calls:
        for name in owners[call.weight]:
            if call.depthwise and isinstance(model.get_submodule(name), _CONVOLUTION):
                for attribute in ("in_channels", "groups"):
                    yield Count(name, attribute, None, call.inputs)
    yield from _group_norms(model, trace, values)


def _owners(model: nn.Module) -> dict[str, list[str]]:
    """Parameter → the modules that hold it; tied weights have several."""
    owners: defaultdict[str, list[str]] = defaultdict(list)
    for each, parameter in first_names(model).items():
        owners[parameter].append(each.rpartition(".")[0])
    return owners


def _counting(module: nn.Module, site: Site) -> str:
    """The attribute that counts what a dimension of a parameter holds; "" for a module of the user's."""
    if isinstance(module, _CONVOLUTION | nn.Linear):
        if not site.parameter.endswith("weight"):
            return ""
        outwards = site.dim == int(getattr(module, "transposed", False))
        return f"{'out' if outwards else 'in'}_{'features' if isinstance(module, nn.Linear) else 'channels'}"
    return next((name for kind, name in _NUMBERS.items() if isinstance(module, kind)), "")


def _group_norms(model: nn.Module, trace: Trace, values: Mapping[str, Labels]) -> Iterator[Count]:
    """The numbers of GroupNorms, which may have no weights that would tell of them."""
    for node in trace.nodes:
        if operation(node) == "group_norm" and isinstance(model.get_submodule(owner(node)), nn.GroupNorm):
            given = arguments(node)
            labels = values[given["input"].name].movedim(1, 0).flatten(1)[:, 0]
            yield Count(owner(node), "num_channels", None, labels)
            yield Count(owner(node), "num_groups", None, labels.reshape(int(given["num_groups"]), -1)[:, 0])
