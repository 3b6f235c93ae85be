"""A run directory on which several processes work together: the first one writes, all see the same stages."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from .parallel import join
from .store import Make, Run, Stage


class SharedRun(Run):
    """A run directory, held by one launch at a time, of however many processes.

    All of them call the same methods in the same order, and see the same folder (on several machines: a shared file
    system). What a method tells one, it tells all. An error ends the process it happens in, and with it the launch.
    """

    def __init__(self, root: Path) -> None:
        """See `Run`."""
        self.root, self.team = root, join()
        self.team.once(partial(super().__init__, root))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """See `Run.locked`."""
        with ExitStack() as held:
            lock = super().locked
            self.team.once(lambda: held.enter_context(lock()))
            yield

    def stage(self, name: str, inputs: dict[str, Any], make: Make) -> Stage:
        """As `Run.stage`, but all processes make it together; what others than the first write is thrown away."""
        find, publish = super().find, super().stage
        if found := self.team.once(lambda: find(name, inputs)):
            return found
        if self.team.rank:
            with tempfile.TemporaryDirectory(prefix=f".tmp-{name}-", dir=self.root) as folder:
                make(Path(folder), self.checkpoint(name, inputs))
        return self.team.once(lambda: publish(name, inputs, make))

    def alone(self, name: str, inputs: dict[str, Any], make: Make) -> Stage:
        """As `Run.stage`, made by the first process while the others wait: nothing in it may need these."""
        return self.team.once(partial(super().stage, name, inputs, make))

    def discard(self, name: str) -> None:
        """See `Run.discard`."""
        self.team.once(partial(super().discard, name))
