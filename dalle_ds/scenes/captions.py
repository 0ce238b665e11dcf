"""Captions of scenes: every wording of a meaning, and the meaning of a caption."""

import re
from collections.abc import Iterable
from typing import Final

from dalle_ds.scenes.meaning import Meaning, Wanted
from dalle_ds.scenes.vocabulary import COLOURS, COUNTS, OPPOSITES, SHAPES, SIZES

# The first of each row is the plain wording.
_RELATION_WORDS: Final = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
}
_PLACES: Final = ("first", "second")
_ONE: Final = ("{0}", "an image of {0}", "an image with {0}")
_BOTH: Final = ("{0} and {1}", "{0} with {1}", "an image of {0} and {1}")
_PLACED: Final = ("{0} {relation} {1}", "an image of {0} {relation} {1}", "{relation} {1}, {0}")


def wordings(meaning: Meaning) -> list[str]:
    """All captions of a meaning, the plain one first.

    Two objects with a relation are named in either order, with the opposite relation in the other one. Without a relation the
    order is the meaning's, since scenes follow it.
    """
    captions = []
    for wanted, relation in _orders(meaning):
        phrases = [_phrase(one) for one in wanted]
        if relation is not None:
            words = _RELATION_WORDS[relation]
            captions += [form.format(*phrases, relation=word) for word in words for form in _PLACED]
        else:
            captions += [form.format(*phrases) for form in (_ONE if len(wanted) == 1 else _BOTH)]
    return list(dict.fromkeys(captions))


def meaning_of(caption: str) -> Meaning | None:
    """What a caption asks for: the inverse of `wordings`. None where it is no caption of a scene.

    Upper case, further spaces and a full stop at the end change nothing.
    """
    text = " ".join(caption.lower().split()).rstrip(".").rstrip()
    found = next(filter(None, (pattern.fullmatch(text) for pattern in _PATTERNS)), None)
    if found is None:
        return None
    groups = found.groupdict()
    wanted = [_wanted(groups, place) for place in _PLACES if f"{place}_shape" in groups]
    if None in wanted or (len(wanted) == 2 and any(one.count > 1 for one in wanted if one)):
        return None  # "two heart", and "two hearts above a star", which no scene shows
    relation = groups.get("relation")
    return Meaning(tuple(one for one in wanted if one), None if relation is None else _RELATION_OF[relation])


def _orders(meaning: Meaning) -> list[tuple[tuple[Wanted, ...], str | None]]:
    orders = [(meaning.wanted, meaning.relation)]
    if meaning.relation is not None:
        orders.append((meaning.wanted[::-1], OPPOSITES[meaning.relation]))
    return orders


def _phrase(one: Wanted) -> str:
    attributes = " ".join(filter(None, (one.size, one.colour)))
    noun = f"{attributes} {one.shape}".strip()
    if one.count == 1:
        return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
    return f"{_NUMERALS[one.count]} {attributes} {_plural(one.shape)}".replace("  ", " ")


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


_NUMERALS: Final = {count: word for word, count in COUNTS.items()}
_COUNT_OF: Final = {"a": 1, "an": 1, **COUNTS}
_RELATION_OF: Final = {word: relation for relation, words in _RELATION_WORDS.items() for word in words}
_SINGULAR: Final = {shape: shape for shape in SHAPES}
_PLURAL: Final = {_plural(shape): shape for shape in SHAPES}


def _any_of(words: Iterable[str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


def _pattern_of_phrase(place: str) -> str:
    size, colour = f"(?:(?P<{place}_size>{_any_of(SIZES)}) )?", f"(?:(?P<{place}_colour>{_any_of(COLOURS)}) )?"
    count, shape = f"(?P<{place}_count>{_any_of(_COUNT_OF)}) ", f"(?P<{place}_shape>{_any_of([*_SINGULAR, *_PLURAL])})"
    return f"{count}{size}{colour}{shape}"


_PATTERNS: Final = tuple(
    re.compile(form.format(*map(_pattern_of_phrase, _PLACES), relation=f"(?P<relation>{_any_of(_RELATION_OF)})"))
    for form in (*_ONE, *_BOTH, *_PLACED)
)


def _wanted(groups: dict[str, str | None], place: str) -> Wanted | None:
    """None where grammar and number disagree: "two heart"."""
    count = _COUNT_OF[str(groups[f"{place}_count"])]
    shape = (_SINGULAR if count == 1 else _PLURAL).get(str(groups[f"{place}_shape"]))
    return None if shape is None else Wanted(shape, groups[f"{place}_colour"], groups[f"{place}_size"], count)
