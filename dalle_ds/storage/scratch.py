"""Temporary folders below TMPDIR. A killed process leaves its own; later processes remove those that are old."""

import functools
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

PREFIX: Final = "dalle-ds-"
OLD_SECONDS: Final = 24 * 3600  # no process keeps a temporary file unchanged for this time


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yields a new folder below TMPDIR, which is removed at the end of the block."""
    _remove_old_once()
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
        yield Path(folder)


def remove_old_scratch() -> tuple[int, int]:
    """Remove this user's scratch folders in which nothing changed for a day. Returns their number and bytes, and logs them."""
    n_removed = n_bytes = 0
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # another process removes it at the same time
            if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.getuid():
                continue
            found = [folder.lstat(), *(file.lstat() for file in folder.rglob("*"))]
            if time.time() - max(stat.st_mtime for stat in found) < OLD_SECONDS:
                continue
            shutil.rmtree(folder)
            n_removed += 1
            n_bytes += sum(stat.st_size for stat in found[1:])
    if n_removed:
        log.info("%s: removed %d temporary folders of killed processes, %d bytes", tempfile.gettempdir(), n_removed, n_bytes)
    return n_removed, n_bytes


@functools.cache
def _remove_old_once() -> None:
    remove_old_scratch()
