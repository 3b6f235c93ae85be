"""A run directory on which several processes work together: the first one writes, all see the same stages."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from .interfaces import Progress, silent
from .parallel import join
from .store import Make, Run, Stage


class SharedRun(Run):
    """A run directory, held by one launch at a time, of however many processes.

    All of them call the same methods in the same order, and see the same folder (on several machines: a shared file
    system). What a method tells one, it tells all. An error ends the process it happens in, and with it the launch.

    Args:
        root: see `Run`.
        progress: told which stages are kept from before: ahead of the next one that is made, and at the end.
    """

    def __init__(self, root: Path, progress: Progress = silent) -> None:
        self.root, self.team, self.progress = root, join(), progress
        self._kept: list[str] = []
        self.team.once(partial(super().__init__, root))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """See `Run.locked`."""
        with ExitStack() as held:
            lock = super().locked
            self.team.once(lambda: held.enter_context(lock()))
            yield
            self._tell()

    def kept(self, name: str) -> Stage | None:
        """See `Run.kept`."""
        if found := self.team.once(partial(super().kept, name)):
            self._kept.append(name)
        return found

    def stage(self, name: str, inputs: dict[str, Any], make: Make) -> Stage:
        """As `Run.stage`, but all processes make it together; what others than the first write is thrown away."""
        if found := self._before(name, inputs):
            return found
        publish = super().stage
        if self.team.rank:
            with tempfile.TemporaryDirectory(prefix=f".tmp-{name}-", dir=self.root) as folder:
                make(Path(folder), self.checkpoint(name, inputs))
        return self.team.once(lambda: publish(name, inputs, make))

    def alone(
        self, name: str, inputs: dict[str, Any], make: Make, holds: Callable[[Stage], bool] = lambda _: True
    ) -> Stage:
        """As `Run.stage`, made by the first process while the others wait: nothing in it may need these.

        Args:
            name, inputs, make: see `Run.stage`.
            holds: whether one that is there counts; what the world outside spoiled is made anew.
        """
        return self._before(name, inputs, holds) or self.team.once(partial(super().stage, name, inputs, make))

    def _before(
        self, name: str, inputs: dict[str, Any], holds: Callable[[Stage], bool] = lambda _: True
    ) -> Stage | None:
        """A stage that is there already; where it is not, what was kept so far is told."""
        found = self.team.once(partial(super().find, name, inputs))
        if found and not self.team.once(partial(holds, found)):
            self.discard(name)
            found = None
        if found:
            self._kept.append(name)
        else:
            self._tell()
        return found

    def _tell(self) -> None:
        if self._kept:
            self.progress("Taking from before", 1, 1, ", ".join(self._kept))
            self._kept.clear()

    def discard(self, name: str) -> None:
        """See `Run.discard`."""
        self.team.once(partial(super().discard, name))
