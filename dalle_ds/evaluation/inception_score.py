"""Inception Score (Salimans et al. 2016): high if each image has a clear class, and the images together have many classes.

N images, K classes.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax, xlogy

from dalle_ds.evaluation.bootstrap import interval_about


@dataclass(frozen=True)
class InceptionScore:
    """`score` is the mean over splits and `std` their standard deviation, as in papers. The interval is for the mean."""

    score: float
    std: float
    low: float
    high: float
    n_splits: int


def inception_score(logits_NK: np.ndarray, *, n_splits: int = 10, n_resamples: int = 200, seed: int = 0) -> InceptionScore:
    """exp of the mean KL divergence of an image's class distribution from the mean class distribution, over random splits.

    The interval resamples images within each split.

    Raises:
        ValueError: fewer than two images per split, or logits that are not finite.
    """
    n = len(logits_NK)
    if n < 2 * n_splits or not np.isfinite(logits_NK).all():
        raise ValueError(f"{n} images in {n_splits} splits: expected two or more per split, with finite logits")
    rng = np.random.default_rng(seed)
    scores_S, resampled_RS = np.empty(n_splits), np.empty((n_resamples, n_splits))
    for split, rows in enumerate(np.array_split(rng.permutation(n), n_splits)):
        log_p_nK = log_softmax(logits_NK[rows].astype(np.float64), axis=1)
        p_nK = np.exp(log_p_nK)
        certainty_n = (p_nK * log_p_nK).sum(1)
        scores_S[split] = _score(np.ones(len(rows)), p_nK, certainty_n)
        draws = (np.bincount(rng.integers(len(rows), size=len(rows)), minlength=len(rows)) for _ in range(n_resamples))
        resampled_RS[:, split] = [_score(draw, p_nK, certainty_n) for draw in draws]
    score = float(scores_S.mean())
    low, high = interval_about(score, resampled_RS.mean(1))
    return InceptionScore(score, float(scores_S.std()), low, high, n_splits)


def _score(weights_n: np.ndarray, p_nK: np.ndarray, certainty_n: np.ndarray) -> float:
    n = weights_n.sum()
    mean_K = weights_n @ p_nK / n
    return float(np.exp(weights_n @ certainty_n / n - xlogy(mean_K, mean_K).sum()))
