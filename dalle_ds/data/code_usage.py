"""How much of its codebook a dVAE uses."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CodebookUsage:
    """Of one code histogram. Perplexity: the number of codes that, used equally often, would carry as much information."""

    n_codes: int
    n_used: int
    perplexity: float


def codebook_usage(histogram_K: np.ndarray) -> CodebookUsage:
    """Usage from how often each of K codes occurs. Raises ValueError where nothing was counted."""
    counts = np.asarray(histogram_K, dtype=np.float64)
    if counts.sum() <= 0:
        raise ValueError("the code histogram is empty")
    shares = counts[counts > 0] / counts.sum()
    return CodebookUsage(len(counts), len(shares), float(np.exp(-(shares * np.log(shares)).sum())))
