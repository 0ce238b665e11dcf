"""Stochastic rounding of fp32 to fp16 is right on average."""

import pytest
import torch
from torch import Tensor

from dalle_ds.ops.stochastic_rounding import LARGEST, NOISE_BITS, noise, round_to_half

ALL_NOISE = torch.arange(2**NOISE_BITS, dtype=torch.int32)


def values(n: int, lowest: int, highest: int) -> Tensor:
    """Values of both signs, over many binades."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, generator=generator).sign() * torch.empty(n).uniform_(lowest, highest, generator=generator).exp2()


def test_the_mean_over_all_noise_is_the_value_itself() -> None:
    x_N1 = values(300, -14, 15)[:, None]
    rounded = round_to_half(x_N1.expand(-1, len(ALL_NOISE)).contiguous(), ALL_NOISE.expand(300, -1).contiguous())
    assert torch.equal(rounded.double().mean(1, keepdim=True), x_N1.double())


def test_below_the_smallest_normal_number_it_is_right_to_a_part_of_the_last_place() -> None:
    x_N1 = values(300, -40, -14)[:, None]
    rounded = round_to_half(x_N1.expand(-1, len(ALL_NOISE)).contiguous(), ALL_NOISE.expand(300, -1).contiguous())
    error = rounded.double().mean(1, keepdim=True) - x_N1.double()
    assert error.abs().max() <= 2.0**-24 * 2.0**-NOISE_BITS


def test_only_the_two_neighbours_come_up() -> None:
    x = values(20_000, -30, 15)
    nearest = x.half()
    for n in (0, 1, 4000, 8191):
        rounded = round_to_half(x, torch.full_like(x, n, dtype=torch.int32))
        is_near = rounded == nearest
        other = torch.nextafter(nearest, torch.where(x > nearest, torch.inf, -torch.inf).half())
        assert torch.equal(rounded[~is_near], other[~is_near])


def test_what_fp16_has_is_kept_and_its_largest_is_not_passed() -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.isfinite()].float()
    assert torch.equal(round_to_half(every, torch.zeros_like(every, dtype=torch.int32)), every.half())
    beyond = torch.tensor([65519.0, 7e4, 1e30, -65519.0, -torch.inf])
    assert round_to_half(beyond, torch.zeros(5, dtype=torch.int32)).abs().tolist() == [LARGEST] * 5


def test_small_changes_add_up_that_rounding_to_the_nearest_loses() -> None:
    n, places = 4096, torch.arange(4096, dtype=torch.int32)
    drawn = nearest = torch.full((n,), 0.02).half()
    for step in range(300):
        drawn = round_to_half(drawn.float() + 1e-6, noise(places, torch.tensor(step * 7919, dtype=torch.int32)))
        nearest = (nearest.float() + 1e-6).half()
    assert torch.all(nearest == torch.tensor(0.02).half())
    assert drawn.double().mean().item() - float(torch.tensor(0.02).half()) == pytest.approx(300e-6, rel=0.01)


@pytest.mark.parametrize("key", [0, 1, -1, 2**31 - 1, -(2**31)])
def test_noise_is_even_and_differs_by_place_and_key(key: int) -> None:
    places = torch.arange(1 << 18, dtype=torch.int32)
    found = noise(places, torch.tensor(key, dtype=torch.int32))
    counts = torch.bincount(found, minlength=2**NOISE_BITS)
    assert len(counts) == 2**NOISE_BITS
    n = len(places) / 2**NOISE_BITS
    assert (counts - n).square().sum() / n < 2**NOISE_BITS * 1.2, "chi square"
    others = noise(places, torch.tensor(key ^ 1, dtype=torch.int32)), noise(places + 1, torch.tensor(key, dtype=torch.int32))
    for other in others:
        both = torch.stack([found, other]).double()
        assert torch.corrcoef(both)[0, 1].abs() < 0.01
