"""What each filter is worth keeping, by the criteria that the papers compare ThiNet with.

Every score is float64, (channels of the group,), and the higher it is the more the channel is worth keeping:
`selection.by_score` chooses. A group is judged in the network as it stands, which may be pruned before it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode

from ..data.dataset import ImageSet
from ..errors import NOT_FINITE, ModelError
from ..parallel import join
from ..seeds import generator
from ..tasks.base import Outputs, said
from .graph import STAYS, ChannelGraph, ChannelGroup, Consumer
from .plan import Plan, members
from .statistics import consumer_calls
from .trace import named_tensors
from .watch import Call, watch

Scores = NDArray[np.float64]
_FLATTENING = {"flatten", "reshape", "view", "squeeze"}
_POOL = re.compile(r"(adaptive_)?(max|avg)_pool[123]d")


def weight_sum(model: nn.Module, graph: ChannelGraph, group: ChannelGroup, plan: Plan) -> Scores:
    """Σ|w| of each filter (Li et al., ICLR 2017), summed over all producers of the group.

    Args:
        model: the network as it stands.
        graph: of the network before `plan`.
        group: whose filters are judged.
        plan: that led to the network; it keeps the whole group.

    Raises:
        ModelError: weights of the group are NaN or infinite.
    """
    tensors = dict(named_tensors(model))
    total = torch.zeros(len(group.channels), dtype=torch.float64)
    for axis in graph.axes:
        name, dim = axis.site
        if not axis.producer or not np.isin(axis.channels, group.channels).any():
            continue
        # What `members` does for the inputs of a consumer holds for the filters of a producer.
        place = torch.from_numpy(members(group, Consumer(name, dim, 0, axis.channels), plan))
        filters = tensors[name].detach().double().abs().movedim(dim, 0).flatten(1).sum(1)
        total += _by_channel(filters[None], place, len(total))[0]
    _check_finite(total, group)
    return total.numpy()


def apoz(
    model: nn.Module,
    group: ChannelGroup,
    plan: Plan,
    images: ImageSet,
    chosen: NDArray[np.int64],
    *,
    batch: int = 64,
) -> Scores:
    """1 − APoZ, the average share of zeros (Hu et al., 2016), of what the consumers read: before a pool on the way.

    For a maximum is seldom zero. The share is over images, positions and all inputs that belong to a channel; of
    several consumers that read it, the mean. A channel that none reads scores 0.

    Args:
        model: the network as it stands; put into eval mode.
        group: whose filters are judged.
        plan: that led to the network; it keeps the whole group.
        images: training images, centre-cropped, without augmentation.
        chosen: indices of the images to use.
        batch: images per forward pass.

    Raises:
        ModelError: NaN or infinity enters a consumer.
    """
    model.eval()
    places = [torch.from_numpy(members(group, each, plan)) for each in group.consumers]
    nonzero = torch.zeros(len(places), len(group.channels), dtype=torch.float64)
    values = torch.zeros_like(nonzero)
    team = join()
    for part in _batches(team.mine(chosen), batch):
        with _Pools() as pools:
            calls = consumer_calls(model, group.consumers, torch.from_numpy(images.inputs(part)))
        for row, (call, place) in enumerate(zip(calls, places, strict=True)):
            given, mine = pools.before(call.given["input"]), place
            if flattened := given.dim() > call.given["input"].dim():
                mine = place.view(given.shape[1], -1)[:, 0]  # a channel's inputs lie side by side
            data = given.flatten(2) if flattened else _channels_second(call, given)
            _check_finite(data, group)
            there, sizes = (data != 0).double().sum((0, 2)), data.new_full(data.shape[1:2], data[:, 0].numel())
            nonzero[row] += _by_channel(there[None], mine, len(group.channels))[0]
            values[row] += _by_channel(sizes[None].double(), mine, len(group.channels))[0]
    nonzero, values = team.sum_(nonzero), team.sum_(values)
    readers = (values > 0).sum(0).clamp(min=1)
    return ((nonzero / values.clamp(min=1)).sum(0) / readers).numpy()


class _Pools(TorchFunctionMode):
    """Remembers what pools read, and flattening after them."""

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        given: Any = args[0] if args else (kwargs or {}).get("input")
        name = getattr(function, "__name__", "")
        if not isinstance(output, torch.Tensor):
            return output
        flattens = name in _FLATTENING and output.dim() == 2 and id(given) in self.read
        if _POOL.fullmatch(name) or flattens:
            self.read[id(output)] = output, given
        elif "dropout" not in name:  # which gives what it was given
            self.read.pop(id(output), None)  # changed in place
        return output

    def before(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the pools read that a tensor comes from; itself where it comes from none."""
        while found := self.read.get(id(tensor)):
            tensor = found[1]
        return tensor


