"""ExportedPrograms (.pt2) that we wrote, for the converters that start from one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .interfaces import OUTPUTS

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram


def input_shape(program: ExportedProgram) -> tuple[int, ...]:
    """Sizes of the program's input without the batch."""
    assert program.example_inputs is not None
    return tuple(program.example_inputs[0][0].shape[1:])


def output_names(program: ExportedProgram) -> tuple[str, ...]:
    """What the program's outputs are called in every engine."""
    return OUTPUTS[: len(program.graph_signature.user_outputs)]


def load_program(path: Path, batch: int | None, max_batch: int = 32) -> ExportedProgram:
    """A program for one batch size, or for 1 to `max_batch`. Only for files of our own: see `export.export_program`.

    Args:
        path: of the .pt2 file.
        batch: the only size; None for any up to `max_batch`.
        max_batch: the largest.
    """
    import torch

    program = torch.export.load(path)
    return exported(program.module(), input_shape(program), batch, max_batch)


def exported(module: nn.Module, shape: tuple[int, ...], batch: int | None, max_batch: int) -> ExportedProgram:
    """A module as a program; see `load_program`.

    Args:
        module: takes a batch of images.
        shape: of an image.
        batch: the only size; None for any up to `max_batch`.
        max_batch: the largest.
    """
    import torch

    example = torch.zeros(batch or 2, *shape)  # batch 1 would be taken for a constant
    dynamic = None if batch else ({0: torch.export.Dim("batch", min=1, max=max_batch)},)
    return torch.export.export(module, (example,), dynamic_shapes=dynamic)
