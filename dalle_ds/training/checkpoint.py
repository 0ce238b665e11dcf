"""Checkpoints on a disk or s3://: written in the background, then committed. Before use they are verified, and if the newest
one is damaged, the one before it is used.

update_00000500/3f2a.../state-*.safetensors ...   files of the ranks; each save attempt has its own folder
update_00000500/checkpoint.json                   the commit, written last, with size and SHA-256 of every file; readers use
                                                  only the files that it lists
"""

import hashlib
import logging
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, Literal, TypeVar

from dalle_ds.errors import DataError, UserError
from dalle_ds.parallel.ranks import Ranks
from dalle_ds.storage import objects
from dalle_ds.storage.record import OtherFormat, Record, read_record

log = logging.getLogger(__name__)

COMMIT_FILE = "checkpoint.json"
HASHED_AT_ONCE = 64 << 20

T = TypeVar("T")
About = TypeVar("About", bound=Record)


class StoredFile(Record):
    bytes: int
    sha256: str


Files = dict[str, StoredFile]
"""Files by their path relative to the checkpoint folder."""


class CheckpointRecord(Record, Generic[About]):
    """Content of checkpoint.json."""

    format: Literal[2]
    update: int
    world_size: int
    """Number of ranks that wrote it."""
    attempt: str
    """Folder of the ranks' files."""
    about: About
    """The trainer's description of the run. Readers get it without opening the tensors."""
    files: Files


@dataclass(frozen=True)
class Checkpoint(Generic[About]):
    """A committed checkpoint."""

    url: str
    record: CheckpointRecord[About]

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]

    @property
    def update(self) -> int:
        return self.record.update

    @property
    def about(self) -> About:
        return self.record.about

    @property
    def data(self) -> str:
        """Folder of the ranks' files."""
        return objects.join(self.url, self.record.attempt)


