"""What thinet-deploy does on a device that it reaches by ssh: one file that needs Python 3.8 and nothing else.

    python3 - look REQUEST                     facts about the machine, as JSON; sent by stdin, before any file
    python3 agent.py sums FOLDER               SHA-256 of each file below a folder
    python3 agent.py folder FOLDER             make it
    python3 agent.py job PLACE MADE COMMAND…   run a command that outlives the connection, and follow its output
    python3 agent.py forget PLACE              what an ended job said is not wanted any more
    python3 agent.py unpack FILE FOLDER        what a .zip file holds, and no longer the file
    python3 agent.py remove PATH…              files, and folders with all that is in them

A job has a session of its own and a lock, which the kernel lets go when it ends in whatever way. So the same call
starts it, follows one that was started before the connection was cut, or shows the output of one that is finished.
MADE is the folder of the files that it makes, "" for none: where they are no longer as it left them, it starts anew.
Jobs run one at a time, whoever asks for them: two at once would falsify each other's times.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path[0] in {"", os.path.dirname(os.path.realpath(sys.argv[0]))}:
    del sys.path[0]  # nothing that lies in a home folder may stand in for the standard library

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
import time
import zipfile
from pathlib import Path
from typing import IO, Any, Iterator, Sequence

PAUSE_S = 0.2
PATIENCE_S = 10


def look(request: dict[str, Any]) -> dict[str, Any]:
    """Facts about this machine.

    Args:
        request: modules: names to look for; files: to read; commands: to run, each a list.
    """
    return {
        "root": str(root()),
        "python": platform.python_version(),
        "executable": sys.executable,
        "machine": platform.machine(),
        "kernel": platform.release(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "free_bytes": free_bytes(root()),
        "modules": {name: version_of(name) for name in request["modules"]},
        "files": {path: read(path) for path in request["files"]},
        "commands": {" ".join(command): run(command) for command in request["commands"]},
    }


def root() -> Path:
    """The folder that bundles are copied into."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "thinet-deploy").absolute()


def free_bytes(path: Path) -> int:
    """Free space where `path` is or will be."""
    there = next(place for place in (path, *path.parents) if place.exists())
    return shutil.disk_usage(str(there)).free


def version_of(module: str) -> str | None:
    """The version of an installed module, "" where it does not tell; None when it is not there."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(module)
    code = "import {0}; print('\\n' + str(getattr({0}, '__version__', '')))".format(module.partition(".")[0])
    return run([sys.executable, "-c", code], PATIENCE_S * 3).strip().rpartition("\n")[2]


def read(path: str) -> str:
    """The text of a system file without surrounding blanks and NULs, or "" when it cannot be read."""
    with contextlib.suppress(OSError), Path(path).open("rb") as stream:
        return stream.read(1 << 20).decode("utf-8", "replace").strip("\0\n ")
    return ""


def last_words(path: Path) -> str:
    """How a log ends; "" where there is none."""
    with contextlib.suppress(OSError), path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 4000))
        return stream.read().decode("utf-8", "replace").strip("\0\n ")[-2000:]
    return ""


def run(command: Sequence[str], seconds: float = PATIENCE_S) -> str:
    """What a program prints, or "" when it is not there, fails or takes longer."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=True,
        )
        return done.stdout.decode("utf-8", "replace").strip()
    return ""


def sums(folder: str) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path; of files that arrived whole."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".partial"]
    return {str(path.relative_to(folder)): sha256_of(path) for path in sorted(files)}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def make_folder(folder: str) -> None:
    """Make a folder, unless it is there."""
    Path(folder).mkdir(parents=True, exist_ok=True)


def unpack(file: str, folder: str) -> None:
    """Take the files out of an archive, which goes; what was cut off in between has another checksum."""
    with zipfile.ZipFile(file) as packed:
        packed.extractall(folder)
    Path(file).unlink()


def remove(*paths: str) -> None:
    """Remove files, and folders with all that is in them; what is not there is gone already."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            Path(path).unlink()


# ----------------------------------------------------------------------------------------------- jobs


def job(place: Path, made: str, command: Sequence[str]) -> dict[str, Any]:
    """Start a command unless it runs or is done, and print its output until it ends.

    Args:
        place: folder that takes `out`, `err` and, once it has ended, `made` and `code`; the command runs in the one
            above it.
        made: folder of the files that it makes; "" for none.
        command: to run.

    Returns:
        code: its exit code; None when it was ended together with its keeper, as by a power cut. err: its last words.
        free_bytes: room on the disk.
    """
    place.mkdir(parents=True, exist_ok=True)
    with Path(place, "readers").open("a+") as readers:
        with Path(place, "door").open("a") as door, Path(place, "lock").open("a") as lock:
            fcntl.flock(door, fcntl.LOCK_EX)  # one at a time looks and starts: who comes next finds it running
            fcntl.flock(readers, fcntl.LOCK_SH)  # until it is read nobody forgets it
            if take(lock, fcntl.LOCK_EX) and not is_done(place, made):
                clear(place)
                (place / "out").touch()
                start([str(place), made, str(lock.fileno()), *command], lock.fileno())
        follow(place)
        return {"code": code_of(place), "err": last_words(place / "err"), "free_bytes": free_bytes(place)}


def take(lock: Any, kind: int) -> bool:
    """Whether the lock could be had."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def start(words: list[str], lock: int) -> None:
    """Start the keeper of a job, in a session of its own; it inherits the lock."""
    keeper, none = [sys.executable, str(Path(__file__).resolve()), "keep", *words], subprocess.DEVNULL
    subprocess.Popen(keeper, stdin=none, stdout=none, stderr=none, start_new_session=True, pass_fds=[lock])


