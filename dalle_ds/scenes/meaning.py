"""What a caption asks for: objects with the attributes that it names, and where they lie."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from dalle_ds.scenes.vocabulary import (
    COLOURS,
    COUNTS,
    OPPOSITES,
    RELATIONS,
    SHAPES,
    SIZES,
    ZERO_SHOT_COLOURS,
    ZERO_SHOT_COMPANIONS,
)
from dalle_ds.storage.hashing import hash_to_integer

Category = Literal["single_object", "two_objects", "counting", "colours", "position", "attribute_binding"]
Split = Literal["training", "seen", "zero_shot"]

# The categories of GenEval (Ghosh et al. 2023). Evaluation keeps one meaning in so many; of few meanings, more.
RESERVED: Final[dict[Category, int]] = {
    "single_object": 3,
    "two_objects": 6,
    "counting": 6,
    "colours": 6,
    "position": 10,
    "attribute_binding": 10,
}
CATEGORIES: Final = tuple(RESERVED)
SPLITS: Final[tuple[Split, ...]] = ("training", "seen", "zero_shot")


@dataclass(frozen=True)
class Wanted:
    """One object, or `count` alike. None: the caption does not say."""

    shape: str
    colour: str | None = None
    size: str | None = None
    count: int = 1

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape {self.shape!r}: expected one of {', '.join(SHAPES)}")
        if self.colour is not None and self.colour not in COLOURS:
            raise ValueError(f"colour {self.colour!r}: expected one of {', '.join(COLOURS)}")
        if self.size is not None and self.size not in SIZES:
            raise ValueError(f"size {self.size!r}: expected one of {', '.join(SIZES)}")
        if self.count not in COUNTS.values():
            raise ValueError(f"count {self.count}: expected 1 to {max(COUNTS.values())}")


@dataclass(frozen=True)
class Meaning:
    """One `Wanted`, or two of one object each; with a relation the first lies there as seen from the second."""

    wanted: tuple[Wanted, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        if len(self.wanted) not in (1, 2) or (len(self.wanted) == 2 and any(one.count > 1 for one in self.wanted)):
            raise ValueError(f"{self.wanted}: expected objects of one kind, or two objects")
        if self.relation is not None and (self.relation not in RELATIONS or len(self.wanted) != 2):
            raise ValueError(f"relation {self.relation!r}: expected one of {', '.join(RELATIONS)} between two objects")

    @property
    def n_objects(self) -> int:
        return sum(one.count for one in self.wanted)

    def objects(self) -> Iterator[Wanted]:
        """Every object by itself; `count` is left as it is."""
        for one in self.wanted:
            yield from [one] * one.count

    @property
    def category(self) -> Category:
        first = self.wanted[0]
        if self.relation is not None:
            return "position"
        if len(self.wanted) == 2:
            return "two_objects" if all(one.colour is None for one in self.wanted) else "attribute_binding"
        if first.count > 1:
            return "counting"
        return "single_object" if first.colour is None else "colours"

    @property
    def key(self) -> str:
        """Equal for captions that ask for the same: "a heart above a star" and "a star below a heart"."""
        wanted, relation = self.wanted, self.relation
        if relation in ("below", "right of"):
            wanted, relation = wanted[::-1], OPPOSITES[relation]
        names = [" ".join(filter(None, (str(one.count), one.size, one.colour, one.shape))) for one in wanted]
        return f" {relation} ".join(names) if relation else " and ".join(sorted(names))

    @property
    def split(self) -> Split:
        """Whether training sees it.

        "zero_shot": it has a pair of colour and shape, or of shapes, that training never sees. "seen": training sees all of
        its combinations, and never this meaning in whatever words. The choice is by hash: the same for all data sets.
        """
        if is_zero_shot([(one.colour, one.shape) for one in self.objects()]):
            return "zero_shot"
        is_reserved = hash_to_integer(f"scenes:{self.key}") % RESERVED[self.category] == 0
        return "seen" if is_reserved else "training"


def is_zero_shot(objects: list[tuple[str | None, str]]) -> bool:
    """Whether objects, as (colour, shape), have a combination that training never sees."""
    has_colour = any(pair in ZERO_SHOT_COLOURS for pair in objects)
    return has_colour or frozenset(shape for _, shape in objects) in ZERO_SHOT_COMPANIONS
