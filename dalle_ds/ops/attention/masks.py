"""Which keys a query may see: the paper's sparse attention masks, one definition each (PAPER section 2.2, appendix B.1).

Sequence: `n_text` text slots, then grid * grid image slots in raster order. Text sees earlier text; every image slot sees
all text and, of the image, what its layer's pattern allows; self is always included.
"""

from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Pattern(StrEnum):
    """Image-to-image pattern of one layer."""

    ROW = "row"
    COLUMN = "column"
    CONV = "conv"


def layer_patterns(n_layers: int) -> list[Pattern]:
    """The pattern of each layer: the last is convolutional; of the others layer i (1-based) is column if (i - 2) % 4 == 0.

    The last-layer rule goes first: at depths such as 6 or 18 the column rule would claim the last layer.
    """
    if n_layers < 1:
        raise ValueError(f"n_layers is {n_layers}, expected at least 1")
    return [Pattern.COLUMN if (i - 2) % 4 == 0 else Pattern.ROW for i in range(1, n_layers)] + [Pattern.CONV]


class SparseMask(NamedTuple):
    """Which keys the queries of one layer may see: the one definition that every backend and cache is built from."""

    pattern: Pattern
    n_text: int
    grid: int
    """Image slots a side."""
    conv_kernel: int
    """Side of the window of convolutional layers, odd."""

    @property
    def n_slots(self) -> int:
        return self.n_text + self.grid * self.grid

    def image_may_attend(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether image slot `query` sees image slot `key` (raster indices, broadcast against each other) -> bool tensor.

        row: the previous `grid` slots and itself, running over row borders, so that the last one seen lies right above.
        column: the same column in this and earlier rows.
        conv: a centred causal window of conv_kernel x conv_kernel offsets dr * grid + dc, |dr|, |dc| <= conv_kernel // 2,
        taken in raster order without regard to row borders (the Toeplitz reading of the paper's "wraparound").
        """
        back = query - key
        if self.pattern is Pattern.ROW:
            return (back >= 0) & (back <= self.grid)
        if self.pattern is Pattern.COLUMN:
            return (back >= 0) & (back % self.grid == 0)
        reach = self.conv_kernel // 2
        # back = dr * grid + dc with 0 <= dr <= reach and |dc| <= reach, in closed form; right for windows wider than a row too
        return (back >= 0) & (back <= reach * self.grid + reach) & ((back + reach) % self.grid <= 2 * reach)

    def dense(self) -> Tensor:
        """All pairs, True = may attend, (L, L), query by key."""
        # device named: masks are values, also while a model is built on the meta device
        mask = torch.ones(self.n_slots, self.n_slots, dtype=torch.bool, device="cpu").tril_()
        image = torch.arange(self.grid * self.grid, device="cpu")
        mask[self.n_text :, self.n_text :] = self.image_may_attend(image[:, None], image[None, :])
        return mask


class _TransposeGrid(torch.autograd.Function):
    """Its own inverse, so its own backward pass: autograd would go back through slice, view and join one after another."""

    @staticmethod
    def forward(ctx: Any, x_BL: Tensor, n_text: int, grid: int) -> Tensor:
        ctx.n_text, ctx.grid = n_text, grid
        out_BL = x_BL.new_empty(x_BL.shape)
        out_BL[:, :n_text] = x_BL[:, :n_text]
        image, source = (x[:, n_text:].unflatten(1, (grid, grid)) for x in (out_BL, x_BL))
        image.copy_(source.transpose(1, 2))
        return out_BL

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BL: Tensor) -> tuple[Tensor, None, None]:
        return _TransposeGrid.apply(grad_BL, ctx.n_text, ctx.grid), None, None


def transpose_grid(x_BL: Tensor, n_text: int, grid: int) -> Tensor:
    """(B, L, ...) with the image part column by column if it was row by row, and the other way round."""
    return _TransposeGrid.apply(x_BL, n_text, grid)
