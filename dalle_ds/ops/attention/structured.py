"""Sparse attention on CPUs that skips most masked pairs: two flash attention calls, merged by their log-sum-exps.

The first call attends to the text keys, which every query sees. The second attends to image keys: queries are split into
blocks, and each block has a window of the keys that its pattern can reach. Both calls use strided views of q, k and v. Nothing
is copied or permuted, not even in column layers.

B batch, H heads, L slots, D head width, n blocks of Q queries, W keys in a block's window.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_ds.ops.attention.masks import Pattern, SparseMask
from dalle_ds.ops.fp16 import through_fp32

# Private operators of torch, since the public function returns no log-sum-exp. `structured_problem` checks that they exist.
_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"


def structured_problem(device: torch.device) -> str | None:
    """Return why structured attention can't run on `device`. If it can, return None."""
    if device.type != "cpu":
        return f"it uses CPU operators, but the device is {device}"
    missing = [name for name in (_FORWARD, _BACKWARD) if not hasattr(torch.ops.aten, name)]
    return f"torch {torch.__version__} lacks {', '.join(missing)}" if missing else None


class StructuredAttention:
    """Attention under one mask: q, k, v (B, H, L, D) -> (B, H, L, D), equal to `DenseAttention`.

    If the CPU has no fp16 units, fp16 inputs are computed in fp32.
    """

    columns_first = False

    def __init__(self, mask: SparseMask) -> None:
        self.windows = _Windows(mask)

    def __call__(self, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor) -> Tensor:
        q, k, v = through_fp32(q_BHLD, k_BHLD, v_BHLD)
        return _TwoParts.apply(q, k, v, self.windows).to(q_BHLD.dtype)


