"""Reduce a PNG to the chunks that decide its pixels, so that damaged or huge texts, profiles and EXIF do not cost an image."""

import zlib
from collections.abc import Iterator
from typing import Final

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
# IHDR, PLTE, IDAT and IEND are kept as they are: their damage is damage of the pixels. tRNS is the transparency, eXIf may hold
# a rotation: both are kept if their checksum is right.
_CRITICAL: Final = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_KEPT_IF_WHOLE: Final = (b"tRNS", b"eXIf")


def only_pixels(data: bytes) -> bytes:
    """The PNG without text, colour profile, later frames of an animation, and damaged ancillary chunks.

    Bytes that are no PNG, and those behind a damaged critical chunk, stay as they are.
    """
    if not data.startswith(SIGNATURE):
        return data
    return SIGNATURE + b"".join(_pixel_chunks(data))


def _pixel_chunks(data: bytes) -> Iterator[memoryview]:
    view, at = memoryview(data), len(SIGNATURE)
    while at + 8 <= len(data):
        length, name = int.from_bytes(view[at : at + 4]), bytes(view[at + 4 : at + 8])
        end = at + 12 + length
        chunk, checksum = view[at:end], view[end - 4 : end]
        if name in _CRITICAL or not name.isalpha():
            yield chunk  # cut at the end of the file, if it is longer
        elif name in _KEPT_IF_WHOLE and end <= len(data) and zlib.crc32(chunk[4:-4]) == int.from_bytes(checksum):
            yield chunk
        if name == b"IEND":
            return
        at = end
    if at < len(data):
        yield view[at:]
