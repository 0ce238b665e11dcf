"""Read text that people or other programs wrote: UTF-8 with or without a byte order mark, lines that end at a line feed."""


def decode_text(data: bytes, errors: str = "strict") -> str:
    """Decode UTF-8 and remove a byte order mark at the start.

    Raises:
        UnicodeDecodeError: the bytes are not UTF-8, and `errors` is "strict".
    """
    return data.decode("utf-8-sig", errors)


def lines_of(text: str) -> list[str]:
    """Split a text at line feeds, and remove a carriage return before each.

    `str.splitlines` also splits at U+2028, U+0085 and others, which captions and JSON strings may contain.
    """
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []
