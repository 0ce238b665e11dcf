"""Fréchet distance between two sets of images, as Gaussians over an extractor's features (Heusel et al. 2017), in fp64.

N images, D features, R rows of a factor: at most D.
"""

from dataclasses import dataclass

import numpy as np

from dalle_ds.evaluation.bootstrap import interval_about

CHUNK = 4  # times D rows are factored at once: 134 MB for Inception's 2048


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of N feature vectors; the covariance (divisor N - 1) is factor.T @ factor, whatever its rank."""

    n: int
    mean_D: np.ndarray
    factor_RD: np.ndarray


def moments(features_ND: np.ndarray, weights_N: np.ndarray | None = None) -> Moments:
    """Moments in fp64; `weights_N` says how often each image counts (whole numbers).

    Raises:
        ValueError: fewer than two images, or features that are not finite.
    """
    n_features = features_ND.shape[1]
    weights = np.ones(len(features_ND)) if weights_N is None else weights_N.astype(np.float64)
    n = int(weights.sum())
    if n < 2 or not np.isfinite(features_ND).all():
        raise ValueError(f"{n} images with features of {n_features} numbers: expected two or more, all finite")
    rows = np.flatnonzero(weights)
    step = CHUNK * n_features
    chunks = [rows[start : start + step] for start in range(0, len(rows), step)]
    mean_D = sum(weights[chunk] @ features_ND[chunk].astype(np.float64) for chunk in chunks) / n
    factor_RD = np.empty((0, n_features))
    for chunk in chunks:
        centred = (features_ND[chunk] - mean_D) * np.sqrt(weights[chunk] / (n - 1))[:, None]
        factor_RD = np.vstack([factor_RD, centred])
        if len(factor_RD) > n_features:  # the triangle has the same product with itself, in D rows
            factor_RD = np.linalg.qr(factor_RD, mode="r")
    return Moments(n, mean_D, factor_RD)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean difference|^2 + tr(A + B - 2 sqrt(A B)), of covariances A and B.

    The trace of the root is the sum of the singular values of factor_a @ factor_b.T, whose squares are the eigenvalues of A B:
    no square root of a covariance is taken, so that singular ones (fewer images than features) need no special care.

    Raises:
        ValueError: features of different lengths.
    """
    if a.mean_D.shape != b.mean_D.shape:
        raise ValueError(f"{a.mean_D.size} and {b.mean_D.size} features an image: expected equal numbers")
    root = np.linalg.svd(a.factor_RD @ b.factor_RD.T, compute_uv=False).sum()
    means = np.square(a.mean_D - b.mean_D).sum()
    return float(means + np.square(a.factor_RD).sum() + np.square(b.factor_RD).sum() - 2 * root)


def fid_interval(
    features_ND: np.ndarray, reference: Moments, fid: float, *, n_resamples: int = 20, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of `fid` under other draws of the images, with the reference as it is.

    It says nothing of FID's bias: with fewer images FID is higher, so compare at equal N only. A resample costs a
    factorisation of N x D and the singular values of D x D: 12 s on one core at 30,000 x 2048.
    """
    rng, n = np.random.default_rng(seed), len(features_ND)
    draws = (np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(n_resamples))
    return interval_about(fid, np.array([frechet_distance(moments(features_ND, draw), reference) for draw in draws]))
