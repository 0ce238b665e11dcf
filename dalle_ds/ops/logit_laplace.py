"""Logit-Laplace likelihood: a distribution over pixel values whose support is (0, 1), as the paper's decoder predicts it."""

# B batch, C channels, H and W pixels

import math

import torch
from torch import Tensor

PIXEL_EPS = 0.1


def map_pixels(pixels: Tensor, eps: float = PIXEL_EPS) -> Tensor:
    """Pixels in [0, 255] (uint8 or float) -> [eps, 1 - eps] fp32: the encoder's input and the likelihood's target.

    Without the margin 1/(x(1-x)) in the density would be infinite at black and white.
    """
    return pixels.float() * ((1.0 - 2.0 * eps) / 255.0) + eps


def unmap_pixels(mapped: Tensor, eps: float = PIXEL_EPS) -> Tensor:
    """Inverse of `map_pixels`, clamped to [0, 255] and rounded to uint8."""
    unit = ((mapped - eps) / (1.0 - 2.0 * eps)).clamp(0.0, 1.0)
    return (unit * 255.0).round().to(torch.uint8)


def split_output(output_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The decoder's 2C maps -> (mu, ln b), each with C maps: first all the locations, then all the log scales."""
    n_channels = output_BCHW.shape[1]
    if n_channels % 2:
        raise ValueError(f"decoder output has {n_channels} channels, expected an even number (mu and ln b)")
    mu, ln_b = output_BCHW.float().chunk(2, dim=1)
    return mu, ln_b


def log_density(mapped: Tensor, mu: Tensor, ln_b: Tensor) -> Tensor:
    """ln f(x | mu, b) = -ln 2 - ln b - ln x - ln(1-x) - |logit(x) - mu| / b, elementwise, in nats (paper, eq. 2).

    The terms in x alone do not move the parameters; they belong to the bound that is reported.
    """
    logit = torch.logit(mapped)
    return -math.log(2.0) - ln_b - mapped.log() - torch.log1p(-mapped) - (logit - mu).abs() * torch.exp(-ln_b)


def location_pixels(mu: Tensor, eps: float = PIXEL_EPS) -> Tensor:
    """The image to look at: sigmoid(mu) un-mapped to uint8; the scale is ignored, as the paper does."""
    return unmap_pixels(torch.sigmoid(mu.float()), eps)
