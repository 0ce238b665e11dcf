"""One job at a time in a folder: a file lock on a disk, a lease on s3://."""

import fcntl
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from dalle_ds.errors import UserError
from dalle_ds.storage import objects

log = logging.getLogger(__name__)

WAIT_SECONDS = 60.0
"""Seconds to wait for the holder of a file lock: a run that was asked to stop still saves."""
LEASE_FOLDER = "lock"
BEAT_SECONDS = 10.0
SPARE_SECONDS = 30.0
EXPIRY_BEATS = 6
"""Beats that must be missing before another job takes a lease over: a minute, in which a store may be away and return."""


def lock_folder(url: str | Path, on_lost: Callable[[str], object]) -> "RunLock | Lease":
    """The lock of a folder, as a context manager.

    Args:
        on_lost: called with the reason, in another thread, if another job takes the folder over. Possible on s3:// only.
    """
    path = objects.local_path(url)
    return Lease(str(url), on_lost) if path is None else RunLock(path)


class RunLock:
    """Lets only one process at a time work in a folder. The advisory lock (flock) ends with its process, also after a crash.

    Raises:
        UserError: the folder is still in use after `wait_seconds`. Names the holder. Or the folder cannot be written.
    """

    def __init__(self, folder: Path, wait_seconds: float | None = None) -> None:
        """`wait_seconds`: None: WAIT_SECONDS."""
        self._path = folder / ".lock"
        self._wait_seconds = WAIT_SECONDS if wait_seconds is None else wait_seconds

    def __enter__(self) -> "RunLock":
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+")
        except OSError as error:
            raise UserError(f"{self._path.parent} cannot be written: {error.strerror or error}") from None
        deadline = time.monotonic() + self._wait_seconds
        told = False
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = self._holder()
                if time.monotonic() > deadline:
                    raise _in_use(self._path.parent, holder) from None
                if not told:
                    log.info("%s is in use by %s; waiting up to %.0f s", self._path.parent, holder, self._wait_seconds)
                    told = True
                time.sleep(0.5)
        self._file.truncate(0)
        self._file.write(json.dumps({"pid": os.getpid(), "host": os.uname().nodename}))
        self._file.flush()
        return self

    def require(self) -> None:
        """Raises UserError if the lock is lost. A file lock never is."""

    def _holder(self) -> str:
        self._file.seek(0)
        return self._file.read() or "another process"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()


