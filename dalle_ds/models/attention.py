"""Sparse self-attention branch of the prior, for whole sequences and token by token.

B batch, L slots, T of them text, H heads, D head width, C model width (H * D); S slots of a layer's ring of image keys.
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
    """Keys and values of what a layer has read: text once for each caption, image keys in a ring for each candidate."""

    text_k_CHTD: Tensor
    text_v_CHTD: Tensor
    ring_k_BHSD: Tensor
    ring_v_BHSD: Tensor

    def expand(self, n: int) -> "LayerCache":
        """The same past for n candidates of each row; the text is not copied."""
        rings = (ring.repeat_interleave(n, 0) for ring in (self.ring_k_BHSD, self.ring_v_BHSD))
        return LayerCache(self.text_k_CHTD, self.text_v_CHTD, *rings)


class _SplitHeads(torch.autograd.Function):
    """(B, L, 3 C) -> q, k, v as views (B, H, L, D). Backward writes their gradients into one tensor, which autograd's own views
    would make in two steps."""

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
    """Multi-head attention under one of the paper's three patterns, one softmax over text and image keys together."""

    def __init__(self, n_heads: int, d_head: int, mask: SparseMask) -> None:
        super().__init__()
        d_model = n_heads * d_head
        self.n_heads, self.d_head, self.mask = n_heads, d_head, mask
        self.qkv = BranchLinear(d_model, 3 * d_model)
        self.project = BranchLinear(d_model, d_model)
        self.attend: Attention | None = None
        """The backend, see `use_attention`; None: the dense reference."""

    def forward(self, x_BLC: Tensor) -> Tensor:
        """x (B, L, C), the whole sequence -> (B, L, C)."""
        attend = self.attend or self.backend("dense", x_BLC.device)
        # columns first: the states are permuted once, at model width, and not q, k, v and the result
        x_BLC = self._reorder(attend, x_BLC)
        out_BHLD = attend(*self.heads(x_BLC))
        return self._reorder(attend, self.project(rearrange(out_BHLD, "b h l d -> b l (h d)")))

    def prefill(self, x_BLC: Tensor) -> tuple[Tensor, LayerCache]:
        """x (B, L, C), all text slots and at least the first image slot -> (B, L, C), and what later slots need of it."""
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
        """x (B, 1, C) of image slot `slot` (int64, one element, on the device) -> (B, 1, C); its key joins the cache."""
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
        """x (B, L, C) -> queries, keys and values of every head, (B, H, L, D) each, views of one projection."""
        return _SplitHeads.apply(self.qkv(x_BLC), self.n_heads)

    def _reorder(self, attend: Attention, x_BLC: Tensor) -> Tensor:
        return transpose_grid(x_BLC, self.mask.n_text, self.mask.grid) if attend.columns_first else x_BLC

    def backend(self, name: str, device: torch.device) -> Attention:
        """The attention backend `name` for this layer. Raises ConfigError where it can't run."""
        return attention_backend(name, self.mask, device)


def use_attention(model: nn.Module, name: str, device: torch.device) -> str:
    """Make every attention layer of `model` compute whole sequences with the backend `name`; "auto": the fastest on `device`.

    Returns:
        The name of the backend in use.

    Raises:
        ConfigError: no such backend, or it can't run on `device`.
    """
    layers = [module for module in model.modules() if isinstance(module, SelfAttention)]
    if name == "auto":
        name = choose_backend(device, layers[0].mask.grid)
    for layer in layers:
        layer.attend = layer.backend(name, device)
    return name


def verify_attention(model: nn.Module, dtype: torch.dtype, device: torch.device, batch: int = 1) -> None:
    """Compare the backend that `model` uses with dense attention on this very machine, in `dtype`: outputs and gradients of
    every pattern at the model's sequence length and heads, with `batch` samples. Released compilers and kernels have been
    silently wrong before.

    With the batch of training the kernels in question are those that training will use, and no others are compiled. They take
    less memory than a layer's step.

    Raises:
        RuntimeError: the errors are out of proportion to those of dense attention in the same format.
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
