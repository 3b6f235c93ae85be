"""The demo over several seeds: does ThiNet-GAP keep the original's accuracy on the digits?"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from _record import keep

from thinet_deploy import Options, build


def main() -> None:
    """Build once per seed, print the differences in top-1, keep every table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two seeds, hardly any training: shows that it works")
    quick = parser.parse_args().quick
    short = {"epochs": 1, "finetune_epochs": 1} if quick else {}
    tables = []
    for seed in range(2 if quick else 5):
        with tempfile.TemporaryDirectory() as folder:
            tables.append(
                build(
                    Options.model_validate({"controls": "all", "seed": seed, "out": Path(folder) / "run", **short})
                ).table
            )
        top1 = {row.name: row.main.value for row in tables[-1].rows}
        print(f"seed {seed}: " + ", ".join(f"{name} {value:.2f}" for name, value in top1.items()), flush=True)
    drops = []
    for table in tables:
        rows = {row.name: row for row in table.rows}
        drops.append(rows["original"].main.value - rows["gap"].main.value)
    path = keep("digits_seeds", {"tables": [table.to_json() for table in tables], "top1_drops": drops}, quick=quick)
    print(f"Original minus ThiNet-GAP, top-1: median {statistics.median(drops):+.2f}, worst {max(drops):+.2f}. {path}")


if __name__ == "__main__":
    main()
