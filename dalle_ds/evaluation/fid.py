"""Fréchet Inception distance: distance of two image sets, as Gaussians over features (Heusel et al. 2017), in fp64.

N images, D features, R rows of a factor, at most D.
"""

from dataclasses import dataclass

import numpy as np

from dalle_ds.evaluation.bootstrap import interval_about

CHUNK = 4  # factor 4 * D rows at once: 134 MB for Inception's D = 2048


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of N feature vectors. The covariance (divisor N - 1) is factor.T @ factor; it may be singular."""

    n: int
    mean_D: np.ndarray
    factor_RD: np.ndarray


def moments(features_ND: np.ndarray, weights_N: np.ndarray | None = None) -> Moments:
    """Moments of features, in fp64.

    Args:
        weights_N: number of times that each image counts, integers. If None, each counts once.

    Raises:
        ValueError: fewer than two images, or features that are not finite.
    """
    n_features = features_ND.shape[1]
    weights = np.ones(len(features_ND)) if weights_N is None else weights_N.astype(np.float64)
    n = int(weights.sum())
    if n < 2 or not np.isfinite(features_ND).all():
        raise ValueError(f"{n} images with {n_features} features: expected two or more images, all features finite")
    rows = np.flatnonzero(weights)
    step = CHUNK * n_features
    chunks = [rows[start : start + step] for start in range(0, len(rows), step)]
    mean_D = sum(weights[chunk] @ features_ND[chunk].astype(np.float64) for chunk in chunks) / n
    factor_RD = np.empty((0, n_features))
    for chunk in chunks:
        centred = (features_ND[chunk] - mean_D) * np.sqrt(weights[chunk] / (n - 1))[:, None]
        factor_RD = np.vstack([factor_RD, centred])
        if len(factor_RD) > n_features:  # the R of a QR decomposition has the same product R.T @ R, in D rows
            factor_RD = np.linalg.qr(factor_RD, mode="r")
    return Moments(n, mean_D, factor_RD)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Fréchet distance: |mean difference|^2 + tr(A + B - 2 sqrt(A B)) with covariances A and B.

    The trace of the square root is the sum of the singular values of factor_a @ factor_b.T, whose squares are the eigenvalues
    of A B. No square root of a covariance is computed, so singular covariances (fewer images than features) need no special
    case.

    Raises:
        ValueError: different numbers of features.
    """
    if a.mean_D.shape != b.mean_D.shape:
        raise ValueError(f"{a.mean_D.size} and {b.mean_D.size} features per image: expected equal numbers")
    root = np.linalg.svd(a.factor_RD @ b.factor_RD.T, compute_uv=False).sum()
    means = np.square(a.mean_D - b.mean_D).sum()
    return float(means + np.square(a.factor_RD).sum() + np.square(b.factor_RD).sum() - 2 * root)


def fid_interval(
    features_ND: np.ndarray, reference: Moments, fid: float, *, n_resamples: int = 20, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of `fid` from resampling the images. The reference stays fixed.

    The interval does not cover FID's bias: FID is higher with fewer images, so compare only at equal N. A resample costs a
    factorization of N x D and the singular values of D x D: 12 s on one core at 30,000 x 2048.
    """
    rng, n = np.random.default_rng(seed), len(features_ND)
    draws = (np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(n_resamples))
    return interval_about(fid, np.array([frechet_distance(moments(features_ND, draw), reference) for draw in draws]))
