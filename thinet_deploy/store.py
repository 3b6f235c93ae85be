"""The run directory: every stage's result with the hash of its inputs, whole or not there at all.

    RUN/run.json            what this folder is
    RUN/STAGE/…             the files of a finished stage
    RUN/.records/STAGE.json the key (hash of the stage's inputs) and the files' SHA-256
    RUN/.partial/STAGE.safetensors   a checkpoint of the stage in flight

A stage is made in a temporary folder, renamed into place, then recorded. A stage whose record does not match
its inputs or its files is made again, so that killing the process at any moment costs at most the stage in
flight, or what it did since its last checkpoint. A folder that somebody else put files into is never
removed: it becomes RUN/STAGE.old1.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifact import explain_os_errors, hash_json, read_json, rename, sha256_of, write_bytes, write_json
from .errors import OutputError, ThinetDeployError

if TYPE_CHECKING:
    from torch import Tensor

_FORMAT = {"format": "thinet-deploy/run", "version": 1}
_FULL_DISK_BYTES = 1 << 20


class Checkpoint:
    """The state of a stage in flight, in one file that is replaced as a whole; a state of other inputs is ignored."""

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._key = key

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Replace the checkpoint by tensors and a JSON-ready state."""
        from safetensors.torch import save

        copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        write_bytes(self._path, save(copies, metadata={"key": self._key, "state": json.dumps(state)}))

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and the state saved last, or None."""
        from safetensors import SafetensorError, safe_open

        if not self._path.is_file():
            return None
        try:
            with safe_open(self._path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != self._key:
                    return None
                return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["state"])  # noqa: SIM118
        except SafetensorError:  # damaged from outside: start the stage anew
            return None


@dataclass(frozen=True)
class Stage:
    """A finished stage.

    Attributes:
        folder: where its files are.
        digest: hash of its inputs and of its files; what later stages depend on.
        inputs: what it was made from.
        reused: whether it had been made by an earlier run of the command.
    """

    folder: Path
    digest: str
    inputs: dict[str, Any]
    reused: bool

    def json(self, name: str) -> Any:
        """One of its JSON files."""
        return read_json(self.folder / name)


Make = Callable[[Path, Checkpoint], None]


class Run:
    """A run directory, held by one process at a time.

    Args:
        root: created if needed.

    Raises:
        OutputError: the folder cannot be written, or holds something else.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        with explain_os_errors(root, every=True):
            if root.exists() and not root.is_dir():
                raise OutputError(f"{root} is a file, but a folder was expected.", hint="Choose another --out.")
            root.mkdir(parents=True, exist_ok=True)
            marker = root / "run.json"
            if marker.exists():
                open_run(root)
            else:
                foreign = sorted(p.name for p in root.iterdir() if not p.name.startswith("."))
                if foreign:
                    raise OutputError(
                        f"{root} is not empty and is no run of thinet-deploy (it has {', '.join(foreign[:3])}).",
                        hint="Choose a new or empty folder with --out.",
                    )
                write_json(marker, _FORMAT)
            (root / ".records").mkdir(exist_ok=True)
            (root / ".partial").mkdir(exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory; what a killed process left half-made is cleared away.

        Raises:
            OutputError: another process works in it.
        """
        with explain_os_errors(self.root):
            stream = (self.root / ".lock").open("w")
        with stream:
            _lock(stream.fileno(), self.root)
            with explain_os_errors(self.root):
                # A run inside this one is another's affair.
                mine = [each for each in self.root.iterdir() if each.is_dir() and not (each / "run.json").exists()]
                for leftover in [path for place in (*mine, self.root) for path in place.glob(".tmp-*")]:
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield

    def find(self, name: str, inputs: dict[str, Any]) -> Stage | None:
        """A stage that is there already, made from the same inputs."""
        if found := self._recorded(name, hash_json([name, inputs])):
            self._partial(name).unlink(missing_ok=True)  # left by a process killed right after it wrote the record
        return found

    def kept(self, name: str) -> Stage | None:
        """A stage that is there as it was made, whatever it was made from."""
        return self._recorded(name)

    def stage(self, name: str, inputs: dict[str, Any], make: Make) -> Stage:
        """Make a stage unless it is there already, made from the same inputs.

        Args:
            name: of the stage and its folder.
            inputs: JSON-ready; everything the result depends on: options, digests of earlier stages.
            make: fills an empty folder; may keep a checkpoint to resume from when it is killed.
        """
        if found := self.find(name, inputs):
            return found
        key = hash_json([name, inputs])
        folder, record = self.root / name, self._record(name)
        with explain_os_errors(self.root):
            made = Path(tempfile.mkdtemp(prefix=f".tmp-{name}-", dir=self.root))
            made.chmod(0o755)
            try:
                with self._explain_failures():
                    make(made, self.checkpoint(name, inputs))
                files = {p.relative_to(made).as_posix(): sha256_of(p) for p in sorted(made.rglob("*")) if p.is_file()}
                self._put_away(name)
                rename(made, folder)
            finally:
                shutil.rmtree(made, ignore_errors=True)
            write_json(record, {**_FORMAT, "stage": name, "key": key, "inputs": inputs, "files": files})
            self._partial(name).unlink(missing_ok=True)
        return Stage(folder, hash_json([key, files]), inputs, reused=False)

    def checkpoint(self, name: str, inputs: dict[str, Any]) -> Checkpoint:
        """Where a stage keeps its state until it is finished."""
        return Checkpoint(self._partial(name), hash_json([name, inputs]))

    def _record(self, name: str) -> Path:
        return self.root / ".records" / f"{name}.json"

    def _recorded(self, name: str, key: str | None = None) -> Stage | None:
        """A finished stage with this key, or with any; None when it has to be made (again)."""
        folder = self.root / name
        try:
            data = read_json(self._record(name))
            files: dict[str, str] = data["files"]
            if key not in (None, data["key"]) or any(sha256_of(folder / each) != sha for each, sha in files.items()):
                return None
            return Stage(folder, hash_json([data["key"], files]), data["inputs"], reused=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _holds_others(self, name: str) -> bool:
        """Whether somebody else put files into a stage's folder."""
        folder = self.root / name
        try:
            known = set(read_json(self._record(name))["files"])
        except (OSError, ValueError, KeyError, TypeError):  # killed before it wrote the record: all of it is ours
            return False
        there = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        worth = (each for each in there if "__pycache__" not in each.parts and not each.name.startswith("."))
        return any(each.as_posix() not in known for each in worth)

    def _partial(self, name: str) -> Path:
        return self.root / ".partial" / f"{name}.safetensors"

    def discard(self, name: str) -> None:
        """Remove a stage that no longer holds, if it is there; with files of others it becomes RUN/STAGE.old1."""
        self._put_away(name)

    def _put_away(self, name: str) -> None:
        folder, gone = self.root / name, self.root / f".tmp-{name}-gone"
        if folder.exists():
            if self._holds_others(name):
                places = (self.root / f"{name}.old{number}" for number in itertools.count(1))
                rename(folder, next(place for place in places if not place.exists()))
            else:
                rename(folder, gone)
                shutil.rmtree(gone)
        self._record(name).unlink(missing_ok=True)

    @contextmanager
    def _explain_failures(self) -> Iterator[None]:
        """A full disk makes libraries fail in many ways: whatever they raise, name the cause while it is still full."""
        try:
            yield
        except ThinetDeployError:
            raise
        except Exception as error:
            if shutil.disk_usage(self.root).free < _FULL_DISK_BYTES:
                raise OutputError(
                    f"The disk is full: a stage in {self.root} could not be written.",
                    hint="Free some space and run the same command again: finished stages are kept.",
                ) from error
            raise


def _lock(descriptor: int, root: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: two builds in one folder are the user's own affair there
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(
            f"Another thinet-deploy works in {root}.", hint="Wait for it, or choose another folder with --out."
        ) from error


def open_run(root: Path) -> Path:
    """Check that a folder is a run and return it.

    Raises:
        OutputError: it is not.
    """
    try:
        if read_json(root / "run.json")["format"] == _FORMAT["format"]:
            return root
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise OutputError(f"{root} is no run of thinet-deploy.", hint="`thinet-deploy build --out RUN` makes one.")
