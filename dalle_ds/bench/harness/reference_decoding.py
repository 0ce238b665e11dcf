"""Reference for sampling: decode with a dense key-value cache, as a cache does that doesn't use sparse patterns.

Every past key is kept, and attention reads all of them under the rows of the pattern's mask.

B batch, L slots, H heads, D head width, C model width, V vocabulary, T text slots.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dalle_ds.models.attention import SelfAttention
from dalle_ds.models.prior import Prior


class DenseDecoder:
    """Reads slots in order and caches the keys and values of all slots."""

    def __init__(self, prior: Prior, batch: int) -> None:
        self.prior, self.length = prior, 0
        config, like = prior.config, prior.embed.row
        shape = (len(prior.layers), 2, batch, config.n_heads, config.n_slots, config.d_head)
        self.kv = torch.zeros(shape, dtype=like.dtype, device=like.device)
        masks = {layer.attention.branch.mask for layer in prior.layers}
        self.masks = {mask: mask.dense().to(like.device) for mask in masks}

    def read(self, x_BLC: Tensor) -> Tensor:
        """Read the next slots, embedded (B, L, C). Returns logits (B, V) of the image token after the last slot."""
        end = self.length + x_BLC.shape[1]
        for layer, kv in zip(self.prior.layers, self.kv, strict=True):
            x_BLC, h_BLC = layer.attention.to_branch(x_BLC)
            y_BLC = self._attend(layer.attention.branch, kv[:, :, :, :end], h_BLC)
            x_BLC = layer.mlp(layer.attention.from_branch(x_BLC, y_BLC))
        self.length = end
        return self.prior.heads(x_BLC[:, -1:], "image")[:, 0]

    def _attend(self, attention: SelfAttention, kv: Tensor, h_BLC: Tensor) -> Tensor:
        q, k, v = attention.heads(h_BLC)
        kv[0, :, :, self.length :], kv[1, :, :, self.length :] = k, v
        end = kv.shape[3]
        mask = self.masks[attention.mask][self.length : end, :end]
        out_BHLD = F.scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=mask)
        return attention.project(rearrange(out_BHLD, "b h l d -> b l (h d)"))


def embed(prior: Prior, text_BT: Tensor, image_BN: Tensor) -> Tensor:
    """Embed captions and n image tokens. Returns (B, T + 1 + n, C): all slots up to the one that predicts the next token."""
    return torch.cat([prior.embed.text_slots(text_BT), prior.embed.image_slots(image_BN)], 1)
