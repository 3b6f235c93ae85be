"""The transfer table: a VGG trained on CIFAR-10, pruned there and fine-tuned to other images, and the other ways.

The targets are ten classes of photos (photos10) and the built-in handwritten digits, both at 32×32 in colour. One
command each, `thinet-deploy build --transfer-to`; what it writes (the table with its ledger, the verdicts) is kept.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from _record import keep
from _trained import cifar10, missing, trained_vgg, unpacked, vgg_weights
from PIL import Image
from rich.console import Console

from thinet_deploy import pipeline, report
from thinet_deploy.data import digits_preprocess, load_digits
from thinet_deploy.environment import cache_folder
from thinet_deploy.ledger import render_ledger
from thinet_deploy.options import make_options


def digits() -> Path:
    """The built-in digits as a folder of image files, made when it is missing."""
    place = cache_folder() / "digits"
    if place.is_dir():
        return place
    data = load_digits(digits_preprocess())
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        for split, images in (("train", data.train), ("test", data.test)):
            for index, label in enumerate(images.labels.tolist()):
                name = Path(folder) / "digits" / split / data.classes[label]
                name.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images.read(np.array([index]))[0, ..., 0]).save(name / f"{index}.png")
        (Path(folder) / "digits").rename(place)
    return place


def main() -> None:
    """Both targets."""
    parser = argparse.ArgumentParser(description="The papers' transfer table, from CIFAR-10 to small sets.")
    parser.add_argument("--quick", action="store_true", help="no training: shows that it works")
    given = parser.parse_args()
    if absent := missing():
        print(f"transfer: skipped, {absent}")
        return
    trained_vgg(norm=True)
    console, tables = Console(width=160), {}
    for target in (unpacked("photos10"), digits()):
        with tempfile.TemporaryDirectory() as folder:
            asked = {
                "model": f"{Path(__file__).with_name('_trained.py')}:vgg_bn",
                "weights": vgg_weights(norm=True),
                "data": cache_folder() / cifar10().name,
                "transfer_to": target,
                "macs": "2x",
                "epochs": 1 if given.quick else 30,
                "finetune_epochs": 0 if given.quick else 1,
                "transfer_epochs": 0 if given.quick else 20,
                "batch_size": 64,
                "controls": "none" if given.quick else "all",
                "train": {"precision": "bf16"},
                "out": Path(folder) / "run",
            }
            done = pipeline.build(make_options(asked))
        tables[target.name] = {"table": done.table.to_json(), "parity": [vars(hop) for hop in done.hops]}
        console.print(report.render([done.table], console.width), render_ledger(done.table.ledger))
        console.print(keep("transfer", {"targets": tables}, quick=given.quick))


if __name__ == "__main__":
    main()
