"""From the original to the finished networks: prune, fine-tune, replace the head, and train what to compare with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from .. import verify
from ..artifact import sha256_of
from ..errors import GateError
from ..models.sources import sources
from ..options import Options
from ..pruning.proof import Proof
from ..reports.ledger import Entry, epochs_in_words
from ..shared_run import SharedRun
from ..store import Stage
from ..tasks.base import Accuracy
from . import latency as latency_stage
from . import steps
from .gcos import grouped
from .job import Job
from .prune import pruned as pruned_stage
from .steps import FineTuning
from .tools import PLAN, REPORT, Tools, read_accuracy
from .trial import TRIAL, tried

# Options that decide which filters stay.
WIDTHS = {
    "keep",
    "macs",
    "size",
    "round_to",
    "keep_layer",
    "ignore",
    "prune_shortcuts",
    "drop_branches",
    "calibration_images",
}
# Of report.json, in which later stages look up what earlier ones measured; 2: figures by name.
_REPORT_LAYOUT = 2


@dataclass(frozen=True)
class Control:
    """What the thin networks are compared with: known architecture, other weights.

    Attributes:
        like: name of the network of the same architecture, whose times and size are its own.
        label: what the table calls it.
        note: shown under the table.
        accuracy: on the test images.
    """

    like: str
    label: str
    note: str
    accuracy: Accuracy


@dataclass
class Networks:
    """The finished networks of a build, and the hops that led to them.

    Attributes:
        stages: name → stage, the original first.
        labels: name → what the table calls it.
        ship: name of the network that goes into the bundle.
        hops: verdicts on the way.
        ledger: accuracy, step by step.
        controls: name → what they are compared with.
    """

    stages: dict[str, Stage]
    labels: dict[str, str]
    ship: str
    hops: list[verify.Hop]
    ledger: list[Entry]
    controls: dict[str, Control] = field(default_factory=dict)


@dataclass(frozen=True)
class Pruning:
    """The original and the pruned networks.

    Attributes:
        original: stage of the original.
        by_method: method → stage of the network pruned by it; the first is the one to ship.
        head: whether the head is to be replaced (ThiNet-GAP).
    """

    original: Stage
    by_method: dict[str, Stage]
    head: bool

    @property
    def first(self) -> Stage:
        """The pruned network to ship."""
        return next(iter(self.by_method.values()))


def original(run: SharedRun, tools: Tools) -> Stage:
    """The network as it was given, or trained here."""
    options = tools.job.options
    training = {**training_of(options), "epochs": options.epochs, "rate": options.lr}
    weights = {"weights": sha256_of(options.weights)} if options.weights else training
    layout = {"report": _REPORT_LAYOUT}
    return run.stage("dense", {**tools.job.identity, **weights, **layout}, partial(steps.dense, tools))


def prune(run: SharedRun, tools: Tools, dense: Stage | None = None, where: str = "") -> Pruning:
    """The original, and the network pruned by each method.

    Args:
        run: the run directory.
        tools: of the job.
        dense: stage of the original, if it is not the job's own.
        where: ends the names of all stages, if there is more than one pruning in the run.

    Raises:
        GateError: a pruned network is not the original minus filters.
    """
    job, options, dense = tools.job, tools.job.options, dense or original(run, tools)
    by_method, between = dict[str, Stage](), dict[str, Any]()
    if options.layerwise:  # it trains after every layer
        between = {**training_of(options), "epochs": options.layer_epochs, "rate": options.rate}
    for method in options.methods:
        inputs = {
            **job.identity,
            **between,
            "dense": dense.digest,
            "widths": options.model_dump(mode="json", include=WIDTHS),
            **({"preset": dict(job.widths)} if job.widths else {}),
            "grid": job.grid,
            "head": job.replaces_head,
            "method": [options.recipe, method, options.rebuilding],
            **latency_stage.identity(job),
        }
        work = partial(pruned_stage, tools.only(method), dense.folder)
        by_method[method] = run.stage(_named("prune", method, options) + where, inputs, work)
        gate((_pruning_hop(_named("conv", method, options), by_method[method]),), run, by_method[method])
        if options.gcos or options.gcos_layer:
            by_method[method] = _group(run, tools, by_method[method], _named("gcos", method, options) + where)
    return Pruning(dense, by_method, job.replaces_head)


def _group(run: SharedRun, tools: Tools, pruned: Stage, name: str) -> Stage:
    """The pruned network with grouped convolutions."""
    inputs = {
        "prune": pruned.digest,
        "groups": tools.job.options.gcos_layer,
        "images": tools.job.options.calibration_images,
        "data": tools.job.data.digest,
        "seed": tools.job.options.seed,
    }
    stage = run.stage(name, inputs, lambda f, _: grouped(tools, pruned.folder, f))
    gate((_grouping_hop(name, stage),), run, stage)
    return stage


def finish(run: SharedRun, tools: Tools, pruning: Pruning, where: str = "") -> Networks:
    """Original → ThiNet-Conv (by each method) → ThiNet-GAP, and the controls; `where` as for `prune`.

    The original trained on is what they are compared with; trained on labels, it is what they learn from too (ADR 31).
    """
    options, dense, report = tools.job.options, pruning.original, pruning.first.json(REPORT)
    how = _fine_tuning(run, tools, pruning, where)
    after = {
        **tools.job.identity,
        **training_of(options),
        "recipe": options.recipe,
        "epochs": how.epochs,
        "rate": how.lr,
        "dense": dense.digest,
    }
    learnt = {**after, "teacher": dense.digest if how.teacher else None}
    networks = Networks({"original": dense}, {"original": "Original"}, "conv", [], [])
    networks.ledger.append(Entry.of("as given" if options.weights else "trained here", accuracy_of(dense), "Original"))
    extra = report["epochs"] + how.epochs * (2 if pruning.head else 1)
    if options.controls != "none" and extra:
        longer = _trained_on(run, tools, networks, how, after, extra)
        if how.teacher and tools.job.data.train.labelled:
            how = replace(how, teacher=longer.folder, teacher_name="the original trained on")
            learnt["teacher"] = longer.digest
    for method, pruned in pruning.by_method.items():
        name = _named("conv", method, options)
        label = options.title(method=method)
        work = partial(steps.tuned, tools, label, how, pruned.folder)
        conv = run.stage(name + where, {**learnt, "prune": pruned.digest}, work)
        networks.stages[name], networks.labels[name] = conv, label
        tuning = verify.tuning_hop(name, "pruned → fine-tuned", accuracy_of(pruned), accuracy_of(conv))
        grouping = [_grouping_hop(name, pruned)] if "grouping" in pruned.json(REPORT) else []
        networks.hops += [_pruning_hop(name, pruned), *grouping, tuning]
        networks.ledger += [Entry.read(entry, label) for entry in pruned.json(REPORT)["ledger"]]
        networks.ledger.append(Entry.of(tuned(how), accuracy_of(conv), label))
    if pruning.head:
        _replace_head(run, tools, networks, how, learnt, where)
    if options.controls == "all":
        taught = how.teacher is not None and how.teacher != dense.folder
        why = "as many as all that went into that network" + (", its teacher's included" if taught else "")
        from_scratch(run, tools, networks, options.epochs + extra * (1 + taught), why, after)
    return networks


def own(original: Stage, thin: Stage, trained: Stage, job: Job, pruned_by: Options) -> Networks:
    """The original beside the thin network that the user trained; `pruned_by`: what `prune` was asked for."""
    label = f"{pruned_by.title(head=job.replaces_head, alone=True)}, own training"
    before, after, report = accuracy_of(thin), accuracy_of(trained), thin.json(REPORT)
    ledger = [Entry.of("as given" if job.options.weights else "trained here", accuracy_of(original), "Original")]
    ledger += [Entry.read(entry, label) for entry in report["ledger"]]
    grouping = [_grouping_hop("own", thin)] if "grouping" in report else []
    hops = [_pruning_hop("own", thin), *grouping, verify.tuning_hop("own", "pruned → trained", before, after)]
    labels, stages_of = {"original": "Original", "own": label}, {"original": original, "own": trained}
    return Networks(stages_of, labels, "own", hops, [*ledger, Entry.of("own training", after, label)])


def _replace_head(
    run: SharedRun, tools: Tools, networks: Networks, how: FineTuning, learnt: dict[str, Any], where: str
) -> None:
    dense, conv = networks.stages["original"], networks.stages["conv"]
    work = partial(steps.gap, tools, how, dense.folder, conv.folder)
    images = tools.job.options.calibration_images
    gap = run.stage(f"gap{where}", {**learnt, "conv": conv.digest, "images": images}, work)
    before, accuracy = Accuracy.read(gap.json(REPORT)["before"]), accuracy_of(gap)
    label = tools.job.options.title(head=True)
    networks.stages["gap"], networks.labels["gap"], networks.ship = gap, label, "gap"
    networks.hops.append(verify.tuning_hop("gap", "head replaced → fine-tuned", before, accuracy))
    networks.ledger += [
        Entry.of("head replaced", before, label),
        Entry.of(tuned(how), accuracy, label),
    ]


def _trained_on(
    run: SharedRun, tools: Tools, networks: Networks, how: FineTuning, after: dict[str, Any], extra: int
) -> Stage:
    """The control: the original with `extra` epochs more on the labels, or, without them, on what it says."""
    label = f"Original, {epochs_in_words(extra)} more"
    longer = replace(how, epochs=extra, teacher=None if tools.job.data.train.labelled else how.teacher)
    work = partial(steps.tuned, tools, label, longer, networks.stages["original"].folder)
    stage = run.stage("longer", {**after, "epochs": extra, "taught": bool(longer.teacher)}, work)
    note = "the original, trained on for as long as the thin networks; same architecture, so same times"
    networks.controls["longer"] = Control("original", label, note, accuracy_of(stage))
    networks.ledger.append(Entry.of(tuned(longer), accuracy_of(stage), label))
    return stage


def from_scratch(
    run: SharedRun, tools: Tools, networks: Networks, epochs: int, why: str, after: dict[str, Any]
) -> None:
    """The control: the thin architecture with fresh weights.

    Args:
        run: to add it to.
        tools: of the job.
        networks: with the thin one, to which it is added.
        epochs: of its training.
        why: so many, in words.
        after: what the result depends on besides.
    """
    ship = networks.stages[networks.ship]
    rate = tools.job.options.lr
    inputs = {**after, "thin": sha256_of(ship.folder / PLAN), "epochs": epochs, "rate": rate}
    stage = run.stage("scratch", inputs, partial(steps.scratch, tools, ship.folder, epochs))
    note = (
        f"the architecture of {networks.labels[networks.ship]} with fresh weights, {epochs_in_words(epochs)}, {why}; "
        "same architecture, so same times"
    )
    networks.controls["scratch"] = Control(networks.ship, "Train from scratch", note, accuracy_of(stage))
    networks.ledger.append(Entry.of(epochs_in_words(epochs), accuracy_of(stage), "Train from scratch"))


def _fine_tuning(run: SharedRun, tools: Tools, pruning: Pruning, where: str) -> FineTuning:
    """How to train at the end: as the recipe says, or what a trial says."""
    options, epochs = tools.job.options, last_epochs(tools.job.options, pruning)
    if not options.distils:
        return FineTuning(epochs, options.rate, own=bool(options.trainer))
    if not epochs or options.trainer:
        return FineTuning(epochs, options.rate, pruning.original.folder, own=bool(options.trainer))
    inputs = {
        **tools.job.identity,
        **training_of(options),
        "dense": pruning.original.digest,
        "prune": pruning.first.digest,
        "epochs": epochs,
        "rate": options.finetune_lr,
    }
    folders = pruning.original.folder, pruning.first.folder
    found = run.stage(f"trial{where}", inputs, lambda f, _: tried(tools, *folders, epochs, f)).json(TRIAL)
    return FineTuning(epochs, found["lr"], pruning.original.folder if found["teacher"] else None)


def last_epochs(options: Options, pruning: Pruning) -> int:
    """Of fine-tuning at the end: as asked, else the recipe's (thinet.md, section 1)."""
    papers = 9 if pruning.first.json(REPORT)["branches"] else 12
    usual = papers if options.layerwise else 15
    return usual if options.finetune_epochs is None else options.finetune_epochs


