"""Masked self-attention: the interface of all backends, and the dense reference.

B batch, H heads, L slots, D head width.
"""

from contextlib import nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dalle_ds.ops.attention.masks import SparseMask
from dalle_ds.ops.fp16 import through_fp32

KERNELS_ON_CUDA = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Attention(Protocol):
    """Attention under one mask: q, k, v (B, H, L, D) -> (B, H, L, D), in q's dtype."""

    columns_first: bool
    """Whether the image parts of q, k, v and the result are in column-major order instead of raster order."""

    def __call__(self, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor) -> Tensor: ...


class DenseAttention:
    """Scaled dot-product attention with a boolean mask: the reference that every other backend must equal.

    Softmax and sums are fp32 inside the fused kernels. On CUDA, cuDNN's kernel is excluded, since it gives NaN gradients for
    some masked shapes (pytorch issue 196678). If no fused kernel can run, torch uses its plain operators.
    """

    columns_first = False

    def __init__(self, mask: SparseMask, device: torch.device) -> None:
        with torch.inference_mode(False):  # a mask created while sampling may be used in training too
            self.mask_LL = mask.dense().to(device)
        self._choose_kernel = device.type == "cuda"

    def __call__(self, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor) -> Tensor:
        """Attend over the whole sequence, or over its first slots only."""
        q, k, v = through_fp32(q_BHLD, k_BHLD, v_BHLD)
        n = q.shape[2]
        with sdpa_kernel(KERNELS_ON_CUDA, set_priority=True) if self._choose_kernel else nullcontext():
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask_LL[:n, :n]).to(q_BHLD.dtype)
