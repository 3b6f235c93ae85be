"""A network run operation by operation, so that a pass over the data can stop anywhere, look, and go on later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from ..errors import ModelError
from .trace import Inputs, named_tensors, trace

Values = dict[str, torch.Tensor]  # node → what it gave
See = Callable[[fx.Node, Values], None]


def copied(values: Values) -> Values:
    """Operations that work in place must not change what is kept."""
    return {name: value.clone() for name, value in values.items()}


class Replay:
    """The operations of a network for batches of one size.

    It works on the tensors of the model itself: whoever changes a weight in place changes what runs next.

    Attributes:
        trace: of the network at that batch size.
        batch: images that run together; a smaller last batch is filled up.
        read: convolution's node → channels of its input that count, once others no longer do: only these are computed
            with.
    """

    def __init__(self, model: nn.Module, input_shape: tuple[int, ...], batch: int) -> None:
        parameter = next(model.parameters())
        inputs: Inputs = (torch.zeros(batch, *input_shape, dtype=parameter.dtype, device=parameter.device),)
        self.trace, self.batch, self._like = trace(model, inputs), batch, parameter
        self.read: dict[fx.Node, torch.Tensor] = {}
        tensors = dict(named_tensors(model))
        self._fixed = {name: tensors[each] for name, each in self.trace.parameters.items() if each in tensors}
        self._fixed.update(self.trace.constants)
        images = [node for node in self.trace.nodes if node.op == "placeholder" and node.name not in self._fixed]
        if len(images) != 1:
            raise ModelError(f"The network takes {len(images)} inputs; reconstruction works with one input of images.")
        self._image = images[0].name
        self._last = self._last_uses()

    def _last_uses(self) -> dict[str, int]:
        return {source.name: index for index, node in enumerate(self.trace.nodes) for source in node.all_input_nodes}

    def begin(self, images: torch.Tensor) -> Values:
        """The values before the first operation, for at most `batch` images (n, …)."""
        missing = self.batch - len(images)
        filled = torch.cat([images, images[-1:].expand(missing, *images.shape[1:])]) if missing else images
        return {self._image: filled.to(self._like)}

    def run(self, values: Values, start: int, stop: int, see: See | None = None) -> None:
        """Execute the operations from index `start` up to, but without, `stop`; values that nobody needs go.

        Args:
            values: changed in place.
            start: index in `trace.nodes`.
            stop: as `start`.
            see: called after each operation, while its inputs are still there.
        """
        with torch.inference_mode():
            for index in range(start, stop):
                node = self.trace.nodes[index]
                if node.op not in {"call_function", "get_attr"}:
                    continue
                values[node.name] = self._execute(node, values)
                if see:
                    see(node, values)
                for source in {node, *node.all_input_nodes}:
                    if self._last.get(source.name, -1) <= index:
                        values.pop(source.name, None)

    def held(self, at: int) -> int:
        """Bytes of the values that lie between the operations before index `at` and the others, for one image."""
        nodes = (node for node in self.trace.nodes[:at] if self._last.get(node.name, -1) >= at)
        values = [node.meta["val"] for node in nodes if node.name not in self._fixed]
        return sum(int(each.numel() * each.element_size()) for each in values) // self.batch

    def _execute(self, node: fx.Node, values: Values) -> torch.Tensor:
        if node.op == "get_attr":
            return getattr(node.graph.owning_module, str(node.target))  # type: ignore[no-any-return]
        args: Any
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: self.value(source, values))
        if (channels := self.read.get(node)) is not None:
            args = args[0][:, channels], args[1][:, channels], *args[2:]
        return node.target(*args, **kwargs)  # type: ignore[no-any-return, operator]

    def value(self, node: fx.Node, values: Values) -> torch.Tensor:
        """What a node stands for: a parameter, or what it gave."""
        return self._fixed[node.name] if node.name in self._fixed else values[node.name]