class CheckpointStore(Generic[About]):
    """The checkpoints of one run. All ranks must call every method that takes `ranks` together."""

    def __init__(self, url: str | Path, about: type[About], keep: int) -> None:
        """Use the checkpoints at `url`; the folder is created by the first save.

        Args:
            url: a path on a file system that all ranks share, or an s3:// url.
            about: record class of the run's description in checkpoint.json.
            keep: number of newest checkpoints to retain.
        """
        self.url, self.keep = str(url), keep
        self._record_class = CheckpointRecord[about]  # type: ignore[valid-type]
        self._open: _Save[About] | None = None
        self._passed_over: set[str] = set()
        """Names of checkpoints that `newest` found damaged."""

    def committed(self) -> list[str]:
        """Names of committed checkpoints, oldest first."""
        found = [url.split("/")[-2:] for url in objects.list_files(self.url, COMMIT_FILE)]
        return sorted(name for name, file in found if name.startswith("update_") and file == COMMIT_FILE)

    # ---- writing ---------------------------------------------------------------------------------------------------------

    def begin(self, update: int, write: Callable[[Path], None], about: About, ranks: Ranks, background: bool = False) -> None:
        """Start a save: every rank calls `write(folder)` with an empty local folder. `finish` commits the files written there.

        Args:
            write: must not communicate with other ranks. With `background` it runs in a thread while training continues.
            about: description of the run for checkpoint.json.
        """
        self.finish(ranks)
        attempt = ranks.from_main(uuid.uuid4().hex[:12])
        self._open = _Save(update, attempt, about, partial(self._write, update, attempt, write, ranks.rank))
        if background:
            self._open.start()
        else:
            self._open.run()

    @property
    def is_open(self) -> bool:
        """Whether `finish` has not yet committed a save. Same on every rank."""
        return self._open is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still writing its files."""
        return self._open is not None and self._open.is_alive()

    def finish(self, ranks: Ranks) -> None:
        """Wait for the open save, if any, and commit it.

        Raises:
            UserError: a rank could not write its files. Raised on all ranks; nothing is committed.
        """
        if self._open is None:
            return
        save, self._open = self._open, None
        try:
            files = _of_all(ranks, save.result)
            _of_all(ranks, lambda: self._commit(save, files) if ranks.is_main else None)
        except UserError as error:
            raise UserError(f"the checkpoint of update {save.update} could not be written to {self.url}: {error}") from None

    def _write(self, update: int, attempt: str, write: Callable[[Path], None], rank: int) -> Files:
        data, files = objects.join(self.url, _name(update), attempt), {}
        with _folder_of(data, rank) as folder:
            write(folder)
            for path in sorted(folder.iterdir()):
                size = path.stat().st_size
                files[f"{attempt}/{path.name}"] = StoredFile(bytes=size, sha256=_sha256(str(path), size))
                objects.move_file(path, objects.join(data, path.name))
        return files

    def _commit(self, save: "_Save[About]", files: list[Files]) -> None:
        name = _name(save.update)
        record = self._record_class(
            format=2,
            update=save.update,
            world_size=len(files),
            attempt=save.attempt,
            about=save.about,
            files={path: found for part in files for path, found in part.items()},
        )
        # if an update is saved again, e.g. after falling back to an older checkpoint, the new save replaces the old one
        objects.write_bytes(objects.join(self.url, name, COMMIT_FILE), record.to_json())
        log.info("saved %s", objects.join(self.url, name))
        # damaged checkpoints do not count towards `keep`: otherwise they would displace the sound ones to fall back to
        self._passed_over.discard(name)
        sound = [found for found in self.committed() if found <= name and found not in self._passed_over]
        for old in sound[: -self.keep]:
            objects.delete(objects.join(self.url, old, COMMIT_FILE))  # first: half a checkpoint must not count as committed
        self._sweep()

    def _sweep(self) -> None:
        """Delete files that no commit lists: of old or replaced checkpoints and of killed saves."""
        committed, attempts = self.committed(), {}
        for url in objects.list_files(self.url):
            name, *rest = url.removeprefix(objects.join(self.url, "")).split("/")
            if name.startswith("update_"):
                attempts.setdefault(name, set()).update(rest[:-1][:1])
        for name in attempts.keys() - committed:
            objects.delete_tree(objects.join(self.url, name))
        for name in committed:
            with suppress(DataError):  # a damaged checkpoint.json: its files are kept for inspection
                for attempt in attempts[name] - {self._read(name).record.attempt}:
                    objects.delete_tree(objects.join(self.url, name, attempt))

    # ---- reading ---------------------------------------------------------------------------------------------------------

    def newest(self, ranks: Ranks) -> Checkpoint[About] | None:
        """Return the newest checkpoint whose files all have the size and SHA-256 of the commit. None if there is no checkpoint.

        A damaged checkpoint is skipped, with an error in the log.

        Raises:
            DataError: there are checkpoints, but all are damaged.
            UserError: the checkpoints cannot be listed or read.
        """
        try:
            candidates = _of_all(ranks, lambda: self.committed()[::-1] if ranks.is_main else [])[0]
        except UserError as error:
            raise UserError(f"checkpoints in {self.url} cannot be listed: {error}") from None
        for name in candidates:
            url = objects.join(self.url, name)
            # all ranks take the same checkpoint, even if only one of them can see the damage
            problem = next(filter(None, _of_all(ranks, partial(self._damage, name, ranks))), None)
            if problem is None:
                return self._read(name)
            self._passed_over.add(name)
            if ranks.is_main:
                log.error("checkpoint %s is DAMAGED and skipped: %s", url, problem)
        if candidates:
            raise DataError(
                f"all {len(candidates)} checkpoints in {self.url} are damaged; move the folder away to start a new run"
            )
        return None

    def find(self, name: str | None) -> Checkpoint[About]:
        """Return checkpoint `name`, or the newest if None. Its files are not verified. Raises DataError if there is none."""
        names = self.committed()
        if not names:
            raise DataError(f"{self.url} has no committed checkpoint; `deepspeed launchers/train_prior.sh` writes checkpoints")
        if name is not None and name not in names:
            raise DataError(f"{self.url} has no checkpoint {name!r}, expected one of {', '.join(names)}")
        return self._read(name or names[-1])

    def _read(self, name: str) -> Checkpoint[About]:
        """Raises DataError if the checkpoint.json is missing or damaged."""
        url = objects.join(self.url, name)
        return Checkpoint(url, read_record(self._record_class, objects.join(url, COMMIT_FILE)))

    def _damage(self, name: str, ranks: Ranks) -> str | None:
        """Verify this rank's part of the files. Returns the first problem, or None if there is none."""
        try:
            checkpoint = self._read(name)
        except OtherFormat:  # not damage: falling back to an older checkpoint would lose the updates of this one
            raise
        except DataError as error:
            return str(error)
        files = checkpoint.record.files
        for file in sorted(files)[ranks.rank :: ranks.world_size]:
            url, expected = objects.join(checkpoint.url, file), files[file]
            try:
                size = objects.size(url)
                if size != expected.bytes:
                    return f"{file} has {size} bytes, expected {expected.bytes}"
                if _sha256(url, size) != expected.sha256:
                    return f"{file} has changed since it was written (SHA-256 differs)"
            except FileNotFoundError:
                return f"{file} is missing"
        return None

    def check_disk_space(self, n_bytes: float, ranks: Ranks) -> None:
        """Call before training. Checks that every rank can write and that checkpoints of `n_bytes` fit on the disk.

        Deletes the leftovers of killed saves.

        Raises:
            UserError: a check failed. Raised on all ranks.
        """
        seen = objects.join(self.url, "probe")

        def prepare() -> None:
            self._sweep()
            self._require_free(n_bytes)
            objects.write_bytes(seen, b"")

        def write() -> None:
            own = f"{seen}-{ranks.rank}"
            objects.write_bytes(own, b"")
            objects.delete(own)
            if not objects.exists(seen):
                raise UserError("a file written by rank 0 is missing: the folder is not on a file system that all ranks share")

        try:
            _of_all(ranks, lambda: prepare() if ranks.is_main else None)
            _of_all(ranks, write)
        except UserError as error:
            raise UserError(f"checkpoints cannot be written to {self.url}: {error}") from None
        if ranks.is_main:
            objects.delete(seen)

    def _require_free(self, n_bytes: float) -> None:
        # one more than `keep`: the new checkpoint is complete before the oldest is deleted
        needed = n_bytes * max(1, self.keep + 1 - len(self.committed()))
        what = f"checkpoints of {n_bytes / 2**30:.2f} GiB, {self.keep} kept while the next is written"
        objects.check_disk_space(self.url, needed, what)


