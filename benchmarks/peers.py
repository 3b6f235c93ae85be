"""Pruning methods against each other: the trained ResNet-20 with half its multiply-accumulates, 10,000 test images.

A contender is a function (network, images, most multiply-accumulates) → thinner network; a new one is one more entry
of CONTENDERS. All are counted by the same rule (thinet_deploy.counting) and tested on the same images without any
training, or, with --tune file.py:function, once more after the same fine-tuning, which the unpruned network gets too:
function(network, data) trains in place.

Torch-Pruning (`pip install torch-pruning==1.6.1 --no-deps`) runs with its defaults but for the criterion and what may
go. Its ratio is searched so that the network just keeps within the budget. What may go:

- *inner*: the first convolution of every block;
- *streams*: all but the classes, the residual streams too, which is its default. It takes the padding of the shortcuts
  for an elementwise operation, so channels behind it no longer meet their own: `fault` measures that;
- *streams, 1×1*: the same with the shortcuts written as 1×1 convolutions of ones and zeros, which it follows rightly;
  afterwards they become selections of channels again, so they are not counted for anyone.

Each with the ratio in every layer (its default), or *global*: with one ranking over all layers.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import importlib.util
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, cast

import numpy as np
import torch
from _ours import pruned
from _record import keep
from _trained import Block, Padding, cifar10, missing, trained_resnet20
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from thinet_deploy.counting import count
from thinet_deploy.data import Dataset, ImageSet
from thinet_deploy.intervals import accuracy_interval, difference_interval
from thinet_deploy.models.loading import load_function
from thinet_deploy.pruning.budget import Wish
from thinet_deploy.pruning.oneshot import Method
from thinet_deploy.training import logits

Contender = Callable[[nn.Module, Dataset, int], nn.Module]
Tune = Callable[[nn.Module, Dataset], None]

# Of 40.55 M: what half of the filters of every block's first convolution leaves (20.497 M), so that a uniform ratio
# of one half is within it and the next step of all layers at once (19.0 M) is not forced on anyone.
BUDGET_MACS = 20_500_000
TAYLOR_IMAGES = 2000
HALVINGS = 10  # of the ratio: finer than one filter of the widest layer
CRITERIA = ("L1", "BN scale", "FPGM", "Taylor")
SCOPES = ("inner", "inner, global", "streams", "streams, 1×1", "streams, 1×1, global")


# --- Torch-Pruning ---------------------------------------------------------------------------------------------------


def torch_pruning(criterion: str, scope: str) -> Contender:
    """Torch-Pruning with a criterion and what may go."""

    def prune(model: nn.Module, data: Dataset, macs: int) -> nn.Module:
        model = with_convolutions(model) if "1×1" in scope else model
        gradients = _gradients(model, data.train) if criterion == "Taylor" else {}
        attempt = functools.partial(_attempt, model, criterion, scope, gradients)
        low, high = 0.0, 0.95
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            fits = count(attempt(middle), data.preprocess.input_shape).macs <= macs
            low, high = (low, middle) if fits else (middle, high)
        return attempt(high)

    return prune


def _attempt(
    model: nn.Module, criterion: str, scope: str, gradients: dict[str, torch.Tensor], ratio: float
) -> nn.Module:
    """A copy without `ratio` of the filters that may go."""
    tp, thin = importlib.import_module("torch_pruning"), copy.deepcopy(model)
    for name, parameter in thin.named_parameters():
        parameter.grad = gradients.get(name)
    importance, pruner = {
        "L1": (tp.importance.MagnitudeImportance(p=1), tp.pruner.MagnitudePruner),
        "BN scale": (tp.importance.BNScaleImportance(), tp.pruner.BNScalePruner),
        "FPGM": (tp.importance.FPGMImportance(), tp.pruner.MagnitudePruner),
        "Taylor": (tp.importance.TaylorImportance(), tp.pruner.MagnitudePruner),
    }[criterion]
    stays = [module for name, module in thin.named_modules() if _stays(name, scope)]
    example = torch.zeros(1, *cast("tuple[int, int, int]", model.input_shape))
    pruner(
        thin,
        example,
        importance=importance,
        pruning_ratio=ratio,
        global_pruning="global" in scope,
        ignored_layers=stays,
    ).step()
    thin.zero_grad()
    return with_selections(thin).eval()


def _stays(name: str, scope: str) -> bool:
    """Whether a layer is kept whole: the classes, and for *inner* what writes to a residual stream."""
    return name == "linear" or (scope.startswith("inner") and (name == "conv1" or name.endswith("conv2")))


def _gradients(model: nn.Module, images: ImageSet) -> dict[str, torch.Tensor]:
    """Of the mean loss over calibration images, in eval mode; name → gradient."""
    chosen = images.sample(TAYLOR_IMAGES, seed=0, stage="taylor")
    model = copy.deepcopy(model).eval()
    for rows in np.array_split(chosen, max(1, len(chosen) // 250)):
        scores, labels = model(torch.from_numpy(images.inputs(rows))), torch.from_numpy(images.labels[rows])
        loss = F.cross_entropy(scores, labels, reduction="sum") / len(chosen)
        loss.backward()  # type: ignore[no-untyped-call]
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


# --- shortcuts that Torch-Pruning follows ----------------------------------------------------------------------------


class Selection(nn.Module):
    """A shortcut whose every output channel is one of the input's, or zero.

    Args:
        source: input channel of each output channel, -1 for zeros; shape (channels,).
        stride: takes every `stride`-th pixel.
    """

    source: torch.Tensor

    def __init__(self, source: torch.Tensor, stride: int) -> None:
        super().__init__()
        self.register_buffer("source", source)
        self.stride = stride

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        """Shape (n, before, h, w) → (n, channels, h / stride, w / stride)."""
        sparse = x_nchw[:, :, :: self.stride, :: self.stride]
        return sparse[:, self.source.clamp(min=0)] * (self.source >= 0)[:, None, None]


def with_convolutions(model: nn.Module) -> nn.Module:
    """The same function, with 1×1 convolutions where shortcuts pad."""
    model = copy.deepcopy(model)
    for block in _blocks(model):
        if isinstance(block.shortcut, Padding):
            before, sides = block.conv1.in_channels, [block.shortcut.more // 2] * 2
            convolution = nn.Conv2d(before, before + sum(sides), 1, block.shortcut.stride, bias=False)
            identity = torch.eye(before)[:, :, None, None]
            convolution.weight = nn.Parameter(F.pad(identity, (0, 0, 0, 0, 0, 0, *sides)))
            block.shortcut = convolution
    return model.eval()


def with_selections(model: nn.Module) -> nn.Module:
    """The same function, with selections where `with_convolutions` has put convolutions; in place."""
    for block in _blocks(model):
        if isinstance(block.shortcut, nn.Conv2d):
            weight = block.shortcut.weight.detach()[:, :, 0, 0]
            block.shortcut = Selection(torch.where(weight.any(1), weight.argmax(1), -1), block.shortcut.stride[0])
    return model


def _blocks(model: nn.Module) -> list[Block]:
    return [each for each in model.modules() if isinstance(each, Block)]


def fault(model: nn.Module) -> float:
    """How far Torch-Pruning's network is from the original with the same channels cut, relative to the largest output.

    Channels 0, 3, 5 and 11 of the first stream go, and what it takes along. The original is cut at every consumer, once
    with the channels of the later streams that it has removed and once with those that the shortcuts lead to; the
    smaller difference counts. Rounding errors are below 1e-5.
    """
    tp, thin, gone = importlib.import_module("torch_pruning"), copy.deepcopy(model), torch.tensor([0, 3, 5, 11])
    example = torch.zeros(1, *cast("tuple[int, int, int]", model.input_shape))
    graph = tp.DependencyGraph().build_dependency(thin, example_inputs=example)
    graph.get_pruning_group(thin.conv1, tp.prune_conv_out_channels, idxs=gone.tolist()).prune()
    images = torch.randn(8, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    along = thin.linear.in_features < model.linear.in_features  # type: ignore[operator,union-attr]
    cuts = [(gone, gone), (gone + 8, gone + 24)] if along else [(gone[:0], gone[:0])]
    with torch.inference_mode():
        expected, found = [_cut(model, gone, *later)(images) for later in cuts], thin(images)
    return min(float((found - each).abs().max() / each.abs().max()) for each in expected)


def _cut(model: nn.Module, first: torch.Tensor, second: torch.Tensor, third: torch.Tensor) -> nn.Module:
    """A copy whose consumers do not see these channels of the three residual streams."""
    model = copy.deepcopy(model)
    readers: list[tuple[nn.Module, torch.Tensor]] = [(cast("nn.Module", model.linear), third)]
    for number, gone in enumerate((first, second, third), 1):
        blocks = list(cast("nn.Sequential", getattr(model, f"layer{number}")))
        after = list(cast("nn.Sequential", getattr(model, f"layer{number + 1}", [])))[:1]
        for index, block in enumerate(cast("list[Block]", blocks + after)):
            if index or number == 1:  # the first block of a later stage reads the stream before
                readers.append((block.conv1, gone))
        readers += [(each.shortcut, gone) for each in after if isinstance(each.shortcut, nn.Conv2d)]
    with torch.no_grad():
        for reader, gone in readers:
            cast("torch.Tensor", reader.weight)[:, gone] = 0
    return model.eval()


# --- the measurement -------------------------------------------------------------------------------------------------


def ours(method: Method, *, allocated: bool) -> Contender:
    """thinet-deploy without training, inside the blocks."""
    return lambda model, data, macs: pruned(model, data, Wish(macs=macs), method, allocated=allocated)


# Name → method.
CONTENDERS: dict[str, Contender] = {
    "thinet-deploy best (inner)": ours(Method(), allocated=True),
    "thinet-deploy best, uniform (inner)": ours(Method(), allocated=False),
    "ThiNet, ICCV 2017 (inner)": ours(Method("thinet", "scale"), allocated=False),
    "ThiNet, TPAMI 2019 (inner)": ours(Method("thinet-omp", "scale"), allocated=False),
} | {
    f"Torch-Pruning {criterion} ({scope})": torch_pruning(criterion, scope)
    for scope in SCOPES
    for criterion in CRITERIA
}
QUICK = ("Torch-Pruning L1 (inner)", "Torch-Pruning Taylor (streams, 1×1, global)")


def hits(model: nn.Module, images: ImageSet) -> NDArray[np.bool_]:
    """Whether each image's class is ranked first, ties against it, as thinet_deploy.training.accuracy has it."""
    outputs = logits(model, images).numpy()
    own = np.take_along_axis(outputs, images.labels[:, None], 1)
    right: NDArray[np.bool_] = (~(outputs < own)).sum(1) == 1
    return right


def judged(model: nn.Module, data: Dataset, unpruned: NDArray[np.bool_] | None = None) -> dict[str, Any]:
    """Accuracy with its interval, the paired difference to the unpruned network, and the raw result per image."""
    right = hits(model, data.test)
    row: dict[str, Any] = {"top1": asdict(accuracy_interval(int(right.sum()), len(right)))}
    if unpruned is not None:
        row["minus_unpruned"] = asdict(difference_interval(right, unpruned))
    return row | {"right": np.packbits(right).tobytes().hex()}  # one bit per image, the first is the highest


def measure(contender: Contender, model: nn.Module, data: Dataset, dense: dict[str, Any], tune: Tune | None) -> Any:
    """A row: prune, count, test, and fine-tune and test again."""
    shape, start = data.preprocess.input_shape, time.perf_counter()
    thin = contender(copy.deepcopy(model), data, BUDGET_MACS)
    row: dict[str, Any] = {"seconds": time.perf_counter() - start}
    counted = count(thin, shape)
    row |= {"macs": counted.macs, "parameters": counted.parameters}
    row["widths"] = {name: each.out_channels for name, each in thin.named_modules() if isinstance(each, nn.Conv2d)}
    row["untuned"] = judged(thin, data, unpack(dense["untuned"]["right"], len(data.test)))
    if tune:
        tune(thin, data)
        row["tuned"] = judged(thin.eval(), data, unpack(dense["tuned"]["right"], len(data.test)))
    return row


