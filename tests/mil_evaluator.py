"""Runs a saved Core ML program with torch: the few operations that our networks become (Core ML is for Apple only)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from thinet_deploy.interfaces import INPUT, OUTPUT


def run_mlpackage(path: Path, images: np.ndarray) -> np.ndarray:
    """Outputs of a .mlpackage for images (n, channels, height, width), from the file as it was saved."""
    import coremltools
    from coremltools.converters.mil.frontend.milproto.load import load

    model = coremltools.models.MLModel(str(path), skip_model_load=True)
    spec = model.get_spec()
    program = load(spec, spec.specificationVersion, str(model.weights_dir))
    values: dict[str, Any] = {INPUT: torch.from_numpy(images)}
    for operation in program.functions["main"].operations:
        if operation.op_type == "const":
            continue
        given = {name: _value(var, values) for name, var in operation.inputs.items() if var is not None}
        results = OPERATIONS[operation.op_type](given)
        for var, made in zip(operation.outputs, results if isinstance(results, list) else [results], strict=True):
            values[var.name] = made
    outputs: np.ndarray = values[OUTPUT].numpy()
    return outputs


def _value(var: Any, values: dict[str, Any]) -> Any:
    if isinstance(var, list | tuple):
        return [_value(each, values) for each in var]
    if var.name in values:
        return values[var.name]
    if not isinstance(var.val, np.ndarray):
        return var.val
    value = torch.from_numpy(np.array(var.val))
    return value.float() if value.dtype == torch.float16 else value


def _ints(value: Any) -> list[int]:
    return [int(number) for number in value]


def _padded(given: dict[str, Any], filling: float, spatial: int = 2) -> Tensor:
    """The input with its border; MIL pads per side: before and after each spatial size."""
    x: Tensor = given["x"]
    if str(given["pad_type"]) == "valid":
        return x
    assert str(given["pad_type"]) == "custom", given["pad_type"]
    pad = _ints(given["pad"])
    sides = [side for axis in reversed(range(spatial)) for side in pad[2 * axis : 2 * axis + 2]]
    return F.pad(x, sides, value=filling)


def _conv(given: dict[str, Any]) -> Tensor:
    strides, dilations = _ints(given["strides"]), _ints(given["dilations"])
    return F.conv2d(
        _padded(given, 0.0), given["weight"], given.get("bias"), strides, 0, dilations, int(given["groups"])
    )


def _max_pool(given: dict[str, Any]) -> Tensor:
    strides, ceil = _ints(given["strides"]), bool(given["ceil_mode"])
    return F.max_pool2d(_padded(given, -torch.inf), _ints(given["kernel_sizes"]), strides, ceil_mode=ceil)


def _mean(given: dict[str, Any]) -> Tensor:
    mean: Tensor = given["x"].mean(_ints(given["axes"]), keepdim=bool(given["keep_dims"]))
    return mean


def _grid(given: dict[str, Any], like: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of steps, along their axis."""
    known = (given["scale"], given.get("zero_point"))
    scale, zero = (each if isinstance(each, Tensor) else torch.tensor(float(each or 0)) for each in known)
    sizes = [1] * like.ndim
    if scale.ndim and scale.numel() > 1:
        sizes[int(given["axis"])] = -1
    return scale.float().reshape(sizes), zero.float().reshape(sizes if zero.numel() > 1 else [1] * like.ndim)


def _steps(given: dict[str, Any]) -> Tensor:
    lowest = {"int8": -128, "uint8": 0}[str(given["output_dtype"])]
    scale, zero = _grid(given, given["input"])
    return torch.clamp(torch.round(given["input"] / scale) + zero, lowest, lowest + 255)


def _back(given: dict[str, Any], name: str) -> Tensor:
    scale, zero = _grid(given, given[name])
    exact: Tensor = (given[name].float() - zero) * scale
    return exact


OPERATIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "conv": _conv,
    "max_pool": _max_pool,
    "reduce_mean": _mean,
    "relu": lambda given: torch.relu(given["x"]),
    "add": lambda given: given["x"] + given["y"],
    "reshape": lambda given: given["x"].reshape(_ints(given["shape"])),
    "transpose": lambda given: given["x"].permute(_ints(given["perm"])),
    "concat": lambda given: torch.cat(given["values"], int(given["axis"])),
    "cast": lambda given: given["x"].float(),  # between fp16 and float32: all is float32 here
    "quantize": _steps,
    "dequantize": lambda given: _back(given, "input"),
    "constexpr_affine_dequantize": lambda given: _back(given, "quantized_data"),
    "linear": lambda given: F.linear(given["x"], given["weight"], given.get("bias")),
}
