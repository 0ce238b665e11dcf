"""Read text that people or other programs wrote: byte order marks, lines that end at a line feed."""

import codecs
import json
from typing import Any, Final

# UTF-16 is what Notepad calls Unicode, and what PowerShell writes with `>`.
_UTF16_MARKS: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
BYTE_ORDER_MARK: Final = "\ufeff"


def encoding_of(start: bytes) -> str:
    """The encoding of a text that starts with these bytes: UTF-8 unless it has the byte order mark of UTF-16."""
    return "utf-16" if start.startswith(_UTF16_MARKS) else "utf-8-sig"


def decode_text(data: bytes, errors: str = "strict") -> str:
    """Decode UTF-8, or UTF-16 with a byte order mark. A byte order mark at the start is removed.

    Raises:
        UnicodeDecodeError: the bytes are in neither encoding, and `errors` is "strict".
    """
    return data.decode(encoding_of(data), errors)


def parse_json(data: str | bytes) -> Any:
    """Parse JSON that may be damaged or hostile.

    Raises:
        ValueError: it is not JSON, or is nested too deep.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None


def lines_of(text: str) -> list[str]:
    """Split a text at line feeds, and remove a carriage return before each.

    `str.splitlines` also splits at U+2028, U+0085 and others, which captions and JSON strings may contain.
    """
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []
