"""PSNR, SSIM and codebook usage against values computed by hand."""

import numpy as np
import pytest

from dalle_ds.data.reconstruction import codebook_usage, psnr, ssim


def test_psnr_of_known_errors():
    real = np.full((3, 3, 4, 4), 100, dtype=np.uint8)
    other = real.copy()
    other[0] += 16
    other[1] -= 1  # negative: an unsigned difference would wrap around to 255
    values = psnr(real, other)
    assert values[0] == pytest.approx(20 * np.log10(255 / 16)) == pytest.approx(24.05, abs=0.01)
    assert values[1] == pytest.approx(20 * np.log10(255))
    assert values[2] == np.inf


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_what_would_be_misread_is_refused(measure):
    real = np.zeros((1, 3, 16, 16), dtype=np.uint8)
    with pytest.raises(ValueError, match="expected uint8"):
        measure(real, real.astype(np.float32))
    with pytest.raises(ValueError, match="equal shapes"):
        measure(real, real[:, :1])


def test_ssim_of_flat_and_of_unrelated_images():
    flat = np.full((1, 3, 16, 16), 100, dtype=np.uint8)
    # Without structure only the luminance term remains: (2ab + c) / (a^2 + b^2 + c), c = (0.01 * 255)^2
    c = (0.01 * 255) ** 2
    assert ssim(flat, flat + 50) == pytest.approx((2 * 100 * 150 + c) / (100**2 + 150**2 + c), rel=1e-6)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    assert ssim(noise, noise) == pytest.approx([1, 1])
    assert ssim(noise[:1], noise[1:]) == pytest.approx(0, abs=0.1)


def test_codebook_usage():
    even = codebook_usage(np.array([5, 5, 5, 5, 0, 0, 0, 0]))
    assert (even.n_codes, even.n_used) == (8, 4)
    assert even.perplexity == pytest.approx(4)
    assert codebook_usage(np.array([0, 9, 0])).perplexity == pytest.approx(1)
    skewed = codebook_usage(np.array([3, 1]))
    assert skewed.perplexity == pytest.approx(2 ** (0.75 * np.log2(4 / 3) + 0.25 * 2))
    with pytest.raises(ValueError, match="empty"):
        codebook_usage(np.zeros(4))
