"""The test of reranking tells good, random and bad choices apart, and rejects records that cannot be compared."""

import json

import numpy as np
import pytest

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.evaluation.judge import judge


def record(file, scores_CK, scorer, **changes):
    scores = np.asarray(scores_CK).tolist()
    about = {"export_fingerprint": "e", "dvae": "d", "captions": ["a"] * len(scores), "settings": {"n": len(scores[0])}}
    about["images"] = [{"file": "a.png", "caption": "a", "row": 0, "candidate": 0, "seed": 1}]
    file.write_text(json.dumps({**about, "scorer": scorer, "scorer_name": scorer, "scores": scores, **changes}))
    return file


def test_a_choice_is_as_good_as_its_agreement_with_the_judge(tmp_path):
    rng = np.random.default_rng(0)
    truth, noise = rng.normal(size=(300, 8)), rng.normal(size=(300, 8))
    judged = record(tmp_path / "b.json", truth, "b")
    good = judge(record(tmp_path / "a.json", truth + noise, "a"), judged)
    favourites = truth[np.arange(300), (truth + noise).argmax(1)]
    assert good["gain"] == pytest.approx(favourites.mean() - truth.mean()) and good["reranking_helps"]
    assert good["gain_low"] < good["gain"] < good["gain_high"] and good["gain_high"] - good["gain_low"] < 0.4
    assert good["favourite_wins"] == pytest.approx((favourites[:, None] > truth).sum() / (300 * 7))
    blind = judge(record(tmp_path / "a.json", noise, "a"), judged)
    assert not blind["reranking_helps"] and abs(blind["favourite_wins"] - 0.5) < 0.05
    assert blind["gain_low"] < 0 < blind["gain_high"]
    perfect = judge(record(tmp_path / "a.json", truth, "a"), judged)
    assert perfect["favourite_wins"] == 1 and perfect["score_of_favourite"] == pytest.approx(truth.max(1).mean())


def test_what_cannot_be_compared(tmp_path):
    a, b = record(tmp_path / "a.json", [[1.0, 2.0]], "a"), record(tmp_path / "b.json", [[1.0, 2.0]], "b")
    for other, message in (
        (record(tmp_path / "c.json", [[1.0, 2.0]], "c", settings={"n": 2, "seed": 1}), "differ in settings"),
        (record(tmp_path / "d.json", [[1.0, 2.0]], "a"), "both scored by a"),
    ):
        with pytest.raises(ConfigError, match=message):
            judge(a, other)
    with pytest.raises(ConfigError, match="1 candidate per caption"):
        judge(record(a, [[1.0]], "a"), record(b, [[1.0]], "b"))
    b.write_text("{}")
    with pytest.raises(DataError, match="not a record of samples"):
        judge(a, b)
    with pytest.raises(DataError, match="has no scores"):
        judge(record(b, [[1.0, 2.0]], "b", scores=None), a)
