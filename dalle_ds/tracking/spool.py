"""A queue of JSON records on disk that survives SIGKILL: after a restart, unacknowledged records are read again."""

import fcntl
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle_ds.errors import DataError
from dalle_ds.storage.atomic import atomic_write
from dalle_ds.storage.record import seal, unseal

SEGMENT = re.compile(r"([0-9]{8,})\.jsonl", re.ASCII)
SEGMENT_BYTES = 8 << 20  # acknowledged segments are deleted: a run of 430,000 updates does not keep gigabytes of records


@dataclass(frozen=True)
class Position:
    """All records before byte `offset` of segment `segment` are acknowledged."""

    segment: int = 0
    offset: int = 0


class Spool:
    """A queue with any number of appending processes and one reader at a time, which holds a file lock.

    Files: NNNNNNNN.jsonl (segments), position.json, lock. Each process appends to new segments of its own and locks its
    segment for as long as it may append. A line torn by SIGKILL is therefore always the last of its segment, where it is
    ignored. Readers never read past a locked segment.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._writing: int | None = None
        self._file: int | None = None
        self._written = 0
        self._lock: int | None = None

    def append(self, record: dict[str, Any]) -> None:
        """Append a record as one line, in one write. Raises OSError if it cannot be written."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        if self._file is None or self._written > SEGMENT_BYTES:
            self._open_segment()
        written = os.write(self._file, line)  # type: ignore[arg-type]
        self._written += written
        if written != len(line):  # the disk is full: start a new segment, so that no record is appended to the torn line
            os.close(self._file)  # type: ignore[arg-type]
            self._file = None
            raise OSError(f"only {written} of {len(line)} bytes of a tracking record could be written to {self.folder}")

    def lock(self) -> bool:
        """Become the reader. Returns False if another process is the reader."""
        if self._lock is None:
            handle = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(handle)
                return False
            self._lock = handle
        return True

    def read(self, limit: int) -> tuple[list[dict[str, Any]], Position]:
        """Read at most `limit` records after the acknowledged position.

        Returns:
            The records, and the position to acknowledge once they are delivered.
        """
        position = self._position()
        segment, offset = position.segment, position.offset
        records: list[dict[str, Any]] = []
        segments = [number for number in self._segments() if number >= segment]
        for number in segments:
            if number != segment:
                segment, offset = number, 0
            with open(self._path(number), "rb") as file:
                file.seek(offset)
                while len(records) < limit:
                    line = file.readline()
                    if not line.endswith(b"\n"):
                        break  # the end of the file, a line torn by a kill, or a line being written, which is read next time
                    offset += len(line)
                    try:
                        records.append(json.loads(line))
                    except ValueError:
                        continue  # a damaged line must not block the records after it
                if len(records) >= limit or number == self._writing or _is_held(file.fileno()):
                    break
        return records, Position(segment, offset)

    def acknowledge(self, position: Position) -> None:
        """Store the position, then delete the segments before it."""
        with atomic_write(self.folder / "position.json", one_writer=True) as temporary:
            temporary.write_bytes(seal({"segment": position.segment, "offset": position.offset}))
        for number in self._segments():
            if number < position.segment and number != self._writing:
                self._path(number).unlink(missing_ok=True)

    def n_waiting(self) -> int:
        """Number of records that are not yet acknowledged."""
        return len(self.read(limit=1 << 60)[0])

    def close(self) -> None:
        """Close the files and release the locks. Unacknowledged records stay on disk."""
        for handle in (self._file, self._lock):
            if handle is not None:
                os.close(handle)
        self._file = self._lock = self._writing = None

    def _open_segment(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
        number = max([self._position().segment, *self._segments()], default=0) + 1
        while True:
            try:
                flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
                self._file = os.open(self._path(number), flags, 0o644)
                break
            except FileExistsError:  # another process created this segment in the meantime
                number += 1
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until this process closes it or ends
        self._writing, self._written = number, 0

    def _segments(self) -> list[int]:
        found = (SEGMENT.fullmatch(path.name) for path in self.folder.iterdir())  # others may put files here, such as copies
        return sorted(int(name[1]) for name in found if name)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.jsonl"

    def _position(self) -> Position:
        try:
            file = self.folder / "position.json"
            tree = unseal(file.read_bytes(), file)
            return Position(int(tree["segment"]), int(tree["offset"]))
        except (OSError, ValueError, KeyError, TypeError, DataError):
            return Position()  # of a damaged position: records are sent again, and none is skipped


def _is_held(handle: int) -> bool:
    """Whether a process still holds the lock of this segment and may append to it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return False
