"""16-bit floating-point formats with six exponent bits: about fp16's precision over 64 binades, for Adam's moments.

A code is a 16-bit pattern in an int16 tensor; its value as an integer has no meaning. torch and checkpoints support int16. From
the highest bit on, a code holds the sign if the format has one, 6 exponent bits E, then the mantissa bits M:

    E > 0    (-1)^sign * 2^(E - bias) * 1.M
    E = 0    (-1)^sign * 2^(1 - bias) * 0.M      zero and subnormals

The paper names the formats 1-6-9 and 0-6-10 (appendix B.2) and states that the largest value of 1-6-9 is slightly less than 16
(appendix E.2). It does not state the biases, the meaning of the highest exponent, or the rounding. Our choices: No code is Inf
or NaN. Values beyond the largest, Inf and NaN become the largest value. Values, including subnormals, round to nearest, ties to
even.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_ds.ops.fused import fused

_FP32_MANTISSA, _FP32_BIAS = 23, 127
_EXPONENT_BITS = 6


@dataclass(frozen=True)
class LowBitFormat:
    """A 16-bit format with 6 exponent bits and `mantissa` mantissa bits. It has a sign bit if 6 + `mantissa` < 16."""

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
"""Largest value 15.984, smallest normal 2^-59, smallest subnormal 2^-68."""

FORMAT_0_6_10 = LowBitFormat("0-6-10", mantissa=10, bias=61)
"""Largest value 7.996, smallest normal 2^-60, smallest subnormal 2^-70.
The bias is the largest one whose range holds 5, the value at which the paper clips the second moment."""


def encode(values: Tensor, fmt: LowBitFormat) -> Tensor:
    """Encode fp32 values of any shape as int16 codes. If the format has no sign, negative values become zero."""
    return encode_wide(values, fmt).to(torch.int16)


def encode_wide(values: Tensor, fmt: LowBitFormat) -> Tensor:
    """Like `encode`, but returns int32 with the code in the lower 16 bits.
    The upper bits are arbitrary; casting to int16 drops them."""
    shift = _FP32_MANTISSA - fmt.mantissa
    lowest = _FP32_BIAS + 1 - fmt.bias  # fp32 exponent field of the format's smallest normal
    largest = ((lowest + 2**_EXPONENT_BITS - 1) << _FP32_MANTISSA) - (1 << shift)  # as an fp32 bit pattern; NaN's is above it
    bits = values.view(torch.int32)
    if fmt.signed:
        magnitude = bits.bitwise_and(0x7FFFFFFF).clamp_max_(largest)
    else:
        magnitude = bits.clamp(0, largest)
    exponent = magnitude.bitwise_right_shift(_FP32_MANTISSA).clamp_min_(lowest)
    # The addend's last bit has the weight of the code's last bit, so the fp32 addition itself rounds to it, ties to even. The
    # low bits of the sum's pattern count in this unit: they are the mantissa, including its leading one, plus `base`, which is
    # even.
    base = -(lowest << fmt.mantissa) % 2**16
    total = exponent.mul(1 << _FP32_MANTISSA).add_((shift << _FP32_MANTISSA) + base)
    total.view(torch.float32).add_(magnitude.view(torch.float32))
    # replace the addend's exponent by the code's; bits above 15 are arbitrary
    total.sub_(exponent, alpha=(1 << _FP32_MANTISSA) - (1 << fmt.mantissa))
    if fmt.signed:
        total.add_(bits.bitwise_right_shift(31), alpha=1 << 15)
    return total


def decode(codes: Tensor, fmt: LowBitFormat) -> Tensor:
    """Decode codes, int16 or sign-extended to int32, to fp32. This is exact.

    If the process flushes fp32 subnormals to zero, subnormals of the format become zero.
    """
    shift = _FP32_MANTISSA - fmt.mantissa
    sign = -(1 << 31) if fmt.signed else 0
    mask = sign + (((1 << (_EXPONENT_BITS + fmt.mantissa)) - 1) << shift)
    bits = codes.to(torch.int32).bitwise_left_shift_(shift).bitwise_and_(mask)  # int32 has the sign up to bit 31
    # Read as fp32, the fields give the value except for the bias. Multiplying corrects the bias and is exact, even for
    # subnormals.
    return bits.view(torch.float32).mul_(2.0 ** (_FP32_BIAS - fmt.bias))


@fused(kernels=1)
def added_to_codes(codes: Tensor, values: Tensor) -> Tensor:
    """Add fp32 values to int16 codes of 1-6-9 of the same shape. Returns the codes of the sums, rounded to nearest."""
    return encode_wide(decode(codes, FORMAT_1_6_9) + values, FORMAT_1_6_9).to(torch.int16)


@fused(kernels=2)
def squares_of_codes(codes: Tensor) -> Tensor:
    """Sum of the squared values of int16 codes of 1-6-9, 0-d fp32."""
    return decode(codes, FORMAT_1_6_9).square().sum()
