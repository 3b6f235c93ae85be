"""Everything a build starts from, loaded and checked before any work begins."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.dataset import Dataset, ImageSet, digits_preprocess, load_digits, load_folder
from ..data.folders import choose_test_folder
from ..data.preprocess import Preprocess, default_preprocess, load_preprocess
from ..data.voc import is_voc, load_voc, tasks_of
from ..devices.site import Machine
from ..errors import InputError, ModelError, first_line
from ..interfaces import Progress, silent
from ..models.loading import InputShape, build_model, input_shape_of, load_function
from ..models.presets import preset_widths
from ..models.pretrained import default_weights
from ..models.sources import sources
from ..models.weights import load_weights, no_weights
from ..options import DEFAULT, HEAD_REPLACED, Options
from ..pruning.plan import GapHead
from ..pruning.surgery import gap_head
from ..target import TargetProfile, load_profile
from ..tasks.base import Task, said
from ..tasks.choice import task_of
from ..tasks.classification import CLASSIFICATION
from ..training import Recipe, changed
from .conflicts import check_together

OFFERED = ("epochs", "lr", "stage", "teacher", "seed", "batch_size")
"""What a --trainer is given beside the network and the images, as far as it asks for it."""
HELD_OUT = 0.1  # of the training images, for choices between variants


@dataclass(frozen=True)
class Job:
    """What the stages work on.

    Attributes:
        options: as the user gave them, with the model's name filled in.
        target: the profile to build for.
        data: images.
        widths: module name → filters that stay, where the preset says all widths.
        machine: the device that a budget of time is met on; None for this machine.
    """

    options: Options
    target: TargetProfile
    data: Dataset
    widths: Mapping[str, int] = field(default_factory=dict)
    machine: Machine | None = None

    @property
    def input_shape(self) -> InputShape:
        """Channels, height and width of the network's input."""
        return self.data.preprocess.input_shape

    @cached_property
    def split(self) -> tuple[ImageSet, ImageSet]:
        """The training images that are calibrated on, and a tenth held out, for choices between variants.

        Raises:
            DataError: every class has one image alone.
        """
        return self.data.train.split(HELD_OUT, self.options.seed)

    @property
    def model_name(self) -> str:
        """The network's name for people, without the folders of the user's file."""
        return Path(self.options.model).name

    def fresh(self) -> nn.Module:
        """The dense network with its initial weights."""
        return build_model(
            self.options.model,
            input_shape=self.input_shape,
            num_classes=len(self.data.classes),
            seed=self.options.seed,
        )

    @property
    def grid(self) -> int:
        """What widths are multiples of."""
        rounding = self.options.round_to
        if rounding is None:  # the papers know no grid
            return 1 if self.options.layerwise or self.widths else self.target.channel_grid
        return self.target.channel_grid if rounding == "target" else rounding

    @cached_property
    def new_head(self) -> GapHead | None:
        """Global average pooling in place of the fully connected head (ThiNet-GAP); None where that stays."""
        preset = self.options.preset
        return gap_head(self.fresh(), self.input_shape) if not preset or preset in HEAD_REPLACED else None

    @property
    def replaces_head(self) -> bool:
        """Whether the fully connected head goes."""
        return self.new_head is not None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What every stage's result depends on: network, images, seed."""
        source, _, factory = self.options.model.rpartition(":")
        return {
            "model": [factory, sources(Path(source))] if source else self.options.model,
            "classes": list(self.data.classes),
            "data": self.data.digest,
            "seed": self.options.seed,
        }


def load_job(options: Options, progress: Progress = silent, *, checked: bool = True) -> Job:
    """Load target, data and network, and check that they fit together.

    Args:
        options: as the user gave them.
        progress: to report to.
        checked: whether every image is looked at now (see `load_folder`).

    Raises:
        InputError: one of them is wrong; nothing has been written yet.
    """
    target = load_profile(options.target)
    check_together(options)
    options = _named_weights(_named_model(options), progress)
    if options.precision:
        target.require_precision(options.precision)
    if isinstance(options.weights, Path) and not options.weights.is_file():
        raise no_weights(options.weights)
    if options.trainer:
        _check_trainer(options.trainer)
    changed(Recipe(options.epochs, options.lr, options.batch_size), options.train)
    job = Job(options, target, _data(options, _preprocess(options), progress, checked=checked))
    _ = job.split  # before anything is trained
    model = _check_model(job)
    return replace(job, widths=preset_widths(str(options.preset), model)) if options.fixed else job


