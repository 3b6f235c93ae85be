"""Options that do not go together: refused before anything is loaded."""

from __future__ import annotations

from ..errors import InputError
from ..options import BUDGETS, Options, check_one_budget


def check_together(options: Options) -> None:
    """Check what the options say of each other; what they say of network, images and target is `load_job`'s.

    Raises:
        InputError: two of them contradict each other, or one leaves another without a meaning.
    """
    _check_timed(options)
    _check_preset(options)
    _check_method(options)
    if options.unlabelled:
        _check_unlabelled(options)
    _check_unused(options)


def _check_timed(options: Options) -> None:
    """Raise InputError for a budget of time beside another, or where widths are not chosen by error curves."""
    if not options.timed:
        return
    asked = "--latency" if options.latency else "--speedup"
    budgets = [name for name in BUDGETS if getattr(options, name)]
    if len(budgets) > 1:
        raise InputError(
            f"{' and '.join(f'--{name}' for name in budgets)} are {len(budgets)} budgets, but one was expected.",
            hint="Leave the others out; --require holds a build to further figures.",
        )
    if options.layerwise or options.methods != ("elimination",):
        how = f"--recipe {options.recipe}" if options.layerwise else f"--method {','.join(options.methods)}"
        raise InputError(
            f"{asked} puts widths where they cost least by the error curves of the elimination, and with {how} there "
            "are none.",
            hint="Leave out --recipe and --method, or give --keep, --macs or --size instead.",
        )
    if (options.times_faster is not None and options.times_faster <= 1) or options.most_ms == 0:
        raise InputError(
            f"{asked} is {options.speedup or options.latency}, but something faster than the original was expected.",
            hint="Such as --speedup 2x, or --latency 8ms.",
        )


def _check_preset(options: Options) -> None:
    """Raise InputError for widths that are asked for beside those of the preset."""
    names = ("keep", *BUDGETS, "round_to", "keep_layer", "ignore", "prune_shortcuts", "drop_branches")
    given = [
        name
        for name in names
        if getattr(options, name) != Options.model_fields[name].get_default(call_default_factory=True)
    ]
    if options.fixed and given:
        raise InputError(
            f"--preset {options.preset} says the width of every layer, so there is no --{given[0].replace('_', '-')}.",
            hint="Leave one of them out.",
        )


def _check_method(options: Options) -> None:
    """Raise InputError for a way of choosing filters that the rest of the options rules out."""
    if options.drop_branches and (options.layerwise or set(options.methods) != {"elimination"}):
        raise InputError(
            "--drop-branches asks the error curves of the elimination which branches may go, and here there are none.",
            hint="Leave out --recipe and --method, or --drop-branches.",
        )
    if options.drop_branches and options.rebuilding != "full":
        raise InputError(
            f"--drop-branches lets a branch say its mean, which --reconstruction {options.rebuilding} does not find.",
            hint="Leave one of them out.",
        )
    if options.layerwise and ("elimination" in options.methods or options.rebuilding == "full"):
        raise InputError(
            f"--recipe {options.recipe} goes layer by layer, where there is neither --method elimination nor "
            "--reconstruction full.",
            hint="Both belong to --recipe best.",
        )


def _check_unlabelled(options: Options) -> None:
    """Raise InputError for what cannot be done without labels."""
    needs = {
        "--weights: no network can be trained without labels": options.weights is None,
        "--data: a folder with val/CLASS/*.jpg (or test/), to measure the accuracy on": options.data is None,
        f"--recipe best: {options.recipe} trains on labels after each layer": options.layerwise,
        "--controls unpruned or none: labels are what a network from scratch learns from": options.controls == "all",
        "another --method: taylor looks at the loss, which takes labels": "taylor" in options.methods,
    }
    if missing := [need for need, lacks in needs.items() if lacks]:
        raise InputError(
            f"--unlabelled needs {missing[0]}.",
            hint="For example: thinet-deploy build --unlabelled photos --data labelled --weights FILE …",
        )


def _check_unused(options: Options) -> None:
    """Raise InputError for an option that another one leaves without a meaning."""
    if options.keep != Options.model_fields["keep"].default:
        check_one_budget(options.model_dump(include={"keep", *BUDGETS}))
    if options.trainer and options.train:
        raise InputError(
            "--train changes our own training, but --trainer brings another one.", hint="Leave one of them out."
        )
    if options.layer_epochs is not None and not options.layerwise:
        raise InputError(
            f"--layer-epochs says how long to fine-tune after each layer, but --recipe {options.recipe} prunes all "
            "layers at once.",
            hint="Give --finetune-epochs, or --recipe iccv2017 or tpami2019, which go layer by layer.",
        )
    if options.finetune_lr and not options.layerwise and options.finetune_epochs == 0:
        raise InputError(
            "--finetune-lr is of fine-tuning, but there is none.", hint="Leave it out, or fine-tune with build."
        )
    if options.device_python != Options.model_fields["device_python"].default and not options.device:
        raise InputError("--device-python is of a device, but there is none.", hint="Name it with --device.")
    if options.max_drop != Options.model_fields["max_drop"].default and options.precision not in (None, "int8"):
        raise InputError(
            f"--max-drop is what INT8 may cost, but --precision is {options.precision}.",
            hint='--require "top1-drop<=1" holds what ships to it, in any precision.',
        )
    if options.transfer_epochs is not None and options.transfer_to is None:
        raise InputError(
            "--transfer-epochs says how long to fine-tune to other images, but there are none.",
            hint="Name their folder with --transfer-to, or give --finetune-epochs.",
        )
