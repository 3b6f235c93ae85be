"""Four small networks with what conversions get wrong: see tests/test_engines.py and engines.py."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from thinet_deploy import registry
from thinet_deploy.export import INPUT, OUTPUT, export_onnx, export_program
from thinet_deploy.interfaces import Conversion, Precision
from thinet_deploy.models.vgg import VGG
from thinet_deploy.on_device.engines import can_run, open_engine
from thinet_deploy.precision.accuracy_gate import outputs
from thinet_deploy.precision.calibration import limits, observe
from thinet_deploy.precision.executed import prove_precision
from thinet_deploy.precision.graph import read_onnx
from thinet_deploy.precision.half import to_half
from thinet_deploy.precision.held import READERS
from thinet_deploy.precision.int8 import quantise
from thinet_deploy.precision.weights import S8S8, U8S8
from thinet_deploy.verify import compare, distance, engine_tolerance, rounding_noise, tolerance

INPUT_SHAPE, CLASSES, IMAGES = (3, 32, 32), 10, 64
Floats = NDArray[np.float32]


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class OddBlock(nn.Module):
    """A bottleneck as pruning leaves it: the inner widths are whatever was kept."""

    def __init__(self, inputs: int, inner: tuple[int, int], outputs: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            *(_conv(inputs, inner[0], 1), nn.ReLU(), _conv(inner[0], inner[1], 3, stride), nn.ReLU()),
            _conv(inner[1], outputs, 1),
        )
        self.shortcut = _conv(inputs, outputs, 1, stride) if (stride, inputs) != (1, outputs) else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.inner(x) + self.shortcut(x))


class ShuffleBlock(nn.Module):
    """Grouped convolutions with a channel shuffle between them, depthwise in the middle."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.first, self.depthwise = _conv(width, width, 1, groups=groups), _conv(width, width, 3, groups=width)
        self.second = _conv(width, width, 1, groups=groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first(x))
        batch, channels, height, width = y.shape
        y = y.view(batch, self.groups, channels // self.groups, height, width).transpose(1, 2)
        y = self.depthwise(y.reshape(batch, channels, height, width))
        return torch.relu(x + self.second(y))


class Fire(nn.Module):
    """SqueezeNet's module: one squeeze, two expansions side by side."""

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.left, self.right = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.squeeze(x))
        return torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)


def _head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]


class RunningSum(nn.Module):
    """An operation that the mobile delegates do not have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cumsum(x, 3)


def undelegated() -> nn.Module:
    """A network with one operation that is left to slow kernels on phones."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), RunningSum(), *_head(8)).eval()


def _squeezenet() -> nn.Module:
    """Both pools look beyond the border: 16 → 8 → 4."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(16, 5, 12)),
        *(nn.MaxPool2d(3, 2, ceil_mode=True), Fire(24, 6, 16), nn.Conv2d(32, CLASSES, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def networks() -> dict[str, nn.Module]:
    """The networks by name, each with fixed random weights and BatchNorms that do something."""
    torch.manual_seed(0)
    made = {
        "vgg-gap": nn.Sequential(
            VGG(((8, 13), (21, 16)), (), input_shape=INPUT_SHAPE, num_classes=CLASSES, norm=True).features, *_head(16)
        ),
        "resnet-odd": nn.Sequential(
            *(_conv(3, 16), nn.ReLU(), OddBlock(16, (7, 11), 24, 1), OddBlock(24, (5, 9), 24, 2)), *_head(24)
        ),
        "shuffle": nn.Sequential(_conv(3, 24), nn.ReLU(), ShuffleBlock(24, 4), ShuffleBlock(24, 3), *_head(24)),
        "squeezenet": _squeezenet(),
    }
    for module in (module for network in made.values() for module in network.modules()):
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return {name: network.eval() for name, network in made.items()}


class Sources:
    """A network in every form that converters start from, and what its engines are held to."""

    def __init__(self, name: str, network: nn.Module, folder: Path) -> None:
        """Export it; INT8 takes min-max limits of noise, which is also what engines are compared on."""
        self.images = np.random.default_rng(0).standard_normal((IMAGES, *INPUT_SHAPE)).astype(np.float32)
        self.program, self.onnx = folder / f"{name}.pt2", folder / f"{name}.onnx"
        self.calibration = folder / f"{name}.npy"
        export_program(network, INPUT_SHAPE, self.program)
        export_onnx(network, INPUT_SHAPE, self.onnx, opset=20, ir_version=9)
        np.save(self.calibration, self.images)
        with torch.inference_mode():
            self.expected: Floats = network(torch.from_numpy(self.images)).numpy()
        self.noise = rounding_noise(network, self.images[:8])

    def job(self, runtime: str, precision: Precision, folder: Path) -> Conversion:
        """What to ask a runtime's converter for."""
        if registry.converter(runtime).CONTRACT.source == "program":
            return Conversion(
                self.program, folder, precision, calibration=self.calibration if precision == "int8" else None
            )
        return Conversion(self._typed(runtime, precision), folder, precision)

    def aim(self, runtime: str, precision: Precision) -> tuple[Floats, float]:
        """What its engine has to say of `images`, and how far it may be off.

        In INT8: what our file means, where it is made from it. A converter that quantises by itself may move the
        network's outputs twice as far as our file does.
        """
        if precision != "int8":
            return self.expected, tolerance(self.noise, precision)
        meant = outputs(read_onnx(self._typed(runtime, precision)), self.images)
        allowed = engine_tolerance("int8", self.noise, distance(self.expected, meant))
        return (self.expected if registry.converter(runtime).CONTRACT.source == "program" else meant), allowed

    def _typed(self, runtime: str, precision: Precision) -> Path:
        """The ONNX file: in INT8 in the runtime's layout; in FP16 only for TensorRT, for others store it themselves."""
        tensorrt = runtime.startswith("tensorrt")
        if precision == "fp32" or (precision == "fp16" and not tensorrt):
            return self.onnx
        layout = S8S8 if tensorrt else U8S8
        path = self.onnx.with_name(f"{self.onnx.stem}-{precision}-{layout.name}.onnx")
        if not path.exists():
            model = read_onnx(self.onnx)
            values = observe(model, lambda: [self.images])
            bounds = {tensor: limits(each, "min-max") for tensor, each in values.items()}
            onnx.save(to_half(model, "fp16") if precision == "fp16" else quantise(model, bounds, layout), path)
        return path


def compared(runtime: str, path: Path, precision: Precision, sources: Sources) -> dict[str, Any]:
    """An engine against its aim, and what it holds or runs."""
    # OpenVINO's FP16 is how the file stores weights: here nothing computes in it.
    runs_in: Precision = "fp32" if (runtime, precision) == ("openvino", "fp16") else precision
    found: dict[str, Any] = {"verdict": "built"}
    if can_run(runtime):
        expected, allowed = sources.aim(runtime, precision)
        engine = open_engine(runtime, str(path), 1, runs_in)
        passed, error, agreement = compare(expected, engine.run({INPUT: sources.images})[OUTPUT], allowed)
        engine.close()
        verdict = "passed" if passed else "FAILED"
        found = {"verdict": verdict, "error": error, "allowed": allowed, "agreement": agreement}
    if (can_run(runtime) or runtime in READERS) and runs_in == precision:
        proof = prove_precision(runtime, path, read_onnx(sources.onnx), runs_in)
        found |= {"holds" if runtime in READERS else "runs": proof.describe(), "as_asked": not proof.wrong}
    return found
