"""From the finished networks to what ships: export → convert → verify → measure → bundle → report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import apps, registry, verify
from ..artifact import hash_json, sha256_of, write_bytes, write_json
from ..bundle import BUILDER, KIT
from ..devices.android import Phone
from ..devices.site import Machine
from ..environment import fingerprint, machine_id
from ..errors import OutputError
from ..precision.held import READERS
from ..precision.plan import PrecisionPlan
from ..registry import device_notes, runs_here
from ..reports import contract
from ..reports import html as html_report
from ..reports.table import Table
from ..shared_run import SharedRun
from ..store import Checkpoint, Run, Stage
from ..timing import latency
from . import bundle as bundle_stage
from . import deploy as deploy_stage
from . import device as device_stage
from . import latency as latency_stage
from . import parity as parity_stage
from . import precision as precision_stage
from .build_table import build_table
from .job import Job
from .networks import Networks, gate
from .tools import Tools, remarks


@dataclass(frozen=True)
class Build:
    """What a build leaves.

    Attributes:
        run: the run directory.
        table: the papers' table.
        hops: the parity verdicts.
        bundle: the bundle's folder.
        notes: what the user has to know or to do.
        verdicts: on every requirement.
        device: what came from the device, where one was given: see `stages.device.on_device`.
    """

    run: Path
    table: Table
    hops: tuple[verify.Hop, ...]
    bundle: Path
    notes: tuple[str, ...]
    verdicts: tuple[contract.Verdict, ...] = ()
    device: dict[str, Any] | None = None


def deploy(
    run: SharedRun, tools: Tools, plan: PrecisionPlan, made: Networks, machine: Machine | Phone | None = None
) -> Build:
    """Export → type → convert → verify → measure → bundle → the same on the device, if there is one → report."""
    build = _Deployment(run, tools, plan, made)
    onnx = build.onnx()
    engines = build.engines(onnx)
    parity = build.parity(onnx, engines)
    measured = build.measured(onnx, engines)
    notes = build.notes(onnx, engines)
    bundle = build.bundle(onnx, engines, parity, notes)
    there = build.on_device(machine, bundle) if machine else None
    judged = build.judged(onnx)
    table = build_table(tools.job, made, judged.files, measured, build.drops(judged))
    page = html_report.Page(run.root, table, build.verdicts(table, there), there)
    build.report(page, parity, measured)
    # What is left to do on the device has been done.
    said = (*plan.notes, *engines.notes) if there else notes
    notes = (*remarks(tools.job, build.folders["original"]), *said, *_slower(tools.job, table, there))
    if why := measured.json(deploy_stage.LATENCY).get(deploy_stage.UNTIMED):
        notes = (*notes, f"No forward and backward times: {why} Everything else was measured.")
    return Build(run.root, table, _hops(parity), bundle.folder, notes, page.verdicts, there)


def _slower(job: Job, table: Table, there: dict[str, Any] | None) -> tuple[str, ...]:
    """Whether what ships misses the budget of time that its widths met."""
    if not job.options.timed:
        return ()
    return contract.budget_notes(job.options, latency_stage.engine_of(job).runtime, table, there)


@dataclass(frozen=True)
class _Onnx:
    """The ONNX files, and what all that is made from them depends on.

    Attributes:
        files: in float32 and in other types.
        digests: of the stages that made them, and the precision of the engines.
    """

    files: deploy_stage.Files
    digests: dict[str, str]


@dataclass(frozen=True)
class _Engines:
    """The engines: digest of their stage, (network, runtime) → file, and runtime → why there are none for it."""

    digest: str
    paths: dict[tuple[str, str], Path]
    refused: dict[str, str]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user has to know of them."""
        return tuple(f"No engine for {runtime}: {why}" for runtime, why in self.refused.items())