def keep(place: Path, made: str, lock: int, command: Sequence[str]) -> None:
    """Run the command; it shares the lock, so that it is not started twice even when this process is killed alone."""
    none = subprocess.DEVNULL
    with Path(place, "out").open("wb") as out, Path(place, "err").open("wb") as err, turn(place, out) as mine:
        locks = [lock, mine.fileno()]
        process = subprocess.Popen(command, stdin=none, stdout=out, stderr=err, cwd=str(place.parent), pass_fds=locks)
        mine.write(", process {0}".format(process.pid))
        mine.flush()
        code = process.wait()
    (place / "made").write_text(seal_of(made))
    partial = place / "code.partial"
    partial.write_text(str(code))
    partial.replace(place / "code")


@contextlib.contextmanager
def turn(place: Path, out: IO[bytes]) -> Iterator[IO[str]]:
    """The machine's lock, which has the name of the job that runs; `out` is told for whom this one waits."""
    root().mkdir(parents=True, exist_ok=True)
    with Path(root(), "turn-{0}".format(platform.node())).open("a+") as lock:  # boards may share a home
        if not take(lock, fcntl.LOCK_EX):
            lock.seek(0)
            words = "waits for {0} there".format(lock.read() or "another job")
            out.write(b"%s\n" % json.dumps({"progress": [0, 1, words]}).encode())
            out.flush()
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(place.name)
        lock.flush()
        yield lock


def code_of(place: Path) -> int | None:
    """The exit code of a job that has ended."""
    text = read(str(place / "code"))
    return int(text) if text else None


def seal_of(made: str) -> str:
    """Changes with any file of a folder; "" for none."""
    return hashlib.sha256(json.dumps(sums(made)).encode()).hexdigest() if made else ""


def is_done(place: Path, made: str) -> bool:
    """Whether a job ended well and its files are as it left them: a power cut empties some, people remove some."""
    return code_of(place) == 0 and (not made or read(str(place / "made")) == seal_of(made))


def forget(place: str) -> None:
    """Remove what an ended job left, once it is read by all who follow it; one that runs is left alone."""
    if not Path(place).is_dir():
        return
    doors = [Path(place, name) for name in ("door", "lock", "readers")]
    with doors[0].open("a+") as door, doors[1].open("a+") as lock, doors[2].open("a+") as readers:
        fcntl.flock(door, fcntl.LOCK_EX)
        if take(lock, fcntl.LOCK_SH):  # as readers may too: the job has ended
            fcntl.flock(lock, fcntl.LOCK_UN)
            patience = time.monotonic() + PATIENCE_S  # with one whose connection hangs
            while not take(readers, fcntl.LOCK_EX) and time.monotonic() < patience:
                time.sleep(PAUSE_S)
            clear(Path(place))


def clear(place: Path) -> None:
    """Remove what a job left."""
    for name in ("code", "made", "out", "err"):
        with contextlib.suppress(FileNotFoundError):
            (place / name).unlink()


def follow(place: Path) -> None:
    """Print the job's output until it ends."""
    with Path(place, "out").open("rb") as out, Path(place, "lock").open() as lock:
        running = True
        while running:
            running = not take(lock, fcntl.LOCK_SH)  # asked before reading, so that no last words are missed
            sys.stdout.buffer.write(out.read())
            sys.stdout.buffer.flush()
            time.sleep(PAUSE_S if running else 0)


def main(arguments: Sequence[str]) -> int:
    """The command line; the last line on stdout is the answer, as JSON."""
    name, rest = arguments[0], arguments[1:]
    try:
        if name == "keep":
            keep(Path(rest[0]), rest[1], int(rest[2]), rest[3:])
            return 0
        if name == "look":
            answer = look(json.loads(rest[0]))
        elif name == "job":
            answer = job(Path(rest[0]), rest[1], rest[2:])
        else:
            work: dict[str, Any] = {"sums": sums, "folder": make_folder, "unpack": unpack}
            answer = {**work, "forget": forget, "remove": remove}[name](*rest) or {}
    except OSError as error:
        answer = {"error": str(error), "errno": error.errno}
    sys.stdout.write(f"\n{json.dumps(answer)}\n")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