def taylor(
    model: nn.Module,
    group: ChannelGroup,
    plan: Plan,
    images: ImageSet,
    chosen: NDArray[np.int64],
    *,
    batch: int = 32,
) -> Scores:
    """First-order Taylor expansion of the loss (Molchanov et al., ICLR 2017): |mean of activation × gradient|.

    The activation is what really enters the consumers, the loss is that of the images' task, the mean is over
    positions; |…| is averaged over images. Inputs that belong to one channel (49 after a flattened 7×7 map) are
    summed within |…|. A tensor that several consumers read counts once: its gradient sums over all its readers.
    Different tensors (before every block of a residual stream) are added. Not normalised over layers, for each group
    is ranked by itself.

    Args:
        model: the network as it stands; put into eval mode. Its weights and their gradients stay as they are.
        group: whose filters are judged.
        plan: that led to the network; it keeps the whole group.
        images: training images with labels, centre-cropped, without augmentation.
        chosen: indices of the images to use.
        batch: images per pass; the whole network's activations for so many are held.

    Raises:
        ModelError: the loss has no gradient for what enters a consumer, or it is NaN or infinite.
    """
    model.eval()
    places = [torch.from_numpy(members(group, each, plan)) for each in group.consumers]
    total = torch.zeros(len(group.channels), dtype=torch.float64)
    team = join()
    for part in _batches(team.mine(chosen), batch):
        inputs, targets = (torch.from_numpy(of(part)) for of in (images.inputs, images.known))
        for call, place, gradient in _gradients(
            model, group, places, inputs, partial(images.task.losses, targets=targets)
        ):
            product = call.given["input"].detach().double() * gradient.double()
            total += _by_channel(_channels_second(call, product).mean(2), place, len(total)).abs().sum(0)
    _check_finite(team.sum_(total), group)
    return (total / len(chosen)).numpy()


def random_scores(group: ChannelGroup, seed: int) -> Scores:
    """Uniform in [0, 1): the same for the same seed and name of the group."""
    return generator(seed, group.name, "random").random(len(group.channels))


def _gradients(
    model: nn.Module,
    group: ChannelGroup,
    places: list[torch.Tensor],
    images: torch.Tensor,
    losses: Callable[[Outputs], torch.Tensor],
) -> list[tuple[Call, torch.Tensor, torch.Tensor]]:
    """Every different tensor that consumers read, as a call of one, with its place in the group and ∂loss/∂tensor."""
    wanted = {(each.weight, each.call): place for each, place in zip(group.consumers, places, strict=True)}
    seen: list[tuple[Call, torch.Tensor]] = []

    def see(call: Call) -> None:
        place = wanted.get((call.weight, call.number))
        if place is not None and not any(call.given["input"] is each.given["input"] for each, _ in seen):
            seen.append((call, place))

    with torch.enable_grad():
        # The images have a gradient, so that everything has one even where weights are frozen; they go in as a
        # product, because a network may begin with an operation in place, which torch refuses for a leaf.
        given = images.requires_grad_() * 1
        with watch(model, [each.weight for each in group.consumers], see):
            # Summed, so that an image's gradient does not depend on the others of its batch.
            loss = losses(said(model, given)).sum()
        if not seen:
            return []
        try:
            found = torch.autograd.grad(loss, [call.given["input"] for call, _ in seen], materialize_grads=True)
        except RuntimeError as error:
            raise ModelError(
                f"The loss has no gradient for what follows {group.name}: {str(error).partition(chr(10))[0]}",
                hint="Its filters cannot be judged by the criterion taylor; choose another one.",
            ) from error
    return [(call, place, gradient) for (call, place), gradient in zip(seen, found, strict=True)]


def _batches(indices: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _channels_second(call: Call, data: torch.Tensor) -> torch.Tensor:
    """A tensor like a consumer's input as (images, inputs, positions)."""
    data = data if "stride" in call.given else data.movedim(-1, 1)
    return data.reshape(*data.shape[:2], -1)


def _by_channel(values: torch.Tensor, place: torch.Tensor, channels: int) -> torch.Tensor:
    """Sums of (rows, inputs) over the inputs of each channel: (rows, channels)."""
    mine = place != STAYS
    return values.new_zeros(len(values), channels).index_add_(1, place[mine], values[:, mine])


def _check_finite(values: torch.Tensor, group: ChannelGroup) -> None:
    if not bool(values.isfinite().all()):
        raise ModelError(
            f"The filters of {group.name} cannot be judged: weights or activations are NaN or infinite.",
            hint=NOT_FINITE,
        )
