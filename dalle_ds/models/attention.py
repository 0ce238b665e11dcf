"""Sparse self-attention branch of the prior, for whole sequences and token by token.

B batch, L tokens, H heads, D head width, C model width (H * D).
"""

from dataclasses import dataclass

from einops import rearrange
from torch import Tensor, nn

from dalle_ds.models.resblock import BranchLinear
from dalle_ds.ops.attention import dense_attention
from dalle_ds.ops.masks import Pattern, shared_mask


@dataclass
class KeyValueCache:
    """Keys and values of the tokens read so far, (B, H, max L, D); `append` fills it in order."""

    k_BHLD: Tensor
    v_BHLD: Tensor
    length: int = 0

    def append(self, k_BHLD: Tensor, v_BHLD: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens; returns all keys and values up to and including them."""
        end = self.length + k_BHLD.shape[2]
        self.k_BHLD[:, :, self.length : end] = k_BHLD
        self.v_BHLD[:, :, self.length : end] = v_BHLD
        self.length = end
        return self.k_BHLD[:, :, :end], self.v_BHLD[:, :, :end]

    def expand(self, n: int) -> "KeyValueCache":
        """The same past for n candidates of each row: (B * n, ...). The past is copied once, not computed again."""
        return KeyValueCache(self.k_BHLD.repeat_interleave(n, 0), self.v_BHLD.repeat_interleave(n, 0), self.length)


class SelfAttention(nn.Module):
    """Multi-head attention under one of the paper's three patterns, one softmax over text and image keys together."""

    def __init__(self, n_heads: int, d_head: int, pattern: Pattern, n_text: int, grid: int, conv_kernel: int) -> None:
        super().__init__()
        d_model = n_heads * d_head
        self.n_heads, self.pattern = n_heads, pattern
        self.qkv = BranchLinear(d_model, 3 * d_model)
        self.project = BranchLinear(d_model, d_model)
        self.geometry = (n_text, grid, conv_kernel)

    def forward(self, x_BLC: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """x (B, L, C) -> (B, L, C). With a cache, x holds the tokens that follow the cached ones."""
        q, k, v = rearrange(self.qkv(x_BLC), "b l (three h d) -> three b h l d", three=3, h=self.n_heads)
        start = 0
        if cache is not None:
            start = cache.length
            k, v = cache.append(k, v)
        mask = shared_mask(self.pattern, *self.geometry, x_BLC.device)[start : start + q.shape[2], : k.shape[2]]
        return self.project(rearrange(dense_attention(q, k, v, mask), "b h l d -> b l (h d)"))

    def new_cache(self, batch: int, like: Tensor) -> KeyValueCache:
        """An empty cache for `batch` sequences, with the dtype and device of `like`."""
        n_text, grid, _ = self.geometry
        shape = (batch, self.n_heads, n_text + grid * grid, self.project.in_features // self.n_heads)
        return KeyValueCache(like.new_zeros(shape), like.new_zeros(shape))
