"""ExportedProgram → Core ML, an ML program (.mlpackage) for iOS 16 or later; only Apple's systems can run it.

In INT8 it is one for iOS 17 or later, with Q/DQ pairs around convolutions and linear layers, and the rest in fp16.
Core ML's own tool finds the limits by running the network, on Apple's systems only; here torch runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..interfaces import INPUT, Contract, Conversion, Progress
from ..program import exported, input_shape, load_program, output_names

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node

CONTRACT = Contract(
    source="program",
    suffix=".mlpackage",
    modules=("coremltools", "torch"),
    extra="coreml",
    precisions=("fp32", "fp16", "int8"),
)
_DATE = "com.github.apple.coremltools.conversion_date"
_LOW, _HIGH = -128, 127
_CALIBRATED_AT_ONCE = 8


def convert(job: Conversion, progress: Progress) -> Path:
    """Convert by way of torch.export (tracing would lose the names); fp16 is Core ML's own default."""
    import coremltools

    program, newest = load_program(job.source, job.batch, job.max_batch), coremltools.target.iOS16
    shape, names = input_shape(program), output_names(program)
    if job.calibration:
        quantised = _quantised(program.module(), job.calibration, job.batch or _CALIBRATED_AT_ONCE)
        program, newest = exported(quantised, shape, job.batch, job.max_batch), coremltools.target.iOS17
    precision = coremltools.precision
    batch = job.batch or coremltools.RangeDim(1, job.max_batch, 1)
    model = coremltools.convert(
        program.run_decompositions({}),
        inputs=[coremltools.TensorType(name=INPUT, shape=(batch, *shape))],
        outputs=[coremltools.TensorType(name=name) for name in names],
        convert_to="mlprogram",
        minimum_deployment_target=newest,
        compute_precision=precision.FLOAT32 if job.precision == "fp32" else precision.FLOAT16,
        skip_model_load=True,  # there is nothing on Linux that could load it
    )
    del model.user_defined_metadata[_DATE]  # the same network gives the same file on another day
    path = job.folder / f"{job.source.stem}.mlpackage"
    model.save(str(path))
    (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)  # for debugging by another tool
    return path


# ------------------------------------------------------------------------------------------------- INT8


def _quantised(module: GraphModule, calibration: Path, size: int) -> GraphModule:
    """The network with what convolutions and linear layers read, and their weights, in 8 bits.

    Weights are symmetric with a step per filter, activations have a zero point, and limits from all images.
    """
    _fold_norms(module)
    layers = list(_layers(module))
    limits = _limits(module, {layer.all_input_nodes[0] for layer in layers}, calibration, size)
    pairs = {node: _pair(module, node, *limits[node]) for node in limits}
    for number, layer in enumerate(layers):
        layer.update_arg(0, pairs[layer.all_input_nodes[0]])
        layer.update_arg(1, _weight(module, layer, f"quantised_{number}"))
    module.recompile()
    return module


def _layers(module: GraphModule) -> Iterator[Node]:
    from torch import ops

    computing = {ops.aten.conv2d.default, ops.aten.conv2d.padding, ops.aten.linear.default}
    return (node for node in module.graph.nodes if node.target in computing and node.args[1].op == "get_attr")


def _value(module: GraphModule, node: Any) -> Tensor:
    """What a node that reads one of the network's own values gives."""
    value: Tensor = attrgetter(node.target)(module)
    return value.detach()


def _constant(module: GraphModule, name: str, value: Tensor, before: Node) -> Node:
    """A value of the network's own, and the node that reads it."""
    module.register_buffer(name, value)
    with module.graph.inserting_before(before):
        return module.graph.get_attr(name)


def _fold_norms(module: GraphModule) -> None:
    """Put BatchNorms into the convolutions before them: coremltools does it only where weights are no steps."""
    from torch import ops
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    for number, layer in enumerate(list(_layers(module))):
        (norm,) = layer.users if len(layer.users) == 1 else (layer,)
        if norm.target != ops.aten.batch_norm.default:
            continue
        has_bias = len(layer.args) > 2 and layer.args[2] is not None
        bias = _value(module, layer.args[2]) if has_bias else None
        # Without `affine`, a BatchNorm has neither scale nor shift.
        scale, shift = (_value(module, each) if each else None for each in norm.args[1:3])
        mean, variance = (_value(module, each) for each in norm.args[3:5])
        weight, epsilon = _value(module, layer.args[1]), float(norm.args[7])  # type: ignore[arg-type]  # as ATen has it
        folded = fuse_conv_bn_weights(weight, bias, mean, variance, epsilon, scale, shift)
        names = (f"folded_{number}_weight", f"folded_{number}_bias")
        nodes = [_constant(module, name, value, layer) for name, value in zip(names, folded, strict=True)]
        layer.args = (layer.args[0], *nodes, *layer.args[3:])
        norm.replace_all_uses_with(layer)
        module.graph.erase_node(norm)
    module.recompile()


def _limits(module: GraphModule, nodes: set[Node], calibration: Path, size: int) -> dict[Node, tuple[float, float]]:
    """Smallest and largest value of each node over all calibration images, and 0 between them."""
    import numpy as np
    import torch
    from torch.fx import Interpreter

    found = dict.fromkeys(nodes, (0.0, 0.0))

    class Watching(Interpreter):
        """Runs the network node by node."""

        def run_node(self, n: Node) -> Any:
            result = super().run_node(n)
            if n in found:
                low, high = found[n]
                found[n] = min(low, float(result.min())), max(high, float(result.max()))
            return result

    images = torch.from_numpy(np.load(calibration))
    with torch.inference_mode():
        for start in range(0, len(images), size):  # the last batch is filled up with the first images
            Watching(module).run(images[torch.arange(start, start + size) % len(images)])
    return found


def _pair(module: GraphModule, node: Node, low: float, high: float) -> Node:
    """Quantise and dequantise what a node gives; returns the last node."""
    import torch

    scale = max(high - low, 1e-9) / (_HIGH - _LOW)
    grid = (scale, round(_LOW - low / scale), _LOW, _HIGH, torch.int8)
    ops = torch.ops.quantized_decomposed  # registered by coremltools, which reads them
    with module.graph.inserting_after(node):
        steps = module.graph.call_function(ops.quantize_per_tensor.default, (node, *grid))
    with module.graph.inserting_after(steps):
        return module.graph.call_function(ops.dequantize_per_tensor.default, (steps, *grid))


def _weight(module: GraphModule, layer: Node, name: str) -> Node:
    """The weights of a layer in steps, and the node that turns them back."""
    import torch

    weight = _value(module, layer.args[1])
    scale = weight.flatten(1).abs().amax(1).clamp(min=1e-9) / _HIGH
    steps = (weight / scale.view(-1, *[1] * (weight.ndim - 1))).round().to(torch.int8)
    zero = torch.zeros(len(scale), dtype=torch.int64)
    values = {"steps": steps, "scale": scale, "zero": zero}
    parts = [_constant(module, f"{name}_{part}", value, layer) for part, value in values.items()]
    back = torch.ops.quantized_decomposed.dequantize_per_channel.default
    with module.graph.inserting_before(layer):
        return module.graph.call_function(back, (*parts, 0, -_HIGH, _HIGH, torch.int8))
