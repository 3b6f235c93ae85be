"""Where training runs: on which device, and in how many processes (`accelerate launch`, `torchrun`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import nn

from .errors import MissingError, ThinetDeployError


@dataclass(frozen=True)
class Team:
    """The processes that train one network together: most often this one alone.

    Attributes:
        rank: which of them this one is; 0 is the one that writes files and reports progress.
        size: how many there are.
        device: where this one computes.
        accelerator: the `accelerate.Accelerator` that connects them; None for one process.
    """

    rank: int
    size: int
    device: torch.device
    accelerator: Any = None

    @contextmanager
    def holding(self, *models: nn.Module) -> Iterator[None]:
        """Keep networks on the device; they are on the CPU afterwards, however the block ends."""
        try:
            for model in models:
                model.to(self.device)
            yield
        finally:
            for model in models:
                model.cpu()

    def align(self, model: nn.Module) -> None:
        """Give all processes the weights and buffers of rank 0."""
        if self.accelerator:
            for tensor in model.state_dict().values():
                torch.distributed.broadcast(tensor, src=0)

    def average_gradients(self, model: nn.Module) -> None:
        """Replace the gradients by their means over all processes.

        In one piece, after the backward pass: torch's DistributedDataParallel would send parts of them earlier, but
        fails on parameters without a gradient.
        """
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if self.accelerator and gradients:
            means = self.mean(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, mean in zip(
                gradients, means.split_with_sizes([part.numel() for part in gradients]), strict=True
            ):
                gradient.copy_(mean.view_as(gradient))

    def share(self, count: int) -> tuple[slice, float]:
        """The rows of a batch of `count` images that this process takes, and the weight of an image's loss.

        The mean over the processes of the weighted sums is the mean over the batch, however unequal the shares. A batch
        with less than two images for each is computed whole by every process: BatchNorm cannot train on one.
        """
        if count < 2 * self.size:
            return slice(None), 1 / count
        return slice(self.rank, None, self.size), self.size / count

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean over all processes, which have to call this together; the same in each."""
        return self.accelerator.reduce(tensor, "mean") if self.accelerator else tensor


def join() -> Team:
    """The processes that a launcher started (it sets WORLD_SIZE), connected; or this one alone.

    A CUDA device is used where there is one; an empty CUDA_VISIBLE_DEVICES hides it.

    Raises:
        MissingError: there are several processes, but accelerate is not installed.
        ThinetDeployError: accelerate does not find the other processes.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched == 1:
        return Team(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    accelerator = _connect(launched)
    return Team(accelerator.process_index, accelerator.num_processes, accelerator.device, accelerator)


def leave() -> None:
    """Wait for the other processes and disconnect, if there are any: for the end of a program that went well.

    A process that ends still connected, or before the others are done, is sometimes aborted by gloo's threads after
    Python has finished, and its launcher then reports a failure (seen with torch 2.13; also from an `atexit` handler).
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@cache
def _connect(launched: int) -> Any:
    try:
        accelerate: Any = import_module("accelerate")
    except ImportError as error:
        raise MissingError(
            f"Training was launched in {launched} processes, but accelerate, which connects them, is not installed.",
            hint="Install it: pip install accelerate. Or start a single process.",
        ) from error
    # Without CUDA, accelerate connects processes of torchrun only when it is told to use the CPU. The recipe decides on
    # the precision, whatever `accelerate config` says.
    accelerator = accelerate.Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    if accelerator.num_processes != launched:
        raise ThinetDeployError(
            f"Training was launched in {launched} processes, but accelerate connects {accelerator.num_processes}.",
            hint="Launch it with `accelerate launch` or `torchrun`, which tell each process its LOCAL_RANK.",
        )
    return accelerator
