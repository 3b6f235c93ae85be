"""The command line on real photographs: CIFAR-10 as image folders, a VGG trained here, a ResNet-20 trained before."""

import json
import re
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from thinet_deploy.artifact import read_json

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
ARCHIVE, WEIGHTS = SHARED / "cifar10-jpeg.zip", SHARED / "resnet20-cifar10-jpeg.safetensors"
IMAGES = {"train": 100, "test": 40}  # per class
TIMEOUT_S = 1200
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ARCHIVE.exists(), reason=f"{ARCHIVE} is absent: CIFAR-10 is not part of the product"),
]

PREPROCESS = """
resize = [32, 32]
crop = [32, 32]
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]
augment = { mirror = true, pad = 4 }
"""
RESNET20 = """
import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, before, width, stride):
        super().__init__()
        self.stride, self.more = stride, width - before
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return torch.relu(out + x)


class ResNet20(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def resnet20(num_classes=10):
    return ResNet20(num_classes)
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first images of every class, as train/CLASS/*.jpg and test/CLASS/*.jpg."""
    folder, taken = tmp_path_factory.mktemp("cifar"), Counter[tuple[str, str]]()
    with zipfile.ZipFile(ARCHIVE) as archive:
        for name in sorted(archive.namelist()):
            if not (found := re.fullmatch(r"cifar10-jpeg/(train|test)/(\w+)/[^/]+\.jpg", name)):
                continue
            split, label = found.groups()
            if taken[split, label] < IMAGES[split]:
                taken[split, label] += 1
                archive.extract(name, folder)
    assert len(taken) == 20
    return folder / "cifar10-jpeg"


def build(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "thinet_deploy", "build", "--json", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    document: dict[str, Any] = json.loads(done.stdout)
    failed = [hop for hop in document["parity"] if not hop["passed"]]
    assert failed == []
    for row in document["table"]["rows"]:
        engines = {name: round(time["ms"], 3) for name, time in row["engines"].items()}
        print(
            f"{row['label']:<24} {row['figures']['top-1']['value']:6.2f} "
            f"{row['parameters']:>9,} {row['flops']:>12,} {engines}"
        )
    command = [sys.executable, f"{document['bundle']}/run.py"]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert checked.returncode == 0, checked.stdout
    return document


def test_a_vgg_is_trained_and_pruned(photos: Path, tmp_path: Path) -> None:
    document = build(
        *("--data", photos, "--model", "vgg-small", "--input-shape", "3x32x32", "--out", tmp_path / "run"),
        *("--epochs", 8, "--finetune-epochs", 4),
    )
    rows = {row["name"]: row for row in document["table"]["rows"]}
    assert list(rows) == ["original", "longer", "conv", "gap"]
    assert document["table"]["images"] == 400
    assert rows["original"]["flops"] > 2 * rows["conv"]["flops"] > 2 * rows["gap"]["flops"]
    assert rows["original"]["parameters"] > rows["conv"]["parameters"] > rows["gap"]["parameters"]
    assert rows["gap"]["figures"]["top-1"]["value"] > 20, "twice as good as guessing"
    assert set(rows["gap"]["engines"]) == {"openvino", "onnxruntime"}


def test_a_given_resnet_is_pruned_inside_its_blocks(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(RESNET20)
    (tmp_path / "pre.toml").write_text(PREPROCESS)
    document = build(
        *("--data", photos, "--model", f"{tmp_path / 'net.py'}:resnet20", "--weights", WEIGHTS),
        *("--preprocess", tmp_path / "pre.toml", "--out", tmp_path / "run"),
        *("--finetune-epochs", 4, "--lr", 0.01, "--epochs", 10),
    )
    rows = {row["name"]: row for row in document["table"]["rows"]}
    assert list(rows) == ["original", "longer", "conv"], "there is no fully connected head to replace"
    assert rows["original"]["figures"]["top-1"]["value"] > 80, "87.08 % on all 10,000 test images"
    assert rows["conv"]["figures"]["top-1"]["value"] > 60
    assert rows["original"]["flops"] > 1.5 * rows["conv"]["flops"]
    layers = read_json(tmp_path / "run" / "prune" / "report.json")["layers"]
    blocks = [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)]
    assert [layer["producer"] for layer in layers] == blocks
    assert [layer["before"] for layer in layers] == [16, 16, 16, 32, 32, 32, 64, 64, 64]
    assert len({layer["after"] / layer["before"] for layer in layers}) > 1, "widths follow the errors"
    assert rows["conv"]["flops"] <= 0.51 * rows["original"]["flops"], "as with half of the filters everywhere"
    preprocess = read_json(Path(document["bundle"]) / "preprocess.json")
    assert (preprocess["crop"], preprocess["mean"]) == ([32, 32], [0.485, 0.456, 0.406])
