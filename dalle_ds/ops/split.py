"""fp32 matrix products on fp16 units: each factor is a sum of two fp16 numbers, and three of their four products are summed.

A GPU's fp32 units are a tenth as fast as its fp16 units. TF32 would be fast too, but rounds factors to 11 bits. The high and
low parts together have 22 bits, two less than fp32. The omitted product, low times low, is smaller than their last bit. Sums
are fp32, and their errors dominate: measured against fp64, such products are as exact as fp32 products
(tests/ops/test_split.py). This holds for matrices of states, weights and probabilities, whose largest values are not tiny:
errors are never below 2^-36.

M rows, K summed, N columns.
"""

import torch
from torch import Tensor

from dalle_ds.ops.fp16 import matmul_to_fp32
from dalle_ds.ops.fused import fused

SHIFT = 2.0**11
"""Factor with which the low part is stored. It brings the low part
of a number in fp16's range into fp16's range, down to 2^-35."""


@fused(kernels=1)
def high_and_low(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split fp32 values of any shape, up to 65504 in magnitude, into two fp16 tensors: x rounded, and the rest times SHIFT."""
    high = x.to(torch.float16)
    return high, ((x - high.float()) * SHIFT).to(torch.float16)


class Split:
    """An fp32 matrix as two fp16 parts."""

    def __init__(self, high: Tensor, low: Tensor) -> None:
        self.high, self.low = high, low

    @staticmethod
    def of(x: Tensor) -> "Split":
        """Split x, fp32 and finite. Magnitudes beyond 65504 become Inf."""
        return Split(*high_and_low(x))

    def t(self) -> "Split":
        return Split(self.high.t(), self.low.t())

    def __getitem__(self, rows: slice) -> "Split":
        return Split(self.high[rows], self.low[rows])


def split_matmul(a_MK: Split, b_KN: Split) -> Tensor:
    """a (M, K) @ b (K, N) -> (M, N) fp32."""
    small = matmul_to_fp32(a_MK.high, b_KN.low).add_(matmul_to_fp32(a_MK.low, b_KN.high))
    return matmul_to_fp32(a_MK.high, b_KN.high).add_(small, alpha=1 / SHIFT)
