"""Stochastic rounding of fp32 to fp16: values round up or down at random, so that sums of many small changes are right on
average.

Near an fp16 weight of 0.02, fp16 values are 1.5e-5 apart. Rounding to nearest would lose every change of less than half of
that. With stochastic rounding, such a change moves the weight by the whole distance, with a probability that makes the mean
exact.

The noise does not come from a random generator. It is a hash of a key and of the value's index in its parameter. So it is the
same on any device, at any memory address, and for any number of ranks among which the values are sharded.
"""

import torch
from torch import Tensor

NOISE_BITS = 13
"""Number of mantissa bits that fp32 has more than fp16, so that the probabilities of normal numbers are exact."""

LARGEST = 65504.0
"""Largest fp16 value."""

_MANTISSA, _BIAS, _HALF_MANTISSA = 23, 127, 10
_SMALLEST_NORMAL = _BIAS - 14  # fp32 exponent field of fp16's smallest normal


def noise(places: Tensor, key: Tensor) -> Tensor:
    """Hash indices to noise: int32 of any shape, each from 0 to 2^13 - 1.

    `places` are int32 indices of values. `key` is one int32, which must be different for each use.
    """
    x = places.mul(_signed(0x9E3779B1)).bitwise_xor(key)
    # "lowbias32" by Chris Wellons: a bijection in which each input bit flips each output bit with a probability of about one
    # half
    x = x.bitwise_xor(_shifted(x, 16)).mul(0x7FEB352D)
    x = x.bitwise_xor(_shifted(x, 15)).mul(_signed(0x846CA68B))
    return _shifted(x, 32 - NOISE_BITS)


def round_to_half(values: Tensor, noise_13: Tensor) -> Tensor:
    """Round fp32 values to fp16 by `noise` of the same shape: to one of the two neighbours, the nearer with the higher
    probability.

    Values that fp16 can represent are not changed. Values beyond fp16's largest become the largest.
    """
    exponent = values.view(torch.int32).bitwise_right_shift(_MANTISSA).bitwise_and(0xFF).clamp_min(_SMALLEST_NORMAL)
    unit = _power(exponent - _HALF_MANTISSA)  # unit in the last place; that of subnormals is the smallest normal's
    in_units = values * _power(2 * _BIAS + _HALF_MANTISSA - exponent)
    below = in_units.floor()
    up = (in_units - below) * 2.0**NOISE_BITS > noise_13
    return ((below + up) * unit).clamp(-LARGEST, LARGEST).to(torch.float16)


def _power(field: Tensor) -> Tensor:
    """The power of two with this fp32 exponent field."""
    return field.bitwise_left_shift(_MANTISSA).view(torch.float32)


def _shifted(x: Tensor, n: int) -> Tensor:
    """Logical right shift of int32: fills up with zeros, where torch would fill up with the sign."""
    return x.bitwise_right_shift(n).bitwise_and((1 << (32 - n)) - 1)


def _signed(pattern: int) -> int:
    return pattern - (1 << 32)
