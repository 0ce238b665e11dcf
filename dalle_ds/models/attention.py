"""Sparse self-attention branch of the prior, for whole sequences and for token-by-token decoding.

B batch, L slots, T text slots, H heads, D head width, C model width (H * D), S slots in a layer's ring buffer of image keys.
"""

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dalle_ds.models.resblock import BranchLinear
from dalle_ds.ops.attention.backends import attention_backend, choose_backend, errors_against_dense
from dalle_ds.ops.attention.decoding import attend_to_reach, reach_of
from dalle_ds.ops.attention.dense import Attention, DenseAttention
from dalle_ds.ops.attention.masks import SparseMask, transpose_grid


@dataclass
class LayerCache:
    """KV cache of one layer: text keys and values once per caption, image keys and values in a ring buffer per candidate."""

    text_k_CHTD: Tensor
    text_v_CHTD: Tensor
    ring_k_BHSD: Tensor
    ring_v_BHSD: Tensor

    def expand(self, n: int) -> "LayerCache":
        """Repeat the cache for n candidates of each row. The text part is shared, not copied."""
        rings = (ring.repeat_interleave(n, 0) for ring in (self.ring_k_BHSD, self.ring_v_BHSD))
        return LayerCache(self.text_k_CHTD, self.text_v_CHTD, *rings)


class _SplitHeads(torch.autograd.Function):
    """(B, L, 3 C) -> q, k, v as views (B, H, L, D). The backward pass writes the three
    gradients straight into one tensor; autograd's own views would take two steps for that."""

    @staticmethod
    def forward(ctx: Any, qkv_BLC: Tensor, n_heads: int) -> tuple[Tensor, ...]:
        return rearrange(qkv_BLC, "b l (three h d) -> three b h l d", three=3, h=n_heads).unbind(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_BHLD: Tensor) -> tuple[Tensor, None]:
        b, h, n, d = grads_BHLD[0].shape
        grad_BL3HD = grads_BHLD[0].new_empty(b, n, 3, h, d)
        for part, grad_BHLD in enumerate(grads_BHLD):
            grad_BL3HD[:, :, part].transpose(1, 2).copy_(grad_BHLD)
        return grad_BL3HD.flatten(2), None


