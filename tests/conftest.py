"""What several test files use: the real command line in this process, a few images, a tiny network."""

import importlib.util
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
from adb_fake import Fake, install, plug_in, program
from PIL import Image
from ssh_server import Server, serving

# For tiny networks, threads that wait for each other cost more than they save: minutes, where cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY_NETS = """
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self, classes, shape, kernel=3):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(shape[0], 4, kernel, padding=1), nn.ReLU(),
            nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.AdaptiveAvgPool2d(2))
        self.classifier = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, classes))
        self.input_shape = shape

    def forward(self, x):
        return self.classifier(torch.flatten(self.features(x), 1))


def tiny(num_classes=2, input_shape=(3, 16, 16)):
    return Tiny(num_classes, input_shape)


def wider(num_classes=2, input_shape=(3, 16, 16)):
    net = tiny(num_classes, input_shape)
    net.features[0], net.features[2] = nn.Conv2d(input_shape[0], 5, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1)
    return net


def shapeless(num_classes=2):
    net = Tiny(num_classes, (3, 16, 16))
    del net.input_shape
    return net


def headless(num_classes=2):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, num_classes, 3),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.input_shape = (3, 16, 16)
    return net


def large(num_classes=2):
    return Tiny(num_classes, (3, 16, 16), kernel=40)


def three_classes():
    return Tiny(3, (3, 16, 16))


def broken():
    raise RuntimeError("the roof is on fire")


def weights_only():
    return tiny().state_dict()


answer = 42
"""


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True, scope="session")
def _usual_toolchains() -> Iterator[None]:
    """Builds make the engines that always belong to a target, whatever else is installed and would take minutes."""
    from thinet_deploy import registry

    with pytest.MonkeyPatch.context() as patch:  # of the session, so that it holds for what a whole file shares
        patch.setattr(registry, "installed", lambda runtime: False)
        yield


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Runs `thinet-deploy ARGUMENTS` in this process, through main()."""
    from thinet_deploy.cli.app import main

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["thinet-deploy", *map(str, arguments)])
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
            main()
        return Done(int(stop.value.code or 0), out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], tuple[Any, list[str]]]:
    """Does some work, and tells which stages of the run were not taken from before."""
    from thinet_deploy.store import Run

    stage = Run.stage

    def work(todo: Callable[[], Any]) -> tuple[Any, list[str]]:
        names: list[str] = []

        def watch(self: Run, name: str, *arguments: Any) -> Any:
            result = stage(self, name, *arguments)
            names.extend([name] * (not result.reused))
            return result

        with monkeypatch.context() as patch:
            patch.setattr(Run, "stage", watch)
            return todo(), names

    return work


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures latency for moments only: the figures of these builds are looked at by nobody."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from thinet_deploy.stages import deploy as deploy_stage

    for name, value in {"ENGINE_SECONDS": 0.01, "ENGINE_ROUNDS": 8, "TORCH_ROUNDS": 8, "TORCH_BATCH": 2}.items():
        monkeypatch.setattr(deploy_stage, name, value)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with data/ (two classes of 16×16 images) and net.py (tiny networks)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(TINY_NETS)
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("dark", "light")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                noise: Any = random.integers(0, 100, (16, 16, 3)) + 130 * label
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{index}.{'png' if index else 'jpg'}")
    return tmp_path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with net.py (see tiny_nets.py) and data/ (three classes of 8×8 images)."""
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copyfile(Path(__file__).with_name("tiny_nets.py"), folder / "net.py")
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 5)):
        for label in range(3):
            place = folder / "data" / split / f"class{label}"
            place.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 60, (8, 8)).astype(np.uint8)
                pixels[2 * label : 2 * label + 3] += 150  # a bright bar, higher or lower
                Image.fromarray(pixels).save(place / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def quick_module() -> Iterator[None]:
    """As `quick`, for builds that are made once for a whole file; long enough for intervals; torch has one thread."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("openvino", reason="openvino is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from thinet_deploy.stages import deploy as deploy_stage

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ENGINE_SECONDS": 0.06, "ENGINE_ROUNDS": 6, "TORCH_ROUNDS": 7, "TORCH_BATCH": 2}.items():
            patch.setattr(deploy_stage, name, value)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def openvino_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program in C++ that runs OpenVINO's engines."""
    from app_builds import SOURCES, build

    return build("openvino", SOURCES / "cpp", tmp_path_factory.mktemp("openvino-program"))


