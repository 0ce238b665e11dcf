"""A scene: objects with shape, colour, size and place on a ground; and scenes of a meaning."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np

from dalle_ds.scenes.meaning import Meaning, Wanted
from dalle_ds.scenes.vocabulary import COLOURS, GROUNDS, RELATIONS, SHAPES, SIZES, TEXTURES, ZERO_SHOT_COLOURS

# Lengths and places are shares of the image's side; x goes right and y down.

STEP: Final = 0.25  # from the middle to each object of a scene of several
_JITTER: Final = {"small": 0.035, "large": 0.012}  # of an object among several, so that gaps between them stay
_ACROSS: Final = 0.08  # further jitter of two objects, across the line that joins them
_ALONE: Final = {"small": 0.2, "large": 0.14}
QUADRANTS: Final = ((-1, -1), (1, -1), (-1, 1), (1, 1))


@dataclass(frozen=True)
class SceneObject:
    """One object; x and y are its centre's."""

    shape: str
    colour: str
    size: str
    x: float
    y: float

    @property
    def radius(self) -> float:
        return SIZES[self.size]


@dataclass(frozen=True)
class Ground:
    """What lies behind the objects."""

    colour: str = "white"
    texture: str = "plain"


@dataclass(frozen=True)
class Scene:
    """What an image shows."""

    objects: tuple[SceneObject, ...]
    ground: Ground = Ground()


def scene_of(meaning: Meaning, rng: np.random.Generator, *, textured: float = 0.25, n_grounds: int = len(GROUNDS)) -> Scene:
    """A scene that a caption of this meaning is true of.

    What the meaning does not say is drawn: colours (a training meaning gets no colour that its shape lacks in training) and
    places. Objects without a size are large where there are one or two, and small where there are more.

    Args:
        textured: probability of a striped, checked or dotted ground.
        n_grounds: colours of grounds: the first of `GROUNDS`; 1: white.
    """
    wanted = list(meaning.objects())
    size_unsaid = "large" if len(wanted) <= 2 else "small"
    sizes = [one.size or size_unsaid for one in wanted]
    colours = _colours(meaning, wanted, rng)
    places = _places(meaning, sizes, rng)
    objects = zip(wanted, colours, sizes, places, strict=True)
    ground = Ground(
        _pick(rng, tuple(GROUNDS)[:n_grounds]), _pick(rng, TEXTURES[1:]) if rng.random() < textured else TEXTURES[0]
    )
    return Scene(tuple(SceneObject(one.shape, colour, size, *place) for one, colour, size, place in objects), ground)


def _colours(meaning: Meaning, wanted: list[Wanted], rng: np.random.Generator) -> list[str]:
    first = meaning.wanted[0]
    if first.count > 1:  # objects that are counted are alike
        return [first.colour or _pick(rng, _TRAINING_COLOURS[first.shape])] * first.count
    return [one.colour or _pick(rng, _TRAINING_COLOURS[one.shape]) for one in wanted]


_TRAINING_COLOURS: Final = {
    shape: tuple(colour for colour in COLOURS if (colour, shape) not in ZERO_SHOT_COLOURS) for shape in SHAPES
}


def _places(meaning: Meaning, sizes: list[str], rng: np.random.Generator) -> list[tuple[float, float]]:
    n = len(sizes)
    if n == 1:
        reach = _ALONE[sizes[0]]
        return [(0.5 + rng.uniform(-reach, reach), 0.5 + rng.uniform(-reach, reach))]
    if n > 2:
        return [
            _jittered(QUADRANTS[corner], size, rng) for corner, size in zip(rng.permutation(4)[:n].tolist(), sizes, strict=True)
        ]
    if meaning.relation is not None:
        steps = RELATIONS[meaning.relation]
    else:
        steps = _pick(rng, _READING_ORDER)
    dx, dy = steps
    ends = [_jittered((dx, dy), sizes[0], rng), _jittered((-dx, -dy), sizes[1], rng)]
    if dx and dy:
        return ends
    across = (_ACROSS if dx == 0 else 0.0, _ACROSS if dy == 0 else 0.0)
    return [(x + rng.uniform(-1, 1) * across[0], y + rng.uniform(-1, 1) * across[1]) for x, y in ends]


def _jittered(steps: tuple[int, int], size: str, rng: np.random.Generator) -> tuple[float, float]:
    reach = _JITTER[size]
    x, y = (0.5 + STEP * step + rng.uniform(-reach, reach) for step in steps)
    return x, y


# Where the first of two objects lies if nothing is said: people name what they see from left to right and from top to bottom.
_READING_ORDER: Final = tuple(step for step in (*RELATIONS.values(), *QUADRANTS) if step[::-1] < (0, 0))

T = TypeVar("T")


def _pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]
