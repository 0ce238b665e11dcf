"""The paper's filters (appendix C). Each filter is a small class that returns the reason to drop a sample.

The paper names the filters but not their thresholds, so the thresholds are ours and configurable.
"""

import re
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from PIL import Image

from dalle_ds.data.images import ImageProblem, decode_image
from dalle_ds.data.raw.shards import RawSample
from preprocessing.configs import FilterConfig
from preprocessing.filters.language import language_of

FILTER_RULES: Final = 4  # part of the fingerprint of raw shards: increment it when a filter's decisions change


class Judgement(NamedTuple):
    """The result of all filters: the reason to drop a sample, or None and its decoded image."""

    reason: str | None
    image: Image.Image | None = None


class CaptionFilter(Protocol):
    """Returns the reason to drop a caption. None keeps it."""

    def __call__(self, caption: str) -> str | None: ...


class ImageFilter(Protocol):
    """Returns the reason to drop an image. None keeps it."""

    def __call__(self, image: Image.Image) -> str | None: ...


class EmptyCaption:
    """Drops captions that are empty or contain only whitespace."""

    def __call__(self, caption: str) -> str | None:
        return None if caption.strip() else "empty caption"


class ShortCaption:
    """Drops captions with too few letters (of any alphabet) to describe an image."""

    def __init__(self, min_letters: int) -> None:
        self.min_letters = min_letters

    def __call__(self, caption: str) -> str | None:
        return "short caption" if sum(map(str.isalpha, caption)) < self.min_letters else None


class LongCaption:
    """Drops captions that are too long, such as a whole page or binary data."""

    def __init__(self, max_characters: int) -> None:
        self.max_characters = max_characters

    def __call__(self, caption: str) -> str | None:
        return "long caption" if len(caption) > self.max_characters else None


class DamagedCaption:
    """Drops captions with invalid UTF-8 (decoded as U+FFFD), unpaired surrogates, or control characters."""

    def __call__(self, caption: str) -> str | None:
        is_damaged = any(c == "\ufffd" or "\ud800" <= c <= "\udfff" or (c < " " and c not in "\t\n\r") for c in caption)
        return "damaged caption" if is_damaged else None


_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|sept|oct|nov|dec)[a-z]*\.?"
_DAY = r"(?:mon|tue|tues|wed|thu|thur|thurs|fri|sat|sun)(?:[a-z]*day)?\.?,?"
_NUMBER = r"\d{1,2}(?:st|nd|rd|th)?"
_YEAR = r"(?:'\d\d|\d{4})"
_DATES: Final = re.compile(
    "|".join(
        [
            # Wed Aug 25 23:35:46 2004
            rf"(?:\b{_DAY}\s+)?\b{_MONTH}\s+{_NUMBER}\s+\d{{1,2}}:\d\d(?::\d\d)?\s+(?:[a-z]{{3,4}}\s+)?{_YEAR}",
            rf"(?:\b{_DAY}\s+)?\b{_NUMBER}(?:\s+of)?[\s.-]+{_MONTH}[\s,.-]*{_YEAR}\b",  # 3rd of May, 2004
            rf"(?:\b{_DAY}\s+)?\b{_MONTH}\s*{_NUMBER}(?:\s*,)?\s*{_YEAR}\b",  # May 3, 2004
            rf"\b{_MONTH},?\s+{_YEAR}\b",  # May 2004
            r"\b\d{4}[-/.:]\d{1,2}[-/.:]\d{1,2}(?:t\d\d:\d\d(?::\d\d)?z?)?\b",  # 2004-05-03, 2004-05-03T12:30Z
            r"\b\d{1,2}[-/.]\d{1,2}[-/.](?:\d{4}|\d\d)\b",  # 3.5.2004
            r"\b\d{1,2}:\d\d(?::\d\d)?(?:\s*[ap]\.?m\b\.?)?",  # 12:30:01 pm
        ]
    )
)
_PHRASES: Final = re.compile(
    r"\b(?:(?:photo(?:graph(?:ed)?|s)?|picture|image|shot|snapshot|file)\s+)?"
    r"(?:photographed|taken|uploaded|created|captured|scanned|posted|published|added|modified)(?:\s+(?:on|at|by|in)\b|\s*$)"
    r"|\bphoto(?:graph)?\s+(?:by|of the day)\b|\b(?:stock|royalty[- ]free)\s+(?:photo|image|picture|vector)s?\b"
    r"|\ball rights reserved\b|\bcopyright\s*(?:\(c\)|©|by|\d{4})|\bpart of the [\w\s]{0,40}collection\b"
    r"|\b(?:img|dsc[nf]?|p?10\d|image|picture|untitled|scan)[_ -]?\d{2,}(?:\.(?:jpe?g|png|gif|tiff?))?\b"
)


