"""A converter's child process: whatever happens in it is told in one message, and nothing is left of it."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from thinet_deploy.errors import ConversionError, MissingError, ThinetDeployError, UnknownNameError
from thinet_deploy.interfaces import Conversion, silent
from thinet_deploy.isolation import convert_isolated

# What `convert` of a toolchain does; `job.target` carries what it needs to know.
WAYS = """
import ctypes, os, signal, subprocess, sys, threading, time
from thinet_deploy.errors import MissingError, UnknownNameError


def convert(job, progress):
    return WAYS[job.precision](job, progress)


def good(job, progress):
    print("hello from python")
    os.write(1, b"hello from C\\n")
    progress("Building", 1, 2, "half")
    progress("Building", 2, 2)
    path = job.folder / "net.engine"
    path.write_text(f"{job.batch} {job.cache}")
    return path


def refuses(job, progress):
    raise ValueError("no such operation:\\n  Frobnicate\\n  in layer 3")


def ours(job, progress):
    raise MissingError("There is no abacus.", hint="Buy one.")


def unknown(job, progress):
    raise UnknownNameError("target", "jetsun", ["jetson"])


def crashes(job, progress):
    ctypes.string_at(0)


def killed(job, progress):
    os.kill(os.getpid(), signal.SIGKILL)


def lingers(job, progress):
    threading.Thread(target=time.sleep, args=(600,)).start()
    raise ValueError("no such operation")


def leaves(job, progress):
    print("goodbye", flush=True)
    os._exit(7)


def hangs(job, progress):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (job.folder / "pids").write_text(f"{os.getpid()} {child.pid}")
    progress("Building", 0, 2)
    time.sleep(600)


WAYS = {way.__name__: way for way in (good, refuses, ours, unknown, crashes, killed, lingers, leaves, hangs)}
"""
PARENT = """
import sys
from pathlib import Path
from thinet_deploy.interfaces import Conversion, silent
from thinet_deploy.isolation import convert_isolated
folder = Path(sys.argv[1])
convert_isolated("ways", Conversion(folder, folder, "hangs"), log=folder / "log", progress=silent)
"""


@pytest.fixture(autouse=True)
def _toolchain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ways.py").write_text(WAYS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def job(tmp_path: Path, way: str) -> Conversion:
    return Conversion(tmp_path / "net.onnx", tmp_path, way, batch=3, cache=tmp_path / "cache")  # type: ignore[arg-type]


def gone(pids: list[int]) -> bool:
    """Whether the processes have ended, a moment allowed."""
    for _ in range(100):
        if not any(Path(f"/proc/{pid}").exists() and "Z (" not in _state(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def _state(pid: int) -> str:
    try:
        return next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("State"))
    except (OSError, StopIteration):
        return "Z ("


def started(tmp_path: Path) -> list[int]:
    """The processes of `hangs`, once they are there."""
    for _ in range(400):
        if (tmp_path / "pids").exists() and (text := (tmp_path / "pids").read_text()):
            return [int(pid) for pid in text.split()]
        time.sleep(0.05)
    raise AssertionError("the child did not start")


def test_result_progress_and_log_come_through(tmp_path: Path) -> None:
    steps: list[object] = []
    path = convert_isolated(
        "ways", job(tmp_path, "good"), log=tmp_path / "logs" / "log", progress=lambda *step: steps.append(step)
    )
    assert path.read_text() == f"3 {tmp_path / 'cache'}"
    assert steps == [("Building", 1, 2, "half"), ("Building", 2, 2, "")]
    log = (tmp_path / "logs" / "log").read_text()
    assert "hello from C" in log
    assert "hello from python" in log


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("refuses", "ways failed: ValueError: no such operation: Frobnicate in layer 3"),
        ("crashes", "ways crashed with SIGSEGV."),
        ("killed", "ways crashed with SIGKILL; too little memory is the usual reason."),
        ("lingers", "ways failed: ValueError: no such operation"),
        ("leaves", "ways ended with code 7 and gave no engine."),
    ],
)
def test_a_toolchain_that_fails_is_a_message_and_a_log(way: str, words: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(ConversionError) as failure:
        convert_isolated("ways", job(tmp_path, way), log=log, progress=silent)
    assert failure.value.what == words
    assert str(log) in failure.value.hint
    told = {
        "refuses": "in layer 3",
        "crashes": "in crashes",
        "killed": "",
        "lingers": "in lingers",
        "leaves": "goodbye",
    }
    assert told[way] in log.read_text()


def test_our_own_errors_keep_their_kind(tmp_path: Path) -> None:
    expected: list[tuple[str, type[ThinetDeployError], str, str]] = [
        ("ours", MissingError, "There is no abacus.", "Buy one."),
        ("unknown", UnknownNameError, "There is no target called 'jetsun'.", "Did you mean 'jetson'? Known: jetson."),
    ]
    for way, kind, what, hint in expected:
        with pytest.raises(kind) as failure:
            convert_isolated("ways", job(tmp_path, way), log=tmp_path / "log", progress=silent)
        assert (failure.value.what, failure.value.hint) == (what, hint)


def test_a_time_limit_ends_the_toolchain_and_its_children(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="ways took longer than 3 s and was ended"):
        convert_isolated("ways", job(tmp_path, "hangs"), log=tmp_path / "log", progress=silent, limit_s=3)
    assert gone(started(tmp_path))


def test_ctrl_c_ends_the_toolchain_and_its_children(tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int, note: str = "") -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_isolated("ways", job(tmp_path, "hangs"), log=tmp_path / "log", progress=interrupt)
    assert gone(started(tmp_path))


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_its_parent(kind: signal.Signals, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, tmp_path],
        stderr=subprocess.DEVNULL,
        # A shell that starts the tests in the background has them ignore it.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    ) as parent:
        pids = started(tmp_path)
        os.kill(parent.pid, kind)
        parent.wait(20)
    assert gone(pids)


def test_a_full_disk_is_named_whatever_the_toolchain_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: _Usage())
    with pytest.raises(ThinetDeployError, match="The disk is full"):
        convert_isolated("ways", job(tmp_path, "refuses"), log=tmp_path / "log", progress=silent)


class _Usage:
    free = 0
