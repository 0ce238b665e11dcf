"""Language identification of captions with py3langid: small and offline, with the model in the package. The paper used cld3."""

import functools
import re
from typing import Final

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from preprocessing.configs import LANGUAGES

MIN_WORDS: Final = 4  # shorter captions are often names, which have no language
# In scripts without spaces, each character counts as a word.
_WORDS: Final = re.compile("[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\\W\\d_]+")


def language_of(caption: str) -> tuple[str, float] | None:
    """Returns (ISO 639-1 code from LANGUAGES, probability). None if the caption has fewer than MIN_WORDS words."""
    if len(_WORDS.findall(caption)) < MIN_WORDS:
        return None
    language, score = _identifier().classify(caption)
    return language, round(float(score), 3)


@functools.cache
def _identifier() -> LanguageIdentifier:
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(LANGUAGES)
    return identifier
