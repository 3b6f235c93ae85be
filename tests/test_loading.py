"""loading.py: networks by name or from the user's file; initial weights depend on the seed and on nothing else."""

import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from thinet_deploy.errors import ModelError, UnknownNameError
from thinet_deploy.models.loading import build_model, input_shape_of, load_function
from thinet_deploy.models.sources import sources

BODY = """
import torch
from torch import nn

def make({parameters}):
    net = nn.Linear(3, {outputs})
    net.called = dict(locals())
    return net
"""


@pytest.fixture
def net(tmp_path: Path) -> Callable[[str], str]:
    """Writes a file with that text; the result is the --model for its function `make`."""

    def write(text: str) -> str:
        (tmp_path / "net.py").write_text(text)
        return f"{tmp_path / 'net.py'}:make"

    return write


def same(one: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


# ---------------------------------------------------------------------------------------------- by name


@pytest.mark.parametrize(
    ("name", "shape", "classes"), [("vgg-small", (1, 32, 32), 10), ("vgg-small", (3, 64, 48), 3), ("vgg16", None, 2)]
)
def test_by_name(name: str, shape: tuple[int, int, int] | None, classes: int) -> None:
    with torch.device("meta"):  # VGG-16 without its half gigabyte
        model = build_model(name, input_shape=shape, num_classes=classes, seed=0)
        output = model.eval()(torch.zeros(2, *(shape or (3, 224, 224))))
    assert tuple(output.shape) == (2, classes)
    assert input_shape_of(model) == (shape or (3, 224, 224))


@pytest.mark.parametrize(("name", "near"), [("vgg61", "vgg16"), ("vgg_small", "vgg-small"), ("VGG16", "vgg")])
def test_unknown_names(name: str, near: str) -> None:
    with pytest.raises(UnknownNameError, match=near):
        build_model(name, input_shape=None, num_classes=2, seed=0)


# ---------------------------------------------------------------------------------------------- from a file


@pytest.mark.parametrize(
    ("parameters", "called"),
    [
        ("", {}),
        ("num_classes", {"num_classes": 4}),
        ("input_shape", {"input_shape": (3, 8, 8)}),
        ("*, input_shape, num_classes=9", {"num_classes": 4, "input_shape": (3, 8, 8)}),
        ("num_classes=2, width=7", {"num_classes": 4, "width": 7}),
        ("weights=None, **kwargs", {"weights": None, "kwargs": {"num_classes": 4}}),  # torchvision's way
    ],
)
def test_a_factory_gets_what_it_takes(parameters: str, called: dict[str, object], net: Callable[[str], str]) -> None:
    spec = net(BODY.format(parameters=parameters, outputs="2"))
    model = build_model(spec, input_shape=(3, 8, 8), num_classes=4, seed=0)
    found = {key: value for key, value in vars(model)["called"].items() if key != "net"}
    assert found == called


def test_a_shape_that_is_not_known_is_not_given(net: Callable[[str], str]) -> None:
    spec = net(BODY.format(parameters="input_shape=(3, 5, 5)", outputs="2"))
    model = build_model(spec, input_shape=None, num_classes=4, seed=0)
    assert vars(model)["called"]["input_shape"] == (3, 5, 5)


def test_a_class_is_a_factory(net: Callable[[str], str]) -> None:
    spec = net(
        "from torch import nn\nclass make(nn.Module):\n    def __init__(self, num_classes): super().__init__()\n"
    )
    assert type(build_model(spec, input_shape=None, num_classes=4, seed=0)).__name__ == "make"


def test_a_file_with_dataclasses_and_future_annotations(net: Callable[[str], str]) -> None:
    """dataclasses look up the module of a class by its name."""
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom torch import nn\n"
        "@dataclass\nclass Config:\n    width: int = 3\n\ndef make():\n    return nn.Linear(Config().width, 2)\n"
    )
    assert isinstance(build_model(net(text), input_shape=None, num_classes=2, seed=0), nn.Linear)


def test_a_file_hides_no_module(tmp_path: Path) -> None:
    """A user's random.py is loaded beside the one of Python."""
    (tmp_path / "random.py").write_text("def fit():\n    return 'mine'\n")
    assert load_function(f"{tmp_path / 'random.py'}:fit", "fit")() == "mine"
    assert sys.modules["random"] is random


def test_a_file_may_import_what_lies_beside_it(tmp_path: Path, net: Callable[[str], str]) -> None:
    (tmp_path / "beside_the_network.py").write_text("WIDTH = 3\n")
    text = (
        "from torch import nn\ndef make():\n    from beside_the_network import WIDTH\n    return nn.Linear(WIDTH, 2)\n"
    )
    model = build_model(net(text), input_shape=None, num_classes=2, seed=0)
    assert isinstance(model, nn.Linear)
    assert model.in_features == 3


def test_what_a_file_imports_from_beside_it_is_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    texts = {
        "net.py": "import torch\nfrom blocks import Block\n\ndef make():\n    import package.late\n",
        "blocks.py": "from package import Block\n",
        "package/__init__.py": "from .parts import Block\n",
        "package/parts.py": "Block = 1\n",
        "package/late.py": "from . import parts\n",
        "torch.txt": "",
        "other.py": "def broken(\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    first = sources(tmp_path / "net.py")
    assert first.keys() == texts.keys() - {"torch.txt", "other.py"}
    (tmp_path / "other.py").write_text("changed = 1\n")
    assert sources(tmp_path / "net.py") == first
    (tmp_path / "package" / "parts.py").write_text("Block = 2\n")
    second = sources(tmp_path / "net.py")
    assert {name for name in first if first[name] != second[name]} == {"package/parts.py"}


def test_the_users_modules_elsewhere_on_the_import_path_are_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {
        "real/net.py": "import json, torch, thinet_deploy, helper, linked, shared.parts\nfrom split import a, b\n",
        "work/helper.py": "",
        "lib/shared/__init__.py": "",
        "lib/shared/parts.py": "from . import more\nBlock = 1\n",
        "lib/shared/more.py": "",
        "lib/shared/other.py": "",
        "one/split/a.py": "",
        "two/split/b.py": "",
        "hidden/real/__init__.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "work" / "net.py").symlink_to(tmp_path / "real" / "net.py")
    (tmp_path / "lib" / "linked").symlink_to(tmp_path / "hidden" / "real")
    for name in ("lib", "one", "two"):
        monkeypatch.syspath_prepend(tmp_path / name)
    first = sources(tmp_path / "work" / "net.py")
    shared = {"shared/__init__.py", "shared/parts.py", "shared/more.py"}
    assert first.keys() == {"net.py", "helper.py", "linked/__init__.py", "split/a.py", "split/b.py", *shared}
    (tmp_path / "lib" / "shared" / "more.py").write_text("changed = 1\n")
    second = sources(tmp_path / "work" / "net.py")
    assert {name for name in first if first[name] != second[name]} == {"shared/more.py"}


def test_a_file_is_executed_once_for_what_it_registers_cannot_be_registered_twice(net: Callable[[str], str]) -> None:
    text = """
import torch
from torch import nn
LIBRARY = torch.library.Library("of_test_loading", "DEF")
LIBRARY.define("twice(Tensor x) -> Tensor")
def make():
    return nn.Conv2d(1, 2, 3)
def other():
    return nn.Conv2d(1, 4, 3)
"""
    spec = net(text)
    build_model(spec, input_shape=None, num_classes=None, seed=0)
    build_model(spec, input_shape=None, num_classes=None, seed=0)
    build_model(f"{spec.rpartition(':')[0]}:other", input_shape=None, num_classes=None, seed=0)


def test_a_factory_that_hands_out_the_same_network_gives_fresh_ones_all_the_same(net: Callable[[str], str]) -> None:
    spec = net("from torch import nn\nNET = nn.Linear(2, 3)\ndef make():\n    return NET\n")
    first = build_model(spec, input_shape=None, num_classes=None, seed=0)
    assert isinstance(first, nn.Linear)
    nn.init.zeros_(first.weight)
    other = build_model(spec, input_shape=None, num_classes=None, seed=0)
    assert isinstance(other, nn.Linear)
    assert other.weight.any()


@pytest.mark.parametrize(("cast", "words"), [("double", "float64"), ("half", "float16"), ("bfloat16", "bfloat16")])
def test_weights_that_are_no_float32_are_refused(net: Callable[[str], str], cast: str, words: str) -> None:
    spec = net(f"from torch import nn\ndef make():\n    return nn.Sequential(nn.ReLU(), nn.Linear(2, 3)).{cast}()\n")
    with pytest.raises(ModelError, match=rf"has weights in {words} \(1.weight\), but float32 was expected") as raised:
        build_model(spec, input_shape=None, num_classes=None, seed=0)
    assert "network.float()" in raised.value.hint


def test_a_changed_file_is_read_again(net: Callable[[str], str]) -> None:
    for outputs in ("2", "13"):
        model = build_model(net(BODY.format(parameters="", outputs=outputs)), input_shape=None, num_classes=2, seed=0)
        assert isinstance(model, nn.Linear)
        assert model.out_features == int(outputs)


def test_the_source_itself_is_run_and_nothing_is_left_beside_it(
    net: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages are keyed by the source, and __pycache__ may hold that of a moment ago."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    build_model(net(BODY.format(parameters="", outputs="2")), input_shape=None, num_classes=2, seed=0)
    assert list(tmp_path.rglob("__pycache__")) == []


BROKEN = {
    "no module": ("def make(): return 3", ModelError, "returned int, but a torch.nn.Module was expected"),
    "the class itself": ("from torch import nn\ndef make(): return nn.ReLU", ModelError, "returned type"),
    "raises": (
        "def make(num_classes): raise KeyError('x')",
        ModelError,
        "KeyError: 'x'\nIt was called with num_classes=2",
    ),
    "asks for more": ("def make(depth): pass", ModelError, "missing 1 required positional argument: 'depth'"),
    "other name": ("def mkae(): pass", UnknownNameError, "Did you mean 'mkae'?"),
    "no function": ("make = 3", UnknownNameError, "called 'make'"),
    "missing import": ("import nowhere_to_be_found", ModelError, "ModuleNotFoundError"),
    "syntax": ("def make(:", ModelError, "failed to load: SyntaxError"),
    "program": ("raise SystemExit(3)", ModelError, "failed to load: SystemExit: 3"),
}


@pytest.mark.parametrize(("text", "kind", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_files(text: str, kind: type[Exception], words: str, net: Callable[[str], str]) -> None:
    with pytest.raises(kind) as caught:
        build_model(net(text), input_shape=None, num_classes=2, seed=0)
    assert words in str(caught.value)
    assert "net.py" in str(caught.value)


@pytest.mark.parametrize("spec", ["net.py", "net:make", "net.py:", ":make", "net.txt:make"])
def test_no_specification_at_all(spec: str) -> None:
    with pytest.raises(ModelError, match=r"names no function.*\n.*file\.py:function"):
        load_function(spec, "factory")


@pytest.mark.parametrize(
    ("shape", "known"),
    [((3, 8, 9), True), ([3, 8, 9], True), (torch.Size([3, 8, 9]), True), (224, False), ((8, 9), False), (None, False)],
    ids=str,
)
def test_what_a_model_says_of_its_input(shape: object, known: bool) -> None:
    model = nn.ReLU()
    model.input_shape = shape  # type: ignore[assignment]
    assert input_shape_of(model) == ((3, 8, 9) if known else None)
    assert input_shape_of(nn.ReLU()) is None


# ---------------------------------------------------------------------------------------------- seeds


def test_the_seed_alone_decides_the_initial_weights() -> None:
    def build(seed: int) -> nn.Module:
        return build_model("vgg-small", input_shape=(1, 16, 16), num_classes=3, seed=seed)

    first = build(0)
    torch.manual_seed(99)
    torch.rand(7)
    assert same(first, build(0))
    assert not same(first, build(1))


def test_the_global_generators_are_left_alone(net: Callable[[str], str]) -> None:
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002 - the global generator is the point
    number = np.random.RandomState(3).random()
    before = torch.random.get_rng_state(), random.getstate()
    for name in ("vgg-small", "resnet20", "squeezenet1_1", net(BODY.format(parameters="", outputs="2"))):
        build_model(name, input_shape=(3, 32, 32), num_classes=2, seed=0)
    with pytest.raises(ModelError):
        build_model(
            net("import torch\ndef make(): torch.rand(3); raise ValueError"), input_shape=None, num_classes=2, seed=0
        )
    after = torch.random.get_rng_state(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert np.random.random() == number  # noqa: NPY002
