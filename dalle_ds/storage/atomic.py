"""Atomic writes to a local disk: a kill or a power cut leaves the old file or the new one, never a part."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path, *, one_writer: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path`, to be written within the block. At its end the file goes to the disk and takes the
    place of `path`. After an error `path` is as before and the temporary is gone.

    Args:
        one_writer: nobody else writes `path` at the same time, as under a lock. The temporary then has one name, so that the
            next write replaces what a killed one left behind.

    Raises:
        FileNotFoundError: the block wrote nothing. OSError: the disk refuses the file.
    """
    with temporary_beside(path, one_writer=one_writer) as temporary:
        yield temporary
        sync_file(temporary)
        temporary.replace(path)


@contextmanager
def temporary_beside(path: Path, *, one_writer: bool = False) -> Iterator[Path]:
    """Yields an unused path in the folder of `path`, on the same disk; a file that is left there is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = "" if one_writer else f"{uuid.uuid4().hex[:12]}."
    temporary = path.parent / f".{path.name}.{unique}part"  # hidden: listings leave it out
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Wait until the disk has the file's content."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