class _Windows:
    """Blocks of image queries, and for each block the window of image keys that it may reach, as views.

    A block is one row of the grid. Its window is this row and the earlier rows back to the furthest reachable key. In column
    layers, block and window are the same column, under a causal mask.
    """

    def __init__(self, mask: SparseMask) -> None:
        self.n_text, self.grid, self.by_column = mask.n_text, mask.grid, mask.pattern is Pattern.COLUMN
        reach = {Pattern.ROW: mask.grid, Pattern.COLUMN: 0, Pattern.CONV: mask.conv_kernel // 2 * (mask.grid + 1)}[mask.pattern]
        self.rows_back = min(-(-reach // mask.grid), mask.grid - 1)
        # The first windows begin in the text part, where they are masked. If the text is too short, zeros are put in front of
        # it.
        self.n_lead = max(0, self.rows_back * mask.grid - mask.n_text)
        with torch.inference_mode(False):  # a mask created while sampling may be used in training too
            n, width = mask.grid, (self.rows_back + 1) * mask.grid
            query_nQ1 = torch.arange(n * n, device="cpu").view(n, n, 1)
            key_n1W = (torch.arange(1, n + 1, device="cpu")[:, None] * n + torch.arange(-width, 0, device="cpu"))[:, None]
            seen_nQW = (key_n1W >= 0) & mask.image_may_attend(query_nQ1, key_n1W)
            self._mask_1nQW = torch.zeros(seen_nQW.shape, device="cpu").masked_fill_(~seen_nQW, float("-inf"))[None]

    def blocks(self, x_HLD: Tensor) -> Tensor:
        """View the image part of (H, L, D) as blocks (H, n, Q, D)."""
        x_HnQD = x_HLD[:, self.n_text :].unflatten(1, (self.grid, self.grid))
        return x_HnQD.transpose(1, 2) if self.by_column else x_HnQD

    def reach(self, x_HLD: Tensor) -> Tensor:
        """View keys or values (H, lead + L, D) as overlapping windows (H, n, W, D)."""
        if self.by_column:
            return self.blocks(x_HLD)
        first = self.n_lead + self.n_text - self.rows_back * self.grid
        return x_HLD[:, first:].unfold(1, (self.rows_back + 1) * self.grid, self.grid).transpose(2, 3)

    def collect(self, grad_HnWD: Tensor) -> Tensor:
        """Gradients of windows (H, n, W, D) -> gradients of blocks (H, n, Q, D).
        For each key, sum over all windows that hold it, in place."""
        own_HnQD = grad_HnWD[:, :, self.rows_back * self.grid :]
        for back in range(1, self.rows_back + 1):
            start = (self.rows_back - back) * self.grid
            own_HnQD[:, : self.grid - back] += grad_HnWD[:, back:, start : start + self.grid]
        return own_HnQD

    def lead(self, x_BHLD: Tensor) -> Tensor:
        return F.pad(x_BHLD, (0, 0, self.n_lead, 0)) if self.n_lead else x_BHLD

    def options(self, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments of the flash operators for the windows' mask."""
        return {"is_causal": True} if self.by_column else {"is_causal": False, "attn_mask": self._mask_1nQW.to(dtype)}


class _TwoParts(torch.autograd.Function):
    """One softmax over text and window, from one flash call for each.

    The backward pass calls flash backward for each part, with the output and log-sum-exp of the joint softmax. Then the
    probabilities exp(score - lse) and the row sums of grad * out are those of the joint softmax, and no gradient through lse is
    needed.
    """

    @staticmethod
    def forward(ctx: Any, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, windows: _Windows) -> Tensor:
        attend = getattr(torch.ops.aten, _FORWARD)
        q, k, v, n_text = q_BHLD, k_BHLD, v_BHLD, windows.n_text
        wide = _at_least_fp32(q.dtype)
        # torch's causal mask is aligned at the top left: text slots see earlier text, and image slots see all text
        out, lse_BHL = attend(q, k[:, :, :n_text], v[:, :, :n_text], 0.0, True)
        led_k, led_v = windows.lead(k), windows.lead(v)
        for b in range(len(q)):  # per sample, since B can't be merged with heads and blocks into one stride
            local, local_lse = attend(
                windows.blocks(q[b]), windows.reach(led_k[b]), windows.reach(led_v[b]), 0.0, **windows.options(q.dtype)
            )
            whole, whole_lse = windows.blocks(out[b]), windows.blocks(lse_BHL[b, ..., None])[..., 0]
            share = torch.sigmoid(local_lse - whole_lse)[..., None]
            whole.copy_(torch.lerp(whole.to(wide), local.to(wide), share))
            whole_lse.copy_(torch.logaddexp(whole_lse, local_lse))
        ctx.save_for_backward(q, k, v, out, lse_BHL)
        ctx.windows = windows
        return out

    @staticmethod
    def backward(ctx: Any, grad_BHLD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        attend_backward = getattr(torch.ops.aten, _BACKWARD)
        q, k, v, out, lse_BHL = ctx.saved_tensors
        windows, n_text, wide = ctx.windows, ctx.windows.n_text, _at_least_fp32(q.dtype)
        grad_q, text_grad_k, text_grad_v = attend_backward(
            grad_BHLD, q, k[:, :, :n_text], v[:, :, :n_text], out, lse_BHL, 0.0, True
        )
        grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
        grad_k[:, :, :n_text], grad_v[:, :, :n_text] = text_grad_k, text_grad_v
        led_k, led_v = windows.lead(k), windows.lead(v)
        for b in range(len(q)):
            # not in 16 bits: the CPU's 16-bit flash backward is slow on small blocks
            local_grad_q, local_grad_k, local_grad_v = attend_backward(
                windows.blocks(grad_BHLD[b].to(wide)),
                windows.blocks(q[b].to(wide)),
                windows.reach(led_k[b].to(wide)),
                windows.reach(led_v[b].to(wide)),
                windows.blocks(out[b].to(wide)),
                windows.blocks(lse_BHL[b, ..., None])[..., 0],
                0.0,
                **windows.options(wide),
            )
            windows.blocks(grad_q[b]).add_(local_grad_q)
            windows.blocks(grad_k[b]).copy_(windows.collect(local_grad_k))
            windows.blocks(grad_v[b]).copy_(windows.collect(local_grad_v))
        return grad_q, grad_k, grad_v, None


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
