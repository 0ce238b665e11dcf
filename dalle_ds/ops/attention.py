"""Masked self-attention backends: tensors in, tensors out.

B batch, H heads, L queries, S keys, D head width.
"""

import torch.nn.functional as F
from torch import Tensor

from dalle_ds.ops.half import through_fp32


def dense_attention(q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask_LS: Tensor) -> Tensor:
    """Softmax attention under a boolean mask (True = may attend): the reference that every other backend must equal.

    Softmax and sums are fp32 inside the fused kernel; the result has the dtype of q.
    """
    q, k, v = through_fp32(q_BHLD, k_BHSD, v_BHSD)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_LS).to(q_BHLD.dtype)
