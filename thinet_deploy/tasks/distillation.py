"""What a network learns from: the labels, and what a teacher such as the dense network says, at its end and inside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Mix:
    """What counts how much in a loss.

    Attributes:
        share: the teacher's part where there is a label too, from 0 to 1.
        temperature: by which both sides' class scores are divided for the teacher's part.
        smoothing: share of each label that is spread evenly over all classes.
    """

    share: float = 0.5
    temperature: float = 4.0
    smoothing: float = 0.0


USUAL = Mix()
_POOLS = {nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d}


def losses(
    outputs_nk: torch.Tensor, labels_n: torch.Tensor, taught_nk: torch.Tensor | None = None, mix: Mix = USUAL
) -> torch.Tensor:
    """Loss of each image, shape (n,): cross-entropy with its label, mixed with the divergence from the teacher.

    The divergence is multiplied by T², so that its gradient does not shrink with the temperature T (Hinton et al.,
    2015, arXiv:1503.02531, section 2). It is zero where both agree; the cross-entropy of the paper has the same
    gradient, but ends at the teacher's entropy.

    Args:
        outputs_nk: the network's outputs before softmax.
        labels_n: class indices; -1 for an image without a label, whose loss is the teacher's alone.
        taught_nk: the teacher's outputs; None without one.
        mix: of labels and teacher.
    """
    hard_n = F.cross_entropy(outputs_nk, labels_n, ignore_index=-1, reduction="none", label_smoothing=mix.smoothing)
    if taught_nk is None:
        return hard_n
    softened_nk, target_nk = (F.log_softmax(part / mix.temperature, 1) for part in (outputs_nk, taught_nk))
    soft_n = mix.temperature**2 * F.kl_div(softened_nk, target_nk, reduction="none", log_target=True).sum(1)
    share_n = torch.where(labels_n < 0, 1.0, mix.share)
    return share_n * soft_n + (1 - share_n) * hard_n


class Inside:
    """What the parts say that a network and its teacher have in common, while both run: a context.

    Parts are modules with modules inside, such as the blocks of a residual network: pruning left the shape of what they
    say, so that a thin network can be held to the original there (as Romero et al., FitNets, ICLR 2015, section 2.2).
    """

    def __init__(self, model: nn.Module, teacher: nn.Module | None) -> None:
        """Nothing is looked for before the first batch."""
        self._models = (model, teacher) if teacher else None
        self._said: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.names: tuple[str, ...] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def find(self, inputs: torch.Tensor) -> None:
        """Find the parts by a run of both networks on some inputs, and listen to them from now on."""
        if self._models is None or self.names is not None:
            return
        outputs = [_outputs(each, inputs) for each in self._models]
        shapes = [{name: said.shape for name, said in each.items()} for each in outputs]
        alike = () if _regrouped(*self._models) else tuple(shapes[0])
        self.names = tuple(name for name in alike if shapes[0][name] == shapes[1].get(name) and self._pools_alike(name))
        for model, said in zip(self._models, self._said, strict=True):
            for name in self.names:
                self._hooks.append(model.get_submodule(name).register_forward_hook(_note(said, name)))

    def differences(self) -> torch.Tensor | None:
        """Squared error of each image, shape (n,), as a share of what the teacher says, averaged over the parts."""
        ours, theirs = self._said
        heard = [name for name in self.names or () if name in ours and name in theirs]  # training may leave a part out
        shares = [_squares(ours[name] - theirs[name]) / _squares(theirs[name]).clamp_min(1e-12) for name in heard]
        ours.clear()
        theirs.clear()
        return torch.stack(shares).mean(0) if shares else None

    def _pools_alike(self, name: str) -> bool:
        """Whether a part ends in the same pool, if it ends in one: a new head has another."""
        mine, aim = (type([*model.get_submodule(name).modules()][-1]) for model in self._models or ())
        return mine is aim or not {mine, aim} & _POOLS

    def _stop(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _squares(part: torch.Tensor) -> torch.Tensor:
    """Sum of squares of each image, shape (n,), added up in fp32 without a copy in fp32."""
    dims, wide = tuple(range(1, part.ndim)), torch.promote_types(part.dtype, torch.float32)
    lengths_n: torch.Tensor = torch.linalg.vector_norm(part, dim=dims, dtype=wide)
    return lengths_n.square()


def _regrouped(model: nn.Module, teacher: nn.Module) -> bool:
    """Whether convolutions were grouped, which puts channels in another order (gcos)."""
    groups = {name: part.groups for name, part in teacher.named_modules() if isinstance(part, nn.Conv2d)}
    mine = ((name, part.groups) for name, part in model.named_modules() if isinstance(part, nn.Conv2d))
    return any(number > 1 and groups.get(name) == 1 for name, number in mine)


def _note(said: dict[str, Any], name: str) -> Callable[[nn.Module, object, Any], None]:
    def note(_: nn.Module, __: object, output: Any) -> None:
        said[name] = output

    return note


def _outputs(model: nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each part says, by name; of nested ones that say the same, the innermost; not what the whole says."""
    said: dict[str, Any] = {}
    parts = {name: each for name, each in model.named_modules() if name and any(True for _ in each.children())}
    hooks = [each.register_forward_hook(_note(said, name)) for name, each in parts.items()]
    training = [each for each in model.modules() if each.training]
    try:
        with torch.no_grad():
            whole = model.eval()(inputs)
    finally:
        for each in training:  # one by one: dropout may be off in a network that is trained
            each.training = True
        for hook in hooks:
            hook.remove()
    different: dict[int, str] = {}
    for name, output in said.items():  # the innermost runs first
        if isinstance(output, torch.Tensor) and output.is_floating_point() and output is not whole:
            different.setdefault(id(output), name)
    return {name: said[name] for name in parts if name in different.values()}