@pytest.fixture(scope="session")
def tiny_options(tiny: Path) -> Callable[..., Any]:
    """Makes options for a network of tiny_nets.py, for a target whose latency is not measured here (takes time)."""
    from thinet_deploy.options import make_options

    def make(out: Path, network: str = "plain", **changes: Any) -> Any:
        usual = {"target": "raspberry-pi-5", "model": f"{tiny / 'net.py'}:{network}", "data": tiny / "data"}
        usual |= {"epochs": 2, "finetune_epochs": 1, "controls": "all"}
        if changes.get("recipe", "best") != "best":  # where the papers' rates and batches teach a tiny network nothing
            usual |= {"layer_epochs": 1, "finetune_lr": 0.03, "batch_size": 32}
        return make_options({**usual, "out": out, **changes})

    return make


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Layers and networks are timed for moments, and the user's cache stays as it is; the one that is used."""
    from functools import partial

    from thinet_deploy.stages import latency as latency_stage
    from thinet_deploy.stages import staircase as staircase_stage
    from thinet_deploy.timing import staircase

    monkeypatch.setenv("THINET_CACHE", str(tmp_path / "cache"))
    for module, name, value in (
        (staircase, "SECONDS", 0.001),
        (staircase, "ROUNDS", 1),
        (staircase_stage, "SECONDS", 0.05),
        (latency_stage, "POINTS", 4),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(latency_stage, "Bench", partial(latency_stage.Bench, rounds=6, seconds=0.05))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def torchvision_or_none() -> Iterator[None]:
    """Where torchvision is installed, it can be imported: beside a CPU build of torch its operations are declared."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operation in ("nms", "qnms"):
        if importlib.util.find_spec("torchvision") is not None and not hasattr(torch.ops.torchvision, operation):
            schema = f"{operation}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            library.define(schema)
    yield
    del library  # until now it has kept them alive


@pytest.fixture(scope="session")
def zoo(torchvision_or_none: None) -> ModuleType:
    """torchvision.models."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed (pip install --no-deps torchvision, one that fits this torch)")
    models: ModuleType = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    return models


@pytest.fixture(scope="session")
def mixed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network of mixed_onnx.py as a file."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from mixed_onnx import export_mixed

    return export_mixed(tmp_path_factory.mktemp("mixed") / "mixed.onnx")


@pytest.fixture(scope="session")
def mixed_model(mixed_file: Path) -> Any:
    """The same, read."""
    from thinet_deploy.precision.graph import read_onnx

    return read_onnx(mixed_file)


@pytest.fixture(scope="session")
def mixed_images() -> Any:
    """Inputs of it."""
    from mixed_onnx import some_images

    return some_images()


@pytest.fixture(scope="session")
def mixed_values(mixed_model: Any, mixed_images: Any) -> Any:
    """What its tensors are on these."""
    from thinet_deploy.precision.calibration import observe

    return observe(mixed_model, lambda: [mixed_images[:50], mixed_images[50:]])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A device behind a real sshd on this machine, for all tests of a file."""
    with serving(tmp_path_factory.mktemp("ssh")) as server:
        yield server


@pytest.fixture
def server(place: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The device, with `ssh` knowing its key."""
    from ssh_bundles import on_path

    on_path(place, monkeypatch)
    return place


@pytest.fixture(scope="module")
def device_spec(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of the bundles that `make_bundle` makes."""
    from ssh_bundles import typed_spec

    return typed_spec(tmp_path_factory.mktemp("engines"))


@pytest.fixture
def make_bundle(device_spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes the stage of a bundle, which its device measures for a second."""
    from ssh_bundles import maker

    from thinet_deploy.stages import device as device_stage

    monkeypatch.setattr(device_stage, "SECONDS", 1)
    return maker(device_spec, tmp_path)


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """A device, with adb on the PATH, and a program for onnxruntime."""
    folder = tmp_path / "phone"
    folder.mkdir()
    fake = plug_in(folder)
    monkeypatch.setenv("PATH", f"{folder / 'host'}:{os.environ['PATH']}")
    monkeypatch.setenv("THINET_CACHE", str(tmp_path / "cache"))
    install(tmp_path, program())
    return fake
