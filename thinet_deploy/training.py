"""Training and evaluation in torch: the papers' SGD or AdamW, taught by the dense network, resumable epoch by epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError
from torch import nn

from .data.dataset import ImageSet
from .errors import DivergedError, InputError, UnknownNameError
from .interfaces import Progress, silent
from .parallel import Team, join
from .seeds import derive
from .store import Checkpoint
from .tasks.base import Accuracy, Judgement, Outputs, Targets, said
from .tasks.distillation import Inside, Mix

Schedule = Literal["cosine", "steps", "constant"]
# Images that are tested at once: in other tasks outputs, and what decodes them, are larger.
_BATCH, _FEW = 256, 32
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: passes over the training images.
        lr: learning rate at the start.
        batch: images per step, over all processes.
        momentum: of SGD.
        weight_decay: L2 penalty of SGD; of AdamW, decay per step as a share of the learning rate.
        warmup: epochs over which the rate rises to `lr`.
        clip: largest gradient norm of a step; keeps deep networks without BatchNorm from diverging.
        optimizer: SGD with momentum, as in the papers, or AdamW.
        schedule: "cosine": half a cosine down to zero over all epochs; "steps", as in the papers: a tenth after each
            third of the epochs; "constant".
        label_smoothing: share of each label that is spread evenly over all classes.
        ema: decay per step of an average of the weights, which is what training then leaves; 0 for none.
        precision: of the forward and backward passes; the weights and their updates are fp32.
        distill: share of the loss that comes from the teacher, where there is one; the labels make up the rest.
        temperature: softens both sides' outputs for the teacher's share.
        inside: weight of how far the parts that both networks have in common, such as residual blocks, are from what
            the teacher's say; 0 for outputs alone.
    """

    epochs: int
    lr: float
    batch: int = 32
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    warmup: Annotated[int, Field(ge=0)] = 0
    clip: Annotated[float, Field(gt=0)] = 1.0
    optimizer: Literal["sgd", "adamw"] = "sgd"
    schedule: Schedule = "cosine"
    label_smoothing: Annotated[float, Field(ge=0, le=1)] = 0.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    distill: Annotated[float, Field(ge=0, le=1)] = 0.5
    temperature: Annotated[float, Field(gt=0)] = 4.0
    inside: Annotated[float, Field(ge=0)] = 2.0


def changed(recipe: Recipe, settings: Mapping[str, object]) -> Recipe:
    """A recipe with some settings by name, as the user gives them; texts such as "0.1" become numbers.

    Raises:
        UnknownNameError: there is no such setting, or it has an option of its own.
        InputError: a value is of the wrong kind (named, with what was expected).
    """
    names = {field.name for field in fields(Recipe)} - {"epochs", "lr", "batch"}
    for name in settings:
        if name not in names:
            raise UnknownNameError("setting of --train", name, names)
    try:
        return TypeAdapter(Recipe).validate_python({**asdict(recipe), **settings})
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"--train {first['loc'][0]}={first['input']}: {first['msg'][0].lower()}{first['msg'][1:]}.",
            hint="The settings and what they mean: thinet_deploy.training.Recipe.",
        ) from error


def logits(
    model: nn.Module, images: ImageSet, batch: int = 256, stage: str = "", progress: Progress = silent
) -> torch.Tensor:
    """Class scores of the network in eval mode for all images in order, shape (n, classes, …), on the CPU."""
    return torch.cat([outputs[0].cpu() for outputs, _ in _outputs(model, images, batch, stage, progress)])


def _outputs(
    model: nn.Module, images: ImageSet, batch: int, stage: str, progress: Progress
) -> Iterator[tuple[Outputs, Targets]]:
    """What the network says in eval mode of all images in order, batch by batch, and what is known of them."""
    model.eval()
    done, team = 0, join()
    with team.holding(model), torch.inference_mode():
        for inputs, targets in images.batches(batch):
            progress(stage, done, len(images))
            yield said(model, torch.from_numpy(inputs).to(team.device)), targets
            done += len(inputs)


def judge(model: nn.Module, images: ImageSet, stage: str = "Testing", progress: Progress = silent) -> Judgement:
    """How good a network is in the figures of the images' task, to be compared with another one's."""
    meter = images.task.meter()
    for outputs, targets in _outputs(model, images, _BATCH if images.targets is None else _FEW, stage, progress):
        meter.add([each.cpu().numpy() for each in outputs], targets)
    found = meter.judge()
    accuracy = found.accuracy
    progress(stage, len(images), len(images), f"{accuracy.name} {accuracy.main:.2f} %")
    return found


def evaluate(model: nn.Module, images: ImageSet, stage: str = "Testing", progress: Progress = silent) -> Accuracy:
    """How good a network is, in the figures of the images' task."""
    return judge(model, images, stage, progress).accuracy


