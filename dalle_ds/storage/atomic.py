"""Atomic writes to a local disk: a kill or power failure leaves the old or the new file, never a partial one."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path, *, one_writer: bool = False) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`, to be written in the `with` block.

    At the end of the block, the file is synced to disk and replaces `path`. After an error, `path` is unchanged and the
    temporary file is deleted.

    Args:
        one_writer: True if no other process writes `path` at the same time (as under a lock). The temporary file then has a
            fixed name, so that the next write replaces the temporary file of a killed process.

    Raises:
        FileNotFoundError: the block did not write the file.
        OSError: writing to disk failed.
    """
    with temporary_beside(path, one_writer=one_writer) as temporary:
        yield temporary
        sync_file(temporary)
        temporary.replace(path)


@contextmanager
def temporary_beside(path: Path, *, one_writer: bool = False) -> Iterator[Path]:
    """Yields an unused path in the folder of `path`, on the same disk. Deletes a file at this path at the end of the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = "" if one_writer else f"{uuid.uuid4().hex[:12]}."
    temporary = path.parent / f".{path.name}.{unique}part"  # hidden: listings skip it
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Sync the file's content to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
