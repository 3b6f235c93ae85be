"""Where an engine's time goes, layer by layer, by the runtime's own profile.

For the report only: a profile slows down what it looks at, and what is fused into a layer counts as the layer's.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx import ModelProto

from ..errors import MissingError, ThinetDeployError, first_line
from ..export import INPUT
from ..interfaces import Array, Precision
from ..on_device.engine import MissingRuntimeError
from ..on_device.engines import import_runtime
from ..precision.executed import owners_of, plain_name
from ..precision.graph import layers

# Left alone, OpenVINO chooses a type itself; quantised layers stay quantised.
_HINTS: Mapping[Precision, str] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "f32"}
RUNS, ENGINES = 20, 3
OTHERS = "all other operations"
Times = dict[tuple[str, ...], float]  # names that a kernel goes by → milliseconds


def layer_times(
    runtime: str, path: Path, precision: Precision, source: ModelProto, image: Array, threads: int
) -> dict[str, float]:
    """Milliseconds of an engine's layers, as its runtime tells.

    Args:
        runtime: one of `PROFILES`.
        path: the engine's main file.
        precision: that it computes in.
        source: the float32 network that it goes back to, whose nodes have names.
        image: (1, channels, height, width).
        threads: CPU threads.

    Returns:
        Layer → milliseconds, in the network's order; what is no layer's comes last, under `OTHERS`.

    Raises:
        MissingError: the runtime is not installed.
        ThinetDeployError: the engine cannot be opened or run.
    """
    try:
        kernels = PROFILES[runtime](path, precision, image, threads)
    except MissingRuntimeError as error:
        raise MissingError(str(error), hint="`thinet-deploy doctor` shows what is installed.") from error
    except Exception as error:  # runtimes raise types of their own
        raise ThinetDeployError(
            f"{path} cannot be profiled: {first_line(error)}", hint="Convert it again; the file may be damaged."
        ) from error
    return _by_layer(source, kernels)


def _by_layer(source: ModelProto, kernels: Mapping[tuple[str, ...], float]) -> dict[str, float]:
    owners, names = owners_of(source), {each.node: each.name for each in layers(source)}
    found = dict.fromkeys(names.values(), 0.0)
    for called, ms in kernels.items():
        mine = [names[node] for name in called for node in owners.get(name, ()) if node in names]
        layer = mine[0] if mine else OTHERS
        found[layer] = found.get(layer, 0.0) + ms
    # A layer without time of its own has been folded into another one.
    return {name: ms for name, ms in found.items() if ms}


def _openvino(path: Path, precision: Precision, image: Array, threads: int) -> Times:
    """From the profile of each run but the first; of several engines, lest one disturbed compilation decides."""
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "PERF_COUNT": True}
    options["INFERENCE_PRECISION_HINT"] = _HINTS[precision]
    core, found = import_runtime("openvino").Core(), defaultdict[tuple[str, ...], list[float]](list)
    for _ in range(ENGINES):
        model = core.compile_model(str(path), "CPU", options)
        request = model.create_infer_request()
        kernels, runs = _kernels(model), list[Times]()
        for _ in range(RUNS):
            request.infer({INPUT: image})
            took: Times = defaultdict(float)
            for each in request.profiling_info:
                took[kernels.get(each.node_name, ())] += each.real_time.total_seconds() * 1000
            runs.append(took)
        for names in runs[0]:
            found[names].append(_middle([took[names] for took in runs[1:]]))
    return {names: statistics.median(values) for names, values in found.items()}


def _kernels(model: Any) -> dict[str, tuple[str, ...]]:
    """A compiled model's kernels, and the names of the layers that went into each."""
    found = {}
    for kernel in model.get_runtime_model().get_ops():
        layers_in = str(kernel.get_rt_info()["originalLayersNames"].value).split(",")
        found[kernel.get_friendly_name()] = tuple(plain_name(name) for name in layers_in)
    return found


def _middle(values: Sequence[float]) -> float:
    """The mean of the middle half: the profile counts in whole microseconds, which a median would keep."""
    part = len(values) // 4
    return statistics.mean(sorted(values)[part : len(values) - part])


def _onnxruntime(path: Path, precision: Precision, image: Array, threads: int) -> Times:
    """From the profile that a session writes: every run of every kernel."""
    del precision  # is in the file
    runtime = import_runtime("onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        options = runtime.SessionOptions()
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level, options.intra_op_num_threads = 3, threads
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder, "run"))
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for _ in range(RUNS):
            session.run(None, {INPUT: image})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    took: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            took[event["name"].removesuffix("_kernel_time")].append(event["dur"] / 1000)
    return {(plain_name(name),): _of_runs(values) for name, values in took.items()}


def _of_runs(values: Sequence[float]) -> float:
    """The median of all but the first run, which may be slower; a kernel may be called several times in each."""
    calls = math.ceil(len(values) / RUNS)
    return calls * statistics.median(values[calls:] or values)


PROFILES: dict[str, Callable[[Path, Precision, Array, int], Times]] = {
    "openvino": _openvino,
    "onnxruntime": _onnxruntime,
}
