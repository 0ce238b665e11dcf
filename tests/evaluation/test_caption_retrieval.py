"""Retrieval among captions: known right and wrong images, captions of the same style only, and chance."""

import numpy as np
import pytest

from dalle_ds.errors import DataError
from dalle_ds.evaluation.caption_retrieval import candidates_of, score_among

STYLE = r"in \w+ style"
POOL = [f"{thing} in {style} style" for style in ("flat", "noto") for thing in ("apple", "boat", "cat", "dog", "egg", "fox")]


def test_images_that_have_the_vector_of_their_caption_are_found() -> None:
    texts_PD = np.eye(12)
    images_ND = texts_PD[[0, 1, 3, 7]]  # the third shows a dog, and is named a cat
    captions = [POOL[0], POOL[1], POOL[2], POOL[7]]
    found = score_among(images_ND, captions, texts_PD, POOL, 6, STYLE)
    assert (found["n"], found["top1"], found["top5"]) == (4, 0.75, 0.75)  # the others tie with what the third shows not
    assert found["top1_low"] <= 0.75 <= found["top1_high"]
    assert {text: row["top1"] for text, row in found["by_text"].items()} == {"in flat style": 2 / 3, "in noto style": 1.0}


def test_a_tie_is_no_success() -> None:
    assert score_among(np.ones((1, 12)), [POOL[0]], np.ones((12, 12)), POOL, 2)["top1"] == 0


def test_vectors_of_chance_give_chance() -> None:
    rng = np.random.default_rng(0)
    texts_PD, captions = rng.normal(size=(12, 8)), POOL * 200
    found = score_among(rng.normal(size=(2400, 8)), captions, texts_PD, POOL, 6)
    assert found["top1"] == pytest.approx(1 / 6, abs=0.03)


def test_candidates_are_of_the_same_style_and_different() -> None:
    places = candidates_of(POOL, POOL, 5, STYLE)
    assert places[:, 0].tolist() == list(range(12))
    for row in places:
        assert len(set(row)) == 5 and len({POOL[place].split()[2] for place in row}) == 1
    assert any(len({POOL[place].split()[2] for place in row}) == 2 for row in candidates_of(POOL, POOL, 5))
    with pytest.raises(DataError, match="6 captions like 'apple in flat style', expected 7 or more"):
        candidates_of(POOL, POOL, 7, STYLE)
