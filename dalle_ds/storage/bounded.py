"""Read a file that a person names, with a bound: a device, a pipe or the wrong file may be endless."""

import errno
from pathlib import Path
from typing import BinaryIO, Final

PIECE_BYTES: Final = 2**20  # Python allocates what a read asks for, before it reads
MAX_TEXT_BYTES: Final = 64 * 2**20  # captions, recipes, JSON and variables that people write


def read_bounded(source: Path | BinaryIO, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """The content of a file, a pipe or standard input.

    Raises:
        OSError: it cannot be read, or (EFBIG) it has more than `max_bytes` bytes.
    """
    if isinstance(source, Path):
        with source.open("rb") as opened:
            return read_bounded(opened, max_bytes)
    data = bytearray()
    while piece := source.read(PIECE_BYTES):
        data += piece
        if len(data) > max_bytes:
            raise OSError(errno.EFBIG, f"has more than {max_bytes} bytes")
    return bytes(data)