def train(
    model: nn.Module,
    images: ImageSet,
    recipe: Recipe,
    *,
    seed: int,
    stage: str,
    teacher: nn.Module | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Progress = silent,
) -> None:
    """Train a network in place; it ends in eval mode on the CPU, trained on a CUDA device where there is one.

    The order of images, augmentation and dropout depend on (seed, stage, epoch) only, so that going on from a
    checkpoint, which is saved after every epoch, gives the same weights as training without a break (on the CPU to the
    bit).

    Several processes started by `accelerate launch` or `torchrun` share every batch, and its gradient is that of one
    process; all end with the same weights. Two things differ from one process: each draws dropout of its own, and its
    BatchNorms normalise with the statistics of its own share. Their running statistics are averaged over the processes
    after every epoch; `norms.reestimate_norms` makes them exact. All processes have to see the checkpoint's folder.

    Args:
        model: changed in place.
        images: to train on; the label -1 stands for an image without one, for which the teacher's outputs are all of
            the loss.
        recipe: how to train.
        seed: of all random choices.
        stage: what this training is called, in messages too.
        teacher: a network with the same outputs, such as the dense one; it sees the same augmented images in eval mode
            and is left unchanged (Hinton et al., 2015, arXiv:1503.02531). Dropout layers do nothing then.
        checkpoint: where the state is kept.
        progress: to report to.

    Raises:
        InputError: images without a label, but no teacher.
        MissingError: there are several processes, but accelerate is not installed.
        DivergedError: loss, gradient or weights are no longer finite; the last checkpoint is not touched.
    """
    if teacher is None:
        _check_labels(images, stage)
    team = join()
    progress = team.speaking(progress)
    with team.holding(model, *filter(None, [teacher])), Inside(model, teacher if recipe.inside else None) as inside:
        training = _Training(model, teacher, inside, images, recipe, team, seed, stage)
        for epoch in range(training.resume(checkpoint) if checkpoint else 0, recipe.epochs):
            training.epoch(epoch, progress)
            if checkpoint and not team.rank:
                training.save(checkpoint, epoch + 1)
            training.report((epoch + 1) * training.steps, progress)
        training.finish()


def _check_labels(images: ImageSet, stage: str) -> None:
    """Raise InputError for images that only a teacher can say something of."""
    if unlabelled := int((images.labels < 0).sum()):
        raise InputError(
            f"{stage}: {unlabelled} of {len(images)} training images have no label, and there is no teacher.",
            hint="Train with distillation, or leave out the images without a label.",
        )


