"""Floating-point numbers of 16 bits with six exponent bits: fp16's precision over 64 binades, for Adam's moments.

A code is a 16-bit pattern held in an int16 tensor, which torch, NCCL, gloo and checkpoints all handle; only its bits mean
something. From the top: the sign if the format has one, 6 exponent bits E, then the mantissa bits M:

    E > 0    (-1)^sign * 2^(E - bias) * 1.M
    E = 0    (-1)^sign * 2^(1 - bias) * 0.M      zero and subnormals

The paper names the formats 1-6-9 and 0-6-10 (appendix B.2) and says of the first that its largest value is slightly less than
16 (appendix E.2). It states neither biases nor what the highest exponent means, nor rounding. Chosen here: no code is Inf or
NaN; values beyond the largest, Inf and NaN become the largest; values round to the nearest, ties to even, subnormals included.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_ds.ops.fused import fused

_FP32_MANTISSA, _FP32_BIAS = 23, 127
_EXPONENT_BITS = 6


@dataclass(frozen=True)
class LowBitFormat:
    """A 16-bit format: 6 exponent bits, `mantissa` bits, and a sign if 6 + `mantissa` leaves room for one."""

    name: str
    mantissa: int
    bias: int

    @property
    def signed(self) -> bool:
        return _EXPONENT_BITS + self.mantissa < 16

    @property
    def largest(self) -> float:
        return 2.0 ** (2**_EXPONENT_BITS - 1 - self.bias) * (2 - 2.0**-self.mantissa)


FORMAT_1_6_9 = LowBitFormat("1-6-9", mantissa=9, bias=60)
"""Up to 15.984; normal from 2^-59, subnormal from 2^-68."""

FORMAT_0_6_10 = LowBitFormat("0-6-10", mantissa=10, bias=61)
"""Up to 7.996, the lowest top binade that holds the 5 at which the paper clips; normal from 2^-60, subnormal from 2^-70."""


def encode(values: Tensor, fmt: LowBitFormat) -> Tensor:
    """fp32 of any shape -> int16 codes. Without a sign in the format, negative values become zero."""
    return encode_wide(values, fmt).to(torch.int16)


def encode_wide(values: Tensor, fmt: LowBitFormat) -> Tensor:
    """As `encode`, but int32 with the code in the lower half and anything in the upper one: casting to int16 cuts it off."""
    shift = _FP32_MANTISSA - fmt.mantissa
    lowest = _FP32_BIAS + 1 - fmt.bias  # exponent field that fp32 has for the smallest normal
    largest = ((lowest + 2**_EXPONENT_BITS - 1) << _FP32_MANTISSA) - (1 << shift)  # as a pattern; NaN's is above it
    bits = values.view(torch.int32)
    if fmt.signed:
        magnitude = bits.bitwise_and(0x7FFFFFFF).clamp_max_(largest)
    else:
        magnitude = bits.clamp(0, largest)
    exponent = magnitude.bitwise_right_shift(_FP32_MANTISSA).clamp_min_(lowest)
    # The addend's last bit weighs what the code's last bit does, so fp32's own addition rounds to it, ties to even. Its pattern
    # counts in these units: the sum's low bits are the mantissa, its leading one included, plus `base`, which is even.
    base = -(lowest << fmt.mantissa) % 2**16
    total = exponent.mul(1 << _FP32_MANTISSA).add_((shift << _FP32_MANTISSA) + base)
    total.view(torch.float32).add_(magnitude.view(torch.float32))
    # take the addend's exponent out and put the code's in, up to what lies above bit 15
    total.sub_(exponent, alpha=(1 << _FP32_MANTISSA) - (1 << fmt.mantissa))
    if fmt.signed:
        total.add_(bits.bitwise_right_shift(31), alpha=1 << 15)
    return total


def decode(codes: Tensor, fmt: LowBitFormat) -> Tensor:
    """Codes, int16 or widened with their sign to int32 -> fp32, exact.

    In a process that flushes fp32's subnormals, the format's are zero.
    """
    shift = _FP32_MANTISSA - fmt.mantissa
    sign = -(1 << 31) if fmt.signed else 0
    mask = sign + (((1 << (_EXPONENT_BITS + fmt.mantissa)) - 1) << shift)
    bits = codes.to(torch.int32).bitwise_left_shift_(shift).bitwise_and_(mask)  # the sign has been extended up to bit 31
    # read as fp32 with the same fields, these are the values but for the bias; the product is exact, subnormals included
    return bits.view(torch.float32).mul_(2.0 ** (_FP32_BIAS - fmt.bias))


@fused(kernels=1)
def added_to_codes(codes: Tensor, values: Tensor) -> Tensor:
    """int16 codes of 1-6-9 and fp32 values of the same shape -> codes of their sums, rounded to the nearest."""
    return encode_wide(decode(codes, FORMAT_1_6_9) + values, FORMAT_1_6_9).to(torch.int16)


@fused(kernels=2)
def squares_of_codes(codes: Tensor) -> Tensor:
    """0-d fp32: sum of the squares of what int16 codes of 1-6-9 stand for."""
    return decode(codes, FORMAT_1_6_9).square().sum()
