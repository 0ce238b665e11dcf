"""Sparse attention on CUDA: FlexAttention, which skips every 128 x 128 block of pairs that a mask leaves empty.

B batch, H heads, L slots, T of them text, D head width, G grid side.
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
"""Side of a block: what the Triton kernels for D = 64 use, forward; smaller ones would force smaller tiles."""


def flex_problem(device: torch.device) -> str | None:
    """Why FlexAttention can't train on `device`, or None."""
    if device.type != "cuda":
        return f"it has no backward pass outside CUDA, the device is {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability (8, 0), {torch.cuda.get_device_name(device)} has {capability}"
    return kernel_problem()


class FlexAttention:
    """Attention under one pattern: (q, k, v) (B, H, L, D) -> (B, H, L, D), in memory (B, L, H, D) if the three are.

    In column layers the image part of all four comes column by column (`columns_first`): in raster order every block of 128
    keys holds some key of each column, and not one could be skipped.
    """

    def __init__(self, mask: SparseMask, device: torch.device) -> None:
        self.columns_first = mask.pattern is Pattern.COLUMN
        # Built here and not when first used: made lazily inside a checkpointed region, they break its recomputation.
        with torch.inference_mode(False):
            self.block_mask = _block_mask(mask, device)

    def __call__(self, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor) -> Tensor:
        # Strided, as the fused projection leaves them: the kernels read them in place, and the result and the gradients come in
        # the same order of dimensions, so that neither they nor the heads' joining copy (tests/cuda_path/test_kernels.py).
        # TRITON: one kernel at every length; by default sequences below a block take one for decoding, with partial sums.
        return _compiled()(q_BHLD, k_BHLD, v_BHLD, block_mask=self.block_mask, kernel_options={"BACKEND": "TRITON"})


@cache
def _compiled() -> Callable[..., Tensor]:
    # static shapes: blocks of the mask are skipped only where the kernel knows their number
    return compiled(flex_attention, dynamic=False)


def _block_mask(mask: SparseMask, device: torch.device) -> BlockMask:
    n_text, grid, by_column = mask.n_text, mask.grid, mask.pattern is Pattern.COLUMN

    def raster(image: Tensor) -> Tensor:
        """Index in raster order of an image slot in the layer's own order."""
        return (image % grid) * grid + image // grid if by_column else image

    def may_attend(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        local = mask.image_may_attend(raster(query - n_text), raster(key - n_text))
        return torch.where(key < n_text, query >= key, (query >= n_text) & local)

    return create_block_mask(may_attend, None, None, mask.n_slots, mask.n_slots, device=device, BLOCK_SIZE=BLOCK)
