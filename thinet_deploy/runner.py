"""Opens, checks and times engines. One file that needs only Python 3.8, numpy and the runtime.

thinet_deploy imports it, and every bundle carries a copy of it as run.py: what was measured while
building and what is measured on the device went through the same code.

    python run.py                verify: checksums, then the golden inputs and outputs on every engine
    python run.py latency        milliseconds per engine, with intervals and raw samples (--json)
    python run.py serve          one engine in a process of its own, JSON lines (used by `latency`)
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]  # nothing that lies beside this file may stand in for numpy or the standard library

import abc
import argparse
import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import math
import platform
import queue
import random
import statistics
import subprocess
import tempfile
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, Callable, Iterable, Iterator, Mapping, NoReturn, Sequence

import numpy as np

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

SCHEMA, VERSION = "thinet-deploy/bundle", 1
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
# Files beside this one that timing needs; they are in every bundle too.
COMPANIONS = ("samples", "sensors")


class RunnerError(Exception):
    """An engine or a bundle that cannot be used; the message is meant for the user."""


class MissingRuntimeError(RunnerError):
    """The runtime is not installed; the message names the pip package."""


# --------------------------------------------------------------------------------------------- engines


class Engine(abc.ABC):
    """An engine loaded by its runtime; see `open_engine`. A new runtime is a subclass and a line in ENGINES.

    Attributes:
        package: what pip installs.
        module: what Python imports, where it is called otherwise.
        environment: variables that the runtime reads when it is imported.
        input_names: the names `run` expects.
    """

    package = ""
    module = ""
    environment: Mapping[str, str] = MappingProxyType({})
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

    def clocks_ms(self) -> dict[str, float]:
        """Milliseconds of the last run by the runtime's own clocks, such as compute; empty where it has none."""
        return {}

    def close(self) -> None:
        """Free the engine; it cannot run afterwards."""
        self.__dict__.clear()  # the last references to the runtime's objects


