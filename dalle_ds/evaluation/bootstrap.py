"""Confidence intervals by resampling."""

from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95


def mean_interval(
    values_S: np.ndarray, classes_S: np.ndarray, *, confidence: float = CONFIDENCE, n_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap percentile interval of a mean over S samples.

    Whole classes are resampled, because samples of one class are not independent.

    Args:
        classes_S: class of each sample, integers from 0.
    """
    counts = np.bincount(classes_S)
    sums = np.bincount(classes_S, weights=values_S)
    present = counts > 0
    counts, sums = counts[present], sums[present]
    rng = np.random.default_rng(seed)
    means = np.empty(n_resamples)
    for i in range(n_resamples):
        weights = np.bincount(rng.integers(len(counts), size=len(counts)), minlength=len(counts))
        means[i] = weights @ sums / (weights @ counts)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def interval_about(value: float, resampled_R: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Normal interval around `value`: plus or minus the normal quantile times the standard deviation of the resampled scores.

    Use it for scores whose bias depends on the number of distinct images (FID, Inception Score). A resample has fewer distinct
    images, so resampled scores lie to one side of the score, and their percentiles would miss it.
    """
    half = NormalDist().inv_cdf((1 + confidence) / 2) * float(np.std(resampled_R, ddof=1))
    return value - half, value + half
