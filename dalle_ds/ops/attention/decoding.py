"""Attention of one new image token to what was read before it: only keys within reach are kept, and only they are read.

C captions, B = C * K candidates (K of each caption in a row), H heads, T text slots, D head width; N image slots,
S slots of the ring, W keys within reach of a query.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from dalle_ds.ops.attention.masks import SparseMask
from dalle_ds.ops.fp16 import batched_matmul_to_fp32


@dataclass(frozen=True)
class Reach:
    """Where a layer keeps the image keys that a later query may still see. All shapes are the same at every step, and the step
    is a tensor, so that a CUDA graph of one step serves all.

    At the paper's size: row S = W = 33; column S = 993, W = 32; conv S = 166, W = 61.
    """

    ring: int
    """S: the furthest look back, and the query's own slot. Image slot j lives at j % S until slot j + S takes its place."""
    read_NW: Tensor | None
    """Ring slots that query j reads, int64; None: the whole ring, W = S."""
    hidden_NW: Tensor
    """0 for a key that query j sees, -inf for one it does not (the first queries see fewer than W), fp32."""


@cache
def reach_of(mask: SparseMask, device: torch.device) -> Reach:
    """The `Reach` of layers with this mask."""
    n = mask.grid * mask.grid
    slots = torch.arange(n, device="cpu")
    with torch.inference_mode(False):
        seen_NN = mask.image_may_attend(slots[:, None], slots[None, :])
        ring = int(((slots[:, None] - slots[None, :]) * seen_NN).max()) + 1
        width = int(seen_NN.sum(1).max())
        # the keys of each query first, in order; where there are fewer than W, unseen ones fill up
        keys_NW = seen_NN.int().sort(dim=1, descending=True, stable=True).indices[:, :width]
        hidden_NW = torch.zeros(n, width).masked_fill_(~seen_NN.gather(1, keys_NW), float("-inf"))
        read_NW = keys_NW % ring
        if width < ring:
            return Reach(ring, read_NW.to(device), hidden_NW.to(device))
        whole_NS = torch.full((n, ring), float("-inf")).scatter_reduce_(1, read_NW, hidden_NW, "amax")
        return Reach(ring, None, whole_NS.to(device))


def attend_to_reach(
    q_BH1D: Tensor, text_k_CHTD: Tensor, text_v_CHTD: Tensor, k_BHWD: Tensor, v_BHWD: Tensor, hidden_W: Tensor
) -> Tensor:
    """One softmax over all text keys, shared by the candidates of a caption, and each candidate's own W image keys
    -> (B, H, 1, D) in q's dtype. Scores, softmax and sums are fp32.

    The queries of a caption's candidates are one matrix: its text keys are read once for all of them.
    """
    n_captions, n_heads, n_text, d_head = text_k_CHTD.shape
    q_CHKD = (q_BH1D * d_head**-0.5).view(n_captions, -1, n_heads, d_head).transpose(1, 2)
    n_candidates = q_CHKD.shape[2]

    def by_caption(x_BH1n: Tensor) -> Tensor:
        return x_BH1n.reshape(n_captions, n_candidates, n_heads, -1).transpose(1, 2)

    def by_candidate(x_CHKn: Tensor) -> Tensor:
        return x_CHKn.transpose(1, 2).reshape(n_captions * n_candidates, n_heads, 1, -1)

    text_CHKT = batched_matmul_to_fp32(q_CHKD, text_k_CHTD.mT)
    local_BH1W = batched_matmul_to_fp32(by_candidate(q_CHKD), k_BHWD.mT) + hidden_W
    p_CHKn = torch.cat([text_CHKT, by_caption(local_BH1W)], -1).softmax(-1).to(q_BH1D.dtype)
    text_out = batched_matmul_to_fp32(p_CHKn[..., :n_text], text_v_CHTD)
    local_out = batched_matmul_to_fp32(by_candidate(p_CHKn[..., n_text:]), v_BHWD)
    return (by_candidate(text_out) + local_out).to(q_BH1D.dtype)
