"""Sums over rows as a pass over the data brings them: float32 within pieces of equal size, float64 over these."""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch

from .moments import Moments

# Numbers in a piece of rows. Where pieces end does not depend on how many images run together.
_PIECE, _MOST_ROWS = 1 << 24, 1 << 13
_TILE = 1152
_LEAST = 64  # rows and columns from which oneDNN pays


class Gathering(Protocol):
    """What takes rows and gives their moments.

    Attributes:
        pieces: of patches (n, G, D), if they are kept.
    """

    pieces: list[torch.Tensor]

    def add(self, patches_ngd: torch.Tensor, targets: torch.Tensor | None = None) -> None:
        """Take rows: patches (n, G, D) and targets (n, G · O), if they are wanted, in float32."""

    def moments(self) -> Moments:
        """Of all rows; this ends the gathering."""


class Sums:
    """Moments of what a layer reads, and of what it should say there.

    Rows are counted from the mean of the first piece, so that float32 is enough for inputs far from zero too.

    Attributes:
        pieces: of patches (n, G, D), if they are kept.
    """

    def __init__(self, blocks: int, inputs: int, filters: int, *, keep: bool = False) -> None:
        """No rows yet.

        Args:
            blocks: G.
            inputs: D of each block.
            filters: O of each block; 0 where targets are not wanted.
            keep: whether to keep the patches.
        """

        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(blocks, *size, dtype=torch.float64)

        self._sums = Moments(0, zeros(inputs), zeros(inputs, inputs), zeros(filters), zeros(filters, inputs))
        self._rows = max(1, min(_MOST_ROWS, _PIECE // max(1, blocks * inputs)))
        self._keep, self.pieces = keep, list[torch.Tensor]()
        self._patches, self._targets = torch.empty(0, blocks, inputs), torch.empty(0, blocks, filters)
        self._filled = 0
        self._origin: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(self, patches_ngd: torch.Tensor, targets: torch.Tensor | None = None) -> None:
        """Take rows: patches (n, G, D) and targets (n, G · O), if they are wanted, in float32."""
        wanted = patches_ngd[:, 0, :0] if targets is None else targets
        wanted = wanted.reshape(len(patches_ngd), *self._targets.shape[1:])
        while len(patches_ngd):
            if not len(self._patches):
                self._patches = torch.empty(self._rows, *self._patches.shape[1:])
                self._targets = torch.empty(self._rows, *self._targets.shape[1:])
            part = slice(self._filled, self._filled + len(patches_ngd))
            taken = len(self._patches[part])
            self._patches[part], self._targets[part] = patches_ngd[:taken], wanted[:taken]
            self._filled += taken
            patches_ngd, wanted = patches_ngd[taken:], wanted[taken:]
            if self._filled == self._rows:
                self._fold()

    def moments(self) -> Moments:
        """Of all rows; this ends the gathering."""
        self._fold()
        sums = self._sums
        if self._origin is not None:
            origin, aim = self._origin
            mirror(sums.squares)
            _shift(sums.squares, sums.patches, sums.patches, origin, origin, sums.count)
            _shift(sums.cross, sums.targets, sums.patches, aim, origin, sums.count)
            sums.patches += sums.count * origin
            sums.targets += sums.count * aim
        return sums

    def _fold(self) -> None:
        patches, targets = self._patches[: self._filled], self._targets[: self._filled]
        if not len(patches):
            return
        if self._keep:
            self.pieces.append(patches)
            self._patches = self._patches[:0]
        self._filled = 0
        if self._origin is None:
            self._origin = patches.mean(0).double(), targets.mean(0).double()
        origin, aim = (each.float() for each in self._origin)
        sums = self._sums
        sums.count += len(patches)
        columns, wanted = (each.movedim(0, -1).contiguous() for each in (patches - origin, targets - aim))
        sums.patches += columns.sum(2)
        sums.targets += wanted.sum(2)
        for block, (mine, aims) in enumerate(zip(columns, wanted, strict=True)):
            add_gram(sums.squares[block], mine)
            if len(aims):
                sums.cross[block] += product(aims, mine)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A Bᵀ of float32 matrices, through oneDNN where torch has it: on AMD's processors twice as fast as MKL."""
    return _onednn(left, right) if min(left.shape + right.shape) >= _LEAST and _trusted() else left @ right.T


def _onednn(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")  # type: ignore[no-any-return]  # noqa: SLF001


@cache
def _trusted() -> bool:
    """Whether this torch has the operation, which is not a public one, and it does what it should."""
    left, right = (torch.arange(each * _LEAST**2).reshape(-1, _LEAST) % 5.0 for each in (1, 2))
    try:
        return torch.equal(_onednn(left, right), left @ right.T)
    except Exception:  # noqa: BLE001 - whatever another version raises for other arguments
        return False


def add_gram(squares: torch.Tensor, columns: torch.Tensor) -> None:
    """Add X Xᵀ of a float32 matrix (D, n) to a float64 one, in tiles on and below the diagonal only."""
    for start in range(0, len(columns), _TILE):
        stop = start + _TILE
        squares[start:, start:stop] += product(columns[start:], columns[start:stop])


def mirror(squares_gdd: torch.Tensor) -> None:
    """Fill in what `add_gram` leaves out."""
    for start in range(0, squares_gdd.shape[1], _TILE):
        stop = start + _TILE
        squares_gdd[:, start:stop, stop:] = squares_gdd[:, stop:, start:stop].mT


def _shift(
    cross_god: torch.Tensor,
    left_go: torch.Tensor,
    right_gd: torch.Tensor,
    a_go: torch.Tensor,
    b_gd: torch.Tensor,
    count: int,
) -> None:
    """Σ x yᵀ → Σ (x + a)(y + b)ᵀ, given Σ x and Σ y."""
    cross_god.baddbmm_(left_go[..., None], b_gd[:, None])
    cross_god.baddbmm_(a_go[..., None], (right_gd + count * b_gd)[:, None])
