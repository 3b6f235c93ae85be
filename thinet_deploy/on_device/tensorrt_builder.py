"""Builds TensorRT engines from typed ONNX: one file that needs only Python 3.8 and TensorRT 8.5 to 11, or TensorRT-RTX.

The converters use it here; on a device it runs alone, since an engine belongs to the device it was built on:

    python tensorrt_builder.py model.onnx model.engine --precision fp16 --workspace-mb 1024 --cache timing.cache

The ONNX file decides the types from TensorRT 10 on (strongly typed networks; 11 knows no others). TensorRT 8, and the
DLA before 11, take flags instead. Progress goes to stdout as JSON lines, the report comes last; Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

Report = Dict[str, Any]
OnProgress = Callable[[int, int, str], None]
RTX_CAPABILITIES = ("SM80", "SM86", "SM89", "SM120")
MIN_WORKSPACE_MB = 64


class BuildError(Exception):
    """An engine that cannot be built; the message is meant for the user."""


class Settings(NamedTuple):
    """How to build.

    Attributes:
        precision: "fp32", "fp16", "bf16" or "int8".
        batch: smallest, usual and largest batch; all the same for a fixed one.
        workspace_mb: memory that a layer may use while it runs, in MiB; None for all there is.
        guard_mb: memory of this machine that must stay free, in MiB.
        dla_core: which DLA takes the layers that it can; None for the GPU.
        cache: file of the timing cache, read if it is there and written at the end.
        capabilities: GPUs that an engine of TensorRT-RTX is for; not for TensorRT.
    """

    precision: str = "fp32"
    batch: Tuple[int, int, int] = (1, 1, 32)
    workspace_mb: Optional[int] = None
    guard_mb: int = 0
    dla_core: Optional[int] = None
    cache: Optional[Path] = None
    capabilities: Tuple[str, ...] = ()


def build(trt: Any, source: Path, engine: Path, settings: Settings, on_progress: OnProgress) -> Report:
    """Build an engine, look into it where its GPU is here, and write what was found to ENGINE.build.json.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
        source: ONNX file.
        engine: file to write; ENGINE.layers.json beside it is the inspector's output.
        settings: how.
        on_progress: told (steps done, all steps, phase); may come from another thread.

    Raises:
        BuildError: it cannot be built or written; the message has the words of TensorRT, or of the system.
    """
    start, logger = time.time(), _logger(trt)
    _check_dla(trt, settings)
    builder, typed = trt.Builder(logger), is_typed(trt, settings)
    network = builder.create_network(_creation_flags(trt, typed))
    parser = _parse(trt, network, logger, source, settings)
    _fix_batch(network, settings)
    if typed:
        check_types(trt, network, settings.precision)
    config = builder.create_builder_config()
    report = _configure(trt, config, settings, typed)
    _add_profile(builder, network, config, settings)
    if settings.dla_core is not None:
        report["gpu_fallback"] = _use_dla(trt, config, network, settings.dla_core)
        report["dla_core"] = settings.dla_core  # whoever loads the engine has to name it again
    cache = _load_cache(config, settings.cache)
    monitor = _watch(trt, config, on_progress)
    blob = _build(builder, network, config, monitor, logger)
    del parser  # kept until now: the network refers to its weights
    report["timing_cache"] = _save_cache(config, cache, settings.cache)
    report.update(tensorrt=trt.__version__, warnings=list(logger.lines), seconds=round(time.time() - start, 1))
    report["inspected"] = _inspect(trt, logger, blob, engine.with_suffix(".layers.json"), settings.dla_core)
    _write(engine.with_suffix(".build.json"), json.dumps(report, indent=1).encode())
    _write(engine, bytes(blob))  # last: where it is, its reports are
    return report


def major(trt: Any) -> int:
    """The first number of TensorRT's version; TensorRT-RTX counts as 11, whose interface it has."""
    return 11 if is_rtx(trt) else int(trt.__version__.split(".")[0])


