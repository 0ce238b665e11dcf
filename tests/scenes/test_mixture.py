"""Training sees every combination but the zero-shot ones; evaluation asks for what training never shows."""

from collections import Counter

import pytest

from dalle_ds.scenes.captions import meaning_of
from dalle_ds.scenes.meaning import CATEGORIES, is_zero_shot
from dalle_ds.scenes.mixture import WEIGHTS, evaluation_captions, training_scene
from dalle_ds.scenes.vocabulary import COLOURS, GROUNDS, SHAPES, ZERO_SHOT_COLOURS, ZERO_SHOT_COMPANIONS

N = 4000


@pytest.fixture(scope="module")
def scenes():
    return [training_scene(0, index) for index in range(N)]


def test_a_scene_is_a_function_of_seed_and_index(scenes) -> None:
    assert [training_scene(0, index) for index in (3, 1500)] == [scenes[3], scenes[1500]]
    assert training_scene(1, 3) != scenes[3] and len({drawn.scene for drawn in scenes}) == N


def test_training_shows_nothing_that_is_kept_back(scenes) -> None:
    for drawn in scenes:
        assert drawn.meaning.split == "training" and meaning_of(drawn.caption).key == drawn.meaning.key
        assert not is_zero_shot([(one.colour, one.shape) for one in drawn.scene.objects])


def test_training_shows_every_other_combination(scenes) -> None:
    colours = {(one.colour, one.shape) for drawn in scenes for one in drawn.scene.objects}
    assert colours == {(colour, shape) for colour in COLOURS for shape in SHAPES} - ZERO_SHOT_COLOURS
    companions = {frozenset(one.shape for one in drawn.scene.objects) for drawn in scenes}
    assert {frozenset((a, b)) for a in SHAPES for b in SHAPES} - ZERO_SHOT_COMPANIONS == companions
    assert {len(drawn.scene.objects) for drawn in scenes} == {1, 2, 3, 4}


def test_categories_have_their_shares(scenes) -> None:
    counts = Counter(drawn.meaning.category for drawn in scenes)
    assert sum(WEIGHTS.values()) == pytest.approx(1)
    assert {category: counts[category] / N for category in CATEGORIES} == pytest.approx(WEIGHTS, abs=0.03)


def test_the_evaluation_is_balanced_and_unseen(scenes) -> None:
    captions = evaluation_captions(20)
    meanings = [meaning_of(caption) for caption in captions]
    assert len(set(captions)) == len(captions) == 220
    kinds = Counter((meaning.category, meaning.split) for meaning in meanings)
    assert kinds == Counter(
        {(c, s): 20 for c in CATEGORIES for s in ("seen", "zero_shot") if (c, s) != ("single_object", "zero_shot")}
    )
    assert len({(meaning.category, meaning.split) for meaning in meanings[:11]}) == 11  # any beginning has all kinds
    trained = {drawn.meaning.key for drawn in scenes}
    assert not trained & {meaning.key for meaning in meanings}
    plain = [caption for caption in captions if caption[:3] not in ("an ", "to ", "ove", "und", "abo", "bel", "lef", "rig")]
    assert 0.4 < len(plain) / len(captions) < 0.9  # several wordings
    assert evaluation_captions(20) == captions and evaluation_captions(20, seed=1) != captions


def test_two_objects_without_a_relation_lie_in_reading_order(scenes) -> None:
    pairs = [one.scene.objects for one in scenes if one.meaning.relation is None and len(one.meaning.wanted) == 2]
    steps = {(round((b.x - a.x) / 0.5), round((b.y - a.y) / 0.5)) for a, b in pairs}
    assert steps == {(0, 1), (1, 0), (1, 1), (-1, 1)}  # right and down, from the first one to the second


def test_grounds_are_the_first_of_the_vocabulary() -> None:
    for n_grounds, expected in ((1, {"white"}), (2, {"white", "cream"}), (len(GROUNDS), set(GROUNDS))):
        assert {training_scene(0, i, n_grounds=n_grounds).scene.ground.colour for i in range(150)} == expected
