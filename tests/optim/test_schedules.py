"""Schedules reproduce the paper's numbers."""

import pytest

from dalle_ds.optim.schedules import HalfCosineConfig, half_cosine, linear_warmup


def test_half_cosine_starts_ends_and_holds() -> None:
    tau = HalfCosineConfig(start=1.0, end=1 / 16, updates=150_000)
    assert tau.at(0) == 1.0
    assert tau.at(75_000) == pytest.approx((1 + 1 / 16) / 2)
    assert tau.at(150_000) == tau.at(3_000_000) == 1 / 16
    values = [half_cosine(n, 0.0, 6.6, 50) for n in range(60)]
    assert values == sorted(values)
    assert values[25] == pytest.approx(3.3)
    assert values[5] < 3.3 / 5 * 1.1  # half a cosine starts flat, unlike a line


def test_no_updates_means_constant() -> None:
    assert HalfCosineConfig(start=3.0, end=2.0, updates=0).at(0) == 2.0
    with pytest.raises(ValueError, match="updates is -1, expected 0"):
        HalfCosineConfig(start=3.0, end=2.0, updates=-1)


def test_warmup_is_a_line_that_never_is_zero() -> None:
    assert [linear_warmup(n, 4) for n in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert linear_warmup(0, 0) == 1.0
