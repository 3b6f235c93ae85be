"""Every converter on four small networks: is the engine right, how large is it, what does the delegate leave out?

Makes docs/engines.md. Networks have random weights; images are noise.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _deployed import INPUT_SHAPE, networks
from _record import keep
from torch import nn

from thinet_deploy import registry
from thinet_deploy.engines import can_run, open_engine
from thinet_deploy.errors import ThinetDeployError
from thinet_deploy.export import INPUT, OUTPUT, export_onnx, export_program
from thinet_deploy.interfaces import Conversion
from thinet_deploy.verify import ALLOWANCE, compare, rounding_noise, tolerance

PAGE = Path(__file__).parent.parent / "docs" / "engines.md"
QUICK = ("openvino", "onnxruntime", "ort")
IMAGES = 64
TEXT = """# Engines

Made by `python benchmarks/engines.py` on {machine}; do not edit.

Four small networks for 32×32 images, in fp32, each through every converter.

- The error is the largest difference from torch over {images} images, relative to the largest output; behind it what is
  allowed, {allowance} times the network's own rounding noise.
- The size is that of all files that the converter wrote.
- Delegated is what the mobile runtimes' fast kernels (XNNPACK) take.

{table}

- TensorRT: not built. Its library could not be had, and an engine belongs to the device that it is built on. Names and
  signatures are checked on the bindings of 8.6, 10.3, 10.16 and 11.4 (tests/test_tensorrt.py).
- TensorRT-RTX: built; not run, which takes an RTX GPU.
- Core ML: built; not run by Core ML, which is for Apple's systems only. tests/test_engines.py runs the saved program
  with torch.
"""


def sources(name: str, network: nn.Module, folder: Path) -> dict[str, Path]:
    """The network as ONNX file and as ExportedProgram."""
    paths = {"onnx": folder / f"{name}.onnx", "program": folder / f"{name}.pt2"}
    export_onnx(network, INPUT_SHAPE, paths["onnx"], opset=20, ir_version=9)
    export_program(network, INPUT_SHAPE, paths["program"])
    return paths


def examine(runtime: str, network: nn.Module, source: Path, folder: Path) -> dict[str, Any]:
    """Convert and compare; what is not done says why."""
    folder.mkdir(parents=True)
    if not registry.installed(runtime):
        return {"verdict": "not installed"}
    try:
        artifact = registry.convert(runtime, Conversion(source, folder), folder)
    except ThinetDeployError as error:
        return {"verdict": "not built", "reason": error.what}
    path = folder / artifact.path
    record = path.with_suffix(".delegation.json")
    made: dict[str, Any] = {"verdict": "built", "size_bytes": artifact.size_bytes, "made_by": artifact.made_by}
    made["delegation"] = json.loads(record.read_text(encoding="utf-8")) if record.exists() else None
    return {**made, **run(runtime, path, network)} if can_run(runtime) else made


def run(runtime: str, path: Path, network: nn.Module) -> dict[str, Any]:
    """The engine against torch."""
    images = np.random.default_rng(0).standard_normal((IMAGES, *INPUT_SHAPE)).astype(np.float32)
    with torch.inference_mode():
        expected = network(torch.from_numpy(images)).numpy()
    engine = open_engine(runtime, str(path), 1, "fp32")
    allowed = tolerance(rounding_noise(network, images[:8]), "fp32")
    passed, error, agreement = compare(expected, engine.run({INPUT: images})[OUTPUT], allowed)
    engine.close()
    verdict = "passed" if passed else "FAILED"
    return {"verdict": verdict, "error": error, "allowed": allowed, "agreement": agreement}


def cell(result: dict[str, Any]) -> str:
    """One entry of the table."""
    text = str(result["verdict"])
    if "error" in result:
        text += f", {result['error']:.1e} ≤ {result['allowed']:.1e}"
    if "size_bytes" in result:
        text += f"<br>{result['size_bytes'] / 1000:.0f} kB"
    if delegation := result.get("delegation"):
        left = ", ".join(f"{count} {kind}" for kind, count in delegation.get("left", {}).items())
        text += "<br>all delegated" if delegation["all"] else f"<br>not delegated: {left or 'a part'}"
    return text


def page(results: dict[str, dict[str, dict[str, Any]]], machine: str) -> str:
    """docs/engines.md."""
    names = list(results)
    rows = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for runtime in registry.CONVERTERS:
        made_by = next((r[runtime]["made_by"] for r in results.values() if "made_by" in r.get(runtime, {})), runtime)
        cells = [cell(results[name][runtime]) for name in names]
        rows.append(f"| {runtime}<br>{made_by if made_by != runtime else ''} | {' | '.join(cells)} |")
    return TEXT.format(machine=machine, images=IMAGES, allowance=ALLOWANCE["fp32"], table="\n".join(rows))


def main() -> None:
    """Convert, compare, write."""
    parser = argparse.ArgumentParser(description="Every converter on four small networks.")
    parser.add_argument("--quick", action="store_true", help="one network and three converters; writes no page")
    quick = parser.parse_args().quick
    results: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as place:
        for name, network in list(networks().items())[: 1 if quick else None]:
            files = sources(name, network, Path(place))
            results[name] = {}
            for runtime in QUICK if quick else registry.CONVERTERS:
                source = files[registry.converter(runtime).CONTRACT.source]
                results[name][runtime] = examine(runtime, network, source, Path(place) / name / runtime)
                print(name, runtime, cell(results[name][runtime]).replace("<br>", ", "), flush=True)
    path = keep("engines", {"results": results}, quick=quick)
    if not quick:
        machine = json.loads(path.read_text(encoding="utf-8"))["environment"]["cpu"]["model"].split(" (")[0]
        PAGE.write_text(page(results, machine), encoding="utf-8")


if __name__ == "__main__":
    main()
