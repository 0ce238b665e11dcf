"""The logit-Laplace density integrates to 1, the pixel mapping is invertible, and the location gives the pixel."""

import math

import pytest
import torch

from dalle_ds.ops.logit_laplace import location_pixels, log_density, log_mass, map_pixels, split_output, unmap_pixels


@pytest.mark.parametrize(("mu", "b"), [(0.0, 0.5), (1.3, 0.2), (-2.0, 1.5)])
def test_density_integrates_to_one(mu: float, b: float) -> None:
    x = torch.linspace(0, 1, 400_001, dtype=torch.float64)[1:-1]
    density = log_density(x, torch.tensor(mu, dtype=torch.float64), torch.tensor(math.log(b), dtype=torch.float64)).exp()
    # The numerical integral misses a few thousandths if the density is unbounded (b > 1).
    assert torch.trapezoid(density, x).item() == pytest.approx(1.0, abs=5e-3)


def test_density_is_the_laplace_of_the_logit() -> None:
    x, mu, b = torch.rand(100, dtype=torch.float64) * 0.8 + 0.1, 0.4, 0.7
    laplace = torch.distributions.Laplace(torch.tensor(mu, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    expected = laplace.log_prob(torch.logit(x)) - torch.log(x * (1 - x))
    torch.testing.assert_close(log_density(x, torch.tensor(mu), torch.tensor(math.log(b), dtype=torch.float64)), expected)


@pytest.mark.parametrize("mu", [-30.0, -2.2, -0.3, 0.0, 1.1, 40.0])
@pytest.mark.parametrize("b", [1e-4, 0.03, 0.5, 4.0])
def test_mass_of_8_bit_values_is_the_difference_of_the_cdf(mu: float, b: float) -> None:
    values = torch.arange(256, dtype=torch.uint8)
    ln_mass = log_mass(values, torch.tensor(mu), torch.tensor(math.log(b)))
    edges = torch.logit((torch.arange(257, dtype=torch.float64) - 0.5) * (0.8 / 255) + 0.1)
    laplace = torch.distributions.Laplace(torch.tensor(mu).double(), torch.tensor(math.log(b)).double().exp())
    cdf = laplace.cdf(edges)
    assert ln_mass.isfinite().all() and ln_mass.max() <= 0
    torch.testing.assert_close(ln_mass.exp(), cdf.diff(), rtol=1e-9, atol=1e-15)
    assert ln_mass.exp().sum().item() == pytest.approx((cdf[-1] - cdf[0]).item(), rel=1e-12)
    if b == 4.0:  # the density hardly changes within an interval
        density = log_density(map_pixels(values).double(), torch.tensor(mu).double(), torch.tensor(math.log(b)).double())
        torch.testing.assert_close(ln_mass, density + math.log(0.8 / 255), rtol=0, atol=2e-3)


def test_pixel_map_runs_over_the_margins_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    mapped = map_pixels(pixels)
    assert mapped.dtype == torch.float32
    assert mapped[0].item() == pytest.approx(0.1)
    assert mapped[255].item() == pytest.approx(0.9)
    assert torch.equal(unmap_pixels(mapped), pixels)


def test_best_location_gives_the_pixels_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(location_pixels(torch.logit(map_pixels(pixels))), pixels)
    assert location_pixels(torch.tensor([-50.0, 50.0])).tolist() == [0, 255]


def test_split_takes_locations_first() -> None:
    output = torch.cat([torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)], dim=1)
    mu, ln_b = split_output(output)
    assert mu.eq(0).all()
    assert ln_b.eq(1).all()
    with pytest.raises(ValueError, match="5 channels"):
        split_output(torch.zeros(1, 5, 2, 2))