def _check_trainer(name: str) -> None:
    """Raise ModelError where the user's function cannot be called as it is going to be."""
    form = signature(load_function(name, "fit"))
    takes_all = any(each.kind is each.VAR_KEYWORD for each in form.parameters.values())
    try:
        form.bind(None, None, **{each: None for each in OFFERED if takes_all or each in form.parameters})
    except TypeError as error:
        raise ModelError(
            f"{name} cannot be called as fit(model, images, …): {error}.",
            hint=f"Beside the two it gets what it names of {', '.join(OFFERED)}; others need a default value.",
        ) from error


def moved(job: Job, folder: Path, progress: Progress = silent) -> Job:
    """The same job with other images, which may be of other classes.

    Raises:
        InputError: they cannot be read, or the network cannot tell so many classes apart.
    """
    there = replace(job, data=load_folder(folder, job.data.preprocess, progress))
    _ = there.split
    _check_scores(there, there.fresh().eval(), "an image", 1, "--transfer-to takes a factory with num_classes.")
    return there


def _data(options: Options, preprocess: Preprocess, progress: Progress, *, checked: bool) -> Dataset:
    if options.data is None:
        return load_digits(preprocess)
    if is_voc(options.data):
        return load_voc(options.data, _voc_task(options, preprocess), preprocess, progress)
    return load_folder(options.data, preprocess, progress, unlabelled=options.unlabelled, checked=checked)


def _voc_task(options: Options, preprocess: Preprocess) -> Task:
    """What the network is for, which it may say itself, if the folder has images for it.

    Raises:
        InputError: something in the options goes with classification only.
        DataError: the folder has images for another task, or for several, and the network does not say which.
        MissingError: what its figures are counted with is not installed.
    """
    assert options.data is not None
    for name in ("unlabelled", "transfer_to"):
        if getattr(options, name):
            raise InputError(
                f"--{name.replace('_', '-')} goes with image folders, but {options.data} is in VOC's layout.",
                hint="Detectors and segmenters learn from what the folder says of its images.",
            )
    found = tasks_of(options.data)
    model = build_model(options.model, input_shape=preprocess.input_shape, num_classes=2, seed=options.seed)
    task = task_of(model, options.model, found, options.data)
    task.meter()  # what it needs is missed now, and not after the training
    return task


def _named_model(options: Options) -> Options:
    if options.model:
        return options
    if options.data:
        raise InputError(
            "--data needs --model: which network is to be pruned?",
            hint="For example --model vgg16, --model vgg-small or --model file.py:factory.",
        )
    return options.model_copy(update={"model": "vgg-small"})


def _named_weights(options: Options, progress: Progress) -> Options:
    """The options with the file of the weights that are asked for by name."""
    if options.weights != Path(DEFAULT):
        return options
    return options.model_copy(update={"weights": default_weights(options.model, progress)})


def _preprocess(options: Options) -> Preprocess:
    """The user's file, else the usual preprocessing for the input that the user or the network names."""
    if options.preprocess:
        preprocess = load_preprocess(options.preprocess)
        if options.input_shape and options.input_shape != preprocess.input_shape:
            raise InputError(
                f"--input-shape {'x'.join(map(str, options.input_shape))} does not fit {options.preprocess}, "
                f"whose crop and colour give {'x'.join(map(str, preprocess.input_shape))}.",
                hint="Leave --input-shape out: the file already says it.",
            )
        return preprocess
    if options.data is not None and is_voc(options.data):
        return _whole_images(_usual(options))
    return _usual(options)