def gate(hops: tuple[verify.Hop, ...], run: SharedRun, stage: Stage) -> None:
    """Raise GateError when a verdict failed; the bundle of an earlier build goes too, lest it ship."""
    failed = [hop for hop in hops if not hop.passed]
    if failed:
        lines = "\n".join(
            f"  {hop.model}: {hop.hop}: "
            + (f"error {hop.error}, allowed {hop.tolerance:.1e}" if hop.tolerance is not None else hop.detail)
            for hop in failed
        )
        for name in ("bundle", "report", "contract"):
            run.discard(name)
        hint = f"All results are kept in {run.root}; {stage.folder} has the figures."
        if any(hop.hop.endswith("fine-tuned") for hop in failed):
            hint += " --finetune-epochs 0 ships the network as it was reconstructed; more epochs or another "
            hint += "--finetune-lr may train it better."
        raise GateError(
            f"{len(failed)} of {len(hops)} parity verdicts failed; no bundle was written:\n{lines}",
            hint=hint,
        )


def _named(stage: str, method: str, options: Options) -> str:
    """A stage's name; those of further methods say which."""
    return stage if method == options.selection else f"{stage}-{method}"


def tuned(how: FineTuning) -> str:
    """What the ledger calls a fine-tuning."""
    if not how.epochs:
        return "not fine-tuned"
    if how.own:
        return f"your own training, {epochs_in_words(how.epochs)} at {how.lr:g}"
    taught = f", {how.teacher_name} as teacher" if how.teacher else ""
    return f"fine-tuned, {epochs_in_words(how.epochs)} at {how.lr:g}{taught}"


def _pruning_hop(name: str, pruned: Stage) -> verify.Hop:
    return verify.pruning_hop(name, Proof(**pruned.json(REPORT)["proof"]))


def _grouping_hop(name: str, stage: Stage) -> verify.Hop:
    return replace(verify.Hop(**stage.json(REPORT)["grouping"]), model=name)


def accuracy_of(stage: Stage) -> Accuracy:
    """What a stage measured on its test images."""
    return read_accuracy(stage.folder)


def training_of(options: Options) -> dict[str, Any]:
    """What the result of any training depends on, besides its epochs and its rate."""
    training: dict[str, Any] = options.model_dump(include={"batch_size", "train"})
    if options.trainer:
        file, _, function = options.trainer.rpartition(":")
        training["trainer"] = [function, sources(Path(file))]
    return training
