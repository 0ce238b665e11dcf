"""The judge: does an image show what its caption says, every object of it, and nothing else?"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Final, Literal

import numpy as np

from dalle_ds.scenes.meaning import Meaning, Wanted
from dalle_ds.scenes.objects import FoundObject, find_objects
from dalle_ds.scenes.vocabulary import RELATIONS

Fault = Literal["no ground", "number", "unknown", "shape", "colour", "size", "place"]
FAULTS: Final[tuple[Fault, ...]] = ("no ground", "number", "unknown", "shape", "colour", "size", "place")

MIN_STEP: Final = 0.2  # share of the side by which objects must lie apart along a relation; drawn ones do by 0.43 or more


@dataclass(frozen=True)
class Verdict:
    """What is wrong with an image, as its caption has it; nothing: the image is right."""

    faults: tuple[Fault, ...]

    @property
    def is_right(self) -> bool:
        return not self.faults


def judge(images_BSSC: np.ndarray, meanings: Sequence[Meaning]) -> list[Verdict]:
    """A verdict for each image, uint8 (B, S, S, 3). Raises DataError as `find_objects`."""
    return [verdict(found, meaning) for found, meaning in zip(find_objects(images_BSSC), meanings, strict=True)]


def verdict(found: Sequence[FoundObject] | None, meaning: Meaning) -> Verdict:
    """The faults of found objects, by the assignment to wanted ones that leaves fewest.

    "no ground": objects cannot be told from what is behind them. "number": too few or too many objects; the rest is not
    judged then. "unknown": an object like none of the vocabulary.
    """
    if found is None:
        return Verdict(("no ground",))
    if len(found) != meaning.n_objects:
        return Verdict(("number",))
    wanted = list(meaning.objects())
    faults = min((_faults(order, wanted, meaning) for order in permutations(found)), key=len)  # one entry for each object
    return Verdict(tuple(fault for fault in FAULTS if fault in faults))


def _faults(order: Sequence[FoundObject], wanted: Sequence[Wanted], meaning: Meaning) -> list[Fault]:
    faults: list[Fault] = []
    for one, want in zip(order, wanted, strict=True):
        if one.shape is None or one.colour is None:
            faults.append("unknown")
        if one.shape is not None and one.shape != want.shape:
            faults.append("shape")
        if one.colour is not None and want.colour not in (None, one.colour):
            faults.append("colour")
        if one.size is not None and want.size not in (None, one.size):
            faults.append("size")
    if meaning.relation is not None and not _lies(order[0], order[1], meaning.relation):
        faults.append("place")
    return faults


def _lies(first: FoundObject, second: FoundObject, relation: str) -> bool:
    right, down = RELATIONS[relation]
    dx, dy = first.x - second.x, first.y - second.y
    along, across = (dx * right, dy) if right else (dy * down, dx)
    return along >= MIN_STEP and along > abs(across)
