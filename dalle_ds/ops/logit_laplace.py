"""Logit-Laplace likelihood: the distribution over pixel values in (0, 1) that the paper's decoder predicts."""

# B batch, C channels, H and W pixels

import math

import torch
from torch import Tensor

PIXEL_EPS = 0.1


def map_pixels(pixels: Tensor, eps: float = PIXEL_EPS) -> Tensor:
    """Map pixels in [0, 255] (uint8 or float) to [eps, 1 - eps] in fp32: the encoder's input and the likelihood's target.

    Without the margin eps, the factor 1/(x(1-x)) of the density would be infinite for black and white pixels.
    """
    return pixels.float() * ((1.0 - 2.0 * eps) / 255.0) + eps


def unmap_pixels(mapped: Tensor, eps: float = PIXEL_EPS) -> Tensor:
    """Inverse of `map_pixels`, clamped to [0, 255] and rounded to uint8."""
    unit = ((mapped - eps) / (1.0 - 2.0 * eps)).clamp(0.0, 1.0)
    return (unit * 255.0).round().to(torch.uint8)


def split_output(output_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Split the decoder's 2C maps (B, 2C, H, W) into mu and ln b, (B, C, H, W) each, fp32: locations first, then log scales.

    Raises:
        ValueError: the number of maps is odd.
    """
    n_channels = output_BCHW.shape[1]
    if n_channels % 2:
        raise ValueError(f"decoder output has {n_channels} channels, expected an even number (mu and ln b)")
    mu, ln_b = output_BCHW.float().chunk(2, dim=1)
    return mu, ln_b


def log_density(mapped: Tensor, mu: Tensor, ln_b: Tensor) -> Tensor:
    """ln f(x | mu, b) = -ln 2 - ln b - ln x - ln(1-x) - |logit(x) - mu| / b, elementwise, in nats (paper, eq. 2).

    Terms that depend only on x have no gradient for the model. They are needed for the value of the reported bound.
    """
    logit = torch.logit(mapped)
    return -math.log(2.0) - ln_b - mapped.log() - torch.log1p(-mapped) - (logit - mu).abs() * torch.exp(-ln_b)


def log_mass(pixels: Tensor, mu: Tensor, ln_b: Tensor, eps: float = PIXEL_EPS) -> Tensor:
    """ln of the probability of 8-bit values under the logit-Laplace distribution, elementwise, in nats, fp64.

    A value v stands for the interval from v - 1/2 to v + 1/2, mapped as by `map_pixels`. The 256 intervals do not overlap, so
    their probabilities sum to at most 1; the rest is on values below 0 and above 255. Where the density hardly changes within
    an interval, the result is `log_density` plus the log of the interval's length, (1 - 2 eps) / 255.

    Args:
        pixels: values from 0 to 255.
    """
    pixels, mu, b = pixels.double(), mu.double(), ln_b.double().exp()
    low, high = ((torch.logit((pixels + side) * ((1 - 2 * eps) / 255) + eps) - mu) / b for side in (-0.5, 0.5))
    # the distribution is symmetric: reflect intervals above the location to below it, where the CDF is exp(x) / 2
    low, high = torch.where(low > 0, -high, low), torch.where(low > 0, -low, high)
    below = high + torch.log(-torch.expm1(low - high)) - math.log(2.0)
    around = torch.log1p(-0.5 * (torch.exp(low) + torch.exp(-high)))
    return torch.where(high > 0, around, below)


def location_pixels(mu: Tensor, eps: float = PIXEL_EPS) -> Tensor:
    """The decoded image: sigmoid(mu), un-mapped to uint8. The scale b is ignored, as in the paper."""
    return unmap_pixels(torch.sigmoid(mu.float()), eps)
