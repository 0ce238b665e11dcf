"""Which scenes are drawn: the mixture that training sees, and the captions of the evaluation."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from dalle_ds.scenes.captions import wordings
from dalle_ds.scenes.meaning import CATEGORIES, Category, Meaning, Split, Wanted
from dalle_ds.scenes.scene import Scene, scene_of
from dalle_ds.scenes.vocabulary import COLOURS, RELATIONS, SHAPES, SIZES

WEIGHTS: Final[dict[Category, float]] = {
    "single_object": 0.08,
    "two_objects": 0.12,
    "counting": 0.22,
    "colours": 0.16,
    "position": 0.24,
    "attribute_binding": 0.18,
}
"""Share of each category in training scenes."""

SIZE_SAID: Final = 0.4  # probability that a caption names an object's size
PLAIN_WORDING: Final = 0.5  # probability of the first wording; the others share the rest
_TRIES: Final = 4000  # meanings that are drawn at most for one caption of an evaluation: few are left where many are taken


@dataclass(frozen=True)
class CaptionedScene:
    """A scene and a caption that is true of it; `meaning` has the objects in the order of the scene's."""

    caption: str
    meaning: Meaning
    scene: Scene


def training_scene(seed: int, index: int, *, textured: float = 0.25) -> CaptionedScene:
    """Scene `index` of the endless training set `seed`: a pure function of both. Nothing in it is zero-shot or reserved."""
    rng = np.random.default_rng([seed, index])
    category = CATEGORIES[int(rng.choice(len(CATEGORIES), p=[WEIGHTS[name] for name in CATEGORIES]))]
    meaning = _draw(rng, category, "training")
    captions = wordings(meaning)
    caption = captions[0 if rng.random() < PLAIN_WORDING else int(rng.integers(len(captions)))]
    return CaptionedScene(caption, meaning, scene_of(meaning, rng, textured=textured))


def evaluation_captions(n: int, seed: int = 0) -> list[str]:
    """`n` different captions of each category, seen and zero-shot, in turns, so that any beginning of the list is balanced.

    Single objects have no zero-shot captions: a shape alone is no combination. No meaning comes twice before each has come.
    """
    rng = np.random.default_rng([seed, 1])
    kinds = [(category, split) for category in CATEGORIES for split in ("seen", "zero_shot")]
    streams = [_different_captions(rng, category, split) for category, split in kinds if (category, split) != NO_COMBINATION]
    rounds = ([next(stream, None) for stream in streams] for _ in range(n))
    return [caption for captions in rounds for caption in captions if caption is not None]


NO_COMBINATION: Final = ("single_object", "zero_shot")


def _different_captions(rng: np.random.Generator, category: Category, split: Split) -> Iterator[str]:
    taken: set[str] = set()
    times_taken: dict[str, int] = {}
    round_number = 1
    while True:
        for _ in range(_TRIES):
            meaning = _draw(rng, category, split)
            captions = [caption for caption in wordings(meaning) if caption not in taken]
            if captions and times_taken.get(meaning.key, 0) < round_number:
                break
        else:
            if round_number > max(times_taken.values(), default=0):
                return
            round_number += 1
            continue
        taken.add(captions[0])
        times_taken[meaning.key] = times_taken.get(meaning.key, 0) + 1
        yield captions[0]


def _draw(rng: np.random.Generator, category: Category, split: Split) -> Meaning:
    while True:
        meaning = _any_meaning(rng, category)
        if meaning.split == split:
            return meaning


def _any_meaning(rng: np.random.Generator, category: Category) -> Meaning:
    has_colour = category not in ("single_object", "two_objects")
    n_kinds = 1 if category in ("single_object", "colours", "counting") else 2
    count = int(rng.integers(2, 5)) if category == "counting" else 1
    names = tuple(RELATIONS)
    relation = names[int(rng.integers(len(names)))] if category == "position" else None
    while True:
        wanted = tuple(_any_wanted(rng, has_colour, count) for _ in range(n_kinds))
        if n_kinds == 1 or (wanted[0].shape, wanted[0].colour) != (wanted[1].shape, wanted[1].colour):
            return Meaning(wanted, relation)


def _any_wanted(rng: np.random.Generator, has_colour: bool, count: int) -> Wanted:
    shapes, colours, sizes = tuple(SHAPES), tuple(COLOURS), tuple(SIZES)
    shape = shapes[int(rng.integers(len(shapes)))]
    colour = colours[int(rng.integers(len(colours)))] if has_colour else None
    size = sizes[int(rng.integers(len(sizes)))] if rng.random() < SIZE_SAID else None
    return Wanted(shape, colour, size, count)
