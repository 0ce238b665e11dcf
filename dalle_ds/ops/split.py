"""fp32 matrix products on fp16 units: each factor is a sum of two fp16 numbers, and three of their four products are summed.

A GPU's fp32 units are a tenth as fast as its fp16 ones. TF32 would be fast too, but rounds factors to 11 bits; high and low
part together have 22, two less than fp32, and what is left out, low times low, is smaller than that. Sums are fp32 in any case,
and their errors are the larger ones: against fp64, such products are as exact as fp32's own (tests/ops/test_split.py). That
holds for matrices of states, weights and probabilities, whose largest values are not tiny: errors are never below 2^-36.

M rows, K summed, N columns.
"""

import torch
from torch import Tensor

from dalle_ds.ops.fp16 import matmul_to_fp32
from dalle_ds.ops.fused import fused

SHIFT = 2.0**11
"""The low part is stored times this: of a number in fp16's range it then is in range as well, down to 2^-35."""


@fused(kernels=1)
def high_and_low(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 of any shape, up to 65504 -> fp16: x rounded, and what rounding left times SHIFT."""
    high = x.to(torch.float16)
    return high, ((x - high.float()) * SHIFT).to(torch.float16)


class Split:
    """A matrix as two fp16 parts."""

    def __init__(self, high: Tensor, low: Tensor) -> None:
        self.high, self.low = high, low

    @staticmethod
    def of(x: Tensor) -> "Split":
        """x fp32, finite, none beyond 65504: those would become Inf."""
        return Split(*high_and_low(x))

    def t(self) -> "Split":
        return Split(self.high.t(), self.low.t())

    def __getitem__(self, rows: slice) -> "Split":
        return Split(self.high[rows], self.low[rows])


def split_matmul(a_MK: Split, b_KN: Split) -> Tensor:
    """-> (M, N) fp32"""
    small = matmul_to_fp32(a_MK.high, b_KN.low).add_(matmul_to_fp32(a_MK.low, b_KN.high))
    return matmul_to_fp32(a_MK.high, b_KN.high).add_(small, alpha=1 / SHIFT)
