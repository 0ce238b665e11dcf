"""PSNR and codebook usage against values known by hand."""

import numpy as np
import pytest

from dalle_ds.evaluation.reconstruction import codebook_usage, psnr


def test_psnr_of_known_errors():
    real = np.full((3, 3, 4, 4), 100, dtype=np.uint8)
    other = real.copy()
    other[0] += 16
    other[1] -= 1  # below: an unsigned difference would wrap around to 255
    values = psnr(real, other)
    assert values[0] == pytest.approx(20 * np.log10(255 / 16)) == pytest.approx(24.05, abs=0.01)
    assert values[1] == pytest.approx(20 * np.log10(255))
    assert values[2] == np.inf


def test_psnr_refuses_what_it_would_misread():
    real = np.zeros((1, 3, 4, 4), dtype=np.uint8)
    with pytest.raises(ValueError, match="expected uint8"):
        psnr(real, real.astype(np.float32))
    with pytest.raises(ValueError, match="equal shapes"):
        psnr(real, real[:, :1])


def test_codebook_usage():
    even = codebook_usage(np.array([5, 5, 5, 5, 0, 0, 0, 0]))
    assert (even.n_codes, even.n_used, even.used_fraction) == (8, 4, 0.5)
    assert even.perplexity == pytest.approx(4)
    assert codebook_usage(np.array([0, 9, 0])).perplexity == pytest.approx(1)
    skewed = codebook_usage(np.array([3, 1]))
    assert skewed.perplexity == pytest.approx(2 ** (0.75 * np.log2(4 / 3) + 0.25 * 2))
    with pytest.raises(ValueError, match="empty"):
        codebook_usage(np.zeros(4))
