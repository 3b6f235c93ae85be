"""A torch model in a process of its own, for its time in training: one model cannot disturb another, nor share memory.

Importing torch takes seconds, so one process, the nursery, does it once, computes nothing, and forks for every model;
a process that has computed could not: its threads do not live on in a fork. Both sides speak JSON lines over a socket.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..errors import InputError, ModelError, ThinetDeployError, first_line
from ..on_device.sensors import memory_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Clock = Callable[[Callable[[], Any]], tuple[Any, float, float | None]]

PATIENCE_S = 3600.0  # for one answer
# glibc keeps what a pass has freed for the next one. Otherwise it depends on the sizes freed before whether memory goes
# back to the system and is faulted in anew: a VGG's forward pass on a CPU then took a fifth longer, at times.
_KEEPING = dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(1 << 32))


@dataclass(frozen=True)
class Pass:
    """Milliseconds of one forward and one backward pass, and of launching both; whether all outputs were finite."""

    forward_ms: float
    backward_ms: float
    launch_ms: float | None
    finite: bool


# ------------------------------------------------------------------------------------------- the parent's side


class TorchWorker:
    """A model in a process of its own; use it in a `with`.

    Args:
        name: of the model, for people.
        path: of what `write_model` wrote.
        asked: JSON-ready: shape of the images with the batch first, device, mode, threads, seed of the images.
    """

    def __init__(self, name: str, path: Path, asked: Mapping[str, Any]) -> None:
        from ..models.loading import users_files

        self.name = name
        ours, theirs = socket.socketpair()
        ours.settimeout(PATIENCE_S)
        with theirs:
            _NURSERY.bear(theirs)
        self._socket, self._lines = ours, ours.makefile("rw", encoding="utf-8")
        self._send({"path": str(path), "imports": sys.path, "users": users_files(), **asked})

    def ready(self) -> str:
        """Wait until the model is there, and name the device that it is on."""
        return str(self._answer()["device"])

    def run(self) -> Pass:
        """One forward and one backward pass."""
        self._send({"op": "pass"})
        return Pass(**self._answer())

    def memory(self) -> int | None:
        """The most memory that the passes and the model held, in bytes; None where the system does not tell."""
        self._send({"op": "memory"})
        found: int | None = self._answer()["peak"]
        return found

    def _send(self, request: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # its silence will tell
            print(json.dumps(request), file=self._lines, flush=True)

    def _answer(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            ModelError: the model failed.
            ThinetDeployError: the process ended, or hangs.
        """
        try:
            line = self._lines.readline()
        except TimeoutError:
            raise ThinetDeployError(
                f"{self.name} takes more than {PATIENCE_S:g} s for a pass.", hint="Give a smaller batch."
            ) from None
        except OSError:
            line = ""
        if not line:
            raise ThinetDeployError(
                f"The process that trains {self.name} ended by itself.",
                hint="Too little memory is the usual reason: give a smaller batch.",
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            full = "out of memory" in answer["error"].lower()
            raise ModelError(
                f"{self.name} cannot be run forward and backward: {answer['error']}",
                hint="All models are in memory at once: give a smaller batch, or fewer models."
                if full
                else "It gets a batch of noise in training mode; the loss is the mean square of its outputs.",
            )
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._lines.close()
        self._socket.close()


class _Nursery:
    """The process that has torch and forks; started when it is needed first, it ends with this one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def bear(self, stream: socket.socket) -> None:
        """A new process that listens to this socket."""
        if self._process is None or self._process.poll() is not None:
            self._socket, theirs = socket.socketpair()
            # What a model prints must not get into the output of a command, which may be JSON. -P: a file in the
            # current folder must not stand in for a library. The path: this package, not another one installed there.
            here = str(Path(__file__).resolve().parents[2])
            start = f"import sys; sys.path.insert(0, {here!r}); from {__name__} import nursery; nursery()"
            command = [sys.executable, "-P", "-c", start]
            with theirs:
                self._process = subprocess.Popen(
                    command, stdin=theirs.fileno(), stdout=2, env={**_KEEPING, **os.environ}
                )
        assert self._socket
        socket.send_fds(self._socket, [b"."], [stream.fileno()])


_NURSERY = _Nursery()


def write_model(model: nn.Module, name: str, path: Path) -> None:
    """Write a model for a process of its own; parametrized weights as they are now, since such modules refuse pickle.

    Raises:
        InputError: it holds something that cannot be written.
    """
    import cloudpickle
    import torch

    try:
        torch.save(_plain(model), path, pickle_module=cloudpickle)
    except Exception as error:  # whatever a user's class says when it is to be pickled
        raise InputError(
            f"{name} cannot be sent to a process of its own to be timed: {first_line(error)}.",
            hint="It has to survive pickle: without open files and locks, scripted modules as they were before.",
        ) from error


def _plain(model: nn.Module) -> nn.Module:
    """The model, or a copy without its parametrizations."""
    from torch.nn.utils import parametrize

    if not any(parametrize.is_parametrized(module) for module in model.modules()):
        return model
    model = copy.deepcopy(model)
    for module in model.modules():
        for weight in list(getattr(module, "parametrizations", ())):
            parametrize.remove_parametrizations(module, weight)
    return model


# ------------------------------------------------------------------------------------------- in the children


def nursery() -> None:
    """A fork for every socket that comes, until the parent is gone."""
    import torch  # noqa: F401 - what all of this is for

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, whose end is heard
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    with socket.socket(fileno=os.dup(0)) as parent:
        while True:
            message, (*streams,), _, _ = socket.recv_fds(parent, 1, 1)
            if not message:
                return
            if os.fork() == 0:
                parent.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a model may start programs, and ask how they ended
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                _serve(socket.socket(fileno=streams[0]))
                os._exit(0)
            os.close(streams[0])


def _serve(stream: socket.socket) -> None:
    """One model, from its request to the end of the socket."""
    from ..models.loading import UsersFiles

    requests = _requests(stream)
    with stream.makefile("w", encoding="utf-8") as answers:
        try:
            first = requests.get()
            sys.path.extend(folder for folder in first["imports"] if folder not in sys.path)
            sys.meta_path.append(UsersFiles(first["users"]))
            for name in first["users"]:  # with what they register, such as operators of their own
                with contextlib.suppress(Exception, SystemExit):  # one that the model does not need
                    importlib.import_module(name)
            _warm_up()
            before = memory_bytes()["now"]
            model, images = _opened(first)
            clock = _cuda_clock(images.device) if images.is_cuda else _wall_clock
            _tell(answers, device=_named(images.device))
            while request := requests.get():
                if request["op"] == "pass":
                    _tell(answers, **vars(_forward_backward(model, images, clock)))
                else:
                    _tell(answers, peak=_peak_bytes(images.device, before))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the user's own code may raise anything
            with contextlib.suppress(OSError):
                _tell(answers, error=f"{type(error).__name__}: {first_line(error)}")


def _requests(stream: socket.socket) -> queue.Queue[dict[str, Any]]:
    """What is asked; when nobody listens any more, this process ends in the midst of whatever it does."""
    found: queue.Queue[dict[str, Any]] = queue.Queue()

    def listen() -> None:
        with contextlib.suppress(OSError), stream.makefile("r", encoding="utf-8") as lines:
            for line in lines:
                found.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    return found


def _tell(answers: Any, **fields: Any) -> None:
    print(json.dumps(fields), file=answers, flush=True)


def _opened(asked: Mapping[str, Any]) -> tuple[nn.Module, Tensor]:
    """The model in training mode and its images, on the device and in the mode."""
    import torch

    from .torch_modes import in_mode, laid_out

    torch.set_num_threads(asked["threads"])
    where, mode = torch.device(asked["device"]), asked["mode"]
    noise = torch.randn(*asked["shape"], generator=torch.Generator().manual_seed(asked["seed"]))
    images = laid_out(noise.to(where), mode)
    model = torch.load(asked["path"], weights_only=False).requires_grad_(True).to(where).train()
    return in_mode(model, images, mode), images


def _warm_up() -> None:
    """What torch loads and allocates when it computes for the first time is no memory of a model."""
    import torch

    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Flatten())
    layer(torch.zeros(2, 3, 8, 8)).square().mean().backward()


def _named(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _peak_bytes(device: torch.device, before: int | None) -> int | None:
    """On a GPU by torch's own count; on a CPU what this process has at most grown by since the model came."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = memory_bytes()["peak"]
    return None if peak is None or before is None else peak - before


def _forward_backward(model: nn.Module, images: Tensor, clock: Clock) -> Pass:
    """One forward and one backward pass; the loss between them is not timed."""
    model.zero_grad(set_to_none=True)
    output, forward_ms, launch_ms = clock(lambda: model(images))
    outputs = list(tensors(output))
    finite = all(bool(tensor.isfinite().all()) for tensor in outputs)
    loss = sum(tensor.float().square().mean() for tensor in outputs)
    _, backward_ms, more_ms = clock(loss.backward)  # type: ignore[union-attr]  # sum() may give 0: a model without outputs
    launched = None if launch_ms is None or more_ms is None else launch_ms + more_ms
    return Pass(forward_ms, backward_ms, launched, finite)


def tensors(output: Any) -> Iterator[Tensor]:
    """All tensors of a model's output, which may be nested (auxiliary classifiers)."""
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, Sequence):
        for part in output:
            yield from tensors(part)
    elif output is not None:
        yield output


def _wall_clock(fn: Callable[[], Any]) -> tuple[Any, float, None]:
    start = time.perf_counter_ns()
    result = fn()
    return result, (time.perf_counter_ns() - start) / 1e6, None


def _cuda_clock(device: torch.device) -> Clock:
    """Times by events on the device, where launching work returns before it is done."""
    import torch

    def clock(fn: Callable[[], Any]) -> tuple[Any, float, float]:
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            start.record()
            result, launch_ms, _ = _wall_clock(fn)
            end.record()
            end.synchronize()
            return result, start.elapsed_time(end), launch_ms

    return clock
