"""Opens, checks and times engines. It needs only Python 3.8, numpy and the runtime.

thinet_deploy imports it, and every bundle carries a copy of it as run.py, with COMPANIONS beside it: what was measured
while building and what is measured on the device went through the same code.

    python run.py                verify: checksums, then the golden inputs and outputs on every engine
    python run.py latency        milliseconds per engine, with intervals and raw samples (--json)
    python run.py serve          one engine in a process of its own, JSON lines (used by `latency`)
    python run.py trial FILE     networks for a budget of time, in turn (used by `--device`)
"""

from __future__ import annotations

import os
import sys

# The files beside this one that it needs; they are in every bundle too.
COMPANIONS = (
    *("cuda", "engine", "engines", "runner_text", "samples", "self_test", "sensors", "serving", "tensorrt_engine"),
    "turns",
)

if __name__ == "__main__":
    _FOLDER = os.path.dirname(os.path.realpath(__file__))
    if os.path.realpath(sys.path[0]) == _FOLDER:
        del sys.path[0]  # nothing that lies beside this file may stand in for numpy or the standard library
    if _MISSING := [name for name in COMPANIONS if not os.path.exists(os.path.join(_FOLDER, f"{name}.py"))]:
        sys.exit(f"error: {_FOLDER} lacks {'.py, '.join(_MISSING)}.py: copy the whole bundle again.")
    import importlib.machinery
    import importlib.util
    import types

    if importlib.util.find_spec("numpy") is None:
        print(f"error: {sys.executable} has no numpy. Do: {sys.executable} -m pip install numpy", file=sys.stderr)
        sys.exit(3)
    sys.dont_write_bytecode = True  # a bundle stays as it is
    # What is imported from "." comes from this folder, which is a package of its own for that, whatever its name is.
    sys.modules["beside_run"] = types.ModuleType("beside_run")
    sys.modules["beside_run"].__path__ = [_FOLDER]
    __package__, __spec__ = "beside_run", importlib.machinery.ModuleSpec("beside_run.run", None)

import argparse
import contextlib
import functools
import json
import math
import platform
import queue
import random
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import IO, Any, Callable, Mapping, NoReturn, Sequence

from . import samples, sensors
from .engine import MissingRuntimeError, RunnerError, ThrottledError
from .engines import ENGINES, gpus_of
from .runner_text import latency_text, verify_text
from .self_test import PASSED, check_files, each_engine, load_manifest, verify
from .serving import clean_stdout, serve
from .turns import OnTurn, turns

ROUNDS = 15  # turns of every engine; where each has one run, a change with a third of them on either side is seen
TOLD = 20  # every so manieth turn of a trial is told of