class _Deployment:
    """The stages behind the networks of a build, one method each: what it depends on, and who makes it."""

    def __init__(self, run: SharedRun, tools: Tools, plan: PrecisionPlan, made: Networks) -> None:
        self.run, self.tools, self.plan, self.made = run, tools, plan, made
        self.job, self.target = tools.job, tools.job.target
        self.folders = {name: stage.folder for name, stage in made.stages.items()}
        self.digests = {name: stage.digest for name, stage in made.stages.items()}

    def onnx(self) -> _Onnx:
        """The networks as ONNX files, in float32 and in the plan's types."""
        onnx, engines = self._exported(), self.plan.engines
        typed = self._typed(onnx) if self.plan.files else None
        report = typed.json(precision_stage.TYPED) if typed else {}
        files = deploy_stage.Files(onnx.folder, typed.folder if typed else onnx.folder, report, engines)
        return _Onnx(files, {"onnx": onnx.digest, "typed": typed.digest if typed else "", "precision": engines})

    def judged(self, onnx: _Onnx) -> _Onnx:
        """What accuracy and size are of: where the device builds the engines, files of the type that was asked for."""
        asked = self.job.options.precision
        if asked not in self.plan.files:
            return onnx
        return _Onnx(replace(onnx.files, engines=asked), {**onnx.digests, "precision": asked})

    def _exported(self) -> Stage:
        inputs = {
            **self.digests,
            "opset": self.target.opset,
            "ir": self.target.ir_version,
            "shape": list(self.job.input_shape),
            "sources": sorted(registry.sources(self.target)),
            "made by": registry.versions(("thinet_deploy", "torch", "onnx", "onnxscript")),
            "rules": 1,  # of the exporter's that are used, see export.py
        }
        return self._made("onnx", inputs, lambda f: deploy_stage.exported(self.tools, self.folders, f))

    def _typed(self, onnx: Stage) -> Stage:
        options = self.job.options
        # Where engines have the type, those of all networks do; files for the device are of the one that ships.
        names = list(self.folders) if self.plan.engines in self.plan.files else [self.made.ship]
        inputs = {
            "onnx": onnx.digest,
            "names": names,
            "files": list(self.plan.files),
            "layout": self.plan.layout.name,
            "data": self.job.data.digest,
            "asked": [options.precision, options.max_drop, options.calibration_images, options.seed],
        }

        return self._made(
            "typed", inputs, lambda f: precision_stage.typed(self.tools, self.plan, onnx.folder, names, f)
        )

    def _made(
        self,
        name: str,
        inputs: dict[str, Any],
        make: Callable[[Path], None],
        holds: Callable[[Stage], bool] = lambda _: True,
    ) -> Stage:
        """A stage on the way to the bundle. Where it cannot be made, an earlier build's bundle goes, lest it ship."""

        def guarded(folder: Path, _: Checkpoint) -> None:
            try:
                make(folder)
            except OutputError:  # a full disk says nothing about the networks
                raise
            except Exception:
                self._discard("bundle", "report", "contract")
                raise

        return self.run.alone(name, inputs, guarded, holds)

    def engines(self, onnx: _Onnx) -> _Engines:
        """An engine per network and runtime; what a runtime refused is tried again by the next call."""
        runtimes, names = self.plan.runtimes, list(self.folders)
        inputs = {**onnx.digests, "tools": {each: registry.toolchain(each) for each in runtimes}}
        made = self._made(
            "engines",
            inputs,
            lambda f: deploy_stage.engines(self.tools, onnx.files, names, runtimes, f),
            lambda stage: not stage.json(deploy_stage.REFUSED),
        )
        paths = dict[tuple[str, str], Path]()
        for key, entry in made.json(deploy_stage.ENGINES).items():
            name, runtime = key.split("/")
            paths[name, runtime] = made.folder / entry["path"]
        return _Engines(made.digest, paths, made.json(deploy_stage.REFUSED))

    def parity(self, onnx: _Onnx, engines: _Engines) -> Stage:
        """The verdicts; a failed one ends the build."""
        executed = self._executed(onnx, engines)
        inputs = {
            **onnx.digests,
            "engines": engines.digest,
            "data": self.job.data.digest,
            "hops": hash_json(str([self.made.hops, executed])),
        }
        known = self.made.hops, executed
        stage = self._made(
            "parity",
            inputs,
            lambda f: parity_stage.parity(self.tools, self.folders, onnx.files, engines.paths, known, f),
        )
        gate(_hops(stage), self.run, stage)
        return stage

    def _executed(self, onnx: _Onnx, engines: _Engines) -> list[verify.Hop]:
        """Verdicts on what the engines execute; for another machine, which decides that anew, on what they hold."""
        here, files = runs_here(self.target), onnx.files
        paths = {key: path for key, path in engines.paths.items() if here or key[1] in READERS}
        if not paths:
            return []
        inputs = {"engines": engines.digest, "machine": _this_machine(), "precision": files.engines}
        stage = self._made(
            "precision",
            inputs,
            lambda f: precision_stage.executed(self.tools, self.plan, files.onnx, files.report, paths, f),
        )
        return [verify.Hop(**proof["hop"]) for proof in stage.json(precision_stage.EXECUTED).values()]

    def measured(self, onnx: _Onnx, engines: _Engines) -> Stage:
        """Milliseconds, as far as the engines run here."""
        here = runs_here(self.target)
        inputs = {
            "engines": engines.digest,
            "engines run": here,
            "threads": self.job.options.threads,
            "torch threads": torch.get_num_threads(),
            "version": latency.VERSION,
            "layers": 1,  # of layers.json
            "machine": _this_machine(),
            **self.digests,
        }
        paths = engines.paths if here else {}
        return self.run.alone(
            "latency",
            inputs,
            lambda f, _: deploy_stage.measured(self.tools, self.folders, paths, onnx.files, f),
            deploy_stage.undisturbed,
        )

    def notes(self, onnx: _Onnx, engines: _Engines) -> tuple[str, ...]:
        """What the user has to know, or to do on the device."""
        dla = self.job.options.dla
        typed = precision_stage.file_notes(onnx.files.report, self.made.labels, self.target, self.plan, dla)
        return (*device_notes(self.target, dla), *self.plan.notes, *engines.notes, *typed)

    def bundle(self, onnx: _Onnx, engines: _Engines, parity: Stage, notes: tuple[str, ...]) -> Stage:
        """What ships."""
        target, name = self.target, self.made.ship
        inputs = {
            **onnx.digests,
            "engines": engines.digest,
            "parity": parity.digest,
            "runner": [sha256_of(file) for file in (*KIT.values(), BUILDER)],
            "app": apps.digest(),
            "target": [target.id, target.builds_on_device, target.os, list(target.runtimes)],
            "model": [self.job.model_name, self.made.labels],
            # What the bundle takes from the images beside what the engines' and golden files hold of them.
            "data": [self.job.data.digest, *self.job.data.classes],
            "ship": self.digests[name],
            "notes": list(notes),
        }
        ship = bundle_stage.Shipped(name, self.made.labels[name], self.folders[name])

        def make(folder: Path, _: Checkpoint) -> None:
            self._discard("report", "contract")
            bundle_stage.bundled(self.tools, ship, onnx.files, engines.paths, parity.folder, notes, folder)

        return self.run.alone("bundle", inputs, make)

    def _discard(self, *stale: str) -> None:
        """What is of an earlier build, lest it be taken for this one's; called where one process works alone."""
        for name in stale:
            Run.discard(self.run, name)

    def on_device(self, machine: Machine | Phone, bundle: Stage) -> dict[str, Any]:
        """What the device makes of the bundle."""
        options, progress = self.job.options, self.tools.progress
        return device_stage.on_device(self.run, machine, self.target, bundle, options.threads, progress, options.dla)

    def drops(self, onnx: _Onnx) -> Stage:
        """How much accuracy each network lost."""
        digests = {key: digest for key, digest in onnx.digests.items() if key != "onnx"}
        inputs = {**self.digests, "data": self.job.data.digest, **digests}
        return self.run.alone(
            "accuracy", inputs, lambda f, _: deploy_stage.drops(self.tools, self.folders, onnx.files, f)
        )

    def verdicts(self, table: Table, there: dict[str, Any] | None) -> tuple[contract.Verdict, ...]:
        """On every requirement; kept in the run if there are any."""
        required = self.job.options.require
        verdicts = tuple(contract.judge(required, table, there))
        if required:
            inputs = {"required": list(required), "table": hash_json(table.to_json()), "device": hash_json(there)}
            self.run.alone("contract", inputs, lambda f, _: contract.write(f, verdicts))
        else:
            self.run.discard("contract")
        return verdicts

    def report(self, page: html_report.Page, parity: Stage, measured: Stage) -> None:
        """The table as JSON and the page."""
        inputs = {
            "table": hash_json(page.table.to_json()),
            "parity": parity.digest,
            "latency": measured.digest,
            "contract": list(self.job.options.require),
            "page": html_report.digest(),
            **({"device": hash_json(page.device)} if page.device else {}),
        }
        self.run.alone("report", inputs, lambda f, _: _report(page, f))


def _report(page: html_report.Page, folder: Path) -> None:
    write_json(folder / "table.json", page.table.to_json())
    if page.device:
        write_json(folder / html_report.DEVICE, page.device)
    write_bytes(folder / "report.html", html_report.render([page]).encode())


def _hops(parity: Stage) -> tuple[verify.Hop, ...]:
    return tuple(verify.Hop(**hop) for hop in parity.json(parity_stage.PARITY)["hops"])


def _this_machine() -> str:
    return machine_id(fingerprint())