class _Save(threading.Thread, Generic[About]):
    """A rank's part of a save. A daemon thread, so that a job that ends with an error does not wait for it."""

    def __init__(self, update: int, attempt: str, about: About, work: Callable[[], Files]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.update, self.attempt, self.about = update, attempt, about
        self._work, self._files, self._problem = work, {}, ""

    def run(self) -> None:
        try:
            self._files = self._work()
        except Exception as error:  # `result` raises it, in the caller's thread
            self._problem = f"{type(error).__name__}: {error}"

    def result(self) -> Files:
        """Wait for the end of the write. Returns the files. Raises UserError if the write failed."""
        if self.ident is not None:
            self.join()
        if self._problem:
            raise UserError(self._problem)
        return self._files


def _name(update: int) -> str:
    return f"update_{update:08d}"


@contextmanager
def _folder_of(data: str, rank: int) -> Iterator[Path]:
    """Yields an empty local folder for a rank's files. If `data` is a path, the folder is on the same disk."""
    local = objects.local_path(data)
    if local is not None:
        local.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"rank-{rank:05d}-", dir=local) as folder:
        yield Path(folder)


def _of_all(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """Run `work` on every rank. Returns the results in rank order, on every rank. If one rank fails, all raise UserError."""
    try:
        value, problem = work(), None
    except (OSError, UserError) as error:
        value, problem = None, str(error)
    outcomes = ranks.gather_objects((value, problem))
    for rank, (_, problem) in enumerate(outcomes):
        if problem is not None:
            raise UserError(f"rank {rank}: {problem}" if ranks.world_size > 1 else problem)
    return [value for value, _ in outcomes]


def _sha256(url: str, n_bytes: int) -> str:
    digest = hashlib.sha256()
    for start in range(0, n_bytes, HASHED_AT_ONCE):
        digest.update(objects.read_range(url, start, min(HASHED_AT_ONCE, n_bytes - start)))
    return digest.hexdigest()
