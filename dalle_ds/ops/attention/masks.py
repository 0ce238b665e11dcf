"""The paper's sparse attention masks, with a single definition for all backends (PAPER section 2.2, appendix B.1).

A sequence has `n_text` text slots, then grid * grid image slots in raster order. A text slot sees earlier text slots. An image
slot sees all text slots, and the image slots that its layer's pattern allows. Every slot sees itself.

B batch, L slots.
"""

from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Pattern(StrEnum):
    """Pattern of one layer: which image slots an image slot sees."""

    ROW = "row"
    COLUMN = "column"
    CONV = "conv"


def layer_patterns(n_layers: int) -> list[Pattern]:
    """The pattern of each layer. The last layer is convolutional. Of the others, layer i (1-based) is column if (i - 2) % 4 ==
    0, else row.

    The rule for the last layer takes precedence: at depths such as 6 or 18, the last layer would otherwise be column.
    """
    if n_layers < 1:
        raise ValueError(f"n_layers is {n_layers}, expected at least 1")
    return [Pattern.COLUMN if (i - 2) % 4 == 0 else Pattern.ROW for i in range(1, n_layers)] + [Pattern.CONV]


class SparseMask(NamedTuple):
    """Which keys the queries of one layer may see. Every backend and cache is built from this definition."""

    pattern: Pattern
    n_text: int
    grid: int
    """Image slots along one side."""
    conv_kernel: int
    """Side of the attention window in convolutional layers; odd."""

    @property
    def n_slots(self) -> int:
        return self.n_text + self.grid * self.grid

    def image_may_attend(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether image slot `query` sees image slot `key`, as a bool tensor. Both are raster indices and are broadcast.

        - row: the slot itself and the previous `grid` slots, across row borders. The furthest one is directly above the slot.
        - column: the same column in this and earlier rows.
        - conv: a centred causal window of conv_kernel x conv_kernel offsets dr * grid + dc, |dr|, |dc| <= conv_kernel // 2, in
          raster order and across row borders (the Toeplitz reading of the paper's "wraparound").
        """
        back = query - key
        if self.pattern is Pattern.ROW:
            return (back >= 0) & (back <= self.grid)
        if self.pattern is Pattern.COLUMN:
            return (back >= 0) & (back % self.grid == 0)
        reach = self.conv_kernel // 2
        # closed form of back = dr * grid + dc, 0 <= dr <= reach, |dc| <= reach; also correct for windows wider than a row
        return (back >= 0) & (back <= reach * self.grid + reach) & ((back + reach) % self.grid <= 2 * reach)

    def dense(self) -> Tensor:
        """The whole mask (L, L) as bool, query by key. True means that the query may attend to the key."""
        # explicit device: the mask must have values even if a model is built on the meta device
        mask = torch.ones(self.n_slots, self.n_slots, dtype=torch.bool, device="cpu").tril_()
        image = torch.arange(self.grid * self.grid, device="cpu")
        mask[self.n_text :, self.n_text :] = self.image_may_attend(image[:, None], image[None, :])
        return mask


class _TransposeGrid(torch.autograd.Function):
    """Transposes the image part. It is its own inverse, so it is also its own backward pass, in one step. autograd would go
    back through slice, view and concatenation one by one."""

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
    """Transpose the image part of (B, L, ...): from raster order to column-major order, or back."""
    return _TransposeGrid.apply(x_BL, n_text, grid)
