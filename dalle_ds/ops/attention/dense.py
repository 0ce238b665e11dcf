"""Masked self-attention: the interface of all backends, and the dense reference.

B batch, H heads, L slots, D head width.
"""

from contextlib import nullcontext
from functools import cached_property
from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dalle_ds.ops.attention.masks import SparseMask
from dalle_ds.ops.fp16 import through_fp32

SHORT: Final = 192
"""Slots up to which bf16 training on CPUs keeps the probabilities. The flash kernel's bf16 backward pass is slow there: with 94
slots, forward and backward take 0.33 times as long without it; with 300, as long (one core with bf16 units)."""

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
        if q.device.type == "cpu" and q.dtype is torch.bfloat16 and n <= SHORT and torch.is_grad_enabled():
            return _KeptProbabilities.apply(q, k, v, self._short_bias[:n, :n])
        with sdpa_kernel(KERNELS_ON_CUDA, set_priority=True) if self._choose_kernel else nullcontext():
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask_LL[:n, :n]).to(q_BHLD.dtype)

    @cached_property
    def _short_bias(self) -> Tensor:
        """The mask of the first SHORT slots as fp32 scores to add. Most runs need none; that of 1,280 slots has 6.6 MB."""
        mask = self.mask_LL[:SHORT, :SHORT]
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))


class _KeptProbabilities(torch.autograd.Function):
    """Attention by whole matrices of probabilities, for short sequences in 16 bits: q, k, v (B, H, L, D), bias (L, L) fp32.

    Scores, softmax and the gradients of both are fp32, as in the flash kernels.
    """

    @staticmethod
    def forward(ctx: Any, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, bias_LL: Tensor) -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in (q_BHLD, k_BHLD, v_BHLD))
        scores = torch.baddbmm(bias_LL, q.float(), k.float().transpose(1, 2), alpha=q.shape[-1] ** -0.5)
        kept = scores.softmax(-1).to(q.dtype)
        ctx.save_for_backward(q, k, v, kept)
        return torch.bmm(kept, v).view(v_BHLD.shape)

    @staticmethod
    def backward(ctx: Any, grad_BHLD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, kept = ctx.saved_tensors
        grad = grad_BHLD.flatten(0, 1)
        grad_kept = torch.bmm(grad.float(), v.float().transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_kept, kept.float(), -1, torch.float32)
        grad_scores = grad_scores.mul_(q.shape[-1] ** -0.5).to(q.dtype)
        grad_q, grad_k = torch.bmm(grad_scores, k), torch.bmm(grad_scores.transpose(1, 2), q)
        grad_v = torch.bmm(kept.transpose(1, 2), grad)
        return grad_q.view(grad_BHLD.shape), grad_k.view(grad_BHLD.shape), grad_v.view(grad_BHLD.shape), None
