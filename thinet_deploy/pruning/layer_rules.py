"""How layers and elementwise operations carry labels: producers define, consumers read, the rest keeps or unifies."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .label_pass import RULES, Labels, Pass, Rule, fixed, lean, register, unknown, varies
from .labels import FIXED, PARAMETER, Site
from .trace import operation, place, shape

# --- producers and consumers -------------------------------------------------------------------------------------


@register("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(run: Pass, node: fx.Node, given: dict[str, Any]) -> Labels:
    groups, transposed = int(given["groups"]), "transpose" in operation(node) or bool(given.get("transposed"))
    data = run.of(given["input"])
    if data.dim() != len(shape(node)) or data.dim() != given["weight"].meta["val"].dim():
        return unknown(run, node, given)  # without a batch dimension
    inputs = _line(run, data, 1, place(node))
    weight = run.trace.parameter(given["weight"])
    if not weight:
        return _computed_weight(run, node, inputs)
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    per_group = len(inputs) // groups
    # Depthwise: the filter goes with its input.
    if groups == len(inputs) > 1 and not run.book.produces(Site(weight, out_dim)):
        outputs = inputs.repeat_interleave(shape(node)[1] // groups)
        if transposed and shape(node)[1] != groups:
            return unknown(run, node, given)
        run.book.use(Site(weight, 0), outputs, place(node))
    else:
        outputs = _produce(run, node, Site(weight, out_dim), groups)
        run.book.use(Site(weight, in_dim), inputs, place(node), 1 if transposed else groups)
        if groups > 1:
            run.book.balance(inputs.reshape(groups, per_group), place(node), every=True)
            run.book.balance(outputs.reshape(groups, -1), place(node), every=True)
    _bias(run, node, given, outputs)
    return outputs.reshape(1, -1, *[1] * (data.dim() - 2)).expand(shape(node))


def _produce(run: Pass, node: fx.Node, site: Site, groups: int) -> torch.Tensor:
    filters = shape(node)[1]
    if site.dim == 1 and groups > 1:  # a grouped transposed convolution shares this dimension between its groups
        run.book.whole(site.parameter, place(node))
        return torch.zeros(filters, dtype=torch.int64)
    return run.book.define(site, filters)


def _computed_weight(run: Pass, node: fx.Node, inputs: torch.Tensor) -> Labels:
    why = f"the weight of {place(node)} is computed, so removing inputs changes it"
    run.book.freeze(inputs, why)
    return fixed(node)


@register("linear")
def _linear(run: Pass, node: fx.Node, given: dict[str, Any]) -> Labels:
    data, weight = run.of(given["input"]), run.trace.parameter(given["weight"])
    if not varies(data, -1) and any(varies(data, dim) for dim in range(data.dim() - 1)):
        # It runs along positions, and each channel by itself (see `calls.LayerCall`).
        run.book.whole(weight, place(node)) if weight else None
        return data.narrow(-1, 0, 1).expand(shape(node))
    inputs = _line(run, data, -1, place(node))
    if not weight:
        return _computed_weight(run, node, inputs)
    outputs = run.book.define(Site(weight, 0), shape(node)[-1])
    run.book.use(Site(weight, 1), inputs, place(node))
    _bias(run, node, given, outputs)
    return outputs.expand(shape(node))


def _bias(run: Pass, node: fx.Node, given: dict[str, Any], outputs: torch.Tensor) -> None:
    bias = given.get("bias")
    if bias is not None:
        _meet(run, node, bias, outputs)


def _meet(run: Pass, node: fx.Node, vector: object, labels: torch.Tensor) -> None:
    """Channels meet a vector with one element for each: a parameter, or something computed from parameters."""
    if not isinstance(vector, fx.Node):
        return
    if name := run.trace.parameter(vector):
        run.book.use(Site(name, 0), labels, place(node))
    else:
        run.book.unify(labels, run.of(vector).expand(labels.shape), place(node))


def _line(run: Pass, data: torch.Tensor, dim: int, why: str) -> torch.Tensor:
    """The labels along one dimension, (size,): all that share an index go together."""
    dim %= data.dim()
    others = [each for each in range(data.dim()) if each != dim]
    return run.same_along(data, others, why, mixed=True).flatten().contiguous()


# --- per-channel operations --------------------------------------------------------------------------------------


@register("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training", "native_batch_norm")
def _batch_norm(run: Pass, node: fx.Node, given: dict[str, Any]) -> Labels:
    data = run.of(given["input"])
    labels = _line(run, data, 1, place(node))
    for name in ("weight", "bias", "running_mean", "running_var"):
        _meet(run, node, given.get(name), labels)
    out = labels.reshape(1, -1, *[1] * (data.dim() - 2)).expand(data.shape)
    return out if isinstance(node.meta["val"], torch.Tensor) else [out, None, None]


@register("prelu")
def _prelu(run: Pass, node: fx.Node, given: dict[str, Any]) -> Labels:
    data, weight = run.of(given["self"]), given["weight"]
    if shape(weight)[0] > 1:
        _meet(run, node, weight, _line(run, data, 1, place(node)))
    return data


@register("group_norm")
def _group_norm(run: Pass, node: fx.Node, given: dict[str, Any]) -> Labels:
    data = run.of(given["input"])
    labels = _line(run, data, 1, place(node))
    blocks = labels.reshape(int(given["num_groups"]), -1)
    run.same_along(blocks, [1], place(node), mixed=True)
    for name in ("weight", "bias"):
        _meet(run, node, given.get(name), labels)
    return data


@register("layer_norm")
def _layer_norm(run: Pass, node: fx.Node, given: dict[str, Any]) -> Labels:
    data, dims = run.of(given["input"]), list(range(-len(given["normalized_shape"]), 0))
    run.same_along(data, dims, place(node), mixed=True)
    for name in ("weight", "bias"):
        vector = given.get(name)
        if isinstance(vector, fx.Node) and len(dims) == 1:
            _meet(run, node, vector, _line(run, data, -1, place(node)))
        elif isinstance(vector, fx.Node):
            run.freeze(given["input"], f"{place(node)} has a weight of several dimensions")
    return data


@register("softmax", "log_softmax", "_softmax")
def _softmax(run: Pass, node: fx.Node, given: dict[str, Any]) -> Labels:
    data = run.of(given["self"])
    run.same_along(data, [int(given["dim"])], place(node), mixed=True)
    return data


@register("mean", "sum", "amax", "amin", "var", "std", "logsumexp", "linalg_vector_norm", "norm", "max", "min", "prod")
def _reduction(run: Pass, node: fx.Node, given: dict[str, Any]) -> Labels:
    if "other" in given:  # of two tensors, element by element
        return _elementwise(run, node, given)
    data = run.of(given.get("self", given.get("input")))
    dims = given.get("dim")
    dims = list(range(data.dim())) if dims in (None, []) else [dims] if isinstance(dims, int) else list(dims)
    out = run.same_along(data, dims, place(node), mixed=True)
    if not given.get("keepdim"):
        for dim in sorted((dim % data.dim() for dim in dims), reverse=True):
            out = out.squeeze(dim)
    return out if isinstance(node.meta["val"], torch.Tensor) else [out, out]


def _spatial(first: int) -> Rule:
    """Operations over positions: dimensions from `first` on, counted from behind."""

    def rule(run: Pass, node: fx.Node, given: dict[str, Any]) -> Labels:
        data = run.of(given.get("self", given.get("input")))
        out = run.same_along(data, range(first, 0), place(node), mixed=True)
        value = node.meta["val"]
        return (
            out.expand(value.shape) if isinstance(value, torch.Tensor) else [out.expand(each.shape) for each in value]
        )

    return rule


for _count, _from in (("1d", -1), ("2d", -2), ("3d", -3)):
    RULES.update(
        dict.fromkeys(
            [
                *(f"{kind}_pool{_count}" for kind in ("max", "avg", "adaptive_avg", "adaptive_max")),
                *(f"upsample_{kind}{_count}" for kind in ("nearest", "_nearest_exact")),
                *(f"reflection_pad{_count}", f"replication_pad{_count}", f"max_pool{_count}_with_indices"),
                *(f"_adaptive_avg_pool{_count}", f"_upsample_nearest_exact{_count}"),
            ],
            _spatial(_from),
        )
    )
RULES.update(
    dict.fromkeys(
        ["upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "lp_pool2d"],
        _spatial(-2),
    )
)
RULES["upsample_linear1d"], RULES["upsample_trilinear3d"] = _spatial(-1), _spatial(-3)


@register("pad", "constant_pad_nd")
def _pad(run: Pass, node: fx.Node, given: dict[str, Any]) -> Labels:
    data, sizes = run.of(given["self"]), list(given["pad"])
    padded = [data.dim() - 1 - index for index in range(len(sizes) // 2) if any(sizes[2 * index : 2 * index + 2])]
    over_channels = [dim for dim in padded if varies(data, dim)]
    if not over_channels:
        return run.same_along(data, padded, place(node)).expand(shape(node))
    if given.get("mode", "constant") != "constant" or any(size < 0 for size in sizes):
        return unknown(run, node, given)
    # What is added belongs to no filter, like the zeros of a padded shortcut.
    whole = torch.zeros(shape(node), dtype=torch.int64)
    inner = whole
    for dim in padded:
        inner = inner.narrow(dim, sizes[2 * (data.dim() - 1 - dim)], data.shape[dim])
    inner.copy_(data)
    return whole


# --- elementwise operations --------------------------------------------------------------------------------------


@register("pointwise")
def _elementwise(run: Pass, node: fx.Node, given: dict[str, Any]) -> Labels:
    result = torch.tensor(FIXED)
    tensors = [value for value in given.values() if isinstance(value, fx.Node)]
    for source in tensors:
        labels = run.of(source)
        if not isinstance(labels, torch.Tensor):
            return unknown(run, node, given)
        result = labels if source is tensors[0] else _join(run, node, result, labels)
    return result.expand(shape(node))


RULES.update(
    dict.fromkeys(
        [
            *("dropout", "dropout_", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout"),
            *("hardswish", "hardswish_", "contiguous", "to", "_to_copy", "type_as", "zeros_like", "ones_like"),
            *("full_like", "empty_like", "rand_like", "randn_like", "float", "half", "rsub", "clone", "alias"),
            *("detach", "detach_", "lift_fresh_copy", "copy_", "logsigmoid", "log_sigmoid", "hardshrink", "rrelu"),
            *("square_", "masked_fill", "masked_fill_", "fill_", "zero_", "where", "expm1"),
        ],
        _elementwise,
    )
)


def _join(run: Pass, node: fx.Node, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Labels of an operation on two tensors that are broadcast against each other."""
    size = torch.broadcast_shapes(one.shape, other.shape)  # type: ignore[no-untyped-call]
    mine, theirs = (labels.reshape([1] * (len(size) - labels.dim()) + list(labels.shape)) for labels in (one, other))
    for gate, data in ((mine, theirs), (theirs, mine)):
        varying = [dim for dim in range(len(size)) if varies(data, dim)]
        if varying and all(gate.shape[dim] == 1 for dim in varying):  # one value for all of the other's channels
            if any(varies(gate, dim) for dim in range(len(size))):
                run.book.freeze(lean(gate), f"{place(node)} multiplies out two sets of channels")
                run.book.freeze(lean(data), f"{place(node)} multiplies out two sets of channels")
                return torch.tensor(FIXED).expand(size)
            run.book.freeze(lean(gate), f"{place(node)} spreads it over other channels")
            return data.expand(size)
    if _is_number(one) or _is_number(other):
        return (other if _is_number(one) else one).expand(size)
    a, b = lean(mine.expand(size), theirs.expand(size))
    run.book.unify(a, b, place(node))
    # A channel goes on rather than a parameter that waited for it; where one of the two is FIXED, both are.
    both = torch.where(a >= PARAMETER, b, a)
    return torch.where((a == FIXED) | (b == FIXED), FIXED, both).expand(size)


def _is_number(labels: torch.Tensor) -> bool:
    return labels.numel() == 1 and int(labels.flatten()[0]) == FIXED


@register("matmul", "bmm")
def _matmul(run: Pass, node: fx.Node, given: dict[str, Any]) -> Labels:
    """Sums over positions carry channels along; sums over channels (attention) are not understood."""
    one, other = run.of(given["self"]), run.of(given.get("other", given.get("mat2")))
    if min(one.dim(), other.dim()) < 2 or varies(one, -1) or varies(other, -2):
        return unknown(run, node, given)
    return _join(run, node, one.narrow(-1, 0, 1), other.narrow(-2, 0, 1)).expand(shape(node))
