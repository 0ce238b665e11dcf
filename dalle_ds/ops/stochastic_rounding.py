"""fp32 to fp16, up or down at random: what a sum of many small changes comes to is then right on average.

An fp16 weight of 0.02 has neighbours 1.5e-5 apart. Rounding to the nearest would lose all changes of less than half of that for
ever; here each of them moves the weight by the whole distance with a probability that makes up for it.

The noise is no generator's: it is a hash of a key and of the value's place. So it is the same on any device, wherever the value
lies, and at any number of ranks that share the values out.
"""

import torch
from torch import Tensor

NOISE_BITS = 13
"""As many as fp32 has and fp16 lacks: the probabilities of normal numbers are exact."""

LARGEST = 65504.0
"""Of fp16."""

_MANTISSA, _BIAS, _HALF_MANTISSA = 23, 127, 10
_SMALLEST_NORMAL = _BIAS - 14  # exponent field that fp32 has for fp16's


def noise(places: Tensor, key: Tensor) -> Tensor:
    """int32 of any shape, and one int32 that is another one for each use -> int32 from 0 to 2^13 - 1."""
    x = places.mul(_signed(0x9E3779B1)).bitwise_xor(key)
    # the constants are Chris Wellons' "lowbias32": a bijection in which each bit changes all others half of the time
    x = x.bitwise_xor(_shifted(x, 16)).mul(0x7FEB352D)
    x = x.bitwise_xor(_shifted(x, 15)).mul(_signed(0x846CA68B))
    return _shifted(x, 32 - NOISE_BITS)


def round_to_half(values: Tensor, noise_13: Tensor) -> Tensor:
    """fp32 and `noise` of the same shape -> fp16: one of the two neighbours, the nearer one the more likely. What fp16 has is
    kept, and what is beyond its largest becomes that."""
    exponent = values.view(torch.int32).bitwise_right_shift(_MANTISSA).bitwise_and(0xFF).clamp_min(_SMALLEST_NORMAL)
    unit = _power(exponent - _HALF_MANTISSA)  # of the last place; subnormals have that of the smallest normal
    in_units = values * _power(2 * _BIAS + _HALF_MANTISSA - exponent)
    below = in_units.floor()
    up = (in_units - below) * 2.0**NOISE_BITS > noise_13
    return ((below + up) * unit).clamp(-LARGEST, LARGEST).to(torch.float16)


def _power(field: Tensor) -> Tensor:
    """The power of two whose fp32 has this exponent field."""
    return field.bitwise_left_shift(_MANTISSA).view(torch.float32)


def _shifted(x: Tensor, n: int) -> Tensor:
    """int32 to the right, filled up with zeros where torch would take the sign."""
    return x.bitwise_right_shift(n).bitwise_and((1 << (32 - n)) - 1)


def _signed(pattern: int) -> int:
    return pattern - (1 << 32)
