"""The papers' transfer table: prune on the source and fine-tune to the target, the other way round, or from scratch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ..reports.ledger import Entry
from ..shared_run import SharedRun
from ..store import Stage
from ..tasks.base import Accuracy
from .networks import Networks, accuracy_of, finish, from_scratch, last_epochs, prune, training_of, tuned
from .steps import FineTuning
from .tools import REPORT, Tools
from .transfer import carried

THERE = "-there"  # ends the names of the stages that work on the target's images


def transfer(run: SharedRun, source: Tools, target: Tools) -> Networks:
    """The thin network of the source, fine-tuned to the target; beside it what the papers compare it with.

    Each is fine-tuned to the target for as many epochs: the original; the original pruned there ("FT & prune"); the
    thin network of the source, which ships. The control from scratch gets the target's images for as many as the
    original was trained for and was fine-tuned for together.

    Args:
        run: the run directory.
        source: of the job with the images to prune on.
        target: of the same job with the images to fine-tune to.
    """
    pruning = prune(run, source)
    here, asked = finish(run, _with(source, controls="none"), pruning), target.job.options.transfer_epochs
    epochs = last_epochs(source.job.options, pruning) if asked is None else asked
    target, rate = _with(target, finetune_epochs=epochs), target.job.options.rate
    where = target.job.data.name
    given = {
        **training_of(target.job.options),
        "recipe": target.job.options.recipe,
        "epochs": epochs,
        "rate": rate,
        **target.job.identity,
        "from": source.job.identity,
    }

    def carry(name: str, stage: Stage, label: str, teacher: Stage | None) -> Stage:
        how = FineTuning(epochs, rate, teacher.folder if teacher else None)
        inputs = {**given, "start": stage.digest, "teacher": teacher.digest if teacher else None}
        return run.stage(name, inputs, partial(carried, source, target, label, how, stage.folder))

    original = carry("original" + THERE, here.stages["original"], "the original", None)
    teacher = original if target.job.options.distils else None
    thin = carry("thin" + THERE, here.stages[here.ship], here.labels[here.ship], teacher)
    there = finish(run, _with(target, controls="none"), prune(run, target, original, THERE), THERE)
    label = f"{here.labels[here.ship]}, then fine-tuned to {where}"
    networks = Networks(
        {"original": original, "pruned-there": there.stages[there.ship], "transferred": thin},
        {"original": f"Original, fine-tuned to {where}", "pruned-there": "FT & prune", "transferred": label},
        "transferred",
        [replace(hop, model="transferred", hop=f"{hop.hop}, {source.job.data.name}") for hop in here.hops]
        + [replace(hop, model="pruned-there") for hop in there.hops],
        [replace(entry, network=f"{entry.network}, {source.job.data.name}") for entry in here.ledger],
    )
    networks.ledger += [Entry.of(tuned(FineTuning(epochs, rate)), accuracy_of(original), networks.labels["original"])]
    networks.ledger += [replace(each, network="FT & prune") for each in there.ledger if each.network != "Original"]
    if before := thin.json(REPORT).get("before"):
        networks.ledger.append(Entry.of("new last layer fitted", Accuracy.read(before), label))
    how = tuned(FineTuning(epochs, rate, teacher.folder if teacher else None))
    networks.ledger.append(Entry.of(how, accuracy_of(thin), label))
    if target.job.options.controls == "all":
        why = "as many as the original's and this fine-tuning"
        from_scratch(run, target, networks, target.job.options.epochs + epochs, why, given)
    return networks


def _with(tools: Tools, **changes: object) -> Tools:
    """The same with other options."""
    return replace(tools, job=replace(tools.job, options=tools.job.options.model_copy(update=changes)))
