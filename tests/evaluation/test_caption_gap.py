"""The caption gap: derangements, intervals, files."""

import numpy as np
import pytest

from dalle_ds.errors import DataError
from dalle_ds.evaluation.caption_gap import caption_classes, derangement, gap_of_file, measure_gap, position_map, save_losses


def test_classes_join_equal_captions_and_groups_through_each_other():
    captions = ["A cat", "a  CAT", "dog", "wolf", "bird"]
    groups = ["g1", "g2", "g2", "g3", "g4"]
    classes = caption_classes(captions, groups)
    assert classes[0] == classes[1] == classes[2]  # 0 and 1 share a caption, 1 and 2 a group
    assert len({classes[0], classes[3], classes[4]}) == 3


@pytest.mark.parametrize("sizes", [[1, 1], [3, 3], [1] * 50, [5, 1, 1, 1, 1, 1, 4, 2], [10, 1, 9]])
@pytest.mark.parametrize("seed", range(5))
def test_nobody_takes_the_place_of_its_own_kind(sizes, seed):
    classes = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    order = derangement(classes, seed)
    assert sorted(order) == list(range(len(classes)))
    assert (classes[order] != classes).all()


def test_seeds_give_different_derangements():
    classes = np.arange(40)
    assert len({tuple(derangement(classes, seed)) for seed in range(10)}) == 10
    assert (derangement(classes, 3) == derangement(classes, 3)).all()


@pytest.mark.parametrize("sizes", [[1], [3, 2], []])
def test_impossible_derangements_are_refused(sizes):
    with pytest.raises(DataError, match="at most half of them in one class"):
        derangement(np.repeat(np.arange(len(sizes)), sizes).astype(np.int64))


def test_gap_and_interval_of_known_losses():
    rng = np.random.default_rng(0)
    n, true_gap = 400, 0.25
    right = rng.normal(4.0, 0.5, (n, 1)) + np.zeros((1, 16))
    wrong = right + rng.normal(true_gap, 0.3, (n, 1))
    gap = measure_gap(right, wrong, np.arange(n))
    difference = (wrong - right)[:, 0]
    assert gap.gap == pytest.approx(difference.mean()) and gap.image_loss == pytest.approx(right.mean())
    # the bootstrap must agree with the normal interval of a mean
    half = 1.96 * difference.std(ddof=1) / n**0.5
    assert gap.gap_low == pytest.approx(gap.gap - half, abs=0.15 * half)
    assert gap.gap_high == pytest.approx(gap.gap + half, abs=0.15 * half)
    assert (gap.n_samples, gap.n_classes) == (n, n)


def test_samples_of_one_class_count_as_one_witness():
    rng = np.random.default_rng(1)
    of_class = rng.normal(0.1, 0.3, 50)
    wrong = np.repeat(of_class, 20)[:, None] + np.zeros((1, 4))
    right = np.zeros_like(wrong)
    honest = measure_gap(right, wrong, np.repeat(np.arange(50), 20))
    naive = measure_gap(right, wrong, np.arange(1000))
    assert honest.gap == pytest.approx(naive.gap)
    ratio = (honest.gap_high - honest.gap_low) / (naive.gap_high - naive.gap_low)
    assert ratio == pytest.approx(20**0.5, rel=0.2)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(2)
    n_trials, n_held = 300, 0
    for _ in range(n_trials):
        right, wrong = rng.normal(4, 1, (60, 4)), rng.normal(4.2, 1, (60, 4))
        gap = measure_gap(right, wrong, np.arange(60), confidence=0.9, n_resamples=200)
        n_held += gap.gap_low < 0.2 < gap.gap_high
    assert 0.84 < n_held / n_trials < 0.95  # 0.9 plus or minus three standard errors; a small bootstrap covers slightly less


def test_map_by_position_is_in_raster_order():
    nll = np.tile(np.arange(9.0), (5, 1))
    assert (position_map(nll) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]).all()
    with pytest.raises(ValueError, match="8 tokens per sample: expected a square"):
        position_map(nll[:, :8])


def test_broken_losses_are_refused():
    nll = np.ones((4, 4))
    with pytest.raises(DataError, match="not finite"):
        measure_gap(nll, np.full((4, 4), np.nan), np.arange(4))
    with pytest.raises(ValueError, match="expected equal lengths"):
        measure_gap(nll, nll[:3], np.arange(4))


def test_a_file_says_the_same_as_its_arrays(tmp_path):
    rng = np.random.default_rng(3)
    right, wrong = rng.random((6, 4)).astype(np.float32), rng.random((6, 4)).astype(np.float32)
    captions, groups = ["a", "a", "b", "c", "d", "e"], ["1", "2", "3", "4", "5", "5"]
    save_losses(
        tmp_path / "losses.npz",
        nll_SN=right,
        nll_shuffled_SN=wrong,
        order_S=np.arange(6),
        keys=list("uvwxyz"),
        captions=captions,
        groups=groups,
    )
    gap = gap_of_file(tmp_path / "losses.npz", seed=1)
    assert gap == measure_gap(right, wrong, caption_classes(captions, groups), seed=1)
    assert gap.n_classes == 4
