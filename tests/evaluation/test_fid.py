"""FID and Inception Score against plain formulas, and their intervals against true repetitions."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from dalle_ds.evaluation.bootstrap import interval_about
from dalle_ds.evaluation.fid import fid_interval, frechet_distance, moments
from dalle_ds.evaluation.inception_score import inception_score


def plain_fid(a, b):
    """The plain formula, with a matrix square root."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    means = np.square(a.mean(0) - b.mean(0)).sum()
    return means + sum(map(np.trace, covariances)) - 2 * np.trace(sqrtm(covariances[0] @ covariances[1])).real


def draw(n, d, seed, shift=0.3):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(d, d)) * np.geomspace(1, 0.01, d)  # some directions vary far less than others
    return (rng.normal(size=(n, d)) @ mix + shift * seed).astype(np.float32)


@pytest.mark.parametrize("n", [400, 2000, 6001])  # below, at and above the size of a chunk
def test_fid_is_the_formula(n):
    a, b = draw(n, 64, 1), draw(n // 2, 64, 2)
    fid = frechet_distance(moments(a), moments(b))
    assert fid == pytest.approx(plain_fid(a, b), rel=1e-9)
    assert fid == pytest.approx(frechet_distance(moments(b), moments(a)), rel=1e-9)


def test_fid_of_known_gaussians():
    # on the diagonal the distance is (difference of means)^2 + (difference of deviations)^2, summed
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200_000, 3)) * [1, 2, 3] + [1, 0, 0], rng.normal(size=(200_000, 3)) * [2, 2, 1]
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(1 + 1 + 0 + 4, abs=0.05)
    assert frechet_distance(moments(a), moments(a)) == pytest.approx(0, abs=1e-9)


def test_fewer_images_than_features():
    a, b = draw(20, 128, 1), draw(30, 128, 2)
    rank = moments(a).factor_RD
    assert rank.shape == (20, 128) and np.allclose(rank.T @ rank, np.cov(a.astype(np.float64), rowvar=False))
    # two sets in orthogonal planes: the product of the covariances is zero, so both traces remain
    first, second = np.zeros((6, 8)), np.zeros((6, 8))
    first[:, :2], second[:, 4:6] = np.random.default_rng(0).normal(size=(2, 6, 2))
    traces = np.cov(first, rowvar=False).trace() + np.cov(second, rowvar=False).trace()
    expected = traces + np.square(first.mean(0) - second.mean(0)).sum()
    assert frechet_distance(moments(first), moments(second)) == pytest.approx(expected, rel=1e-12)
    # nearly singular: the matrix square root of the plain formula is accurate only to a few digits
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(plain_fid(a, b), rel=1e-4)


def test_weights_stand_for_repeats():
    features, weights = draw(300, 16, 1), np.random.default_rng(1).integers(0, 4, 300)
    weighted, repeated = moments(features, weights), moments(np.repeat(features, weights, axis=0))
    assert weighted.n == repeated.n == weights.sum()
    np.testing.assert_allclose(weighted.mean_D, repeated.mean_D, rtol=1e-12)
    product = [found.factor_RD.T @ found.factor_RD for found in (weighted, repeated)]
    np.testing.assert_allclose(*product, rtol=1e-9, atol=1e-9)


def test_the_interval_is_as_wide_as_fid_varies_between_draws():
    reference = moments(draw(4000, 8, 2))
    source = draw(40_000, 8, 1)
    draws = [source[start : start + 400] for start in range(0, len(source), 400)]
    fids = np.array([frechet_distance(moments(features), reference) for features in draws])
    widths = []
    for features, fid in zip(draws[:8], fids, strict=False):
        features = features[features[:, 0].argsort()]  # resampling must not depend on the order
        low, high = fid_interval(features, reference, fid, n_resamples=60)
        assert low < fid < high
        widths.append(high - low)
    assert np.mean(widths) == pytest.approx(2 * 1.96 * fids.std(), rel=0.15)
    assert fid_interval(draws[0], reference, fids[0], seed=3) == fid_interval(draws[0], reference, fids[0], seed=3)


def test_interval_about_a_score_is_normal():
    spread = np.random.default_rng(0).normal(7, 2, 4000)  # off the score, like resamples of a biased score
    assert interval_about(5.0, spread) == pytest.approx((5 - 1.96 * 2, 5 + 1.96 * 2), abs=0.2)


@pytest.mark.parametrize("features", [np.zeros((1, 4)), np.array([[0.0], [np.nan]])])
def test_what_has_no_covariance_is_refused(features):
    with pytest.raises(ValueError, match="expected two or more images, all features finite"):
        moments(features)


def test_features_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="4 and 3 features"):
        frechet_distance(moments(draw(9, 4, 1)), moments(draw(9, 3, 1)))


def test_inception_score_of_known_classes():
    sure = 60 * np.eye(5)[np.arange(1000) % 5]
    # images with certain classes, five classes in all, score five, slightly less because random splits have unequal counts
    assert inception_score(sure).score == pytest.approx(5, rel=0.05)
    assert inception_score(sure, n_splits=1).score == pytest.approx(5)
    assert inception_score(np.zeros((40, 7))).score == pytest.approx(1)  # uniform class distribution for every image
    assert inception_score(60 * np.eye(5)[np.zeros(40, dtype=int)]).score == pytest.approx(1)  # all of one class


def test_inception_score_interval_is_as_wide_as_the_score_varies_between_draws():
    logits = np.random.default_rng(0).normal(size=(60_000, 12)) * 2
    scores = [inception_score(logits[start : start + 1000], n_resamples=2).score for start in range(0, 60_000, 1000)]
    found = inception_score(logits[:1000])
    assert found.low < found.score < found.high and found.std > 0
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.std(scores), rel=0.35)


def test_too_few_images_for_the_splits_are_refused():
    with pytest.raises(ValueError, match="19 images in 10 splits"):
        inception_score(np.zeros((19, 3)))
