"""Scores: rows by category and split, intervals, chance, and the text and charts made of them."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest

from dalle_ds.errors import DataError
from dalle_ds.scenes.charts import RIGHT, WRONG, judged_sheet, score_chart
from dalle_ds.scenes.meaning import CATEGORIES
from dalle_ds.scenes.mixture import evaluation_captions, training_scene
from dalle_ds.scenes.render import render
from dalle_ds.scenes.scene import scene_of
from dalle_ds.scenes.score import mean_of, require_meaning, score, share_of
from dalle_ds.scenes.table import table
from dalle_ds.scenes.trial import try_judge

CAPTIONS = evaluation_captions(6)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([render(scene_of(require_meaning(caption), rng), 32) for caption in CAPTIONS])


def test_right_images_score_one_and_shuffled_captions_near_nothing(images) -> None:
    report = score(images, CAPTIONS)
    assert list(report.rows) == ["seen", "zero_shot"] and list(report.rows["seen"]) == list(CATEGORIES)
    assert list(report.rows["zero_shot"]) == list(CATEGORIES[1:])
    for split in report.rows:
        assert report.means[split].value == 1 and report.faults[split] == {}
        assert report.means[split].chance < 0.15
        assert all(share.n_images == share.n_captions == 6 for share in report.rows[split].values())
    wrong = score(np.roll(images, 1, axis=0), CAPTIONS)
    assert wrong.means["seen"].value < 0.1 and wrong.faults["seen"]["number"] > 0.2


def test_a_wrong_image_lowers_its_row_alone(images) -> None:
    changed = images.copy()
    counting = next(i for i, caption in enumerate(CAPTIONS) if require_meaning(caption).category == "counting")
    changed[counting] = images[0]
    report = score(changed, CAPTIONS)
    split = require_meaning(CAPTIONS[counting]).split
    assert report.rows[split]["counting"].value == pytest.approx(5 / 6)
    others = [share.value for rows in report.rows.values() for share in rows.values()]
    assert sum(value < 1 for value in others) == 1
    assert report.metrics()[f"{split}/counting"] == pytest.approx(5 / 6)
    assert report.metrics()[f"{split}/mean"] == pytest.approx(1 - 1 / 6 / len(report.rows[split]))
    assert [one.verdict.is_right for one in report.judged].count(False) == 1


def test_images_may_differ_in_size_and_keep_their_order(images) -> None:
    as_images = [
        Image.fromarray(image).resize((32 + 16 * (i % 3),) * 2, Image.Resampling.BICUBIC) for i, image in enumerate(images)
    ]
    report = score(as_images, CAPTIONS)
    assert report.means["seen"].value > 0.95 and report.means["zero_shot"].value > 0.95


def test_captions_that_training_sees_have_rows_of_their_own() -> None:
    scenes = [training_scene(0, index) for index in range(30)]
    report = score(np.stack([render(one.scene, 32) for one in scenes]), [one.caption for one in scenes])
    assert list(report.rows) == ["training"] and report.means["training"].value == 1


@pytest.mark.parametrize(("right", "n"), [(0, 20), (13, 20), (20, 20), (199, 200)])
def test_an_interval_is_wilsons(right: int, n: int) -> None:
    share = share_of([True] * right + [False] * (n - right), n_captions=n)
    twin = binomtest(right, n).proportion_ci(method="wilson")
    assert (share.low, share.high) == pytest.approx((twin.low, twin.high)) and share.value == right / n


def test_images_of_one_caption_are_one_witness() -> None:
    many, few = (share_of([True, False] * 50, n_captions=n) for n in (100, 10))
    assert few.value == many.value and few.high - few.low > 2.5 * (many.high - many.low)


def test_the_interval_of_a_mean_covers_it() -> None:
    """95 % of many repetitions with known shares, give or take."""
    rng, truth = np.random.default_rng(0), np.array([0.98, 0.9, 0.6, 0.95, 0.8, 0.9])
    hits, n = [], 25
    for _ in range(1500):
        mean = mean_of([share_of((rng.random(n) < p).tolist(), n_captions=n) for p in truth])
        hits.append(mean.low <= truth.mean() <= mean.high)
    assert 0.93 < np.mean(hits) < 0.985


def test_what_cannot_be_judged_is_an_error(images) -> None:
    with pytest.raises(DataError, match="caption 'the same cat' is no caption of a scene"):
        score(images[:1], ["the same cat"])
    with pytest.raises(DataError, match="2 images and 1 captions"):
        score(images[:2], CAPTIONS[:1])
    with pytest.raises(DataError, match="no images to judge"):
        score([], [])


def test_text_and_json(images) -> None:
    report = score(images, CAPTIONS)
    text = table(report, report)
    assert text.count("1.000") >= 2 * (6 + 5 + 2) and "zero-shot mean" in text and "seen images with a fault: none" in text
    assert "reconstructed" in text.splitlines()[0] and "ceiling" not in text, "samples may score higher"
    assert json.loads(json.dumps(report.to_dict()))["seen"]["counting"]["n_images"] == 6


def test_charts(images) -> None:
    changed = images.copy()
    changed[1] = images[0]
    report = score(changed, CAPTIONS)
    chart = np.asarray(score_chart(report, report))
    assert chart.shape[0] > 300 and len(np.unique(chart.reshape(-1, 3), axis=0)) > 50
    sheet = np.asarray(judged_sheet([Image.fromarray(image) for image in changed[:14]], report.judged[:14], "14 images"))
    frames = [tuple(sheet[27, x]) for x in (1, 141)]
    assert frames == [RIGHT, WRONG] and sheet.shape[1] == 1400
    texts = [sheet[26 + 134 : 26 + 134 + 13, x : x + 134] for x in (0, 140)]
    assert all((text < 100).all(2).any() for text in texts), "captions, in ink"
    assert (sheet[26 + 134 : 250, 140:274] == WRONG).all(2).any(), "its fault, in the colour of the frame"
    assert not (sheet[26 + 134 : 250, :134] == WRONG).all(2).any()


def test_the_judge_on_trial() -> None:
    trial = try_judge(CAPTIONS, 32, n=150)
    assert len(trial.captions) == len(trial.images_BSSC) >= 150 and set(trial.captions) == set(CAPTIONS)
    assert trial.drawn_right >= 0.99 and trial.spoiled_refused >= 0.99
