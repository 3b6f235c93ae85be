"""Every converter on four small networks in fp32, fp16 and int8: is the engine right, how large is it, what runs where?

Makes docs/engines.md. Networks have random weights; images are noise. Rows are kept as they come, so a run that was
stopped goes on: delete results/engines.json to start anew.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from _deployed import IMAGES, Sources, compared, networks
from _record import keep, kept

from thinet_deploy import registry
from thinet_deploy.errors import ThinetDeployError
from thinet_deploy.interfaces import Precision
from thinet_deploy.verify import ALLOWANCE

PAGE = Path(__file__).parent.parent / "docs" / "engines.md"
QUICK = ("openvino", "onnxruntime", "ort")
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
TEXT = """# Engines

Made by `python benchmarks/engines.py` on {machine}; do not edit.

Four small networks for 32×32 images, each through every converter in every precision. An empty place says why it is.

- The error is the largest difference from torch over {images} images, relative to the largest output; behind it what is
  allowed: in fp32 {allowance} times the network's own rounding noise, in fp16 twice that of fp16. An int8 engine made
  from our Q/DQ file is held to what the file means, and one that its converter quantises to torch: both may be off by
  twice what our file moves the outputs by.
- The size is that of all files that the converter wrote.
- *Runs* is what the runtime says it computes in, layer by layer, as a share of the multiply-accumulates; *holds* is the
  type of the tensors in the file, for runtimes that do not tell. OpenVINO's fp16 is how weights are stored.
- Delegated is what the mobile runtimes' fast kernels (XNNPACK) take.

{table}

- TensorRT: not built. Its library could not be had, and an engine belongs to the device that it is built on. Names and
  signatures are checked on the bindings of 8.6, 10.3, 10.16 and 11.4 (tests/test_tensorrt.py).
- TensorRT-RTX: built; not run, which takes an RTX GPU. What its layers compute in, its builder says in its log: on
  the papers' networks at their real sizes, all of the MACs in the file's type (tests/test_tensorrt_networks.py).
- Core ML: built; not run by Core ML, which is for Apple's systems only. tests/test_engines.py runs the saved program
  with torch.
"""


def examine(runtime: str, precision: Precision, sources: Sources, folder: Path) -> dict[str, Any]:
    """Convert, compare, read back; what is not done says why."""
    folder.mkdir(parents=True)
    contract = registry.converter(runtime).CONTRACT
    if precision not in contract.precisions:
        return {"verdict": "none", "reason": contract.without[precision]}
    if not registry.installed(runtime):
        return {"verdict": "not installed"}
    try:
        artifact = registry.convert(runtime, sources.job(runtime, precision, folder), folder)
    except ThinetDeployError as error:
        return {"verdict": "not built", "reason": error.what}
    path = folder / artifact.path
    record = path.with_suffix(".delegation.json")
    made: dict[str, Any] = {"size_bytes": artifact.size_bytes, "made_by": artifact.made_by}
    made["delegation"] = json.loads(record.read_text(encoding="utf-8")) if record.exists() else None
    return {**made, **compared(runtime, path, precision, sources)}


def cell(result: dict[str, Any]) -> str:
    """One entry of the table."""
    text = f"{result['verdict']}: {result['reason']}" if "reason" in result else str(result["verdict"])
    if "error" in result:
        text += f", {result['error']:.1e} ≤ {result['allowed']:.1e}"
    if "size_bytes" in result:
        text += f"<br>{result['size_bytes'] / 1000:.0f} kB"
    for verb in ("runs", "holds"):
        if verb in result:
            text += f"<br>{verb} {result[verb].removesuffix(' of the MACs')}"
    if delegation := result.get("delegation"):
        left = ", ".join(f"{count} {kind}" for kind, count in delegation.get("left", {}).items())
        text += "<br>all delegated" if delegation["all"] else f"<br>not delegated: {left or 'a part'}"
    return text


def page(rows: dict[str, dict[str, Any]], names: list[str], machine: str) -> str:
    """docs/engines.md."""
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for runtime, precision in product(registry.CONVERTERS, PRECISIONS):
        found = [rows[key(name, runtime, precision)] for name in names]
        made_by = next((each["made_by"] for each in found if "made_by" in each), "")
        cells = [cell(each) for each in found]
        same = [*cells[:1], *("as left" for _ in cells[1:])] if "reason" in found[0] and len(set(cells)) == 1 else cells
        lines.append(f"| {runtime}, {precision}<br>{made_by} | {' | '.join(same)} |")
    return TEXT.format(machine=machine, images=IMAGES, allowance=ALLOWANCE["fp32"], table="\n".join(lines))


def key(name: str, runtime: str, precision: str) -> str:
    """Of a row."""
    return f"{name}, {runtime}, {precision}"


def main() -> None:
    """Convert, compare, write."""
    parser = argparse.ArgumentParser(description="Every converter on four small networks, in every precision.")
    parser.add_argument("--quick", action="store_true", help="one network and three converters; writes no page")
    quick = parser.parse_args().quick
    names, runtimes = list(networks())[: 1 if quick else None], QUICK if quick else tuple(registry.CONVERTERS)
    rows = kept("engines", quick=quick)
    with tempfile.TemporaryDirectory() as place:
        for name in names:
            sources = Sources(name, networks()[name], Path(place))
            for runtime, precision in product(runtimes, PRECISIONS):
                row = key(name, runtime, precision)
                rows[row] = rows.get(row) or examine(runtime, precision, sources, Path(place, name, runtime, precision))
                print(row, cell(rows[row]).replace("<br>", ", "), flush=True)
                keep("engines", {"rows": rows}, quick=quick)
    if not quick:
        path = keep("engines", {"rows": rows}, quick=quick)
        machines = json.loads(path.read_text(encoding="utf-8"))["environments"].values()
        processors = ", ".join(dict.fromkeys(each["cpu"]["model"].split(" (")[0] for each in machines))
        PAGE.write_text(page(rows, names, processors), encoding="utf-8")


if __name__ == "__main__":
    main()
