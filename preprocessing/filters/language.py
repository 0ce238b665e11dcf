"""Which language a caption is in, by py3langid: small, offline, its model inside the package (the paper used cld3)."""

import functools
import re
from typing import Final

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from preprocessing.configs import LANGUAGES

MIN_WORDS: Final = 4  # shorter captions are names as often as sentences, and names belong to no language
# Scripts without spaces: there each sign counts as a word.
_WORDS: Final = re.compile("[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\\W\\d_]+")


def language_of(caption: str) -> tuple[str, float] | None:
    """(ISO 639-1 code out of LANGUAGES, probability), or None where a caption is too short to be judged."""
    if len(_WORDS.findall(caption)) < MIN_WORDS:
        return None
    language, score = _identifier().classify(caption)
    return language, round(float(score), 3)


@functools.cache
def _identifier() -> LanguageIdentifier:
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(LANGUAGES)
    return identifier
