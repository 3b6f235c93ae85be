"""The stage that makes convolutions of the pruned network grouped ones (gcos), before it is fine-tuned."""

from __future__ import annotations

from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from ..artifact import read_json, write_json
from ..counting import count
from ..errors import InputError
from ..pruning.gcos import default_groups, group_convolutions
from ..pruning.plan import load_plan
from ..pruning.surgery import apply
from ..reports.ledger import Entry
from ..verify import grouping_hop
from .prune import calibration, graph_of, proof_images
from .tools import PLAN, REPORT, Tools, json_ready, write_network


def check_layout(tools: Tools, model: nn.Module) -> None:
    """Raise InputError when --gcos-layer names nothing in the original."""
    _named(model, tools.job.options.gcos_layer)


def grouped(tools: Tools, pruned_folder: Path, folder: Path) -> None:
    """The pruned network with grouped convolutions; its report goes on from the pruned one's."""
    options, shape = tools.job.options, tools.job.input_shape
    thin, plan, report = tools.load(pruned_folder), load_plan(pruned_folder / PLAN), read_json(pruned_folder / REPORT)
    graph = graph_of(tools, thin)
    wanted = _named(thin, options.gcos_layer) if options.gcos_layer else default_groups(thin, graph)
    if not wanted:
        raise InputError(
            f"--gcos finds no convolution in {tools.job.model_name} that can be grouped.",
            hint='Name some with --gcos-layer "PATTERN=GROUPS": it says of each why it cannot.',
        )
    done = group_convolutions(thin, graph, wanted, calibration(tools)[0], shape, progress=tools.progress)
    small = apply(done.plan, done.model)
    hop = grouping_hop("conv", done.model, small, proof_images(tools.job.data.train))
    accuracy = tools.test(small, "the grouped network")
    write_network(folder, small, plan.then(done.plan))
    changes = {
        "accuracy": asdict(accuracy),
        "ledger": [*report["ledger"], asdict(Entry.of("convolutions grouped (gcos)", accuracy))],
        "macs": {**report["macs"], "after": count(small, shape).macs},
        "groups": {name: {"groups": wanted[name], "explained": share} for name, share in done.explained.items()},
        "grouping": json_ready(hop),
    }
    write_json(folder / REPORT, {**report, **changes})


def _named(model: nn.Module, patterns: dict[str, int]) -> dict[str, int]:
    """Convolution → groups, for patterns of module names; of several that fit the last counts."""
    wanted: dict[str, int] = {}
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    for pattern, groups in patterns.items():
        fitting = [name for name in convolutions if fnmatchcase(name, pattern)]
        if not fitting:
            raise InputError(
                f"--gcos-layer {pattern}={groups}: no convolution has such a name.",
                hint=f"They are called {', '.join(convolutions[:4])} …",
            )
        wanted.update(dict.fromkeys(fitting, groups))
    return {name: wanted[name] for name in convolutions if name in wanted}
