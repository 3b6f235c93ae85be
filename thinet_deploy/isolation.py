"""A converter in a process of its own: a toolchain that crashes, hangs or prints takes nothing down with it.

The parent sends one JSON line, the child answers in JSON lines: progress, then a result or an error. What the toolchain
prints goes into a log, which is kept. The child leads a process group, so that a time limit or Ctrl-C ends the
toolchain's own children as well; when the parent dies, the child ends itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from . import errors
from .errors import ConversionError, OutputError, ThinetDeployError
from .interfaces import Conversion, Progress

LIMIT_S = 3600.0
_LAST_WORDS_S = 3
_FULL_DISK_BYTES = 1 << 20
_PATHS = ("source", "folder", "cache", "calibration")


def convert_isolated(module: str, job: Conversion, *, log: Path, progress: Progress, limit_s: float = LIMIT_S) -> Path:
    """Run `module.convert(job, progress)` in a child process.

    Args:
        module: dotted name of the converter.
        job: what to convert, and where to.
        log: takes everything that the toolchain prints; written anew.
        progress: to report to, in this process.
        limit_s: how long it may take.

    Returns:
        The engine's main file.

    Raises:
        ConversionError: the toolchain refused the network, crashed, or took too long; it names the log.
        ThinetDeployError: what the converter itself raised.
        OutputError: the disk is full.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream, _child(stream) as child:
        _send(child, {"module": module, "job": _to_json(job)})
        try:
            answer = _listen(child, progress, limit_s)
        except TimeoutError:
            raise ConversionError(
                f"{_name(module)} took longer than {limit_s:g} s and was ended.", hint=f"Its log is {log}."
            ) from None
        code = None if "path" in answer else _end_of(child)
    if "path" in answer:
        return Path(answer["path"])
    if shutil.disk_usage(job.folder).free < _FULL_DISK_BYTES:
        raise OutputError(
            f"The disk is full: {job.folder} could not be written.",
            hint="Free some space and run the same command again: finished stages are kept.",
        )
    raise _failure(_name(module), answer, code, log)


def _end_of(child: subprocess.Popen[bytes]) -> int | None:
    """Exit code of a child that has failed, once its last words are in the log; None where threads of it go on."""
    try:
        return child.wait(_LAST_WORDS_S)
    except subprocess.TimeoutExpired:
        return None


def _to_json(job: Conversion) -> dict[str, Any]:
    paths = {name: str(path.absolute()) for name in _PATHS if (path := getattr(job, name)) is not None}
    return {**asdict(job), **paths}


def _from_json(data: dict[str, Any]) -> Conversion:
    paths = {name: Path(data[name]) for name in _PATHS if data[name] is not None}
    return Conversion(**{**data, **paths})


def _name(module: str) -> str:
    """`thinet_deploy.converters.onnx_to_openvino` → `onnx to openvino`."""
    return module.rpartition(".")[2].replace("_", " ")


@contextlib.contextmanager
def _child(log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A child that waits for a request; however this block ends, no process of its group is left."""
    # -P: a file in the current folder must not stand in for a library.
    command = [sys.executable, "-P", "-m", __name__]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, start_new_session=True) as child:
        try:
            yield child
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _send(child: subprocess.Popen[bytes], request: dict[str, Any]) -> None:
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died at once: its silence will tell
        child.stdin.write(json.dumps(request).encode() + b"\n")
        child.stdin.flush()


def _listen(child: subprocess.Popen[bytes], progress: Progress, limit_s: float) -> dict[str, Any]:
    """Pass progress on until the child has a result or an error, or is gone ({}); TimeoutError when it takes longer."""
    lines: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_read, args=(child, lines), daemon=True).start()
    end = time.monotonic() + limit_s
    while True:
        try:
            line = lines.get(timeout=max(end - time.monotonic(), 0))
        except queue.Empty:
            raise TimeoutError from None
        answer: dict[str, Any] = json.loads(line or b"{}")
        if "progress" not in answer:
            return answer
        progress(*answer["progress"])


def _read(child: subprocess.Popen[bytes], lines: queue.Queue[bytes]) -> None:
    assert child.stdout is not None
    with contextlib.suppress(ValueError):  # closed meanwhile
        for line in child.stdout:
            lines.put(line)
    lines.put(b"")


def _failure(name: str, answer: dict[str, Any], code: int | None, log: Path) -> ThinetDeployError:
    hint = f"What the toolchain said is in {log}."
    if "ours" in answer:
        error: ThinetDeployError = getattr(errors, answer["ours"]).__new__(getattr(errors, answer["ours"]))
        ThinetDeployError.__init__(error, answer["what"], hint=answer["hint"])  # some have arguments of their own
        return error
    if "what" in answer:
        return ConversionError(f"{name} failed: {answer['what']}", hint=hint)
    if code is not None and code < 0:
        # The kernel sends SIGKILL where memory runs out; nobody else knows the process.
        why = "; too little memory is the usual reason" if -code == signal.SIGKILL else ""
        return ConversionError(f"{name} crashed with {signal.Signals(-code).name}{why}.", hint=hint)
    return ConversionError(f"{name} ended with code {code} and gave no engine.", hint=hint)


# ------------------------------------------------------------------------------------------- in the child


def main() -> int:
    """The child's side: one request from stdin, answers to stdout."""
    faulthandler.enable()  # a crash leaves the Python stack in the log
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a toolchain prints goes into the log
    request = json.loads(_line())
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def answer(**fields: Any) -> None:
        sys.stdout.flush()  # behind the last answer the parent ends this process, and what waits here would be lost
        print(json.dumps(fields), file=answers, flush=True)

    def progress(stage: str, done: int, total: int, note: str = "") -> None:
        answer(progress=[stage, done, total, note])

    try:
        path = importlib.import_module(request["module"]).convert(_from_json(request["job"]), progress)
        answer(path=str(path))
    except ThinetDeployError as error:
        answer(ours=type(error).__name__, what=error.what, hint=error.hint)
    except Exception as error:  # toolchains raise types of their own
        answer(what=_reason(error))
        raise
    return 0


def _line() -> bytes:
    """The first line of stdin, and not a byte more."""
    return b"".join(iter(lambda: os.read(0, 1), b"\n"))


def _reason(error: Exception) -> str:
    """An error in one line: toolchains spread the cause over the first few."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300] or 'no message'}"


def _end_with_parent() -> None:
    """Wait for the end of stdin, which is the parent's end too, and leave no process of this group behind."""
    while os.read(0, 1):  # without a buffer, whose lock would disturb the end of this process
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
