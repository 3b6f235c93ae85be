"""Files that stages leave behind: written whole or not at all, hashed, with their provenance.

Every rename of the package goes through `rename`, which is where tests kill the process
(THINET_DEPLOY_FAILPOINT="N:before" or "N:after" ends it with SIGKILL at the N-th rename).
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import OutputError

_FAILPOINT = "THINET_DEPLOY_FAILPOINT"
_renames = itertools.count(1)


@dataclass(frozen=True)
class Artifact:
    """One file or folder a stage made, and where it came from.

    Attributes:
        kind: "onnx", "openvino", "onnxruntime" …
        path: relative to the run or bundle it belongs to, with forward slashes.
        sha256: of the file; of a folder, over its sorted (path, sha256) pairs.
        size_bytes: of the file, or of all files in the folder.
        made_by: tool and version, such as "openvino 2026.4.1".
        inputs: sha256 of what it was made from.
    """

    kind: str
    path: str
    sha256: str
    size_bytes: int
    made_by: str
    inputs: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict; the inverse is `Artifact(**d)` with `inputs` as a tuple."""
        return {**asdict(self), "inputs": list(self.inputs)}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, or of a folder's sorted (relative path, sha256) pairs, in hex."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_of(file)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size


def canonical_json(data: Any) -> str:
    """JSON with sorted keys and no spare spaces: equal data, equal text."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def hash_json(data: Any) -> str:
    """SHA-256 of the canonical JSON of `data`."""
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()


def rename(source: Path, target: Path) -> None:
    """Atomically move `source` to `target` (same file system), durable once it returns."""
    count = next(_renames)
    point = os.environ.get(_FAILPOINT, "")
    if point == f"{count}:before":
        os.kill(os.getpid(), signal.SIGKILL)
    os.replace(source, target)
    if os.name == "posix":
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    if point == f"{count}:after":
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def explain_os_errors(path: Path, *, every: bool = False) -> Iterator[None]:
    """Turn a full disk or a folder without write permission into an OutputError about `path`.

    Args:
        path: what is being written.
        every: whether nothing else happens here, so that any OSError is about `path`.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"The disk is full: {path} could not be written.",
                hint="Free some space and run the same command again: finished stages are kept.",
            ) from error
        if every or error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise OutputError(
                f"{path} cannot be written: {error.strerror}.",
                hint="Give a folder you may write to with --out.",
            ) from error
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all (temporary file beside it, fsync, rename)."""
    with explain_os_errors(path, every=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(name, 0o644)
            rename(Path(name), path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def write_json(path: Path, data: Any) -> None:
    """Write readable JSON, whole or not at all."""
    write_bytes(path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