class SelfAttention(nn.Module):
    """Multi-head attention under one of the paper's three patterns. One softmax covers text and image keys together."""

    def __init__(self, n_heads: int, d_head: int, mask: SparseMask) -> None:
        super().__init__()
        d_model = n_heads * d_head
        self.n_heads, self.d_head, self.mask = n_heads, d_head, mask
        self.qkv = BranchLinear(d_model, 3 * d_model)
        self.project = BranchLinear(d_model, d_model)
        self.attend: Attention | None = None
        """The attention backend, set by `use_attention`. None means the dense reference."""

    def forward(self, x_BLC: Tensor) -> Tensor:
        """Attend over the whole sequence: x (B, L, C) -> (B, L, C)."""
        attend = self.attend or self.backend("dense", x_BLC.device)
        # For columns_first, permute x once before the projection; otherwise q, k and v would be three permutations.
        x_BLC = self._reorder(attend, x_BLC)
        out_BHLD = attend(*self.heads(x_BLC))
        return self._reorder(attend, self.project(rearrange(out_BHLD, "b h l d -> b l (h d)")))

    def prefill(self, x_BLC: Tensor) -> tuple[Tensor, LayerCache]:
        """Attend over the first slots and fill a cache.

        x (B, L, C) holds all text slots and at least the first image slot. Returns the output (B, L, C) and the cache from
        which `decode` continues.
        """
        q, k, v = self.heads(x_BLC)
        out_BHLD = self.backend("dense", x_BLC.device)(q, k, v)
        ring = reach_of(self.mask, x_BLC.device).ring
        n_image = k.shape[2] - self.mask.n_text
        kept = torch.arange(max(0, n_image - ring), n_image, device=x_BLC.device)
        parts = [part[:, :, : self.mask.n_text].contiguous() for part in (k, v)]
        for part in (k, v):
            ring_BHSD = part.new_zeros(*part.shape[:2], ring, part.shape[3])
            parts.append(ring_BHSD.index_copy_(2, kept % ring, part[:, :, self.mask.n_text + kept]))
        return self.project(rearrange(out_BHLD, "b h l d -> b l (h d)")), LayerCache(*parts)

    def decode(self, x_B1C: Tensor, cache: LayerCache, slot_1: Tensor) -> Tensor:
        """Attend from one image slot to the cache, and add the slot's key and value to the cache.

        x (B, 1, C) -> (B, 1, C). `slot_1` (1,) int64, on the device, is the index of the image slot.
        """
        q, k, v = self.heads(x_B1C)
        reach = reach_of(self.mask, x_B1C.device)
        place_1 = slot_1 % reach.ring
        keys, values = cache.ring_k_BHSD.index_copy_(2, place_1, k), cache.ring_v_BHSD.index_copy_(2, place_1, v)
        if reach.read_NW is not None:
            read_W = reach.read_NW[slot_1][0]
            keys, values = keys.index_select(2, read_W), values.index_select(2, read_W)
        out_BH1D = attend_to_reach(q, cache.text_k_CHTD, cache.text_v_CHTD, keys, values, reach.hidden_NW[slot_1][0])
        return self.project(rearrange(out_BH1D, "b h l d -> b l (h d)"))

    def heads(self, x_BLC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, C) -> queries, keys and values, (B, H, L, D) each. All three are views of one projection."""
        return _SplitHeads.apply(self.qkv(x_BLC), self.n_heads)

    def _reorder(self, attend: Attention, x_BLC: Tensor) -> Tensor:
        return transpose_grid(x_BLC, self.mask.n_text, self.mask.grid) if attend.columns_first else x_BLC

    def backend(self, name: str, device: torch.device) -> Attention:
        """Return the attention backend `name` for this layer's mask. Raises ConfigError if it can't run on `device`."""
        return attention_backend(name, self.mask, device)


def use_attention(model: nn.Module, name: str, device: torch.device) -> str:
    """Set the backend that every attention layer of `model` uses for whole sequences. "auto" is the fastest one on `device`.

    Returns:
        The name of the backend in use.

    Raises:
        ConfigError: the backend does not exist or can't run on `device`.
    """
    layers = [module for module in model.modules() if isinstance(module, SelfAttention)]
    if name == "auto":
        name = choose_backend(device, layers[0].mask.grid)
    for layer in layers:
        layer.attend = layer.backend(name, device)
    return name


def verify_attention(model: nn.Module, dtype: torch.dtype, device: torch.device, batch: int = 1) -> None:
    """Compare the model's attention backend with dense attention on this machine, in `dtype`.

    Outputs and gradients of every pattern are compared, at the model's sequence length and number of heads, with `batch`
    samples. Released compilers and kernels have been silently wrong before.

    When `batch` is the training micro-batch, the compiled kernels are exactly those that training will use. The check takes
    less memory than a training step of one layer.

    Raises:
        RuntimeError: a relative error is more than twice that of dense attention in the same format.
    """
    layers = {layer.mask.pattern: layer for layer in model.modules() if isinstance(layer, SelfAttention)}
    for pattern, layer in layers.items():
        if layer.attend is None or isinstance(layer.attend, DenseAttention):
            continue
        errors = errors_against_dense(layer.attend, layer.mask, layer.n_heads, layer.d_head, dtype, device, batch)
        for what, (ours, dense) in errors.items():
            if not ours <= 2 * dense + 1e-6:
                raise RuntimeError(
                    f"{type(layer.attend).__name__}, {pattern} pattern, {dtype} on {device}: relative error of {what} is "
                    f"{ours:.1e}, expected at most twice dense attention's {dense:.1e}; set attention: dense in the recipe"
                )
