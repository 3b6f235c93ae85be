"""How shape operations carry labels: they run on the label tensors themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .label_pass import Labels, Pass, first_of, fixed, lean, register, unknown, varies
from .labels import FIXED
from .trace import operation, place, shape

# More blocks than this come from a fixed number in the code rather than from a share of the channels.
_MOST_BLOCKS = 16


# --- shape operations: run on the labels themselves --------------------------------------------------------------


@register(
    *("permute", "transpose", "t", "movedim", "swapaxes", "swapdims", "unsqueeze", "squeeze", "expand", "expand_as"),
    *("repeat", "repeat_interleave", "tile", "roll", "flip", "select", "unbind", "cat", "stack", "concat", "hstack"),
    *("unflatten", "unsqueeze_", "squeeze_", "transpose_", "view_as", "numpy_T", "channel_shuffle", "pixel_unshuffle"),
    *("pixel_shuffle", "diagonal", "rot90", "broadcast_to", "narrow", "ravel"),
)
def _shape_operation(run: Pass, node: fx.Node, given: dict[str, Any]) -> Labels:
    def value(item: object) -> object:
        if isinstance(item, list | tuple):
            return [value(each) for each in item]
        return run.of(item) if isinstance(item, fx.Node) else item

    args, kwargs = [value(item) for item in node.args], {key: value(item) for key, item in node.kwargs.items()}
    out = node.target(*args, **kwargs)  # type: ignore[operator]
    return list(out) if isinstance(out, list | tuple) else out


@register("view", "reshape", "_unsafe_view", "flatten", "reshape_as", "view_copy")
def _reshape(run: Pass, node: fx.Node, given: dict[str, Any]) -> Labels:
    if "dtype" in given and "size" not in given and operation(node) == "view":
        return unknown(run, node, given)
    data, size = run.of(given["self"]), shape(node)
    for old, new in _factors(data.shape, size):
        if len([dim for dim in new if size[dim] > 1]) < 2 or not any(varies(data, dim) for dim in old):
            continue
        if len([dim for dim in old if data.shape[dim] > 1]) == 1:
            line = data.movedim(next(dim for dim in old if data.shape[dim] > 1), 0).flatten(1)[:, 0]
            mine = line[line != FIXED]
            if len(mine.unique()) < len(mine):  # its order could change within a channel, unseen
                run.book.freeze(line, f"{place(node)} divides channels of several values each")
            outer = 1
            for dim in new[:-1]:
                outer *= size[dim]
                _balance(run, node, line.reshape(outer, -1))
    return _reshaped(data, size)


def _reshaped(data: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """`reshape` that keeps trailing dimensions of equal labels (positions) as thin as they are."""
    cut = 0
    while cut < min(data.dim(), len(size)) and data.shape[-1 - cut] == size[-1 - cut] and not varies(data, -1 - cut):
        cut += 1
    if cut == 0:
        return data.reshape(size)
    thin = first_of(data, range(data.dim() - cut, data.dim()))
    return thin.reshape([*size[: len(size) - cut], *[1] * cut]).expand(size)


def _factors(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of dimensions of two shapes that hold the same number of elements."""
    runs, i, j = [], 0, 0
    while i < len(old) and j < len(new):
        left, right, a, b = [i], [j], old[i], new[j]
        while a != b:
            if a < b:
                i += 1
                left.append(i)
                a *= old[i]
            else:
                j += 1
                right.append(j)
                b *= new[j]
        runs.append((left, right))
        i, j = i + 1, j + 1
    return runs


@register("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split")
def _split(run: Pass, node: fx.Node, given: dict[str, Any]) -> Labels:
    parts = _shape_operation(run, node, given)
    _shares(
        run, node, run.of(given["self"]), int(given.get("dim") or 0), [0, *_ends(parts, int(given.get("dim") or 0))]
    )
    return parts


def _ends(parts: list[torch.Tensor], dim: int) -> list[int]:
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + part.shape[dim])
    return ends[1:]


@register("slice")
def _slice(run: Pass, node: fx.Node, given: dict[str, Any]) -> Labels:
    data, dim = run.of(given["self"]), int(given["dim"])
    if int(given.get("step") or 1) > 1 and varies(data, dim):
        run.book.freeze(lean(data), f"{place(node)} takes channels at intervals")
    size = data.shape[dim]
    start, end = (
        int(given[key]) if given[key] is not None else default for key, default in (("start", 0), ("end", size))
    )
    start, end = (min(size, max(0, bound + size if bound < 0 else bound)) for bound in (start, end))
    _shares(run, node, data, dim, [0, start, end, size])
    return _shape_operation(run, node, given)


def _shares(run: Pass, node: fx.Node, data: torch.Tensor, dim: int, bounds: list[int]) -> None:
    """Parts of a dimension keep their share of the channels, as `x[:, : c // 2]` demands.

    If the bounds are fixed numbers instead, the pruned network shows it.
    """
    if not varies(data, dim):
        return
    size = data.shape[dim]
    step = math.gcd(*bounds)
    if size > step >= 1 and size // step <= _MOST_BLOCKS:
        line = data.movedim(dim, 0).reshape(size, -1)[:, 0]
        _balance(run, node, line.reshape(size // step, step))


def _balance(run: Pass, node: fx.Node, blocks: torch.Tensor) -> None:
    run.book.balance(blocks, place(node))


@register("getitem")
def _getitem(run: Pass, node: fx.Node, given: dict[str, Any]) -> Labels:
    source, index = run.of(node.args[0]), node.args[1]
    return source[index] if isinstance(source, list) and isinstance(index, int) else unknown(run, node, given)


@register("zeros", "ones", "full", "arange", "empty", "scalar_tensor", "linspace", "eye", "new_zeros", "new_ones")
def _constant(_: Pass, node: fx.Node, __: dict[str, Any]) -> Labels:
    return fixed(node)
