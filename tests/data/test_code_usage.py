"""Usage of a codebook, from histograms that can be worked out by hand."""

import numpy as np
import pytest

from dalle_ds.data.code_usage import codebook_usage


def test_codebook_usage():
    even = codebook_usage(np.array([5, 5, 5, 5, 0, 0, 0, 0]))
    assert (even.n_codes, even.n_used) == (8, 4)
    assert even.perplexity == pytest.approx(4)
    assert codebook_usage(np.array([0, 9, 0])).perplexity == pytest.approx(1)
    skewed = codebook_usage(np.array([3, 1]))
    assert skewed.perplexity == pytest.approx(2 ** (0.75 * np.log2(4 / 3) + 0.25 * 2))
    with pytest.raises(ValueError, match="empty"):
        codebook_usage(np.zeros(4))
