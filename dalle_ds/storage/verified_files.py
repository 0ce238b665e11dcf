"""Files whose size and SHA-256 are known: read once, in pieces, and verified while they are read."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from pydantic import Field

from dalle_ds.errors import Damaged
from dalle_ds.storage import objects
from dalle_ds.storage.record import Record

REQUEST_BYTES, DISK_BYTES = 64 << 20, 2 << 20
"""Sizes of a piece from s3://, which is one GET, and from a disk. Memory holds two pieces, and a third while it arrives."""


class CommittedFile(Record):
    """Size and SHA-256 of a file, as a commit lists it."""

    bytes: int = Field(ge=0)
    sha256: str


def pieces(url: str | Path, n_bytes: int, first: int = 0) -> Iterator[bytearray]:
    """Yields the first `n_bytes` of an object in order. A thread reads the next piece while the caller uses the last one.

    Args:
        first: size of the first piece, for callers who may stop after it: nothing is read ahead meanwhile. 0: like the others.

    Raises:
        FileNotFoundError: there is no such object.
        Damaged: the object is shorter.
        DataError: storage was unreachable for DALLE_DS_RETRY_SECONDS.
    """
    path = objects.local_path(url)
    size = REQUEST_BYTES if path is None else DISK_BYTES
    with ExitStack() as stack:
        file = stack.enter_context(path.open("rb")) if path is not None else None

        def read(start: int, length: int) -> bytearray:
            piece = bytearray(min(length, n_bytes - start))
            if file is None:
                objects.read_into(url, start, memoryview(piece))
            elif (n := file.readinto(piece)) != len(piece):
                raise Damaged(f"{url} has {start + n} bytes, expected {n_bytes}; the file is truncated")
            return piece

        if first:
            yield read(0, first)
        pool = stack.enter_context(ThreadPoolExecutor(1, "read ahead"))  # starts no thread for a single piece
        ahead = None
        for start in range(first, n_bytes, size):
            piece = ahead.result() if ahead else read(start, size)
            ahead = pool.submit(read, start + size, size) if start + size < n_bytes else None
            yield piece
            del piece


def verified_pieces(url: str | Path, file: CommittedFile, first: int = 0) -> Iterator[bytearray]:
    """Like `pieces`. After the last piece, raises Damaged if the content is not that of `file`."""
    digest = hashlib.sha256()
    for piece in pieces(url, file.bytes, first):
        digest.update(piece)
        yield piece
    if digest.hexdigest() != file.sha256:
        raise Damaged(f"{url} has changed since it was written (SHA-256 differs)")