def is_rtx(trt: Any) -> bool:
    """Whether this is TensorRT-RTX."""
    return hasattr(trt, "ComputeCapability")


def is_typed(trt: Any, settings: Settings) -> bool:
    """Whether the ONNX file alone decides the types: from 10 on, but for DLAs, which took flags until 11."""
    return major(trt) >= (10 if settings.dla_core is None else 11)


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # the base class is only known now
        """Keeps what TensorRT complains about."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: List[str] = []

        def log(self, severity: Any, message: str) -> None:
            kinds = trt.ILogger.Severity
            if severity in (kinds.INTERNAL_ERROR, kinds.ERROR, kinds.WARNING):
                self.lines.append(message)
                print(message, file=sys.stderr)

    return Logger()


def _said(logger: Any) -> str:
    return " ".join(logger.lines[-3:]) or "TensorRT gave no reason."


def _creation_flags(trt: Any, typed: bool) -> int:
    known = trt.NetworkDefinitionCreationFlag.__members__
    wanted = ["EXPLICIT_BATCH"] if major(trt) == 8 else ["STRONGLY_TYPED"] if typed else []
    return sum(1 << int(known[name]) for name in wanted)


def _parse(trt: Any, network: Any, logger: Any, source: Path, settings: Settings) -> Any:
    parser = trt.OnnxParser(network, logger)
    if settings.dla_core is not None and hasattr(getattr(trt, "OnnxParserFlag", None), "ADJUST_FOR_DLA"):
        parser.set_flag(trt.OnnxParserFlag.ADJUST_FOR_DLA)
    if not parser.parse_from_file(str(source)):
        words = "; ".join(_parser_words(parser.get_error(i)) for i in range(parser.num_errors)) or _said(logger)
        raise BuildError(f"TensorRT {trt.__version__} cannot read {source.name}: {words}")
    return parser


def _parser_words(error: Any) -> str:
    named = f" ({error.node_operator()} {error.node_name()!r})" if hasattr(error, "node_operator") else ""  # from 10 on
    return f"node {error.node()}{named}: {error.desc()}"


def _inputs(network: Any) -> List[Any]:
    return [network.get_input(i) for i in range(network.num_inputs)]


def _layers(network: Any) -> List[Any]:
    return [network.get_layer(i) for i in range(network.num_layers)]


def _fix_batch(network: Any, settings: Settings) -> None:
    if len(set(settings.batch)) == 1:
        for tensor in _inputs(network):
            tensor.shape = (settings.batch[0], *tuple(tensor.shape)[1:])


def check_types(trt: Any, network: Any, precision: str) -> None:
    """Raise BuildError where a strongly typed network holds nothing of the precision asked for: it runs in another."""
    found = {layer.get_output(i).dtype for layer in _layers(network) for i in range(layer.num_outputs)}
    kinds = {"fp16": trt.DataType.HALF, "bf16": getattr(trt.DataType, "BF16", None), "int8": trt.DataType.INT8}
    if precision in kinds and kinds[precision] not in found:
        names = ", ".join(sorted(str(kind).rpartition(".")[2] for kind in found))
        raise BuildError(
            f"{precision} was asked for, but the ONNX file computes in {names} only, and TensorRT {trt.__version__} "
            "takes its types from the file. Convert a file that is typed for it."
        )


def _configure(trt: Any, config: Any, settings: Settings, typed: bool) -> Report:
    if workspace := workspace_mb(settings.workspace_mb, settings.guard_mb, available_mb()):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace << 20)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that the inspector tells types and tactics
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 is to be fp32
    flags = [] if typed else {"fp16": ["FP16"], "bf16": ["BF16"], "int8": ["INT8", "FP16"]}.get(settings.precision, [])
    for name in flags:
        if name not in trt.BuilderFlag.__members__:
            raise BuildError(f"TensorRT {trt.__version__} cannot compute in {settings.precision}.")
        config.set_flag(trt.BuilderFlag.__members__[name])
    if is_rtx(trt):
        _for_gpus(trt, config, settings.capabilities or RTX_CAPABILITIES)
    return {"precision": settings.precision, "strongly_typed": typed, "flags": flags, "workspace_mb": workspace}


def _for_gpus(trt: Any, config: Any, names: Sequence[str]) -> None:
    known = trt.ComputeCapability.__members__
    if unknown := [name for name in names if name not in known]:
        raise BuildError(f"TensorRT-RTX {trt.__version__} knows no {', '.join(unknown)}, only {', '.join(known)}.")
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(known[name], index)


def available_mb() -> Optional[int]:
    """Memory of this machine that is free for the taking, in MiB; None where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) >> 10
    return None


def workspace_mb(asked: Optional[int], guard: int, available: Optional[int]) -> Optional[int]:
    """The workspace to allow: what was asked for, or less where more would not leave `guard` MiB free.

    Raises:
        BuildError: so little is free that a build would take the machine down.
    """
    if not guard or available is None:
        return asked
    room = available - guard
    if room < MIN_WORKSPACE_MB:
        raise BuildError(
            f"Only {available} MiB of memory are free, and {guard} of them are to stay so. Close other programs."
        )
    return min(asked or room, room)


def _add_profile(builder: Any, network: Any, config: Any, settings: Settings) -> None:
    profile, shapes = builder.create_optimization_profile(), {each.name: tuple(each.shape) for each in _inputs(network)}
    dynamic = {name: shape[1:] for name, shape in shapes.items() if shape[0] == -1}
    for name, shape in dynamic.items():
        profile.set_shape(name, *((batch, *shape) for batch in settings.batch))
    if dynamic:
        config.add_optimization_profile(profile)


def _check_dla(trt: Any, settings: Settings) -> None:
    if settings.dla_core is None:
        return
    if len(set(settings.batch)) > 1:
        raise BuildError("A DLA takes one batch size only: give a fixed one.")
    if settings.precision not in ("fp16", "int8") or (settings.precision == "int8" and major(trt) < 11):
        raise BuildError(
            f"The DLA of TensorRT {trt.__version__} cannot be asked for {settings.precision}: it computes in fp16, and "
            "in int8 from Q/DQ files with TensorRT 11 only."
        )


def _use_dla(trt: Any, config: Any, network: Any, core: int) -> List[str]:
    """Send what can run there to the DLA; the names of the layers that stay on the GPU."""
    config.default_device_type, config.DLA_core = trt.DeviceType.DLA, core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    return [layer.name for layer in _layers(network) if not config.can_run_on_DLA(layer)]


def _load_cache(config: Any, path: Optional[Path]) -> str:
    """Attach a timing cache; one of another TensorRT or GPU is not used."""
    if path is None:
        return "none"
    path.parent.mkdir(parents=True, exist_ok=True)  # now, rather than after hours of building
    kept = config.create_timing_cache(path.read_bytes()) if path.exists() else None
    if kept is not None and config.set_timing_cache(kept, False):  # there is none of a damaged file
        return "reused"
    config.set_timing_cache(config.create_timing_cache(b""), False)
    return "new"


def _save_cache(config: Any, state: str, path: Optional[Path]) -> str:
    cache = config.get_timing_cache() if path else None
    if path and cache:
        _write(path, bytes(cache.serialize()))
    return state


def _watch(trt: Any, config: Any, on_progress: OnProgress) -> Any:
    """Attach a progress monitor (TensorRT 10 or later has them); its `stop` ends the build at the next step."""
    stop = threading.Event()
    if not hasattr(trt, "IProgressMonitor"):
        return stop

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # as above
        """Reports the outermost phase's steps and the name of the phase in work."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.root, self.done, self.total = "", 0, 1

        def phase_start(self, phase_name: str, parent_phase: Optional[str], num_steps: int) -> None:
            if not parent_phase:
                self.root, self.total = phase_name, max(num_steps, 1)
            on_progress(self.done, self.total, phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Called by TensorRT; False ends the build."""
            if phase_name == self.root:
                self.done = min(step + 1, self.total)
            return not stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            """Called by TensorRT."""

    config.progress_monitor = Monitor()
    return stop