class _Training:
    """A training under way: all that a checkpoint holds, and how a step changes it."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        inside: Inside,
        images: ImageSet,
        recipe: Recipe,
        team: Team,
        seed: int,
        stage: str,
    ) -> None:
        team.align(model)
        self.model, self.teacher, self.inside = model, teacher.eval() if teacher else None, inside
        self.images, self.recipe, self.team, self.seed, self.stage = images, recipe, team, seed, stage
        self.steps, self.note = images.training_steps(recipe.batch), ""
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(model.parameters(), recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
            if recipe.optimizer == "sgd"
            else torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
        )
        self.scaler = torch.amp.GradScaler(team.device.type, enabled=recipe.precision == "fp16")
        self.average = {name: tensor.clone() for name, tensor in model.state_dict().items()} if recipe.ema else {}

    def report(self, done: int, progress: Progress) -> None:
        """Say how many steps are done."""
        progress(self.stage, done, self.recipe.epochs * self.steps, self.note)

    def epoch(self, number: int, progress: Progress) -> None:
        """Learn from all images once."""
        rank = [self.team.rank] if self.team.rank else []
        torch.manual_seed(derive(self.seed, self.stage, number, "dropout", *rank))
        self._listen()
        total, first, recipe = 0.0, number * self.steps, self.recipe
        batches = self.images.training_batches(recipe.batch, seed=self.seed, stage=self.stage, epoch=number)
        for done, (inputs, targets) in enumerate(batches, first):
            self.report(done, progress)
            total += self.step(inputs, targets, done)
            self.note = f"epoch {number + 1}/{recipe.epochs}, loss {total / (done - first + 1):.3f}"
        self._end_epoch(first + self.steps)

    def _listen(self) -> None:
        """Training mode, but without dropout where there is a teacher, who says one thing of an image.

        What is refitted in closed form says it best with all of its inputs: without some it says something else.
        """
        self.model.train()
        for module in self.model.modules() if self.teacher else ():
            if isinstance(module, _DROPOUTS):
                module.eval()

    def step(self, inputs: NDArray[np.float32], targets: Targets, done: int) -> float:
        """Learn from a batch after `done` steps; its loss."""
        epoch, step = divmod(done, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = _rate(self.recipe, epoch + step / self.steps)
        loss = self._loss(inputs, targets)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.team.average_gradients(self.model)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        # Both in one transfer: each makes the device finish what it does.
        value, length = torch.stack([self.team.mean(loss.detach()), norm]).tolist()
        if not math.isfinite(value):
            raise self._diverged(f"the loss of {self.stage} is {value}", done)
        # With fp16, a step whose gradient overflows is left out and the scale halved; without, the scale is 1.
        if not math.isfinite(length) and self.scaler.get_scale() <= 1:
            raise self._diverged(f"the gradient of {self.stage} has the norm {length}", done)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._follow(done)
        return float(value)

    def _loss(self, inputs: NDArray[np.float32], targets: Targets) -> torch.Tensor:
        rows, weight = self.team.share(len(targets))
        inputs_nchw, targets_n = (torch.from_numpy(part[rows]).to(self.team.device) for part in (inputs, targets))
        self.inside.find(inputs_nchw)
        dtype = _AUTOCAST.get(self.recipe.precision)
        with torch.autocast(self.team.device.type, dtype, enabled=dtype is not None):
            outputs = said(self.model, inputs_nchw)
            with torch.no_grad():
                taught = said(self.teacher, inputs_nchw) if self.teacher else None
        recipe = self.recipe
        loss_n = self.images.task.losses(
            tuple(each.float() for each in outputs),
            targets_n,
            taught and tuple(each.float() for each in taught),
            Mix(recipe.distill, recipe.temperature, recipe.label_smoothing),
        )
        if (differences_n := self.inside.differences()) is not None:
            loss_n = loss_n + recipe.inside * differences_n
        return weight * loss_n.sum()

    def _follow(self, done: int) -> None:
        """Move the average towards the weights; in the first steps faster, for the start is not worth remembering.

        BatchNorm's statistics are averaged alike: those of the last steps belong to the last weights, not to an average
        that lags behind them.
        """
        if not self.average:
            return
        decay = min(self.recipe.ema, (1 + done) / (10 + done))
        for name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point():
                self.average[name].lerp_(tensor, 1 - decay)
            else:
                self.average[name].copy_(tensor)

    def _end_epoch(self, done: int) -> None:
        """Make the processes' buffers the same; raise before weights that are no numbers reach the checkpoint."""
        for name, buffer in self.model.named_buffers():
            for tensor in (buffer, self.average.get(name)):
                if tensor is not None and tensor.is_floating_point():
                    tensor.copy_(self.team.mean(tensor))
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise self._diverged(f"weights of {self.stage} are not finite", done - 1)

    def finish(self) -> None:
        """Leave the average in the network, if there is one."""
        if self.average:
            self.model.load_state_dict(self.average)
        self.model.eval()

    def save(self, checkpoint: Checkpoint, epochs: int) -> None:
        """Write the state after so many epochs."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": slot for name, slot in slots.items() if slot is not None}
        checkpoint.save(tensors, {"epochs": epochs, "scaler": self.scaler.state_dict()})

    def resume(self, checkpoint: Checkpoint) -> int:
        """Load what was saved last; the number of epochs that are done."""
        if (saved := checkpoint.load()) is None:
            return 0
        tensors, state = saved
        self.model.load_state_dict({name: tensors[f"model.{name}"] for name in self.model.state_dict()})
        for name, tensor in self.average.items():
            tensor.copy_(tensors[f"average.{name}"])
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                slots.setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        self.scaler.load_state_dict(state["scaler"])
        return int(state["epochs"])

    def _diverged(self, what: str, done: int) -> DivergedError:
        epoch, step = divmod(done, self.steps)
        rate = self.optimizer.param_groups[0]["lr"]
        hint = (
            "Lower the learning rate: --lr, or --finetune-lr."
            if done
            else "Nothing was learnt yet: check weights and images."
        )
        if self.recipe.precision == "fp16":
            hint += " Or train in bf16, whose range is that of fp32."
        return DivergedError(
            f"Training diverged: {what} in epoch {epoch + 1} of {self.recipe.epochs}, step {step + 1} of {self.steps}, "
            f"at a learning rate of {rate:g}.",
            hint=hint,
        )


def _rate(recipe: Recipe, epoch: float) -> float:
    if epoch < recipe.warmup:
        return recipe.lr * (epoch + 1 / 16) / recipe.warmup
    if recipe.schedule == "steps":
        return recipe.lr * 0.1 ** int(3 * epoch / recipe.epochs)
    if recipe.schedule == "constant":
        return recipe.lr
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * epoch / recipe.epochs))
