"""Suggest the word that a user meant: part of every message about an unknown name."""

import difflib
import re
from collections.abc import Iterable


def close_words(word: str, known: Iterable[str]) -> list[str]:
    """Return at most two known words that `word` may stand for, the closest first.

    Words that contain all parts of `word` come first, such as "image_prompt" for "prompt_image" or "--mlflow-uri" for "--uri".
    """
    known, parts = list(dict.fromkeys(known)), _parts(word)
    containing = sorted((one for one in known if parts and parts <= _parts(one)), key=len)
    return (containing or difflib.get_close_matches(word, known, n=2))[:2]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the closest known words, or an empty string if none is close."""
    found = close_words(word, known)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _parts(word: str) -> set[str]:
    return set(filter(None, re.split(r"[\W_]+", word)))
