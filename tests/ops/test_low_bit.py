"""16-bit formats, compared bit by bit with a slow reference in exact fractions."""

import math
from fractions import Fraction

import pytest
import torch

from dalle_ds.ops.low_bit import FORMAT_0_6_10, FORMAT_1_6_9, LowBitFormat, decode, encode

FORMATS = pytest.mark.parametrize("fmt", [FORMAT_1_6_9, FORMAT_0_6_10], ids=lambda fmt: fmt.name)


def slow_value(code: int, fmt: LowBitFormat) -> Fraction:
    """The value of `code` by the format's definition."""
    sign = -1 if fmt.signed and code >> 15 else 1
    exponent, mantissa = (code >> fmt.mantissa) & 63, Fraction(code % 2**fmt.mantissa, 2**fmt.mantissa)
    if exponent == 0:
        return sign * mantissa * Fraction(2) ** (1 - fmt.bias)
    return sign * (1 + mantissa) * Fraction(2) ** (exponent - fmt.bias)


def slow_code(value: float, fmt: LowBitFormat) -> int:
    """The nearest code, ties to even, computed with exact fractions."""
    sign = 2**15 if fmt.signed and math.copysign(1, value) < 0 else 0
    top = 2 ** (6 + fmt.mantissa) - 1
    if math.isnan(value) or math.isinf(value):
        return (0 if value < 0 and not fmt.signed else top) | sign
    magnitude = abs(Fraction(value)) if fmt.signed else max(Fraction(value), Fraction(0))
    exponent = 1
    while exponent < 63 and magnitude >= Fraction(2) ** (exponent + 1 - fmt.bias):
        exponent += 1
    quanta = magnitude / Fraction(2) ** (exponent - fmt.bias - fmt.mantissa)
    return min(round(quanta) + (exponent - 1) * 2**fmt.mantissa, top) | sign  # round() of a Fraction: ties to even


def all_codes() -> torch.Tensor:
    return torch.arange(2**16).to(torch.int16)


def as_unsigned(codes: torch.Tensor) -> list[int]:
    return [code % 2**16 for code in codes.tolist()]


@FORMATS
def test_every_code_means_what_the_definition_says_and_comes_back(fmt: LowBitFormat) -> None:
    values = decode(all_codes(), fmt)
    assert values.dtype is torch.float32
    assert [Fraction(v) for v in values.tolist()] == [slow_value(code, fmt) for code in range(2**16)]
    assert torch.equal(encode(values, fmt), all_codes())  # includes minus zero


@FORMATS
def test_every_midpoint_goes_to_the_even_neighbour_and_all_beside_it_to_the_nearer(fmt: LowBitFormat) -> None:
    lower = torch.arange(2 ** (6 + fmt.mantissa) - 1).to(torch.int16)
    upper = (lower.int() + 1).to(torch.int16)
    midpoints = (decode(lower, fmt).double() + decode(upper, fmt).double()) / 2
    assert torch.equal(midpoints.float().double(), midpoints), "fp32 holds them exactly"
    midpoints = midpoints.float()
    assert torch.equal(encode(midpoints, fmt), torch.where(lower % 2 == 0, lower, upper))
    infinity = torch.tensor(float("inf"))
    assert torch.equal(encode(midpoints.nextafter(infinity), fmt), upper)
    assert torch.equal(encode(midpoints.nextafter(-infinity), fmt), lower)
    if fmt.signed:
        assert torch.equal(encode(-midpoints, fmt).int() + 2**15, encode(midpoints, fmt).int())


@FORMATS
def test_values_of_all_sizes_round_as_the_reference(fmt: LowBitFormat) -> None:
    smallest_normal = 2.0 ** (1 - fmt.bias)
    patterns = torch.randint(-(2**31), 2**31, (20_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    near = torch.randn(20_000, generator=torch.Generator().manual_seed(1)).mul(4).exp2() * smallest_normal
    tiny, huge = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    edges = [
        0.0,
        -0.0,
        1.0,
        5.0,
        fmt.largest,
        fmt.largest * (1 + 2**-20),
        2 * fmt.largest,
        huge,
        float("inf"),
        float("nan"),
        smallest_normal,
        smallest_normal * (1 - 2**-20),
        smallest_normal * 2.0 ** (-fmt.mantissa - 1),
        smallest_normal * 2.0 ** (-fmt.mantissa - 1) * (1 + 2**-20),
        tiny,
        2.0**-149,
    ]
    values = torch.cat([patterns.to(torch.int32).view(torch.float32), near, torch.tensor(edges), -torch.tensor(edges)])
    finite_or_positive = ~(values.isnan() & values.signbit())  # the sign of a NaN has no meaning
    values = values[finite_or_positive]
    expected = [slow_code(v, fmt) for v in values.tolist()]
    assert as_unsigned(encode(values, fmt)) == expected
    assert len({code for code in expected if 0 < code < 2**fmt.mantissa}) > 300, "subnormals are among them"


def test_ranges_are_the_papers_and_the_clips() -> None:
    assert FORMAT_1_6_9.largest == 16 - 2**-6  # slightly less than 16
    assert FORMAT_0_6_10.largest == 8 - 2**-8
    assert decode(encode(torch.tensor(5.0), FORMAT_0_6_10), FORMAT_0_6_10) == 5
    with_sign = encode(torch.tensor([-1e9, 1e9, float("nan")]), FORMAT_1_6_9)
    assert decode(with_sign, FORMAT_1_6_9).tolist() == [-15.984375, 15.984375, 15.984375]
    assert encode(torch.tensor([-1.0, float("-inf")]), FORMAT_0_6_10).tolist() == [0, 0]


def test_any_shape_and_stride() -> None:
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    codes = encode(values.t(), FORMAT_1_6_9)
    assert codes.shape == (4, 6)
    assert torch.equal(codes.t(), encode(values, FORMAT_1_6_9))
    assert encode(torch.empty(0), FORMAT_1_6_9).shape == (0,)
