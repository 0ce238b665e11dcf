"""Attention of one new image token to the cached keys. Only image keys that later queries may see are cached.

C captions, B = C * K candidates (the K candidates of a caption are consecutive), H heads, T text slots, D head width, N image
slots, S slots of the ring buffer, W image keys within reach of a query.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from dalle_ds.ops.attention.masks import SparseMask
from dalle_ds.ops.fp16 import batched_matmul_to_fp32


@dataclass(frozen=True)
class Reach:
    """Layout of a layer's ring buffer of image keys, and which of its slots each query reads.

    Shapes are the same at every step, and the step is a tensor, so one CUDA graph can replay every step. At the paper's size,
    row layers have S = W = 33, column layers S = 993 and W = 32, the conv layer S = 166 and W = 61.
    """

    ring: int
    """S: the distance to the furthest visible key, plus 1 for the query's own slot.
    Image slot j is stored at j % S until slot j + S replaces it."""
    read_NW: Tensor | None
    """Ring slots that query j reads, int64. None means the whole ring, W = S."""
    hidden_NW: Tensor
    """Mask added to the scores of query j, fp32: 0 for visible keys, -inf for others.
    The first queries see fewer than W keys."""


@cache
def reach_of(mask: SparseMask, device: torch.device) -> Reach:
    """Compute the `Reach` of layers with this mask."""
    n = mask.grid * mask.grid
    slots = torch.arange(n, device="cpu")
    with torch.inference_mode(False):
        seen_NN = mask.image_may_attend(slots[:, None], slots[None, :])
        ring = int(((slots[:, None] - slots[None, :]) * seen_NN).max()) + 1
        width = int(seen_NN.sum(1).max())
        # sort each query's visible keys first, in order; queries with fewer than W visible keys are filled up with hidden ones
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
    """Attend to all text keys, which the candidates of a caption share, and to each candidate's own W image keys.

    One softmax covers both. Scores, softmax and sums are fp32. Returns (B, H, 1, D) in q's dtype. The queries of a caption's
    candidates form one matrix, so the caption's text keys are read once for all of them.
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