class Worker:
    """The parent's side of `serve`: a child process that holds one engine; use it in a `with`.

    One model per process, since several in one can pin each other's threads to the same core.

    Attributes:
        patience_s: how long one answer may take, in seconds, beyond what the work is to take.
    """

    patience_s = 600.0

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        pipe, command = subprocess.PIPE, [sys.executable, str(Path(__file__).resolve()), "serve"]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, encoding="utf-8")
        self._replies: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._replies.put(line)
        self._replies.put("")

    def ask(self, op: str, more_s: float = 0.0, /, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for the reply; RunnerError if it fails, or the child died or hangs.

        Args:
            op: what to do.
            more_s: seconds that the work itself is to take.
            arguments: of it.
        """
        line, patience_s = "", self.patience_s + more_s
        try:
            print(json.dumps({"op": op, **arguments}), file=self.process.stdin, flush=True)
            line = self._replies.get(timeout=patience_s)
        except queue.Empty:
            self._give_up(f"hangs: no answer to {op!r} within {patience_s:g} s")
        except OSError:  # a broken pipe
            pass
        if not line:
            self._give_up(f"ended by itself at {op!r} with code {self.process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise (MissingRuntimeError if reply["missing"] else RunnerError)(reply["error"])
        return reply

    def _give_up(self, what: str) -> NoReturn:
        self._errors.seek(0)
        tail = self._errors.read().decode("utf-8", "replace").strip()[-1000:]
        words = f"Its last words:\n{tail}" if tail else "It left no message; too little memory is the usual reason."
        raise RunnerError(f"The engine's process {what}. {words}")

    def __enter__(self) -> Worker:  # noqa: PYI034 - typing.Self is younger than Python 3.8
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            with contextlib.suppress(OSError):  # a request that was never read
                stream.close()  # type: ignore[union-attr]  # both are pipes


def interleave(
    workers: Mapping[str, Worker],
    rounds: int,
    seconds: float,
    on_round: Callable[[int], object] = lambda _: None,
    fps: float = 0.0,
) -> dict[str, list[list[float]]]:
    """Time opened engines in turn, A B A B …, so that a slow minute of the machine hits all of them.

    Args:
        workers: by name, each with an engine open.
        rounds: how often each has its turn.
        seconds: per engine, warm-up included.
        on_round: told how many rounds are done.
        fps: runs a second; 0 for back to back.

    Returns:
        Per engine the samples in milliseconds of every round.
    """
    counts, turn_s = {}, seconds * 4 / 5 / rounds
    for name, worker in workers.items():
        warm = worker.ask("warm", seconds / 5, seconds=seconds / 5)
        rate = warm["calls"] / warm["seconds"]
        counts[name] = max(1, round(turn_s * (min(rate, fps) if fps else rate)))
    rounds_ms: dict[str, list[list[float]]] = {name: [] for name in workers}
    for number in range(rounds):
        order = sorted(workers)
        random.Random(f"latency:{number}").shuffle(order)  # so that nobody keeps its neighbour
        for name in order:
            rounds_ms[name].append(workers[name].ask("time", turn_s, count=counts[name], fps=fps)["samples_ms"])
        on_round(number + 1)
    return rounds_ms


def measure(
    opened: Mapping[str, tuple[Worker, Mapping[str, Any]]],
    rounds: int,
    seconds: float,
    on_round: Callable[[int], object] = lambda _: None,
    fps: float = 0.0,
) -> dict[str, dict[str, Any]]:
    """`interleave` while the machine's sensors are watched, then what would disturb it: own clocks, memory, energy.

    Args:
        opened: by name, the process and its reply to "open".
        rounds, seconds, on_round, fps: see `interleave`.

    Returns:
        Per engine, JSON-ready: load_ms, first_ms, describe, rounds_ms (all samples), summary (see samples.py), machine
        (see sensors.Watch), clocks_ms by part, launch_ms (None without a GPU), memory, energy (None where no
        sensor is), fps.
    """
    gpus = gpus_of(*(reply["describe"]["runtime"] for _, reply in opened.values()))
    watch = sensors.Watch(gpus=gpus)

    def after_round(done: int) -> None:
        watch.look()
        on_round(done)

    series = interleave({name: worker for name, (worker, _) in opened.items()}, rounds, seconds, after_round, fps)
    machine, meter, rows = watch.summary(), sensors.EnergyMeter(gpus=gpus), {}
    for name, (worker, reply) in opened.items():
        row: dict[str, Any] = {key: reply[key] for key in ("load_ms", "first_ms", "describe")}
        summary = samples.judged(samples.summarize_rounds(series[name], fps), machine, finite=reply["finite"])
        count = min(100, max(3, len(series[name][0])))
        parts = worker.ask("clocks", count / fps if fps else 0.0, count=count, fps=fps)
        summary["warnings"] += samples.launch_warnings(parts["launch_ms"], parts["clocks_ms"].get("compute"))
        row.update(rounds_ms=series[name], summary=summary, machine=machine, fps=fps)
        row.update(clocks_ms=parts["clocks_ms"], launch_ms=parts["launch_ms"], memory=worker.ask("memory")["memory"])
        row["energy"] = meter.measure(functools.partial(_run_for, worker, seconds / 5, fps)) if meter.there else None
        rows[name] = row
    return rows


def _run_for(worker: Worker, seconds: float, fps: float) -> int:
    if fps:
        return len(worker.ask("time", seconds, count=max(1, round(seconds * fps)), fps=fps)["samples_ms"])
    return int(worker.ask("warm", seconds, seconds=seconds)["calls"])


def latency(
    folder: str, batch: int, threads: int, seconds: float, rounds: int = ROUNDS, fps: float = 0.0
) -> dict[str, Any]:
    """Time every usable engine of a bundle in turn, each in a process of its own; JSON-ready, raw samples kept.

    Back to back, and where `fps` says so, in rows of their own, also at so many runs a second.
    """
    manifest = load_manifest(folder)
    files = check_files(folder, manifest["files"])
    opened: dict[str, tuple[Worker, dict[str, Any]]] = {}
    with contextlib.ExitStack() as children:

        def start(path: str, golden: str, engine: Mapping[str, Any]) -> dict[str, Any]:
            worker = children.enter_context(Worker())
            what = {"runtime": engine["runtime"], "path": path, "precision": engine["precision"], "inputs": golden}
            opened[f"{len(opened):03}"] = (worker, worker.ask("open", batch=batch, threads=threads, **what))
            return {"verdict": PASSED, "reason": ""}

        rows, code = each_engine(folder, manifest, files["missing"] + files["changed"], start)
        timed = [list(measure(opened, rounds, seconds, fps=pace).values()) for pace in ([0.0, fps] if fps else [0.0])]
    usable = [row for row in rows if row["verdict"] == PASSED]
    rows += [{**row, **figures} for paced in timed[1:] for row, figures in zip(usable, paced)]
    for row, figures in zip(usable, timed[0]):
        row.update(figures)
    code = code or int(any(row["summary"]["invalid"] for row in rows if row["verdict"] == PASSED))
    how = {"batch": batch, "threads": threads, "seconds": seconds, "rounds": rounds, "fps": fps}
    where = {"processor": processor(), "platform": platform.platform(), "python": platform.python_version()}
    return {"bundle": folder, "model": manifest["model"], **how, **where, "engines": rows, "exit_code": code}


def trial(file: str, on_turn: OnTurn) -> dict[str, Any]:
    """Time what a budget of time asks a device for, by the code that times it where thinet-deploy runs.

    Args:
        file: JSON with `layers`, see `turns`, or with `engines`, see `measure`; their paths are relative to it.
        on_turn: told before every turn of a layer, and after every round of engines.

    Returns:
        JSON-ready: found, which is per layer's network the medians of its turns, or a row for each engine.
    """
    folder, asked = Path(file).resolve().parent, json.loads(Path(file).read_text(encoding="utf-8"))
    with contextlib.ExitStack() as children:
        if "layers" in asked:
            for network in asked["layers"]["networks"].values():
                network["path"] = str(folder / network["path"])
            worker = children.enter_context(Worker())
            return {"found": turns(worker.ask, asked["layers"], on_turn), "exit_code": 0}
        opened: dict[str, tuple[Worker, Mapping[str, Any]]] = {}
        for number, engine in enumerate(asked["engines"]):
            files = {name: str(folder / engine[name]) for name in ("path", "inputs")}
            worker = children.enter_context(Worker())
            opened[f"{number:03}"] = worker, worker.ask("open", **{**engine, **files})
        rounds, seconds = asked["rounds"], asked["seconds"]
        rows = measure(opened, rounds, seconds, lambda done: on_turn(done, rounds, asked["engines"][0]["runtime"]))
        return {"found": list(rows.values()), "exit_code": 0}


def processor() -> str:
    """The board or the processor, in the system's words."""
    for path, key in (("/proc/device-tree/model", ""), ("/proc/cpuinfo", "model name")):
        with contextlib.suppress(OSError):
            lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
            found = [line.split(":")[-1].strip(" \t\0") for line in lines if line.startswith(key)]
            if found:
                return found[0]
    return platform.processor() or platform.machine()


# ------------------------------------------------------------------------------------------ in a shell


def _parser() -> argparse.ArgumentParser:
    about = """Checks and times the engines of this bundle. Needs numpy and one runtime, nothing else.

  python run.py                       is every file whole, does every engine compute what it should?
  python run.py latency --threads 1   how fast is it here?"""
    packages = ", ".join(f"{name} (pip install {engine.package})" for name, engine in ENGINES.items())
    codes = "exit codes: 0 passed, 1 damaged, failed or times that do not hold, 2 wrong usage, 3 nothing could run here"
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, epilog=f"runtimes: {packages}\n{codes}", formatter_class=raw)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    verifying = commands.add_parser("verify", help="checksums, then golden inputs and outputs (the default)")
    timing = commands.add_parser("latency", help="milliseconds per engine, with intervals")
    commands.add_parser("serve", help="used by latency: one engine in this process, JSON lines")
    trying = commands.add_parser("trial", help="used by --device: networks for a budget of time, in turn")
    trying.add_argument("file", metavar="FILE", help="JSON: what to time")
    for command in (verifying, timing):
        here = str(Path(__file__).resolve().parent)
        command.add_argument("--bundle", default=here, metavar="FOLDER", help="default: where this file lies")
        command.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    timing.add_argument("--batch", type=_count, default=1, metavar="N", help="images per run (default 1)")
    timing.add_argument("--threads", type=_count, default=usable_cores(), metavar="N", help="default: all, %(default)s")
    timing.add_argument("--seconds", type=_number, default=5, metavar="N", help="per engine (default 5)")
    timing.add_argument(
        "--rounds", type=_count, default=ROUNDS, metavar="N", help="turns of every engine (default %(default)s)"
    )
    timing.add_argument("--fps", type=_number, default=0, metavar="N", help="also measure at so many runs a second")
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on was expected, not {text!r}")
    return int(text)


