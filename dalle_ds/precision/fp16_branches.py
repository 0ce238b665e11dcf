"""fp16 residual branches: which numbers are 16-bit (paper section 2.4 and appendix D item 2).

Parameters stay fp32 and are rounded to fp16 when they are used. Identity path, norms, embeddings and logits are fp32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dalle_ds.models.resblock import BranchLinear, BranchPrecision, InputsFirstLinear, ResBlock
from dalle_ds.ops.fp16 import linear_fp16, linear_fp16_backward


class _LinearFP16(torch.autograd.Function):
    """Linear layer in fp16. The weight's gradient is always fp32, even if `dalle_ds.parallel.fp16_gather` passes an fp16
    weight.

    It saves the parameter rather than an fp16 copy. ZeRO-3 frees the parameter after the forward pass and gathers it again
    before the backward pass; a saved copy would keep every layer's weights alive in between.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return linear_fp16(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        return linear_fp16_backward(grad, x, weight, ctx.has_bias)


class _InputsFirstFP16(_LinearFP16):
    """`_LinearFP16` with a weight of the shape (inputs, outputs)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return linear_fp16(x, weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        return linear_fp16_backward(grad, x, weight.t(), ctx.has_bias, inputs_first=True)


class _UnreadFP16(_InputsFirstFP16):
    """`_InputsFirstFP16` whose output is never read: forward returns uninitialised memory, and only backward computes
    anything."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return x.new_empty(*x.shape[:-1], weight.shape[1])


@contextmanager
def unread_product(linear: InputsFirstLinear) -> Iterator[None]:
    """Within this context, calling an fp16 `linear` only builds the autograd graph and skips the product.
    Layers in other formats are not changed."""
    is_fp16 = linear.matmul == _InputsFirstFP16.apply
    if is_fp16:
        linear.use_matmul(_UnreadFP16.apply)
    try:
        yield
    finally:
        if is_fp16:
            linear.use_matmul(_InputsFirstFP16.apply)


class FP16BranchPrecision(BranchPrecision):
    """Branch in fp16, identity path in fp32, no gradient scaling. Used for evaluation, and as the reference in tests."""

    def to_branch(self, norm: nn.LayerNorm, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        return x_BLD, norm(x_BLD).to(torch.float16)

    def from_branch(self, x_BLD: Tensor, y_BLD: Tensor) -> Tensor:
        return x_BLD + y_BLD.float()


def resblocks_of(model: nn.Module) -> list[tuple[str, ResBlock]]:
    """(name, block) of every residual block in model order. Vectors of gradient scales use the same order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ResBlock)]


def use_fp16_branches(model: nn.Module) -> None:
    """Make every residual branch of `model` compute in fp16."""
    for _, block in resblocks_of(model):
        block.precision = FP16BranchPrecision()
        for module in block.branch.modules():
            if isinstance(module, BranchLinear):
                module.use_matmul(_InputsFirstFP16.apply if module.is_inputs_first else _LinearFP16.apply)
