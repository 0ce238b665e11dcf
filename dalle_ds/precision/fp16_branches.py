"""fp16 residual branches: which numbers are 16-bit (paper section 2.4 and appendix D item 2).

Parameters stay fp32 and are rounded to fp16 where they are used; identity path, norms, embeddings and logits are fp32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dalle_ds.models.resblock import BranchLinear, Numerics, ResBlock
from dalle_ds.ops.fp16 import linear_fp16, linear_fp16_backward


class _LinearFP16(torch.autograd.Function):
    """Saves the parameter rather than an fp16 copy: ZeRO-3 frees the parameter after the forward pass and gathers it again
    before the backward pass, while a saved copy would keep every layer's weights alive in between. The weight may be fp16
    already, as `dalle_ds.parallel.fp16_gather` leaves it; its gradient is fp32 all the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return linear_fp16(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        return linear_fp16_backward(grad, x, weight, ctx.has_bias)


class _UnreadFP16(_LinearFP16):
    """Nobody reads the product, so it is not computed: what it holds is left to chance. The backward pass is the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return x.new_empty(*x.shape[:-1], len(weight))


@contextmanager
def unread_product(linear: BranchLinear) -> Iterator[None]:
    """Within it, an fp16 layer is called for its graph alone; layers in other formats compute as ever."""
    is_fp16 = linear.matmul == _LinearFP16.apply
    if is_fp16:
        linear.use_matmul(_UnreadFP16.apply)
    try:
        yield
    finally:
        if is_fp16:
            linear.use_matmul(_LinearFP16.apply)


class HalfNumerics(Numerics):
    """Branch in fp16, identity path fp32, gradients not scaled: for evaluation, and as the plain twin in tests."""

    def enter(self, norm: nn.LayerNorm, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        return x_BLD, norm(x_BLD).to(torch.float16)

    def leave(self, x_BLD: Tensor, y_BLD: Tensor) -> Tensor:
        return x_BLD + y_BLD.float()


def resblocks_of(model: nn.Module) -> list[tuple[str, ResBlock]]:
    """(name, block) of every residual block in model order: the order of gradient scales everywhere."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ResBlock)]


def use_fp16_branches(model: nn.Module) -> None:
    """Make every residual branch of `model` compute in fp16."""
    for _, block in resblocks_of(model):
        block.numerics = HalfNumerics()
        for module in block.branch.modules():
            if isinstance(module, BranchLinear):
                module.use_matmul(_LinearFP16.apply)
