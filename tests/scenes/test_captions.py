"""Captions of scenes: every wording has its meaning, and nothing else has one."""

from itertools import product

import numpy as np
import pytest

from dalle_ds.scenes.captions import meaning_of, wordings
from dalle_ds.scenes.meaning import Meaning, Wanted, is_zero_shot
from dalle_ds.scenes.vocabulary import COLOURS, COUNTS, RELATIONS, SHAPES, SIZES, ZERO_SHOT_COLOURS, ZERO_SHOT_COMPANIONS
from dalle_ds.storage.hashing import hash_to_integer

PHRASES = [Wanted(*words) for words in product(SHAPES, (None, *COLOURS), (None, *SIZES))]


def pairs(n: int) -> list[Meaning]:
    rng = np.random.default_rng(0)
    relations = (None, *RELATIONS)
    return [
        Meaning((PHRASES[a], PHRASES[b]), relations[c])
        for a, b, c in zip(*(rng.integers(len(few), size=n) for few in (PHRASES, PHRASES, relations)), strict=True)
    ]


def test_every_wording_of_every_single_kind_is_read_back() -> None:
    for shape, colour, size, count in product(SHAPES, (None, *COLOURS), (None, *SIZES), COUNTS.values()):
        meaning = Meaning((Wanted(shape, colour, size, count),))
        assert [meaning_of(caption) for caption in wordings(meaning)] == [meaning] * 3


def test_every_wording_of_two_objects_is_read_back() -> None:
    for meaning in pairs(2000):
        captions = wordings(meaning)
        assert len(captions) >= (3 if meaning.relation is None else 6)
        if meaning.relation is None:  # scenes show the objects in this order
            assert {read.wanted for read in map(meaning_of, captions) if read} == {meaning.wanted}
        for caption in captions:
            read = meaning_of(caption)
            assert read is not None and read.key == meaning.key and read.category == meaning.category
            assert sorted(map(str, read.wanted)) == sorted(map(str, meaning.wanted))
        assert meaning_of(captions[0]) == meaning


def test_captions_read_as_english() -> None:
    star, heart = Wanted("star", "blue", "small"), Wanted("heart", "orange")
    assert wordings(Meaning((Wanted("star", "blue", "small", 3),)))[0] == "three small blue stars"
    assert wordings(Meaning((Wanted("cross", None, None, 2),)))[0] == "two crosses"
    assert wordings(Meaning((heart,)))[1] == "an image of an orange heart"
    placed = wordings(Meaning((heart, star), "above"))
    assert placed[0] == "an orange heart above a small blue star"
    assert "a small blue star under an orange heart" in placed and "over a small blue star, an orange heart" in placed


@pytest.mark.parametrize("caption", ["A red  heart above a blue star.", " a RED heart over a blue star"])
def test_case_spaces_and_full_stop_change_nothing(caption: str) -> None:
    assert meaning_of(caption) == meaning_of("a red heart above a blue star")


@pytest.mark.parametrize(
    "caption",
    ["", "a heart shaped box", "a teal heart", "five red hearts", "two red heart", "a red hearts", "a heart above", "red heart",
     "a heart above a star and a ring", "two hearts above a star", "a red small heart", "a heart, a star", "the same cat"],
)  # fmt: skip
def test_other_captions_have_no_meaning(caption: str) -> None:
    assert meaning_of(caption) is None


@pytest.mark.parametrize(
    ("caption", "category"),
    [
        ("a large heart", "single_object"),
        ("a large red heart", "colours"),
        ("four hearts", "counting"),
        ("a heart and a small star", "two_objects"),
        ("a red heart with a star", "attribute_binding"),
        ("a heart left of a star", "position"),
    ],
)
def test_categories(caption: str, category: str) -> None:
    meaning = meaning_of(caption)
    assert meaning is not None and meaning.category == category


def test_captions_that_ask_for_the_same_have_one_key() -> None:
    same = ("a heart above a star", "a star below a heart", "under a heart, a star", "an image of a star under a heart")
    assert {meaning.key for meaning in map(meaning_of, same) if meaning} == {"1 heart above 1 star"}
    keys = [meaning.key for meaning in map(meaning_of, ("a heart and a star", "a star with a heart")) if meaning]
    assert keys[0] == keys[1]
    assert len({meaning.key for meaning in pairs(300)}) > 290


def test_zero_shot_combinations() -> None:
    assert len({colour for colour, _ in ZERO_SHOT_COLOURS}) == len({shape for _, shape in ZERO_SHOT_COLOURS}) == len(SHAPES)
    assert sorted(shape for pair in ZERO_SHOT_COMPANIONS for shape in pair) == sorted(SHAPES)
    for caption in ("a red heart", "three small red hearts", "a heart and a star", "a blue star right of a green heart"):
        assert meaning_of(caption).split == "zero_shot"
    assert is_zero_shot([("blue", "ring"), ("black", "triangle")]) and not is_zero_shot([("blue", "ring")])


def test_what_is_kept_for_evaluation_never_changes() -> None:
    """A score of an older version stays comparable, and its captions stay unseen."""
    kinds = product(SHAPES, (None, *COLOURS), (None, *SIZES), COUNTS.values())
    meanings = [Meaning((Wanted(shape, colour, size, count),)) for shape, colour, size, count in kinds]
    kept = sorted(meaning.key for meaning in meanings if meaning.split == "seen")
    assert len(kept) == 141 and hash_to_integer("; ".join(kept)) == 6612270856681950239


def test_mistakes_in_a_meaning() -> None:
    with pytest.raises(ValueError, match="shape 'cube': expected one of circle"):
        Wanted("cube")
    with pytest.raises(ValueError, match="colour 'teal'"):
        Wanted("heart", "teal")
    with pytest.raises(ValueError, match="count 5: expected 1 to 4"):
        Wanted("heart", count=5)
    with pytest.raises(ValueError, match="expected objects of one kind, or two objects"):
        Meaning((Wanted("heart", count=2), Wanted("star")))
    with pytest.raises(ValueError, match="relation 'inside'"):
        Meaning((Wanted("heart"), Wanted("star")), "inside")
