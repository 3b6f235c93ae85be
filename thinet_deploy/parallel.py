"""Where work runs: on which device, and in how many processes (`accelerate launch`, `torchrun`)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .errors import MissingError, ThinetDeployError, first_line
from .interfaces import Progress, silent

T = TypeVar("T")

# When a process fails, its launcher ends the others within a tenth of a second, and they need not say anything.
PATIENCE_S = 5.0
# While the first process works alone (latency, engines), the others wait: no matter how long.
_FOREVER = timedelta(days=365)


@dataclass(frozen=True)
class Team:
    """The processes that work on one network together: most often this one alone.

    All of them run the same program. What they do together they have to call in the same order.

    Attributes:
        rank: which of them this one is; 0 is the one that writes files and reports progress.
        size: how many there are.
        device: where this one computes.
        accelerator: the `accelerate.Accelerator` that connects them; None for one process.
        by_cpu: their `torch.distributed` group for what is on the CPU. Waiting in it costs no processor time.
    """

    rank: int
    size: int
    device: torch.device
    accelerator: Any = None
    by_cpu: Any = None

    def speaking(self, progress: Progress) -> Progress:
        """Where to report to: nowhere, unless this is the first process."""
        return silent if self.rank else progress

    def tell(self, value: T) -> T:
        """What rank 0 gives, in every process: for decisions, which may differ where floats differ in the last bit."""
        box = [value]
        if self.accelerator:
            with _linked():
                torch.distributed.broadcast_object_list(box, src=0, group=self.by_cpu)
        return box[0]

    def once(self, work: Callable[[], T]) -> T:
        """Let rank 0 do something while the others wait; all get the result."""
        return work() if not self.accelerator else self.tell(work() if not self.rank else None)  # type: ignore[return-value]

    def mine(self, items: NDArray[np.int64]) -> NDArray[np.int64]:
        """This process's share of some items (n,), in order; it may be empty."""
        return items[self.rank :: self.size]

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace a tensor on the CPU by its sum over all processes, the same to the bit in each; returns it."""
        if self.accelerator:
            with _linked():
                torch.distributed.all_reduce(tensor, group=self.by_cpu)
        return tensor

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
                with _linked():
                    torch.distributed.broadcast(tensor, src=0, group=self.by_cpu if tensor.is_cpu else None)

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
        if not self.accelerator:
            return tensor
        with _linked():
            return self.accelerator.reduce(tensor, "mean")  # type: ignore[no-any-return]


@contextmanager
def _linked() -> Iterator[None]:
    """Stands around all that processes exchange: where one has ended, the others cannot go on."""
    try:
        yield
    except RuntimeError as error:
        time.sleep(PATIENCE_S)  # most often the launcher ends this process meanwhile: the other one has said why
        raise ThinetDeployError(
            f"Another process of this launch ended, so this one cannot go on ({first_line(error)}).",
            hint="Its own message says why. Run the same command again to go on: finished stages are kept.",
        ) from error


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
    accelerator, by_cpu = _connect(launched)
    return Team(accelerator.process_index, accelerator.num_processes, accelerator.device, accelerator, by_cpu)


def leave() -> None:
    """Wait for the other processes and disconnect, if there are any: for the end of a program that went well.

    A process that ends still connected, or before the others are done, is sometimes aborted by gloo's threads after
    Python has finished, and its launcher then reports a failure (seen with torch 2.13; also from an `atexit` handler).
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@cache
def _connect(launched: int) -> tuple[Any, Any]:
    try:
        accelerate: Any = import_module("accelerate")
    except ImportError as error:
        raise MissingError(
            f"Training was launched in {launched} processes, but accelerate, which connects them, is not installed.",
            hint="Install it: pip install accelerate. Or start a single process.",
        ) from error
    here, devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if 0 < devices < here:
        raise ThinetDeployError(
            f"{here} processes were launched on this machine, but it has {devices} GPU{'s'[: devices > 1]}.",
            hint="Launch one for each GPU, or hide the GPUs: CUDA_VISIBLE_DEVICES= torchrun …",
        )
    # Without CUDA, accelerate connects processes of torchrun only when it is told to use the CPU. The recipe decides on
    # the precision, whatever `accelerate config` says.
    accelerator = accelerate.Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    if accelerator.num_processes != launched:
        raise ThinetDeployError(
            f"Training was launched in {launched} processes, but accelerate connects {accelerator.num_processes}.",
            hint="Launch it with `accelerate launch` or `torchrun`, which tell each process its LOCAL_RANK.",
        )
    return accelerator, torch.distributed.new_group(backend="gloo", timeout=_FOREVER)
