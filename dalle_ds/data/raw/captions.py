"""The caption of an image, from the records and texts that data sets of others keep beside it."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from dalle_ds.data.raw.sample import SampleProblem
from dalle_ds.storage.hashing import hash_to_integer
from dalle_ds.storage.text import BYTE_ORDER_MARK, decode_text, lines_of

CAPTION_EXTENSIONS: Final = ("txt", "caption", "captions", "text")  # NAME.txt beside NAME.jpg; the first that exists
CAPTION_FIELDS: Final = ("caption", "text")  # in any case: LAION writes TEXT


class CaptionProblem(SampleProblem):
    """An image has no usable caption."""


def field_of(record: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The first value of a record that is not None, by name; upper and lower case are equal if the exact name is missing."""
    for name in names:
        found = [record[name]] if name in record else [value for key, value in record.items() if str(key).lower() == name]
        if found and found[0] is not None:
            return found[0]
    return None


def draw_caption(captions: Iterable[str], key: str) -> str:
    """One of an image's captions, drawn by its key, so that any machine draws the same. Empty captions are not drawn."""
    clean = [caption.strip().strip(BYTE_ORDER_MARK).strip() for caption in captions]
    filled = [caption for caption in clean if caption]
    if len(filled) > 1:
        return filled[hash_to_integer(f"caption:{key}") % len(filled)]
    return filled[0] if filled else ""


def captions_in(value: Any) -> list[str]:
    """The captions of a field: a text is one caption, a list of texts is several, and None is none.

    Raises:
        CaptionProblem: "unreadable caption", if the value is of another type.
    """
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(caption, str) for caption in values):
        raise CaptionProblem("unreadable caption")
    return values


def group_in(record: Mapping[str, Any]) -> str:
    """The group of a record; a number becomes text. Empty if there is none.

    Raises:
        CaptionProblem: "unreadable caption", if the value is of another type.
    """
    value = field_of(record, ("group",))
    if not isinstance(value, str | int | None):
        raise CaptionProblem("unreadable caption")
    return "" if value is None else str(value)


def caption_beside(key: str, record: bytes | None, texts: Iterable[bytes], errors: str = "strict") -> tuple[str, str]:
    """Caption and group of an image, from the .json and the texts beside it.

    The record's caption comes first. If it has none, an empty or an unreadable one, each line of the texts is a caption. Of
    several captions one is drawn.

    Raises:
        CaptionProblem: "no caption", or "unreadable caption": neither JSON nor UTF-8, or a value that is no text.
    """
    texts = list(texts)
    captions: list[str] = []
    group = key
    try:
        captions, group = _captions_of(record, key) if record is not None else ([], key)
    except CaptionProblem:
        if not texts:
            raise
    if not any(map(str.strip, captions)):  # img2dataset's json may lack the caption, which is then in the txt
        try:
            captions += [line for text in texts for line in lines_of(decode_text(text, errors)) or [""]]
        except UnicodeDecodeError:
            raise CaptionProblem("unreadable caption") from None
    if not captions:
        raise CaptionProblem("no caption")
    return draw_caption(captions, key), group


def _captions_of(data: bytes, key: str) -> tuple[list[str], str]:
    try:
        record = json.loads(data)
        captions, group = captions_in(field_of(record, CAPTION_FIELDS)), group_in(record) or key
        "".join([*captions, group]).encode()  # raises on an unpaired surrogate: JSON can express it, UTF-8 cannot
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise CaptionProblem("unreadable caption") from None
    return captions, group
