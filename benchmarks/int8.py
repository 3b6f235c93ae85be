"""INT8 of dense and of pruned networks: accuracy in fp32 and in INT8, with and without refitted weights, and latency.

On the trained ResNet-20 and the CIFAR VGG with and without BatchNorm; pruned ones have half of the multiply-accumulates
and were not trained afterwards. All choices are made on held-out training images; what is told is the accuracy on test
images. Times are of the engines that a build makes, all four of a network in turn. Rows are kept as they come.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from _ours import pruned
from _record import keep, kept
from _trained import NETWORKS, cifar10, missing
from onnx import ModelProto
from rich.console import Console
from rich.table import Table
from torch import nn

from thinet_deploy import registry
from thinet_deploy.counting import count
from thinet_deploy.data.dataset import Dataset
from thinet_deploy.environment import fingerprint
from thinet_deploy.export import INPUT, export_onnx
from thinet_deploy.interfaces import Conversion, Precision
from thinet_deploy.intervals import accuracy_interval, difference_interval
from thinet_deploy.precision.accuracy_gate import Judge, quantise_within, speaking
from thinet_deploy.precision.calibration import Floats, limits, observe
from thinet_deploy.precision.graph import read_onnx
from thinet_deploy.precision.int8 import quantise
from thinet_deploy.precision.plan import plan_precision
from thinet_deploy.pruning.budget import Wish
from thinet_deploy.pruning.oneshot import Method
from thinet_deploy.stages.job import HELD_OUT
from thinet_deploy.target import load_profile
from thinet_deploy.timing import latency

RUNTIMES = ("openvino", "onnxruntime")
KINDS = ("dense", "pruned")
TEST_IMAGES = 2000
CALIBRATION_IMAGES, JUDGING_IMAGES = 300, 500  # as a build has them
MAX_DROP = 1.0
ROUNDS, SECONDS = 15, 1.0
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")


def network(name: str, kind: str, data: Dataset) -> nn.Module:
    """The trained network, or what pruning to half of its multiply-accumulates leaves of it."""
    model = NETWORKS[name]()
    if kind == "dense":
        return model
    macs = count(model, data.preprocess.input_shape).macs // 2
    return pruned(model, data, Wish(macs=macs), Method(), allocated=True).eval()


def row(name: str, data: Dataset, folder: Path, *, quick: bool) -> dict[str, Any]:
    """A network and the pruned one, in fp32 and in INT8."""
    kinds = {}
    for kind in KINDS[:1] if quick else KINDS:
        (folder / kind).mkdir()
        kinds[kind] = quantised(network(name, kind, data), data, folder / kind)
        print(f"{name}, {kind}: {kinds[kind]['top1']}, {kinds[kind]['judged']['kept']}", flush=True)
    return {"networks": kinds, "latency": times(folder, list(kinds), data, quick=quick)}


def quantised(model: nn.Module, data: Dataset, folder: Path) -> dict[str, Any]:
    """One network in fp32 and in INT8: weights rounded to the nearest, and refitted, as a build has them."""
    export_onnx(model, data.preprocess.input_shape, folder / "fp32.onnx", opset=20, ir_version=9)
    source = read_onnx(folder / "fp32.onnx")
    fit, held_out = data.train.split(HELD_OUT, 0)
    chosen = fit.sample(CALIBRATION_IMAGES, seed=0, stage="precision")
    judged = held_out.sample(JUDGING_IMAGES, seed=0, stage="precision")

    def batches() -> Iterator[Floats]:
        for start in range(0, len(chosen), 64):
            yield fit.inputs(chosen[start : start + 64])

    layout = plan_precision(load_profile("cpu"), "int8", fingerprint()["cpu"]["flags"]).layout
    values, judge = observe(source, batches), Judge(held_out.inputs(judged), held_out.labels[judged])
    done = quantise_within(source, values, layout, judge, MAX_DROP, batches)
    onnx.save(done.model, folder / "int8.onnx")
    found = {tensor: limits(each, done.method) for tensor, each in values.items()}
    files = {"fp32": source, "int8, nearest": quantise(source, found, layout, keep=done.kept), "int8": done.model}
    told = {key: value for key, value in vars(done).items() if key != "model"}
    sizes = {precision: (folder / f"{precision}.onnx").stat().st_size for precision in PRECISIONS}
    return {"layout": layout.name, "judged": told, "size_bytes": sizes, **tested(files, data)}


def tested(files: dict[str, ModelProto], data: Dataset) -> dict[str, Any]:
    """Top-1 on test images, the drop against fp32 image by image, and the raw results as bits."""
    chosen = np.linspace(0, len(data.test) - 1, min(TEST_IMAGES, len(data.test))).astype(np.int64)
    inputs, labels = data.test.inputs(chosen), data.test.labels[chosen]
    right = {name: speaking(each, literal=False)(inputs).argmax(1) == labels for name, each in files.items()}
    top1 = {name: asdict(accuracy_interval(int(each.sum()), len(each))) for name, each in right.items()}
    drop = {name: asdict(difference_interval(right["fp32"], each)) for name, each in right.items() if name != "fp32"}
    return {"top1": top1, "drop": drop, "right": {n: np.packbits(each).tobytes().hex() for n, each in right.items()}}


def times(folder: Path, kinds: list[str], data: Dataset, *, quick: bool) -> dict[str, Any]:
    """Raw samples of each engine, one thread, all of a runtime in turn; the dense one in fp32 is the baseline."""
    refs = []
    for runtime, kind, precision in product(RUNTIMES, kinds, PRECISIONS):
        source, place = folder / kind / f"{precision}.onnx", folder / f"{runtime}-{kind}-{precision}"
        place.mkdir()
        artifact = registry.convert(runtime, Conversion(source, place, precision), place)
        name = latency.BASELINE if (kind, precision) == ("dense", "fp32") else f"{kind} {precision}"
        refs.append(latency.EngineRef(name, runtime, place / artifact.path, precision))
    rounds, seconds = (3, 0.2) if quick else (ROUNDS, SECONDS)
    image = data.test.inputs(np.arange(1))
    rows = latency.measure_engines(refs, {INPUT: image}, threads=1, rounds=rounds, seconds=seconds)
    return {f"{each.model}, {each.runtime}": {**asdict(each), "path": ""} for each in rows}


def show(rows: dict[str, Any]) -> None:
    """The tables: accuracy, then times."""
    columns = ("fp32", "int8, nearest", "int8", "drop (95 %)", "refitted layers", "layers in fp32")
    table = Table("network", *columns, title=f"top-1 on {TEST_IMAGES:,} test images, %")
    timed = Table("network", "engine", "ms", "times faster than dense in fp32 (95 %)")
    for name, found in rows.items():
        for kind, each in found["networks"].items():
            drop, judged = each["drop"]["int8"], each["judged"]
            figures = [f"{each['top1'][column]['value']:.2f}" for column in columns[:3]]
            figures.append(f"{drop['value']:+.2f} ({drop['low']:+.2f} … {drop['high']:+.2f})")
            table.add_row(f"{name}, {kind}", *figures, str(len(judged["refitted"])), ", ".join(judged["kept"].values()))
        for engine, each in found["latency"].items():
            gain = each["speedup"] or {"ratio": 1.0, "low": None, "high": None}
            spread = f" ({gain['low']:.2f} … {gain['high']:.2f})" if gain["low"] else ""
            timed.add_row(
                name, engine, f"{each['samples']['summary']['median_ms']:.3f}", f"{gain['ratio']:.2f}{spread}"
            )
    for each in (table, timed):
        Console(width=150).print(each)


def main() -> None:
    """Measure the networks that are missing, and show all."""
    parser = argparse.ArgumentParser(description="INT8 of dense and of pruned networks.")
    parser.add_argument("--quick", action="store_true", help="one network: shows that it works")
    parser.add_argument("--network", choices=list(NETWORKS), help="one of them")
    given = parser.parse_args()
    if absent := missing():
        print(f"int8: skipped, {absent}")
        return
    data, rows = cifar10(), kept("int8", quick=given.quick)
    for name in [given.network] if given.network else ["resnet20"] if given.quick else NETWORKS:
        if name not in rows:
            with tempfile.TemporaryDirectory() as folder:
                rows[name] = row(name, data, Path(folder), quick=given.quick)
            keep("int8", {"threads": 1, "max_drop": MAX_DROP, "rows": rows}, quick=given.quick)
    show(rows)


if __name__ == "__main__":
    main()
