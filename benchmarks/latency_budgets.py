"""Budgets of time for VGG-16-GAP and ResNet-50 at 224 with random weights, 1.5x, 2x and 3x, on each engine.

`thinet-deploy prune --speedup` as a user has it, on images of noise: how near the measured ratio is to the one asked
for, and how much of the multiply-accumulates saved arrives as time saved. Layer times are kept between runs; a case
that is in the results is not run again. No case of full size has been run so far.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _record import keep, kept
from PIL import Image

from thinet_deploy import pipeline
from thinet_deploy.artifact import read_json
from thinet_deploy.errors import GateError, InputError
from thinet_deploy.options import make_options
from thinet_deploy.staircase import RUNTIMES

MODELS, TIMES = ("vgg16", "resnet50"), ("1.5x", "2x", "3x")
TRAIN, TEST, SIDE = 36, 4, 224
PROFILES = Path(__file__).resolve().parents[1] / "profiles"


def noise(root: Path) -> Path:
    """A folder with images of noise in two classes: times do not depend on what is in them."""
    luck = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("val", TEST)):
        for name in ("one", "other"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count // 2):
                pixels = luck.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def target(root: Path, runtime: str) -> Path:
    """The profile `cpu` with one engine only."""
    text = (PROFILES / "cpu.toml").read_text("utf-8")
    path = root / f"{runtime}.toml"
    path.write_text(text.replace('runtimes = ["openvino", "onnxruntime"]', f'runtimes = ["{runtime}"]'), "utf-8")
    return path


def case(root: Path, data: Path | None, model: str, runtime: str, times: str) -> dict[str, Any]:
    """What `prune` reports, or why it refused."""
    given = {"model": model, "data": data, "input_shape": (3, SIDE, SIDE)} if data else {"model": model}
    usual = {"epochs": 0, "calibration_images": 32, "controls": "none"}
    out = root / f"{model}-{runtime}-{times}"
    try:
        options = make_options({**given, **usual, "target": str(target(root, runtime)), "speedup": times, "out": out})
        report = read_json(pipeline.prune(options) / "report.json")
    except (GateError, InputError) as error:
        return {"refused": error.what}
    fewer = report["macs"]["before"] / report["macs"]["after"]
    return {"timing": report["timing"], "fewer_macs": fewer, "realised": report["timing"]["best"]["speedup"] / fewer}


def show(name: str, row: dict[str, Any]) -> None:
    """One line."""
    if "refused" in row:
        print(f"{name}: {row['refused']}", flush=True)
        return
    best, networks = row["timing"]["best"], len(row["timing"]["trials"]) - 1
    print(
        f"{name}: {best['speedup']:.3f}x [{best['low']:.3f}, {best['high']:.3f}] with {networks} networks measured; "
        f"{row['fewer_macs']:.2f}x fewer multiply-accumulates, of which {row['realised']:.2f} arrive",
        flush=True,
    )


def main() -> None:
    """Run the cases that are missing."""
    parser = argparse.ArgumentParser(description="Budgets of time, met and measured.")
    parser.add_argument("--quick", action="store_true", help="a small network, once: shows that it works")
    quick = parser.parse_args().quick
    models, runtimes, times = (("vgg-small",), RUNTIMES[:1], TIMES[:1]) if quick else (MODELS, RUNTIMES, TIMES)
    rows = kept("latency_budgets", quick=quick)
    with tempfile.TemporaryDirectory() as folder:
        data = None if quick else noise(Path(folder, "noise"))
        for model, runtime, ratio in ((m, r, t) for m in models for r in runtimes for t in times):
            name = f"{model} {runtime} {ratio}"
            rows[name] = rows.get(name) or case(Path(folder), data, model, runtime, ratio)
            show(name, rows[name])
            keep("latency_budgets", {"rows": rows}, quick=quick)


if __name__ == "__main__":
    main()
