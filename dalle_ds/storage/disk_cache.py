"""Disk cache: pieces of remote objects in a local folder with a size limit, shared by the processes of a machine."""

import fcntl
import hashlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)

KEPT_SHARE = 0.95  # fraction of the capacity that remains after removing pieces, so that the folder is rarely listed
ABANDONED_SECONDS = 3600  # an unfinished file older than this was left by a killed process
_LOCK, _UNFINISHED = ".lock", ".part"


class DiskCache:
    """LRU cache of pieces by name. Many processes may use one folder; each writes one piece at a time.

    A full or failing disk slows a run down but never ends it: it causes one warning, and pieces that are not in the cache are
    read from storage again. The reader must check a piece's content (blocks have a CRC) and call `forget` if it is damaged.

    Args:
        capacity: maximum size of the folder in bytes. Pieces that processes are writing may exceed it.
    """

    def __init__(self, folder: str | Path, capacity: int) -> None:
        self._folder, self._capacity = Path(folder), capacity
        self._writing = threading.Lock()
        self._has_failed = False

    def get(self, name: str) -> bytes | None:
        """Returns the piece and marks it as most recently used. None if it is not in the cache."""
        path = self._path(name)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            return self._failed(error)
        with suppress(OSError):  # meanwhile removed, or owned by another user
            os.utime(path)
        return data

    def put(self, name: str, data: bytes) -> None:
        """Store a piece. If it does not fit, remove the least recently used pieces."""
        if len(data) > self._capacity:
            return
        path = self._path(name)
        unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{_UNFINISHED}")
        with self._writing:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                unfinished.write_bytes(data)  # no fsync: a file damaged by a power failure fails its CRC
                with self._locked() as total:
                    if path.exists():  # another process was first
                        return
                    if total.value + len(data) > self._capacity:
                        total.value = self._make_room(len(data))
                    unfinished.replace(path)
                    total.value += len(data)
            except OSError as error:
                self._failed(error)
            finally:
                self._remove(unfinished)

    def forget(self, name: str) -> None:
        """Remove a damaged piece."""
        self._remove(self._path(name))

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()[:40]
        return self._folder / digest[:2] / digest  # sub-folders, since folders with a million files are slow

    @contextmanager
    def _locked(self) -> Iterator["_Total"]:
        # The lock file contains the total size, so that a write needs no listing. Every listing corrects it.
        with os.fdopen(os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666), "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            text = file.read()
            total = _Total(int(text) if text.isdigit() else self._make_room(0))
            try:
                yield total
            finally:
                file.seek(0)
                file.truncate()
                file.write(str(total.value))

    def _make_room(self, wanted: int) -> int:
        """Remove the least recently used pieces until `wanted` more bytes fit into KEPT_SHARE. Returns the remaining size."""
        found = []
        for path in self._folder.glob("??/*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if not path.name.endswith(_UNFINISHED):
                found.append((status.st_mtime_ns, status.st_size, path))
            elif time.time() - status.st_mtime > ABANDONED_SECONDS:
                self._remove(path)
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total + wanted <= (self._capacity * KEPT_SHARE if wanted else self._capacity):
                break
            self._remove(path)
            total -= size
        return total

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        if not self._has_failed:
            log.warning("cache %s: %s; blocks that cannot be cached are read from storage", self._folder, error)
        self._has_failed = True


class _Total:
    def __init__(self, value: int) -> None:
        self.value = value