def _number(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"a number above 0 was expected, not {text!r}")


def usable_cores() -> int:
    """Cores that this process may use, a container's limit included."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = sensors.cpu_limit()
    return cores if limit is None else max(1, min(cores, math.ceil(limit)))


def main(arguments: Sequence[str]) -> int:
    """The command line; without a command it verifies."""
    if not arguments or arguments[0].startswith(("--json", "--bundle")):
        arguments = ["verify", *arguments]
    asked = _parser().parse_args(arguments)
    if asked.command == "serve":
        return serve()
    out = clean_stdout()
    if asked.command == "trial":
        return _try(asked.file, out)
    try:
        if asked.command == "verify":
            report = verify(asked.bundle)
            text = verify_text(report)
        else:
            report = latency(asked.bundle, asked.batch, asked.threads, asked.seconds, asked.rounds, asked.fps)
            text = "\n\n".join(map(latency_text, _by_pace(report)))
    except RunnerError as error:
        report, text = {"error": str(error), "exit_code": 1}, f"error: {error}"
    print(json.dumps(report) if asked.json else text, file=out, flush=True)
    return int(report["exit_code"])


def _by_pace(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A report of `latency` for each pace: back to back, with what could not run, and the one that was asked for."""
    paces = dict.fromkeys((0.0, report["fps"]))
    return [
        {**report, "fps": pace, "engines": [row for row in report["engines"] if row.get("fps", 0.0) == pace]}
        for pace in paces
    ]


def _try(file: str, out: IO[str]) -> int:
    """`trial`: JSON lines with its progress, then one with what it found."""

    def on_turn(done: int, total: int, what: str) -> None:
        if done % TOLD == 0 or done == total or total < TOLD:  # lines take time from what is being timed
            print(json.dumps({"progress": [done, total, what]}), file=out, flush=True)

    try:
        report = trial(file, on_turn)
    except RunnerError as error:
        codes = {MissingRuntimeError: 3, ThrottledError: 4}
        report = {"error": str(error), "exit_code": codes.get(type(error), 1)}
    print(json.dumps(report), file=out, flush=True)
    return int(report["exit_code"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
