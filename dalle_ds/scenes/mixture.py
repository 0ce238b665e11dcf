"""Which scenes are drawn: the mixture that training sees, and the captions of the evaluation."""

from bisect import bisect
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from typing import Final

import numpy as np

from dalle_ds.scenes.captions import wordings
from dalle_ds.scenes.meaning import CATEGORIES, Category, Meaning, Split, Wanted
from dalle_ds.scenes.scene import Scene, scene_of
from dalle_ds.scenes.vocabulary import COLOURS, GROUNDS, RELATIONS, SHAPES, SIZES

WEIGHTS: Final[dict[Category, float]] = {
    "single_object": 0.08,
    "two_objects": 0.12,
    "counting": 0.22,
    "colours": 0.16,
    "position": 0.24,
    "attribute_binding": 0.18,
}
"""Share of each category in training scenes."""
_CUMULATIVE: Final = tuple(accumulate(WEIGHTS[category] for category in CATEGORIES[:-1]))

SIZE_SAID: Final = 0.4  # probability that a caption names an object's size
PLAIN_WORDING: Final = 0.5  # probability of the first wording; the others share the rest
_DRAWS: Final = 8  # meanings that are drawn for each caption of an evaluation: rare ones come too

EVALUATED: Final[tuple[Split, ...]] = ("seen", "zero_shot")
NO_COMBINATION: Final = ("single_object", "zero_shot")
_KINDS: Final = tuple((row, split) for row in CATEGORIES for split in EVALUATED if (row, split) != NO_COMBINATION)
N_KINDS: Final = len(_KINDS)
"""Categories of the evaluation, seen and zero-shot each: `evaluation_captions(n)` has at most `n` times as many captions."""
_COLOURS, _SIZES, _RELATIONS = tuple(COLOURS), tuple(SIZES), tuple(RELATIONS)


@dataclass(frozen=True)
class CaptionedScene:
    """A scene and a caption that is true of it; `meaning` has the objects in the order of the scene's."""

    caption: str
    meaning: Meaning
    scene: Scene


def training_scene(seed: int, index: int, *, textured: float = 0.25, n_grounds: int = len(GROUNDS)) -> CaptionedScene:
    """Scene `index` of the endless training set `seed`: a pure function of both. Nothing in it is zero-shot or reserved."""
    rng = np.random.default_rng([seed, index])
    category = CATEGORIES[bisect(_CUMULATIVE, rng.random())]
    meaning = _draw(rng, category, "training")
    caption = _worded(rng, meaning)[0]
    return CaptionedScene(caption, meaning, scene_of(meaning, rng, textured=textured, n_grounds=n_grounds))


def evaluation_captions(n: int, seed: int = 0) -> list[str]:
    """`n` different captions of each category, seen and zero-shot, in turns, so that any beginning of the list is balanced.

    Single objects have no zero-shot captions: a shape alone is no combination. They have few meanings, and fewer captions than
    `n` where `n` is large.
    """
    rng = np.random.default_rng([seed, 1])
    columns = [_different_captions(rng, category, split, n) for category, split in _KINDS]
    return [caption for row in zip_longest(*columns) for caption in row if caption is not None]


def _different_captions(rng: np.random.Generator, category: Category, split: Split, n: int) -> list[str]:
    """Each meaning once, in whatever words, then each in other words, and so on."""
    drawn = (_draw(rng, category, split) for _ in range(_DRAWS * n))
    meanings = {meaning.key: meaning for meaning in drawn}
    rounds = zip_longest(*(_worded(rng, meaning) for meaning in meanings.values()))
    captions = [caption for one_round in rounds for caption in one_round if caption is not None]
    return list(dict.fromkeys(captions))[:n]


def _worded(rng: np.random.Generator, meaning: Meaning) -> list[str]:
    """All captions of a meaning, from a drawn one on."""
    captions = wordings(meaning)
    first = 0 if rng.random() < PLAIN_WORDING else int(rng.integers(len(captions)))
    return captions[first:] + captions[:first]


def _draw(rng: np.random.Generator, category: Category, split: Split) -> Meaning:
    while True:
        meaning = _any_meaning(rng, category)
        if meaning.split == split:
            return meaning


def _any_meaning(rng: np.random.Generator, category: Category) -> Meaning:
    has_colour = category not in ("single_object", "two_objects")
    n_kinds = 1 if category in ("single_object", "colours", "counting") else 2
    count = int(rng.integers(2, 5)) if category == "counting" else 1
    relation = _RELATIONS[int(rng.integers(4))] if category == "position" else None
    while True:
        wanted = tuple(_any_wanted(rng, has_colour, count) for _ in range(n_kinds))
        if n_kinds == 1 or (wanted[0].shape, wanted[0].colour) != (wanted[1].shape, wanted[1].colour):
            return Meaning(wanted, relation)


def _any_wanted(rng: np.random.Generator, has_colour: bool, count: int) -> Wanted:
    shape = SHAPES[int(rng.integers(len(SHAPES)))]
    colour = _COLOURS[int(rng.integers(len(_COLOURS)))] if has_colour else None
    size = _SIZES[int(rng.integers(len(_SIZES)))] if rng.random() < SIZE_SAID else None
    return Wanted(shape, colour, size, count)