class Boilerplate:
    """Drops captions that are mainly a date, a camera's file name or a stock phrase, as "photographed on 3 May 2004"."""

    def __init__(self, max_boilerplate: float) -> None:
        self.max_boilerplate = max_boilerplate

    def __call__(self, caption: str) -> str | None:
        text = caption.lower()
        rest = _PHRASES.sub(" ", _DATES.sub(" ", text))
        before, after = (sum(map(str.isalnum, version)) for version in (text, rest))
        return "boilerplate" if before and 1 - after / before > self.max_boilerplate else None


class OtherLanguage:
    """Drops captions in a language other than `language`, if its probability exceeds `max_other`.

    Captions that are too short to classify are kept.
    """

    def __init__(self, language: str, max_other: float) -> None:
        self.language, self.max_other = language, max_other

    def __call__(self, caption: str) -> str | None:
        found = language_of(caption)
        return "other language" if found and found[0] != self.language and found[1] > self.max_other else None


class SmallImage:
    """Drops images with a side under `min_side` pixels."""

    def __init__(self, min_side: int) -> None:
        self.min_side = min_side

    def __call__(self, image: Image.Image) -> str | None:
        return "too small" if min(image.size) < self.min_side else None


class AspectRatio:
    """Drops images that are too wide or too tall: a square crop may cut off the objects that the caption names."""

    def __init__(self, min_aspect: float, max_aspect: float) -> None:
        self.min_aspect, self.max_aspect = min_aspect, max_aspect

    def __call__(self, image: Image.Image) -> str | None:
        return None if self.min_aspect <= image.width / image.height <= self.max_aspect else "aspect ratio"


def caption_filters(config: FilterConfig) -> list[CaptionFilter]:
    """The caption filters in the order in which they apply. The first reason counts."""
    filters: list[CaptionFilter] = [
        EmptyCaption(),
        LongCaption(config.max_characters),
        DamagedCaption(),
        ShortCaption(config.min_letters),
        Boilerplate(config.max_boilerplate),
    ]
    return filters + ([OtherLanguage(config.language, config.max_other_language)] if config.language else [])


def image_filters(config: FilterConfig) -> list[ImageFilter]:
    return [SmallImage(config.min_side), AspectRatio(config.min_aspect, config.max_aspect)]


def judge_caption(caption: str, filters: list[CaptionFilter]) -> str | None:
    """Returns the reason of the first filter that drops the caption. None if all filters keep it."""
    return next(filter(None, (check(caption) for check in filters)), None)


def sample_judge(config: FilterConfig) -> Callable[[RawSample], Judgement]:
    """Returns a function that judges a sample.

    The function checks the caption first, because this needs no image decoding.
    """
    captions, images = caption_filters(config), image_filters(config)

    def judge(sample: RawSample) -> Judgement:
        reason = judge_caption(sample.caption, captions)
        return Judgement(reason) if reason else judge_image(sample.image, images, config.max_pixels)

    return judge


def judge_image(data: bytes, filters: list[ImageFilter], max_pixels: int) -> Judgement:
    """Decodes an image. The reason to drop it is that of `decode_image` or of the first filter."""
    try:
        image = decode_image(data, max_pixels=max_pixels)
    except ImageProblem as problem:
        return Judgement(problem.reason)
    reason = next(filter(None, (check(image) for check in filters)), None)
    return Judgement(reason) if reason else Judgement(None, image)
