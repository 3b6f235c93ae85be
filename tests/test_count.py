"""The command `count`: the papers' figures as they print them, by layer, by either rule, and what it says otherwise."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]


def test_what_the_users_file_prints_is_not_in_the_document(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text(
        "from torch import nn\nprint('hello')\ndef net(num_classes=3):\n"
        "    print('again')\n    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, num_classes))\n"
    )
    done = cli("count", "--model", f"{tmp_path / 'loud.py'}:net", "--input-shape", "1x8x8", "--json")
    assert json.loads(done.out)["input_shape"] == [1, 8, 8]
    assert "hello" in done.err


@pytest.mark.parametrize(
    ("arguments", "figures"),
    [
        ("--model vgg16", "138.34M 527.74 MB 30.94B"),
        ("--model vgg16 --preset thinet-conv", "131.44M 501.41 MB 9.58B"),
        ("--preset thinet-gap --classes 200", "7.91M 30.17 MB 9.34B"),
        ("--model vgg16 --preset thinet-tiny", "1.32M 5.05 MB 2.01B"),
        ("--model vgg16 --preset thinet-tiny --gcos", "0.70M 2.66 MB 1.55B"),
        ("--model thinet-tiny --gcos", "0.70M 2.66 MB 1.55B"),
        ("--model squeezenet", "1.24M 4.75 MB 1.72B"),
        ("--model alexnet --classes 67", "57.13M 217.95 MB 1.44B"),
        ("--preset thinet-30", "8.66M 33.05 MB 2.20B"),
        ("--model resnet50 --preset thinet-30", "8.66M 33.05 MB 2.33B"),
        ("--model resnet50 --rule multiply-accumulate", "25.56M 97.49 MB 4.09B"),
        ("--model vgg16-cifar --rule multiply-accumulate", "14.99M 57.19 MB 313.46M"),
    ],
)
def test_figures_as_the_papers_print_them(arguments: str, figures: str, cli: Cli) -> None:
    done = cli("count", *arguments.split())
    assert (done.code, done.err) == (0, "")
    assert figures in " ".join(done.out.split())


def test_layer_by_layer(cli: Cli) -> None:
    done = cli("count", "--preset", "thinet-tiny", "--per-layer")
    rows = [line.split() for line in done.out.splitlines()]
    assert ["features.0", "Conv2d", "16x224x224", "432", "43,352,064", "2.2%"] in rows
    assert ["classifier.0", "Linear", "1000", "256,000", "512,000", "0.0%"] in rows


def test_for_a_program(cli: Cli) -> None:
    found = json.loads(cli("count", "--preset", "thinet-70", "--per-layer", "--json").out)
    assert (found["parameters"], found["flops"]) == (16_944_246, 4_880_149_800)
    assert found["size_bytes"] == 4 * found["parameters"]
    for name in ("parameters", "learned", "flops", "macs"):
        assert found[name] == sum(layer[name] for layer in found["layers"])
    short = json.loads(cli("count", "--model", "resnet20", "--rule", "multiply-accumulate", "--json").out)
    assert short["size_bytes"] == 4 * short["learned"]
    assert short["input_shape"] == [3, 32, 32]
    assert short["layers"] is None


def test_a_network_of_the_users(cli: Cli, workplace: Path) -> None:
    del workplace
    assert "0.53k" in cli("count", "--model", "net.py:tiny").out
    done = cli("count", "--model", "net.py:shapeless", "--input-shape", "3x16x16", "--classes", "5", "--json")
    assert json.loads(done.out)["parameters"] == 4 * 27 + 6 * 36 + 24 * 8 + 8 * 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", ("Which network", "--preset thinet-tiny")),
        ("--model vgg61", ("no model called 'vgg61'", "Did you mean 'vgg16'?")),
        ("--preset thinet-60", ("no preset called 'thinet-60'", "Did you mean 'thinet-")),
        ("--model alexnet --preset thinet-tiny", ("made from vgg16 or vgg16_bn or vgg16-cifar, and alexnet",)),
        ("--model squeezenet --gcos", ("no layout of group convolutions for squeezenet", "thinet-tiny")),
        ("--model vgg16 --input-shape 3x16x16", ("at least 32x32 pixels, and 3x16x16", "--input-shape")),
        ("--model vgg16 --input-shape 224", ("--input-shape is '224'",)),
        ("--model vgg16 --rule papers", ("papers", "count --help")),
        ("--model vgg16 --classes 0", ("--classes", "greater than or equal to 1")),
        ("--model net.py:shapeless", ("does not say which images it takes", "--input-shape")),
        ("--model net.py:headless --input-shape 1x16x16", ("net.py:headless cannot take an image of 1x16x16",)),
    ],
)
def test_mistakes(arguments: str, words: tuple[str, ...], cli: Cli, workplace: Path) -> None:
    del workplace
    done = cli("count", *arguments.split())
    assert (done.code, done.out) == (2, "")
    assert [word for word in words if word not in done.err] == []
    assert "Traceback" not in done.err