class Lease:
    """Lets only one process at a time work below an s3:// url.

    FOLDER/lock/NNNNNNNN.json is the lease of the holder, which writes it again with every beat. Another process takes over by
    creating the next number, which only one can (`create_exclusive`): at once if the lease is released or its process, on the
    same machine, has ended; otherwise after EXPIRY_BEATS beats without a change. The holder notices at its next beat, or
    before its next commit (`require`), that a higher number exists.

    Raises:
        UserError: the folder is still in use after `wait_seconds`. Names the holder. Or the store refuses.
    """

    def __init__(
        self, url: str, on_lost: Callable[[str], object], wait_seconds: float | None = None, beat_seconds: float | None = None
    ) -> None:
        """`wait_seconds`: None: SPARE_SECONDS longer than a lease without beats lasts. `beat_seconds`: None: BEAT_SECONDS."""
        self._url, self._on_lost = url, on_lost
        self._beat_seconds = BEAT_SECONDS if beat_seconds is None else beat_seconds
        self._expiry_seconds = EXPIRY_BEATS * self._beat_seconds
        self._wait_seconds = self._expiry_seconds + SPARE_SECONDS if wait_seconds is None else wait_seconds
        self._number, self._n_beats, self._owner = 0, 0, uuid.uuid4().hex
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        try:
            self._acquire()
        except OSError as error:
            raise UserError(f"{self._url} cannot be locked: {error}") from None
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join(10)  # a store that is away must not hold up the end: the lease expires

    def require(self) -> None:
        """Raises UserError if another process has taken over."""
        newest = self._newest()
        if newest != self._number:
            holder = _told(self._read(newest))
            raise UserError(f"{self._url} was taken over by {holder}, because this job did not answer: it ends here")

    def _acquire(self) -> None:
        deadline, told, seen, since = time.monotonic() + self._wait_seconds, False, None, time.monotonic()
        while True:
            newest = self._newest()
            holder = self._read(newest)
            if holder != seen:
                seen, since = holder, time.monotonic()
            has_expired = time.monotonic() - since > self._expiry_seconds
            if (holder is None or holder.get("released") or _has_ended(holder) or has_expired) and self._take(newest + 1):
                return
            if time.monotonic() > deadline:
                raise _in_use(self._url, _told(holder))
            if not told:
                log.info("%s is in use by %s; waiting up to %.0f s", self._url, _told(holder), self._wait_seconds)
                told = True
            self._done.wait(min(1.0, self._beat_seconds / 4))

    def _take(self, number: int) -> bool:
        self._number = number
        if not objects.create_exclusive(self._lease_url(number), self._content()):
            return False
        if self._newest() != number:  # the listing was old: the number had been used and deleted in the meantime
            objects.delete(self._lease_url(number))
            return False
        for url in objects.list_files(objects.join(self._url, LEASE_FOLDER)):
            if _number_of(url) < number:
                objects.delete(url)
        return True

    def _beat(self) -> None:
        while not self._done.wait(self._beat_seconds):
            try:
                self.require()
                self._n_beats += 1
                objects.write_bytes(self._lease_url(self._number), self._content())
            except UserError as error:
                if self._newest_or_none() not in (None, self._number):
                    log.error("%s", error)
                    self._on_lost(str(error))
                    return
            except OSError as error:
                log.warning("the lock of %s could not be renewed: %s", self._url, error)
        with suppress(UserError, OSError):
            self.require()
            objects.write_bytes(self._lease_url(self._number), self._content(released=True))

    def _newest_or_none(self) -> int | None:
        with suppress(UserError, OSError):
            return self._newest()
        return None

    def _content(self, released: bool = False) -> bytes:
        return json.dumps({**_this_process(), "owner": self._owner, "beats": self._n_beats, "released": released}).encode()

    def _newest(self) -> int:
        """The highest number of a lease. 0 if there is none."""
        return max(map(_number_of, objects.list_files(objects.join(self._url, LEASE_FOLDER), ".json")), default=0)

    def _read(self, number: int) -> dict[str, Any] | None:
        try:
            holder = json.loads(objects.read_bytes(self._lease_url(number)))
        except FileNotFoundError:
            return None
        except ValueError:
            holder = None
        return holder if isinstance(holder, dict) else {}  # a damaged lease expires

    def _lease_url(self, number: int) -> str:
        return objects.join(self._url, LEASE_FOLDER, f"{number:08d}.json")


def _in_use(folder: str | Path, holder: str) -> UserError:
    return UserError(f"{folder} is in use by {holder}: wait for it to end, or stop it")


def _told(holder: dict[str, Any] | None) -> str:
    holder = holder or {}
    return f"process {holder.get('pid', '?')} on {holder.get('host', 'another machine')}"


def _number_of(url: str) -> int:
    name = url.rsplit("/", 1)[1].removesuffix(".json")
    return int(name) if name.isdecimal() else 0


def _this_process() -> dict[str, Any]:
    """What names a process of this machine: process ids are only valid in one container and until the next boot."""
    namespace, boot = Path("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": os.uname().nodename,
        "machine": f"{boot.read_text().strip()} {namespace.readlink()}" if boot.exists() and namespace.exists() else None,
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def _has_ended(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended. False if that cannot be known."""
    machine = _this_process()["machine"]
    if machine is None or holder.get("machine") != machine or not isinstance(holder.get("pid"), int):
        return False
    try:
        process = psutil.Process(holder["pid"])
        return process.create_time() != holder.get("started") or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False
