"""Sparse attention on CUDA by FlexAttention, which skips every 128 x 128 block of (query, key) pairs that is fully masked.

B batch, H heads, L slots, D head width.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from dalle_ds.ops.attention.masks import Pattern, SparseMask
from dalle_ds.ops.compiling import compiled
from dalle_ds.ops.kernel_compiler import kernel_problem

BLOCK = 128
"""Side of a mask block. The forward Triton kernels for D = 64 use this size; smaller blocks would force smaller tiles."""


def flex_problem(device: torch.device) -> str | None:
    """Return why FlexAttention can't train on `device`. If it can, return None."""
    if device.type != "cuda":
        return f"its backward pass needs CUDA, but the device is {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability (8, 0), but {torch.cuda.get_device_name(device)} has {capability}"
    return kernel_problem()


class FlexAttention:
    """Attention under one mask: q, k, v (B, H, L, D) -> (B, H, L, D). If q, k and v are (B, L, H, D) in memory, so is the
    result.

    In column layers, the image parts of q, k, v and the result are in column-major order (`columns_first`). In raster order,
    every block of 128 keys would hold a key of each column, so no block could be skipped.
    """

    def __init__(self, mask: SparseMask, device: torch.device) -> None:
        self.columns_first = mask.pattern is Pattern.COLUMN
        # Build the block mask here. If it were built lazily inside a checkpointed region, it would break the recomputation.
        with torch.inference_mode(False):
            self.block_mask = _block_mask(mask, device)

    def __call__(self, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor) -> Tensor:
        # q, k and v keep the strides of the fused projection. The kernels read them in place and return the result and the
        # gradients with the same order of dimensions, so neither they nor joining the heads needs a copy
        # (tests/cuda_path/test_kernels.py). TRITON selects the same kernel at every length. By default, sequences shorter than
        # a block use a decoding kernel with partial sums.
        return _compiled()(q_BHLD, k_BHLD, v_BHLD, block_mask=self.block_mask, kernel_options={"BACKEND": "TRITON"})


@cache
def _compiled() -> Callable[..., Tensor]:
    # static shapes: the kernel must know the number of mask blocks to skip them
    return compiled(flex_attention, dynamic=False)


def _block_mask(mask: SparseMask, device: torch.device) -> BlockMask:
    n_text, grid, by_column = mask.n_text, mask.grid, mask.pattern is Pattern.COLUMN

    def raster(image: Tensor) -> Tensor:
        """Convert image slot indices from the layer's order to raster order."""
        return (image % grid) * grid + image // grid if by_column else image

    def may_attend(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        local = mask.image_may_attend(raster(query - n_text), raster(key - n_text))
        return torch.where(key < n_text, query >= key, (query >= n_text) & local)

    return create_block_mask(may_attend, None, None, mask.n_slots, mask.n_slots, device=device, BLOCK_SIZE=BLOCK)
