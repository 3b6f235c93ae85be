"""What the calibration of `--recipe best` takes beside bare forward passes: VGG-16 at 224, 2x fewer multiplications.

Weights and images are random: neither time nor memory depends on them much. Each case runs in a process of its own,
which lets the network see the calibration images in the same batches before `prune_once` runs on them, and once more
afterwards: both are kept, the ratio is to their mean. Memory is the process's resident set, sampled every 20 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _record import keep, kept
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import nn

from thinet_deploy.data.dataset import ImageSet
from thinet_deploy.data.preprocess import Augment, Preprocess
from thinet_deploy.models.vgg import vgg16, vgg_small
from thinet_deploy.pruning.allocation import Costs, allocate
from thinet_deploy.pruning.budget import Wish
from thinet_deploy.pruning.calibration import Sample
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.layerwise import prunable
from thinet_deploy.pruning.oneshot import Method, prune_once
from thinet_deploy.pruning.trace import example_inputs, named_tensors

SIZE, IMAGES, BATCH = 224, (128, 512, 1024), 4
QUICK_SIZE, QUICK_IMAGES = 32, (16, 32)


def images(count: int, size: int) -> ImageSet:
    """Random pixels, made when they are asked for: the set itself takes no memory."""

    def read(indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        return np.stack([np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8) for i in indices])

    preprocess = Preprocess(
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        resize=(size, size),
        crop=(size, size),
        augment=Augment(),
    )
    return ImageSet(np.arange(count) % 1000, read, preprocess)


def resident_bytes() -> int:
    """Of this process, now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Watch:
    """Peak memory and times of the steps that progress is reported for."""

    peak: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)
    _done: threading.Event = field(default_factory=threading.Event)

    def sample(self) -> None:
        """Until `stop`."""
        while not self._done.wait(0.02):
            self.peak = max(self.peak, resident_bytes())

    def stop(self) -> None:
        """End the sampling."""
        self._done.set()

    def progress(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Time since the last report belongs to the stage, which reports at the begin of each step and at the end."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def seconds_of(model: nn.Module, sample: Sample) -> float:
    """Of the bare forward passes over all images."""
    start = time.perf_counter()
    with torch.inference_mode():
        for _, part in sample.batches():
            model(sample.inputs(part))
    return time.perf_counter() - start


def measure(count: int, size: int) -> dict[str, Any]:
    """One case."""
    torch.manual_seed(0)
    shape = (3, size, size)
    model = (vgg_small if size == QUICK_SIZE else vgg16)(shape).eval()
    sample = Sample(images(count, size), np.arange(count), BATCH, 0)
    with torch.inference_mode():
        model(torch.zeros(BATCH, *shape))  # the first pass chooses kernels
    forward = [seconds_of(model, sample)]
    graph = channel_graph(model, example_inputs(model, shape))
    groups, tensors = prunable(graph), dict(named_tensors(model))
    costs = Costs(tensors, graph, groups)
    wish = Wish(macs=costs({group.name: len(group.channels) for group in groups})[0] / 2)
    watch = Watch()
    before, sampler = resident_bytes(), threading.Thread(target=watch.sample)
    sampler.start()
    start = time.perf_counter()
    done = prune_once(
        model,
        graph,
        groups,
        lambda curves: allocate(costs, groups, curves, wish),
        sample,
        shape,
        Method(),
        watch.progress,
    )
    whole = time.perf_counter() - start
    watch.stop()
    sampler.join()
    forward.append(seconds_of(model, sample))
    return {
        "images": count,
        "size": size,
        "batch": BATCH,
        "threads": torch.get_num_threads(),
        "forward_s": forward,  # before and after
        "calibration_s": whole,
        "steps_s": watch.seconds,
        "ratio": whole / statistics.fmean(forward),
        "memory_before_bytes": before,
        "peak_memory_bytes": watch.peak,
        "widths": done.widths,
        "load_average": os.getloadavg(),
    }


def main() -> None:
    """Run the cases, print a table, keep the samples."""
    parser = argparse.ArgumentParser(description="The calibration's time and memory on VGG-16, random weights.")
    parser.add_argument("--quick", action="store_true", help="a small VGG at 32: shows that it works")
    parser.add_argument("--size", type=int, help="of the images, in pixels")
    parser.add_argument("--images", type=int, nargs="+", help="numbers of them")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    size = given.size or (QUICK_SIZE if given.quick else SIZE)
    if given.case:
        print(json.dumps(measure(given.case, size)))
        return
    usual = not given.quick and not given.size
    rows = kept("calibration", quick=not usual)
    table = Table(
        "images", "forward before, s", "forward after, s", "calibration, s", "ratio", "before, GB", "peak, GB"
    )
    for count in given.images or (QUICK_IMAGES if given.quick else IMAGES):
        command = [sys.executable, __file__, "--case", str(count), "--size", str(size)]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        rows[f"{count} images"] = row
        seconds = *(f"{each:.1f}" for each in row["forward_s"]), f"{row['calibration_s']:.1f}", f"{row['ratio']:.2f}"
        memory = (f"{row[name] / 1e9:.2f}" for name in ("memory_before_bytes", "peak_memory_bytes"))
        table.add_row(str(count), *seconds, *memory)
        print(f"{count} images: {json.dumps(row['steps_s'])}", flush=True)
    Console().print(table)
    print(keep("calibration", {"rows": rows}, quick=not usual))


if __name__ == "__main__":
    main()
