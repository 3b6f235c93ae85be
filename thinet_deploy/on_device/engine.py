"""What run.py takes for an engine, whatever runtime is behind it; and the errors of the files that run on devices.

Python 3.8, numpy and the standard library only: a copy lies beside run.py in every bundle.
"""

from __future__ import annotations

import abc
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Callable, Mapping

import numpy as np

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


class RunnerError(Exception):
    """An engine or a bundle that cannot be used; the message is meant for the user."""


class MissingRuntimeError(RunnerError):
    """The runtime, or the GPU that it needs, is not there; the message says how to get it."""


class ThrottledError(RunnerError):
    """The machine slowed itself down in every attempt to measure something; the message says how."""


class Engine(abc.ABC):
    """An engine loaded by its runtime; see `open_engine`. A new runtime is a subclass and a line in ENGINES.

    Attributes:
        package: what pip installs.
        module: what Python imports, where it is called otherwise.
        to_get: how it is installed, if not by pip.
        environment: variables that the runtime reads when it is imported.
        on_gpu: whether it computes on a GPU.
        input_names: the names `run` expects.
    """

    package = ""
    module = ""
    to_get = ""
    environment: Mapping[str, str] = MappingProxyType({})
    on_gpu = False
    input_names: list[str]

    @abc.abstractmethod
    def __init__(self, runtime: Any, path: str, threads: int, precision: str) -> None:
        """Load `path` with the imported `runtime`."""

    @abc.abstractmethod
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Execute once. Inputs and outputs by name, batch first."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the runtime says of itself: version, device, threads, precision asked for and in use."""

    @classmethod
    def can_run(cls) -> bool:
        """Whether this machine has what such engines run on, apart from the runtime itself."""
        return True

    def clocks_ms(self) -> dict[str, float]:
        """Milliseconds of the last run by the runtime's own clocks, such as compute; empty where it has none."""
        return {}

    def launch_ms(self) -> float | None:
        """Milliseconds of the host to hand the last run's computing to a GPU; None where there is no such step."""
        return None

    def close(self) -> None:
        """Free the engine; it cannot run afterwards."""
        self.__dict__.clear()  # the last references to the runtime's objects


def in_steps(
    inputs: Mapping[str, Array], batch: int, run: Callable[[Mapping[str, Array]], dict[str, Array]]
) -> dict[str, Array]:
    """Run an engine that has one batch size on any number of images: the last batch is filled up, and the rest cut."""
    count, parts = len(next(iter(inputs.values()))), []
    for start in range(0, count, batch):
        outputs = run({name: to_batch(array[start : start + batch], batch) for name, array in inputs.items()})
        parts.append({name: array[: count - start] for name, array in outputs.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def to_batch(array: Array, batch: int) -> Array:
    """`array` repeated or cut to `batch` rows."""
    return np.ascontiguousarray(np.take(array, np.arange(batch) % len(array), axis=0))


def reason(error: BaseException) -> str:
    """An error in one line; long messages of runtimes have the reason at their end."""
    if isinstance(error, RunnerError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:300] if lines else 'no message'}"
