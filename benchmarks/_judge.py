"""How the benchmarks test a network: right or wrong per image, kept raw."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from thinet_deploy.data.dataset import Dataset
from thinet_deploy.intervals import accuracy_interval, difference_interval
from thinet_deploy.tasks.classification import ranks
from thinet_deploy.training import logits


def judged(model: nn.Module, data: Dataset, unpruned: dict[str, Any] | None = None) -> dict[str, Any]:
    """Accuracy with its interval, the paired difference to another such row, and the raw result per image."""
    right: NDArray[np.bool_] = ranks(logits(model, data.test).numpy(), data.test.labels) < 1
    row: dict[str, Any] = {"top1": asdict(accuracy_interval(int(right.sum()), len(right)))}
    if unpruned is not None:
        row["minus_unpruned"] = asdict(difference_interval(right, unpack(unpruned["right"], len(right))))
    return row | {"right": np.packbits(right).tobytes().hex()}  # one bit per image, the first is the highest


def unpack(right: str, images: int) -> NDArray[np.bool_]:
    """Right or wrong per image from a row's raw result."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(right), np.uint8))[:images].astype(bool)


def best(row: dict[str, Any]) -> dict[str, Any]:
    """Of a row that was fine-tuned at several rates: after the one that suited it."""
    return max(row["tuned"].values(), key=lambda each: float(each["top1"]["value"]))


def percent(row: dict[str, Any]) -> str:
    """Top-1 with its interval, for tables."""
    top1 = row["top1"]
    return f"{top1['value']:.2f} ({top1['low']:.2f}–{top1['high']:.2f})"
