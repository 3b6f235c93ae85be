"""The papers' table of a build, read from what its stages have left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..artifact import read_json
from ..environment import machine_id
from ..intervals import Interval
from ..registry import host_runtimes, runs_here
from ..reports.ledger import Entry
from ..reports.table import Row, Table, setting_of
from ..store import Stage
from ..tasks.base import Accuracy
from . import deploy as deploy_stage
from .deploy import DROPS, EXPORTED, LATENCY, Files
from .job import Job
from .networks import Networks
from .tools import read_accuracy


def build_table(job: Job, made: Networks, files: Files, measured: Stage, drops: Stage) -> Table:
    """The table: a row per network and per control, and the ledger of their accuracies.

    Args:
        job: what was built.
        made: the networks.
        files: the ONNX files that their engines come from.
        measured: stage of the times.
        drops: stage of what each network lost against the original.
    """
    timing = measured.json(LATENCY)
    rows = list(_networks(made, files, timing, drops.json(DROPS)))
    by_name = {row.name: row for row in rows}
    for name, control in made.controls.items():
        note = control.note + ("; accuracy in fp32" if files.typed_as(control.like) else "")
        row = by_name[control.like].with_weights(name, control.label, control.accuracy, note)
        rows.insert(1 if control.like == "original" else len(rows), row)
    environment = timing["environment"]
    runtimes = tuple(host_runtimes(job.target) if runs_here(job.target) else job.target.runtimes)
    return Table(
        target=job.target.id,
        model=job.model_name,
        data=job.data.name,
        images=len(job.data.test),
        machine=machine_id(environment),
        processor=environment.get("cpu", {}).get("model", "unknown processor"),
        threads=job.options.threads,
        torch_threads=timing["models"][0]["threads"] if timing["models"] else torch.get_num_threads(),
        batch=deploy_stage.TORCH_BATCH,
        runtimes=runtimes,
        rows=tuple(rows),
        ledger=tuple(_with_types(made, files.report)),
        precision=files.engines,
        ships=made.ship,
        setting=setting_of(environment, runtimes),
    )


def _networks(
    made: Networks, files: Files, timing: dict[str, Any], lost: Mapping[str, Mapping[str, float]]
) -> Iterator[Row]:
    """The rows of the networks themselves: accuracy and size of what their engines are made from."""
    exported = read_json(files.onnx / EXPORTED)
    for name, stage in made.stages.items():
        typed = files.typed_as(name)
        accuracy = Accuracy.read(typed["accuracy"]) if typed else read_accuracy(stage.folder)
        size = files.source(name).stat().st_size
        row = Row.make(name, made.labels[name], accuracy, exported[name]["count"], size, timing)
        yield replace(row, drop=Interval(**lost[name]) if name in lost else None)


def _with_types(made: Networks, report: Mapping[str, Any]) -> Iterator[Entry]:
    """The ledger, with each network's typed files after its other steps."""
    last = {entry.network: number for number, entry in enumerate(made.ledger)}
    names = {label: name for name, label in made.labels.items()}
    for number, entry in enumerate(made.ledger):
        yield entry
        if last[entry.network] == number:
            for precision, how in report.get(names.get(entry.network, ""), {}).items():
                if "path" in how:
                    yield Entry.of(f"in {precision}, as ONNX", Accuracy.read(how["accuracy"]), entry.network)