def _build(builder: Any, network: Any, config: Any, stop: threading.Event, logger: Any) -> Any:
    """Build in a thread, so that Ctrl-C is heard here meanwhile."""
    made: List[Any] = []
    worker = threading.Thread(target=lambda: made.append(builder.build_serialized_network(network, config)))
    worker.start()
    try:
        worker.join()
    except KeyboardInterrupt:
        stop.set()
        worker.join()
        raise
    if not made or made[0] is None:
        raise BuildError(f"TensorRT built no engine: {_said(logger)}")
    return made[0]


def _inspect(trt: Any, logger: Any, blob: Any, path: Path, dla_core: Optional[int]) -> Any:
    """Write the inspector's output; how many layers compute in which type, or why that cannot be known here."""
    try:
        runtime = trt.Runtime(logger)
        if dla_core is not None:
            runtime.DLA_core = dla_core
        engine = runtime.deserialize_cuda_engine(blob)
        inspector = engine.create_engine_inspector() if engine else None
    except Exception as error:  # noqa: BLE001 - the bindings raise types of their own, where there is no driver
        return f"not inspected: {type(error).__name__}: {error}"
    if inspector is None:
        return "not inspected: this machine has no GPU that the engine could run on"
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    _write(path, text.encode())
    return types_of(json.loads(text))


def types_of(information: Any) -> Dict[str, int]:
    """Data types of the first outputs of the inspector's layers, and how many layers have each."""
    layers = [layer for layer in information.get("Layers", []) if isinstance(layer, dict) and layer.get("Outputs")]
    outputs = [layer["Outputs"][0] for layer in layers]
    # The layout is in there until 10; 11 has the type alone.
    return dict(Counter(str(each.get("Format/Datatype") or each.get("Datatype", "unknown")) for each in outputs))


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, also where the power fails."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        with partial.open("r+b") as stream:
            os.fsync(stream.fileno())
        os.replace(str(partial), str(path))
    except OSError as error:
        raise BuildError(
            f"{path} cannot be written: {error.strerror}. Free some space, or name another place."
        ) from error


def main(arguments: Sequence[str]) -> int:
    """The command line: 0 built, 1 not built, 3 no TensorRT, 130 interrupted."""
    parser = argparse.ArgumentParser(description="Builds a TensorRT engine for this device.")
    parser.add_argument("source", type=Path, metavar="ONNX")
    parser.add_argument("engine", type=Path, metavar="ENGINE")
    parser.add_argument("--module", default="tensorrt", choices=["tensorrt", "tensorrt_rtx"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "fp16", "bf16", "int8"])
    parser.add_argument("--batch", type=int, nargs=3, default=(1, 1, 32), metavar=("MIN", "USUAL", "MAX"))
    parser.add_argument("--workspace-mb", type=int)
    parser.add_argument("--guard-mb", type=int, default=0, help="memory that must stay free")
    parser.add_argument("--dla-core", type=int)
    parser.add_argument("--cache", type=Path, help="file of the timing cache")
    asked = vars(parser.parse_args(arguments))
    name, source, engine = asked.pop("module"), asked.pop("source"), asked.pop("engine")

    def say(**fields: Any) -> None:
        print(json.dumps(fields), flush=True)

    try:
        trt = importlib.import_module(name)
        settings = Settings(**{**asked, "batch": tuple(asked["batch"])})
        engine.parent.mkdir(parents=True, exist_ok=True)
        report = build(trt, source, engine, settings, lambda *step: say(progress=step))
    except ImportError as error:
        say(error=f"{name} cannot be imported: {error}")
        return 3
    except (BuildError, OSError) as error:
        say(error=str(error))
        return 1
    except (RuntimeError, TypeError, ValueError) as error:  # how the bindings refuse
        say(error=f"{name} refuses: {error}. Is there a GPU with a driver for it, and may this container use it?")
        return 1
    except KeyboardInterrupt:
        return 130
    say(report=report)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
