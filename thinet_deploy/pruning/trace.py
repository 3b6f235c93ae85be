"""The ATen graph of a network, as `torch.export` gives it, and where each operation stands in the user's code."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ..errors import ModelError

Inputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Trace:
    """One pass through a network, operation by operation.

    Attributes:
        nodes: of the graph, in the order of execution.
        parameters: placeholder → name of the parameter or buffer; tied ones have the first of their names.
        constants: placeholder → a tensor that the code made itself.
    """

    nodes: tuple[fx.Node, ...]
    parameters: Mapping[str, str]
    constants: Mapping[str, torch.Tensor]

    @property
    def images(self) -> tuple[fx.Node, ...]:
        """The network's inputs."""
        inputs = (node for node in self.nodes if node.op == "placeholder")
        return tuple(node for node in inputs if node.name not in self.constants and not self.parameter(node))

    def parameter(self, node: object) -> str:
        """Name of the parameter or buffer that a node stands for; "" for anything else."""
        return self.parameters.get(node.name, "") if isinstance(node, fx.Node) else ""


def example_inputs(model: nn.Module, input_shape: tuple[int, ...]) -> Inputs:
    """Two zero inputs of the model's type and device; with one, `torch.export` would specialise the batch."""
    parameter = next(model.parameters(), torch.empty(0))
    return (torch.zeros(2, *input_shape, dtype=parameter.dtype, device=parameter.device),)


def trace(model: nn.Module, inputs: Inputs) -> Trace:
    """Trace a network in eval mode.

    Raises:
        ModelError: `torch.export` cannot trace it.
    """
    try:
        with _quiet():
            program = torch.export.export(model.eval(), inputs)
    except Exception as error:  # torch.export raises many kinds of error for a network it cannot trace
        shapes = ", ".join("x".join(map(str, each.shape[1:])) for each in inputs)
        raise ModelError(
            f"torch.export cannot trace the network for inputs of {shapes}: "
            f"{(str(error).strip() or type(error).__name__).splitlines()[0]}",
            hint="Check --input-shape, and that forward() takes image tensors and has no data-dependent branches.",
        ) from error
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    first = first_names(model)
    parameters = {node: first.get(name, name) for node, name in names.items()}
    constants = {node: program.constants[name] for node, name in signature.inputs_to_lifted_tensor_constants.items()}
    return Trace(tuple(program.graph.nodes), parameters, constants)


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch logs a failure that it also raises; the message says enough."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer → the first name of that tensor; they differ for tied weights."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in named_tensors(model)}


def named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """All parameters and buffers by all of their names."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def operation(node: fx.Node) -> str:
    """The plain name of an ATen operation: "conv2d" of aten.conv2d.default; the function's name for others."""
    if node.op != "call_function":
        return ""
    namespace, _, rest = str(node.target).partition(".")
    return rest.partition(".")[0] if namespace == "aten" else getattr(node.target, "__name__", str(node.target))


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an ATen operation by name, defaults filled in."""
    names = node.target._schema.arguments  # type: ignore[union-attr]  # noqa: SLF001 - the only place that names them
    given = {argument.name: value for argument, value in zip(names, node.args, strict=False)}
    defaults = {argument.name: argument.default_value for argument in names if argument.has_default_value()}
    return {**defaults, **given, **node.kwargs}


def shape(node: fx.Node) -> torch.Size:
    """Of a node's only output."""
    return node.meta["val"].shape  # type: ignore[no-any-return]


def owner(node: fx.Node) -> str:
    """Name of the innermost module that was running; "" for the network itself."""
    stack = [name for name, _ in node.meta.get("nn_module_stack", {}).values()]
    # A module that is called again is traced as name@1.
    return str(stack[-1]).partition("@")[0] if stack else ""


def place(node: fx.Node) -> str:
    """The operation and its line in the user's code: "mean (net.py:31)"."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{operation(node)} ({Path(lines[-1][0]).name}:{lines[-1][1]})" if lines else operation(node)