def unpack(right: str, images: int) -> NDArray[np.bool_]:
    """Right or wrong per image from a row's raw result."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(right), np.uint8))[:images].astype(bool)


def unpruned_row(model: nn.Module, data: Dataset, tune: Tune | None) -> dict[str, Any]:
    """The original network, fine-tuned like the others."""
    counted = count(model, data.preprocess.input_shape)
    row = {"macs": counted.macs, "parameters": counted.parameters, "untuned": judged(model, data)}
    if tune:
        tuned = copy.deepcopy(model)
        tune(tuned, data)
        row["tuned"] = judged(tuned.eval(), data)
    return row


def show(rows: dict[str, Any]) -> None:
    """A table, best first."""
    states = [state for state in ("untuned", "tuned") if state in rows["unpruned"]]
    table = Table("network", "MMAC", "parameters", *(f"top-1, {state} (95 %)" for state in states))
    for name, row in sorted(rows.items(), key=lambda item: -item[1][states[-1]]["top1"]["value"]):
        accuracies = (row[state]["top1"] for state in states)
        texts = [f"{each['value']:.2f} ({each['low']:.2f}–{each['high']:.2f})" for each in accuracies]
        table.add_row(name, f"{row['macs'] / 1e6:.2f}", f"{row['parameters']:,}", *texts)
    Console(width=140).print(table)


def main() -> None:
    """Measure every contender, keep each row at once, print the table."""
    parser = argparse.ArgumentParser(description="Pruning methods against each other on the trained ResNet-20.")
    parser.add_argument("--quick", action="store_true", help="two contenders, 500 test images: shows that it works")
    parser.add_argument("--tune", metavar="FILE.py:FUNCTION", help="the same fine-tuning for everybody")
    given = parser.parse_args()
    if absent := missing():
        print(f"peers: skipped, {absent}")
        return
    torch.set_num_threads(1)
    tune = cast("Tune", load_function(given.tune, "fine-tuning")) if given.tune else None
    model, data = trained_resnet20(), cifar10()
    if given.quick:
        few = data.test.view(data.test.sample(500, seed=0, stage="quick"))
        data = Dataset(data.name, data.classes, data.train, few, data.digest)
    installed = importlib.util.find_spec("torch_pruning") is not None
    facts: dict[str, Any] = {"network": "resnet20", "test_images": len(data.test), "budget_macs": BUDGET_MACS}
    facts |= {"tune": given.tune or "", "threads": 1, "torch_pruning": version("torch-pruning") if installed else ""}
    if installed:
        forms = {"padding": model, "1×1 convolutions": with_convolutions(model)}
        facts["fault_of_shortcuts"] = {form: fault(network) for form, network in forms.items()}
        print(f"Torch-Pruning against the cut network, by form of the shortcuts: {facts['fault_of_shortcuts']}")
    rows = {"unpruned": unpruned_row(model, data, tune)}
    for name, contender in CONTENDERS.items():
        if given.quick and name not in QUICK:
            continue
        if name.startswith("Torch-Pruning") and not installed:
            print(f"{name}: skipped, torch_pruning is not installed")
            continue
        rows[name] = measure(contender, model, data, rows["unpruned"], tune)
        path = keep("peers", {**facts, "rows": rows}, quick=given.quick)
        print(f"{name}: {rows[name]['untuned']['top1']['value']:.2f} %, {rows[name]['macs'] / 1e6:.2f} M. {path}")
    show(rows)


if __name__ == "__main__":
    main()
