"""Which keys a query may see: the paper's sparse attention masks, one definition each (PAPER section 2.2, appendix B.1).

Sequence: `n_text` text slots, then grid * grid image slots in raster order. Text sees earlier text; every image slot sees
all text and, of the image, what its layer's pattern allows; self is always included.
"""

from enum import StrEnum

import torch
from torch import Tensor


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


def image_may_attend(pattern: Pattern, query: Tensor, key: Tensor, grid: int, conv_kernel: int) -> Tensor:
    """Whether image slot `query` sees image slot `key` (raster indices, broadcast against each other) -> bool tensor.

    row: the previous `grid` slots and itself, running over row borders, so that the last one seen lies right above.
    column: the same column in this and earlier rows.
    conv: a centred causal window of conv_kernel x conv_kernel offsets dr * grid + dc, |dr|, |dc| <= conv_kernel // 2,
    taken in raster order without regard to row borders (the Toeplitz reading of the paper's "wraparound").
    """
    back = query - key
    if pattern is Pattern.ROW:
        return (back >= 0) & (back <= grid)
    if pattern is Pattern.COLUMN:
        return (back >= 0) & (back % grid == 0)
    reach = conv_kernel // 2
    # back = dr * grid + dc with 0 <= dr <= reach and |dc| <= reach, in closed form; right for windows wider than a row too
    return (back >= 0) & (back <= reach * grid + reach) & ((back + reach) % grid <= 2 * reach)


def attention_mask(pattern: Pattern, n_text: int, grid: int, conv_kernel: int) -> Tensor:
    """The dense mask, True = may attend, (L, L) with L = n_text + grid * grid, query by key."""
    n = n_text + grid * grid
    # device named: masks are values, also while a model is built on the meta device
    mask = torch.ones(n, n, dtype=torch.bool, device="cpu").tril_()
    image = torch.arange(grid * grid, device="cpu")
    mask[n_text:, n_text:] = image_may_attend(pattern, image[:, None], image[None, :], grid, conv_kernel)
    return mask


def transpose_grid(x_BL: Tensor, n_text: int, grid: int) -> Tensor:
    """(B, L, ...) with the image part column by column if it was row by row, and the other way round."""
    image = x_BL[:, n_text:].unflatten(1, (grid, grid)).transpose(1, 2).flatten(1, 2)
    return torch.cat([x_BL[:, :n_text], image], 1)
