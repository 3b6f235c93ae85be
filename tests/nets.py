"""Networks as tests write them down: a forward function and its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Forward = Callable[..., Any]


class Net(nn.Module):
    """A network from its forward function and its parts; a tensor that is no parameter is a buffer."""

    def __init__(self, forward: Forward, **parts: Any) -> None:
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self._forward(self, *inputs)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """A convolution that leaves maps as large as they are."""
    return nn.Conv2d(inputs, outputs, kernel, **{"padding": kernel // 2, **options})


def drawn(model: nn.Module, std: float) -> nn.Module:
    """The network in eval mode with random values in all parameters and in the statistics of BatchNorms."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()