def _whole_images(usual: Preprocess) -> Preprocess:
    """Boxes and masks reach to the edges of an image: all of it is used, and training shifts it by up to an eighth."""
    augment = usual.augment.model_copy(update={"pad": min(usual.crop) // 8})
    return usual.model_copy(update={"resize": usual.crop, "augment": augment})


def _usual(options: Options) -> Preprocess:
    if options.data is None and options.input_shape in (None, digits_preprocess().input_shape):
        return digits_preprocess()
    shape = options.input_shape or input_shape_of(
        build_model(options.model, input_shape=None, num_classes=2, seed=options.seed)
    )
    if shape is None:
        if options.data is not None and not is_voc(options.data):  # that it has no images is the first thing to know
            choose_test_folder(options.data, needs_train=options.unlabelled is None)
        raise InputError(
            f"{options.model} does not say which images it takes.",
            hint="Give --input-shape 3x224x224 (or as your network expects), or --preprocess FILE.toml.",
        )
    return default_preprocess(shape)


def _check_model(job: Job) -> nn.Module:
    """The network; run, its weights read, so that nothing is found out after minutes of work."""
    model = job.fresh()
    try:
        copy.deepcopy(model)
    except Exception as error:  # a user's network may hold anything
        raise ModelError(
            f"{job.options.model} cannot be copied: {first_line(error)}",
            hint="torch.nn.utils.weight_norm leaves computed weights in the network, "
            "torch.nn.utils.parametrizations.weight_norm does not; locks, files and generators do not belong there.",
        ) from error
    if job.options.weights:
        load_weights(model, job.options.weights)
    _check_scores(job, model.eval(), "an image", 1, "Check --input-shape or --preprocess: channels x height x width.")
    if job.options.preset in HEAD_REPLACED and not job.replaces_head:
        raise ModelError(
            f"{job.options.model} has no fully connected head that ThiNet-GAP could replace: it needs the parts "
            "`features` and `classifier`, with a hidden layer in the classifier, and a forward() that hands what "
            "`features` says to it whatever its size.",
            hint="Use --preset thinet-conv, which keeps the head.",
        )
    if job.options.weights is None or job.options.layerwise:
        check_trainable(job, model)
    if not job.options.trainer:
        batch = min(2, job.options.batch_size)
        hint = "BatchNorm needs --batch-size 2 or more; else look at what forward() does in training."
        _check_scores(job, model.train(), f"a training batch of {batch}", batch, hint)
    return model


def check_trainable(job: Job, model: nn.Module) -> None:
    """Raise ModelError where our training would have nothing to change."""
    if not job.options.trainer and not any(each.requires_grad for each in model.parameters()):
        raise ModelError(
            f"{job.options.model} has frozen all of its parameters, so that nothing could be trained.",
            hint="Leave requires_grad_(False) out of it, or fine-tune by a --trainer of your own.",
        )


def _check_scores(job: Job, model: nn.Module, what: str, batch: int, hint: str) -> None:
    """Raise ModelError unless the network gives what the task expects, such as one score per image and class."""
    try:
        with torch.inference_mode():
            output = model(torch.zeros(batch, *job.input_shape))
    except Exception as error:  # the user's own forward() may raise anything
        shape = "x".join(map(str, job.input_shape))
        raise ModelError(
            f"{job.options.model} cannot take {what} of {shape}: {first_line(error)}", hint=hint
        ) from error
    classes = len(job.data.classes)
    shapes = job.data.task.shapes(classes, job.input_shape[1:])
    expected = tuple((batch, *shape) for shape in shapes.values())
    given = (output,) if isinstance(output, torch.Tensor) else output
    tensors = isinstance(given, tuple | list) and all(isinstance(each, torch.Tensor) for each in given)
    if not tensors or tuple(tuple(each.shape) for each in given) != expected:
        found = ", ".join(str(tuple(each.shape)) for each in given) if tensors else type(output).__name__
        raise ModelError(
            f"{job.options.model} gives {found} for {what}, but {', '.join(map(str, expected))} was expected: "
            f"{' and '.join(shapes)} for each of the {classes} classes.",
            hint="A factory that takes num_classes is called with the number of classes in the data.",
        )
    if job.data.task.name == CLASSIFICATION.name and _sums_to_one(given[0]) and _sums_to_one(_of_noise(model, job)):
        raise ModelError(
            f"{job.options.model} gives probabilities, but scores were expected: training and the bundle's programs "
            "make probabilities of them.",
            hint="Leave the softmax at the end of forward() out.",
        )


def _of_noise(model: nn.Module, job: Job) -> torch.Tensor:
    noise = torch.randn(2, *job.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return said(model, noise)[0]


def _sums_to_one(scores: torch.Tensor) -> bool:
    """Whether each row is what a softmax gives."""
    sums = scores.sum(1)
    return scores.shape[1] > 1 and bool((scores >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-4)