class _OpenVino(Engine):
    """An OpenVINO IR (.xml beside its .bin) on the CPU."""

    package = "openvino"
    # Left alone, a CPU with AVX512_BF16 or AMX computes in bf16. In an INT8 network the quantised
    # layers stay quantised whatever the hint says; it decides about the remaining ones.
    hints = MappingProxyType({"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "f32"})
    compute_layers = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")

    def __init__(self, runtime: Any, path: str, threads: int, precision: str) -> None:
        core, hint = runtime.Core(), self.hints[precision]
        device, version = str(core.get_property("CPU", "FULL_DEVICE_NAME")), str(runtime.__version__)
        self.about = {"runtime": "openvino", "version": version, "device": device, "precision_asked": hint}
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads}
        self.model = core.compile_model(path, "CPU", options)
        self.request = self.model.create_infer_request()
        self.input_names = [port.get_any_name() for port in self.model.inputs]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        results = self.request.infer(dict(inputs))
        # A tensor can have several names; the one that the ONNX file uses is among them.
        return {name: results[i] for i, port in enumerate(self.model.outputs) for name in port.get_names()}

    def clocks_ms(self) -> dict[str, float]:
        return {"compute": float(self.request.latency)}

    def describe(self) -> dict[str, Any]:
        infos = [layer.get_rt_info() for layer in self.model.get_runtime_model().get_ops()]
        layers = [info for info in infos if info["layerType"].value in self.compute_layers]
        executed = Counter(str(info["runtimePrecision"].value) for info in layers)
        in_use = self.model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        threads = int(self.model.get_property("INFERENCE_NUM_THREADS"))
        return {**self.about, "threads": threads, "precision_in_use": in_use, "executed_layers": dict(executed)}


class _OnnxRuntime(Engine):
    """An ONNX or .ort file on ONNX Runtime's CPU provider. It decides the precision; the runtime does not tell."""

    package = "onnxruntime"

    def __init__(self, runtime: Any, path: str, threads: int, precision: str) -> None:
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3  # errors only; warnings would fill the terminal
        # Threads spin inside a run, as an app gets it by default (without, the best runs took 14 % longer),
        # but not after it: an idle engine must not take the cores from the one being timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.input_names = [port.name for port in self.session.get_inputs()]
        self.output_names = [port.name for port in self.session.get_outputs()]
        about = {"runtime": "onnxruntime", "version": str(runtime.__version__), "device": "CPU", "threads": threads}
        self.about = {**about, "precision_asked": precision, "precision_in_use": None, "executed_layers": {}}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return dict(zip(self.output_names, self.session.run(self.output_names, dict(inputs))))

    def describe(self) -> dict[str, Any]:
        return dict(self.about)


class _Ncnn(Engine):
    """An ncnn network (.param beside its .bin) on the CPU."""

    package = "ncnn"
    environment = MappingProxyType({"OMP_WAIT_POLICY": "passive"})  # threads that spin cost up to 250 ms a run

    def __init__(self, runtime: Any, path: str, threads: int, precision: str) -> None:
        self.net, half, brain = runtime.Net(), precision == "fp16", precision == "bf16"
        options = self.net.opt
        options.num_threads = threads
        # Left alone, it would store and compute in fp16 wherever the CPU can.
        options.use_fp16_packed = options.use_fp16_storage = options.use_fp16_arithmetic = half
        options.use_bf16_packed = options.use_bf16_storage = brain
        if self.net.load_param(path) or self.net.load_model(str(Path(path).with_suffix(".bin"))):
            raise RunnerError("it, or the .bin beside it, cannot be read")
        self.input_names, self.output_names = list(self.net.input_names()), list(self.net.output_names())
        self.array, about = runtime.Mat, {"runtime": "ncnn", "version": str(runtime.__version__), "device": "CPU"}
        asked = {"threads": threads, "precision_asked": precision, "precision_in_use": None, "executed_layers": {}}
        self.about = {**about, **asked}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return in_steps(inputs, 1, self._run_one)  # it knows no batch

    def _run_one(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        extractor = self.net.create_extractor()
        for name, array in inputs.items():
            extractor.input(name, self.array(array[0]).clone())
        return {name: np.array(extractor.extract(name)[1])[None] for name in self.output_names}

    def describe(self) -> dict[str, Any]:
        return dict(self.about)


class _LiteRt(Engine):
    """A LiteRT flatbuffer (.tflite) on the CPU, by XNNPACK; it has one batch size."""

    package, module = "ai-edge-litert", "ai_edge_litert.interpreter"

    def __init__(self, runtime: Any, path: str, threads: int, precision: str) -> None:
        self.interpreter = runtime.Interpreter(path, num_threads=threads)
        self.signature = self.interpreter.get_signature_runner()
        details = self.signature.get_input_details()
        self.input_names, self.batch = list(details), int(next(iter(details.values()))["shape"][0])
        about = {"runtime": "litert", "version": _version(self.package), "device": "CPU", "threads": threads}
        self.about = {**about, "precision_asked": precision, "precision_in_use": None, "executed_layers": {}}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return in_steps(inputs, self.batch, lambda part: dict(self.signature(**part)))

    def describe(self) -> dict[str, Any]:
        return dict(self.about)


class _ExecuTorch(Engine):
    """An ExecuTorch program (.pte) on the CPU; it has one batch size, and its names in constant methods."""

    package, module = "executorch", "executorch.runtime"

    def __init__(self, runtime: Any, path: str, threads: int, precision: str) -> None:
        program = runtime.Runtime.get().load_program(path)
        self.method, self.tensor = program.load_method("forward"), importlib.import_module("torch").from_numpy
        read = {name: program.load_method(name).execute([]) for name in ("input_names", "output_names")}
        self.input_names, self.output_names = read["input_names"], read["output_names"][0].split(",")
        self.batch = int(self.method.metadata.input_tensor_meta(0).sizes()[0])
        about = {"runtime": "executorch", "version": _version(self.package), "device": "CPU"}
        # Its Python interface cannot set the threads: it takes one for each core.
        self.about = {**about, "threads": None, "precision_asked": precision, "precision_in_use": None}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return in_steps(inputs, self.batch, self._run_batch)

    def _run_batch(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        results = self.method.execute([self.tensor(inputs[name]) for name in self.input_names])
        return {name: result.numpy().copy() for name, result in zip(self.output_names, results)}

    def describe(self) -> dict[str, Any]:
        return dict(self.about)


def in_steps(
    inputs: Mapping[str, Array], batch: int, run: Callable[[Mapping[str, Array]], dict[str, Array]]
) -> dict[str, Array]:
    """Run an engine that has one batch size on any number of images: the last batch is filled up, and the rest cut."""
    count, parts = len(next(iter(inputs.values()))), []
    for start in range(0, count, batch):
        outputs = run({name: to_batch(array[start : start + batch], batch) for name, array in inputs.items()})
        parts.append({name: array[: count - start] for name, array in outputs.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _version(package: str) -> str:
    return importlib.metadata.version(package)


ENGINES: dict[str, type[Engine]] = {
    "openvino": _OpenVino,
    "onnxruntime": _OnnxRuntime,
    "ort": _OnnxRuntime,  # its own format, and the same runtime
    "ncnn": _Ncnn,
    "litert": _LiteRt,
    "executorch": _ExecuTorch,
}


def import_runtime(runtime: str) -> Any:
    """The runtime's module; MissingRuntimeError says what to install."""
    if runtime not in ENGINES:
        raise MissingRuntimeError(f"This runner has no runtime called {runtime!r}. It knows: {', '.join(ENGINES)}.")
    package = ENGINES[runtime].package
    for name, value in ENGINES[runtime].environment.items():
        os.environ.setdefault(name, value)
    try:
        # OpenVINO reports to its maker when it is imported, from a process of its own; without this module it does not.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # absent
        return importlib.import_module(ENGINES[runtime].module or package)
    except ImportError as error:
        raise MissingRuntimeError(f"{runtime} cannot be imported: {error}. Do: pip install {package}") from error


def open_engine(runtime: str, path: str, threads: int, precision: str = "fp32") -> Engine:
    """Load an engine.

    Args:
        runtime: one of ENGINES.
        path: its main file (.xml, .onnx …).
        threads: CPU threads that one inference may use.
        precision: "fp32", "fp16", "bf16" or "int8": what the engine has to compute in.

    Raises:
        MissingRuntimeError: the runtime is unknown or not installed.
        RunnerError: the file is missing, or the runtime refuses it.
    """
    module, known = import_runtime(runtime), ", ".join(_OpenVino.hints)
    if precision not in _OpenVino.hints:
        raise RunnerError(f"There is no precision {precision!r}; one of {known} was expected.")
    if not Path(path).exists():
        raise RunnerError(f"There is no engine at {path}.")
    try:
        return ENGINES[runtime](module, path, threads, precision)
    except Exception as error:  # runtimes raise types of their own
        raise RunnerError(f"{runtime} refuses {path}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """An error in one line; long messages of runtimes have the reason at their end."""
    if isinstance(error, RunnerError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:300] if lines else 'no message'}"


# ---------------------------------------------------------------------------------------------- timing


def time_run(fn: Callable[[], object], count: int, fps: float = 0.0) -> list[float]:
    """Milliseconds of each of `count` calls, none left out: back to back, or `fps` a second with pauses between.

    In a pause the processor is left alone, as in an app that waits for its camera: clocks fall, caches go cold.
    """
    samples_ms, due = [], time.perf_counter()
    for _ in range(count):
        if fps:
            time.sleep(max(0.0, due - time.perf_counter()))
            due = max(due, time.perf_counter() - 1 / fps) + 1 / fps  # late frames are not made up for
        start = time.perf_counter_ns()
        fn()
        samples_ms.append((time.perf_counter_ns() - start) / 1e6)
    return samples_ms


def warm_up(fn: Callable[[], object], seconds: float) -> int:
    """Call `fn` for `seconds`, at least once; how often it was called."""
    end, calls = time.perf_counter() + seconds, 0
    while calls == 0 or time.perf_counter() < end:
        fn()
        calls += 1
    return calls


# ------------------------------------------------------------------------------ one process per engine


@functools.lru_cache(maxsize=None)
def beside(name: str) -> Any:
    """The module in the file NAME.py beside this one: in the package, and in a bundle, whose folder is not searched."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"_thinet_deploy_{name}", path)
    if spec is None or spec.loader is None or not path.exists():
        raise RunnerError(f"{path} is missing: copy the whole bundle again.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_arrays(path: str, prefix: str) -> dict[str, Array]:
    """The arrays of an .npz whose names start with `prefix` ("input:" or "output:"), without it."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name[len(prefix) :]: archive[name] for name in archive.files if name.startswith(prefix)}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise RunnerError(f"{path} cannot be read as an .npz of arrays: {error}") from error


def to_batch(array: Array, batch: int) -> Array:
    """`array` repeated or cut to `batch` rows."""
    return np.ascontiguousarray(np.take(array, np.arange(batch) % len(array), axis=0))


def clean_stdout() -> IO[str]:
    """The real stdout, for our own words alone: what a runtime prints goes to stderr from now on."""
    sys.stdout.flush()
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


class _Server:
    """The child's side: holds one engine and answers requests."""

    def open(
        self,
        runtime: str,
        path: str,
        threads: int,
        precision: str,
        batch: int,
        inputs: str = "",
        shapes: Mapping[str, Sequence[int]] = MappingProxyType({}),
        seed: int = 0,
    ) -> dict[str, Any]:
        """Load, then run once on `inputs` (an .npz with input:NAME) or on noise of `shapes` (without batch)."""
        import_runtime(runtime)  # is not loading the engine
        noise = np.random.default_rng(seed)
        given = {name: noise.standard_normal([1, *shape]).astype("float32") for name, shape in shapes.items()}
        arrays = {name: to_batch(array, batch) for name, array in (given or load_arrays(inputs, "input:")).items()}
        self.memory_before = beside("sensors").memory_bytes()["now"]
        start = time.perf_counter_ns()
        engine = open_engine(runtime, path, threads, precision)
        load_ms = (time.perf_counter_ns() - start) / 1e6
        self.engine, self.fn = engine, functools.partial(engine.run, arrays)
        reply = {"ok": True, "load_ms": load_ms, "first_ms": time_run(self.fn, 1)[0], "describe": engine.describe()}
        return {**reply, "finite": all(bool(np.isfinite(array).all()) for array in self.fn().values())}

    def warm(self, seconds: float) -> dict[str, Any]:
        start = time.perf_counter()
        calls = warm_up(self.fn, seconds)
        return {"ok": True, "calls": calls, "seconds": time.perf_counter() - start}

    def time(self, count: int, fps: float = 0.0) -> dict[str, Any]:
        return {"ok": True, "samples_ms": time_run(self.fn, count, fps)}

    def clocks(self, count: int) -> dict[str, Any]:
        """Medians of what the runtime's own clocks say, and of what is left of the whole run: the host's share."""
        parts: list[dict[str, float]] = []
        for _ in range(count):
            (total,) = time_run(self.fn, 1)
            own = self.engine.clocks_ms()
            parts.append({**own, "host": max(0.0, total - math.fsum(own.values()))} if own else {})
        return {"ok": True, "clocks_ms": {name: statistics.median(p[name] for p in parts) for name in parts[0]}}

    def memory(self) -> dict[str, Any]:
        """The highest memory of this process, and of the engine: what came on top of Python and the runtime."""
        peak, before = beside("sensors").memory_bytes()["peak"], self.memory_before
        grown = None if peak is None or before is None else peak - before
        return {"ok": True, "memory": {"process_peak_bytes": peak, "engine_bytes": grown}}

    def close(self) -> dict[str, Any]:
        self.engine.close()
        return {"ok": True}


def _requests() -> Iterator[str]:
    """The lines of stdin; when the parent is gone, this process ends in the midst of whatever it does."""
    lines: queue.Queue[str] = queue.Queue()
    parent = os.getppid()

    def listen() -> None:
        for line in sys.stdin:
            lines.put(line)
        lines.put("")
        while os.getppid() == parent:  # the pipe is closed, but the answers may still be read
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    return iter(lines.get, "")


def serve() -> int:
    """Answer JSON lines from stdin until "close" or the end of stdin, so that no child outlives its parent."""
    replies, server, op = clean_stdout(), _Server(), ""
    operations: dict[str, Callable[..., dict[str, Any]]]
    names = ("open", "warm", "time", "clocks", "memory", "close")
    operations = {name: getattr(server, name) for name in names}
    for line in _requests():
        try:
            request = json.loads(line)
            op = request.pop("op")
            reply = operations[op](**request)
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent has to hear of it
            reply = {"error": _reason(error), "missing": isinstance(error, MissingRuntimeError)}
        print(json.dumps(reply), file=replies, flush=True)
        if op == "close":
            break
    return 0


class Worker:
    """The parent's side of `serve`: a child process that holds one engine; use it in a `with`.

    One model per process, since several in one can pin each other's threads to the same core.

    Attributes:
        patience_s: how long one answer may take, in seconds.
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

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for the reply; RunnerError if it fails, or the child died or hangs."""
        line = ""
        try:
            print(json.dumps({"op": op, **arguments}), file=self.process.stdin, flush=True)
            line = self._replies.get(timeout=self.patience_s)
        except queue.Empty:
            self._give_up(f"hangs: no answer to {op!r} within {self.patience_s:g} s")
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
    counts = {}
    for name, worker in workers.items():
        warm = worker.ask("warm", seconds=seconds / 5)
        rate = warm["calls"] / warm["seconds"]
        counts[name] = max(1, round(seconds * 4 / 5 / rounds * (min(rate, fps) if fps else rate)))
    rounds_ms: dict[str, list[list[float]]] = {name: [] for name in workers}
    for number in range(rounds):
        order = sorted(workers)
        random.Random(f"latency:{number}").shuffle(order)  # so that nobody keeps its neighbour
        for name in order:
            rounds_ms[name].append(workers[name].ask("time", count=counts[name], fps=fps)["samples_ms"])
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
        (see sensors.Watch), clocks_ms by part, memory, energy (None where no sensor is), fps.
    """
    samples, sensors = beside("samples"), beside("sensors")
    watch = sensors.Watch()

    def after_round(done: int) -> None:
        watch.look()
        on_round(done)

    series = interleave({name: worker for name, (worker, _) in opened.items()}, rounds, seconds, after_round, fps)
    machine, meter, rows = watch.summary(), sensors.EnergyMeter(), {}
    for name, (worker, reply) in opened.items():
        row: dict[str, Any] = {key: reply[key] for key in ("load_ms", "first_ms", "describe")}
        summary = samples.judged(samples.summarize_rounds(series[name], fps), machine, finite=reply["finite"])
        count = min(100, max(1, len(series[name][0])))
        row.update(rounds_ms=series[name], summary=summary, machine=machine, fps=fps)
        row.update(clocks_ms=worker.ask("clocks", count=count)["clocks_ms"], memory=worker.ask("memory")["memory"])
        row["energy"] = meter.measure(functools.partial(_run_for, worker, seconds / 5)) if meter.there else None
        rows[name] = row
    return rows


def _run_for(worker: Worker, seconds: float) -> int:
    return int(worker.ask("warm", seconds=seconds)["calls"])


# ---------------------------------------------------------------------------------------------- bundle


def compare_outputs(expected: Mapping[str, Array], got: Mapping[str, Array], tolerance: float) -> dict[str, Any]:
    """Compare outputs by name; `passed` when no value is off by more than `tolerance` × max|expected|.

    Returns:
        passed, tolerance, max_abs_error, max_relative_error (to that scale), top1_agreement (share of equal
        argmax, over 2-D outputs only), each the worst over all outputs; `problem` says in words why it failed.
        Where nothing can be compared (an output is missing, NaN) there are no errors, only the problem.
    """
    failed = {"passed": False, "tolerance": tolerance}
    if not expected:
        return {**failed, "problem": "there is nothing to compare"}
    result: dict[str, Any] = {"passed": True, "tolerance": tolerance, "max_abs_error": 0.0, "max_relative_error": 0.0}
    for name, want in expected.items():
        have = got.get(name)
        if have is None or have.shape != want.shape:
            shape = "missing" if have is None else f"of shape {have.shape}"
            return {**failed, "problem": f"output {name!r} is {shape}, expected {want.shape}"}
        exact, value = want.astype("float64"), have.astype("float64")
        if not (np.isfinite(exact).all() and np.isfinite(value).all()):
            return {**failed, "problem": f"output {name!r} holds NaN or infinity"}
        error, scale = float(np.abs(value - exact).max(initial=0)), float(np.abs(exact).max(initial=0))
        result["max_abs_error"] = max(result["max_abs_error"], error)
        result["max_relative_error"] = max(result["max_relative_error"], error / (scale or 1.0))
        if want.ndim == 2 and want.size:
            agreement = float((exact.argmax(1) == value.argmax(1)).mean())
            result["top1_agreement"] = min(result.get("top1_agreement", 1.0), agreement)
    off = result["max_relative_error"]
    if not off <= tolerance:
        result.update(passed=False, problem=f"outputs are off by {off:.2g} of their scale, allowed {tolerance:g}")
    return result


def load_manifest(folder: str) -> dict[str, Any]:
    """manifest.json of a bundle, checked as far as this file relies on it; RunnerError if it is damaged."""
    path = Path(folder, "manifest.json")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        _check_manifest(manifest)
    except FileNotFoundError:
        raise RunnerError(
            f"There is no manifest.json in {folder}: copy the whole bundle, or name it with --bundle."
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        raise RunnerError(f"{path} is damaged or not ours: {why}. Copy the bundle again.") from error
    return dict(manifest)


def _check_manifest(manifest: Any) -> None:
    if (manifest["schema"], manifest["version"]) != (SCHEMA, VERSION):
        found = f"{manifest['schema']!r} version {manifest['version']!r}"
        raise ValueError(f"it is {found}, this run.py reads {SCHEMA!r} version {VERSION}")
    texts = [manifest[key] for key in ("model", "target", "created_by")] + [manifest["golden"]["path"]]
    texts += [*manifest["files"], *manifest["files"].values(), *manifest["notes"]]
    texts += [engine[key] for engine in manifest["engines"] for key in ("runtime", "path", "precision")]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("something in it should be text and is not")
    if not all(isinstance(engine["tolerance"], (int, float)) for engine in manifest["engines"]):
        raise ValueError("a tolerance is not a number")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex; "" if it cannot be read."""
    digest = hashlib.sha256()
    with contextlib.suppress(OSError), path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
        return digest.hexdigest()
    return ""


def check_files(folder: str, listed: Mapping[str, str]) -> dict[str, list[str]]:
    """Names of files that are missing, changed, or extra (not in the manifest; never used, so they harm nothing)."""
    paths = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if not path.is_dir()}
    missing = sorted(set(listed) - set(paths))  # also every name that leads out of the folder
    changed = sorted(name for name in set(listed) & set(paths) if sha256_of(paths[name]) != listed[name])
    return {"missing": missing, "changed": changed, "extra": sorted(set(paths) - set(listed) - {"manifest.json"})}


def _why_unusable(engine: Mapping[str, str], manifest: Mapping[str, Any], damaged: Iterable[str]) -> str:
    """Why an engine must not be loaded, or "". Loading runs native code: only on what the manifest vouches for."""
    main, golden, listed = engine["path"], manifest["golden"]["path"], manifest["files"]
    own = (main.rpartition(".")[0] + ".", main + "/")  # an .xml's .bin, an .onnx's .data; a folder's content
    bad = [name for name in damaged if name in (main, golden) or name.startswith(own)]
    if bad:
        return f"not loaded, damaged: {', '.join(bad)}"
    known = golden in listed and any(name == main or name.startswith(own[1]) for name in listed)
    return "" if known else f"not loaded, {main} or {golden} has no checksum in the manifest"


def _examine(path: str, golden: str, engine: Mapping[str, Any]) -> dict[str, Any]:
    """Run the golden inputs on one engine."""
    opened = open_engine(engine["runtime"], path, 1, engine["precision"])
    got, about = opened.run(load_arrays(golden, "input:")), opened.describe()
    opened.close()
    result = compare_outputs(load_arrays(golden, "output:"), got, float(engine["tolerance"]))
    verdict = PASSED if result.pop("passed") else FAILED
    return {"verdict": verdict, "reason": result.pop("problem", ""), **result, "describe": about}


def _each_engine(
    folder: str, manifest: Mapping[str, Any], damaged: Sequence[str], examine: Callable[..., dict[str, Any]]
) -> tuple[list[dict[str, Any]], int]:
    """A row with verdict and reason per engine, and the exit code: 0 passed, 1 damaged or failed, 3 nothing ran."""
    rows, golden = [], str(Path(folder, manifest["golden"]["path"]))
    for engine in manifest["engines"]:
        path = str(Path(folder, engine["path"]))
        row = {key: engine[key] for key in ("runtime", "precision", "path")}
        reason = _why_unusable(engine, manifest, damaged)
        try:
            result = {"verdict": FAILED, "reason": reason} if reason else examine(path, golden, engine)
        except MissingRuntimeError as error:
            result = {"verdict": NOT_RUN, "reason": str(error)}
        except Exception as error:  # noqa: BLE001 - runtimes raise types of their own
            result = {"verdict": FAILED, "reason": _reason(error)}
        rows.append({**row, **result})
    verdicts = {row["verdict"] for row in rows}
    return rows, 1 if damaged or FAILED in verdicts else 0 if PASSED in verdicts else 3


def verify(folder: str) -> dict[str, Any]:
    """Check every file of a bundle and run every engine whose runtime is here; JSON-ready, with `exit_code`."""
    manifest = load_manifest(folder)
    files = check_files(folder, manifest["files"])
    rows, code = _each_engine(folder, manifest, files["missing"] + files["changed"], _examine)
    about = {key: manifest[key] for key in ("model", "target", "created_by", "notes")}
    counted = {"listed": len(manifest["files"]), **files}
    return {"bundle": folder, **about, "files": counted, "engines": rows, "exit_code": code}


def latency(folder: str, batch: int, threads: int, seconds: float, rounds: int = 9, fps: float = 0.0) -> dict[str, Any]:
    """Time every usable engine of a bundle in turn, each in a process of its own; JSON-ready, raw samples kept."""
    manifest = load_manifest(folder)
    files = check_files(folder, manifest["files"])
    opened: dict[str, tuple[Worker, dict[str, Any]]] = {}
    with contextlib.ExitStack() as children:

        def start(path: str, golden: str, engine: Mapping[str, Any]) -> dict[str, Any]:
            worker = children.enter_context(Worker())
            what = {"runtime": engine["runtime"], "path": path, "precision": engine["precision"], "inputs": golden}
            opened[f"{len(opened):03}"] = (worker, worker.ask("open", batch=batch, threads=threads, **what))
            return {"verdict": PASSED, "reason": ""}

        rows, code = _each_engine(folder, manifest, files["missing"] + files["changed"], start)
        timed = measure(opened, rounds, seconds, fps=fps)
    for row, figures in zip((row for row in rows if row["verdict"] == PASSED), timed.values()):
        row.update(figures)
    how = {"batch": batch, "threads": threads, "seconds": seconds, "rounds": rounds, "fps": fps}
    where = {"processor": processor(), "platform": platform.platform(), "python": platform.python_version()}
    return {"bundle": folder, "model": manifest["model"], **how, **where, "engines": rows, "exit_code": code}


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


def _engine_lines(row: Mapping[str, Any], text: str, notes: Iterable[str]) -> list[str]:
    name = f"{row['runtime']} {row['precision']}"
    return [f"{name:<18}{text}".rstrip(), *(f"{'':<18}{note}" for note in notes if note)]


def verify_text(report: Mapping[str, Any]) -> str:
    """The report of `verify` as people read it."""
    files, rows = report["files"], report["engines"]
    good = files["listed"] - len(files["missing"]) - len(files["changed"])
    lines = [f"{report['model']} for {report['target']}, made by {report['created_by']}"]
    lines += [f"{good} of {files['listed']} files are as the manifest says"]
    lines += [f"  {kind}: {', '.join(files[kind])}" for kind in ("missing", "changed", "extra") if files[kind]]
    for row in rows:
        figures = (
            [f"error {row['max_relative_error']:.1e} of scale (allowed {row['tolerance']:g})"]
            if "max_relative_error" in row
            else []
        )
        figures += [f"top-1 agrees in {row['top1_agreement']:.0%}"] if "top1_agreement" in row else []
        executed = row.get("describe", {}).get("executed_layers", {})
        figures += [f"layers run in {kind}: {count}" for kind, count in sorted(executed.items())]
        lines += _engine_lines(row, f"{row['verdict']:<9}{', '.join(figures)}", [row["reason"]])
    passed = sum(row["verdict"] == PASSED for row in rows)
    verdicts = {
        0: f"PASSED: {passed} of {len(rows)} engines ran here and gave the golden outputs.",
        1: "FAILED: do not ship this bundle. Copy it again, or build it again.",
        3: f"NOT VERIFIED: the files are whole, but none of {len(rows)} engines could run here.",
    }
    return "\n".join([*lines, *(f"note: {note}" for note in report["notes"]), verdicts[report["exit_code"]]])


def _latency_text(report: Mapping[str, Any]) -> str:
    pace = "{fps:g} a second".format(**report) if report["fps"] else "back to back"
    lines = ["{model} on {processor}, batch {batch}, threads {threads}".format(**report)]
    lines += [f"milliseconds per run; 95 % interval; engines in turn, one process each, runs {pace}"]
    for row in report["engines"]:
        text, notes = row["verdict"], [row["reason"]]
        if row["verdict"] == PASSED:
            text, notes = latency_words(row), latency_notes(row)
        lines += _engine_lines(row, text, notes)
    return "\n".join(lines)


def latency_words(row: Mapping[str, Any]) -> str:
    """One engine's figures in a line: median, interval, percentiles, load, first run, parts, memory, energy."""
    summary, memory = row["summary"], row["memory"]
    known = {"min": summary["min_ms"], **summary["percentiles_ms"], "load": row["load_ms"], "first": row["first_ms"]}
    known.update(row["clocks_ms"])
    text = f"median {summary['median_ms']:.4g}"
    if summary["interval_ms"]:
        text += " [{:.4g} .. {:.4g}]".format(*summary["interval_ms"])
    text += "".join(f"  {name} {value:.4g}" for name, value in known.items()) + f"  ({summary['n']} runs)"
    if memory["engine_bytes"] is not None:
        text += f"  memory {memory['engine_bytes'] / 2**20:.1f} MB"
    joules = row["energy"]["joules_per_run"] if row["energy"] else {}
    return text + "".join(f"  {sensor} {1000 * energy:.4g} mJ" for sensor, energy in joules.items())


def latency_notes(row: Mapping[str, Any]) -> list[str]:
    """What has to be known beside an engine's figures."""
    summary = row["summary"]
    return [*(f"INVALID because {reason}" for reason in summary["invalid"]), *summary["warnings"]]


def _parser() -> argparse.ArgumentParser:
    about = """Checks and times the engines of this bundle. Needs numpy and one runtime, nothing else.

  python run.py                       is every file whole, does every engine compute what it should?
  python run.py latency --threads 1   how fast is it here?"""
    packages = ", ".join(f"{name} (pip install {engine.package})" for name, engine in ENGINES.items())
    codes = "exit codes: 0 passed, 1 damaged or failed, 2 wrong usage, 3 nothing could run here"
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, epilog=f"runtimes: {packages}\n{codes}", formatter_class=raw)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    verifying = commands.add_parser("verify", help="checksums, then golden inputs and outputs (the default)")
    timing = commands.add_parser("latency", help="milliseconds per engine, with intervals")
    commands.add_parser("serve", help="used by latency: one engine in this process, JSON lines")
    for command in (verifying, timing):
        here = str(Path(__file__).resolve().parent)
        command.add_argument("--bundle", default=here, metavar="FOLDER", help="default: where this file lies")
        command.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    timing.add_argument("--batch", type=_count, default=1, metavar="N", help="images per run (default 1)")
    timing.add_argument("--threads", type=_count, default=usable_cores(), metavar="N", help="default: all, %(default)s")
    timing.add_argument("--seconds", type=_count, default=5, metavar="N", help="per engine (default 5)")
    timing.add_argument("--fps", type=_count, default=0, metavar="N", help="runs a second (default: back to back)")
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on was expected, not {text!r}")
    return int(text)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(arguments: Sequence[str]) -> int:
    """The command line; without a command it verifies."""
    if not arguments or arguments[0].startswith(("--json", "--bundle")):
        arguments = ["verify", *arguments]
    asked = _parser().parse_args(arguments)
    if asked.command == "serve":
        return serve()
    out = clean_stdout()
    try:
        if asked.command == "verify":
            report = verify(asked.bundle)
            text = verify_text(report)
        else:
            report = latency(asked.bundle, asked.batch, asked.threads, asked.seconds, fps=asked.fps)
            text = _latency_text(report)
    except RunnerError as error:
        report, text = {"error": str(error), "exit_code": 1}, f"error: {error}"
    print(json.dumps(report) if asked.json else text, file=out, flush=True)
    return int(report["exit_code"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
