"""Checkpoints on a disk or s3://: written in the background, then committed. Before use they are verified, and if the newest
one is damaged, the one before it is used.

update_00000500/3f2a.../state-*.safetensors ...   files of the ranks; each save attempt has its own folder
update_00000500/checkpoint.json                   the commit, written last, with size and SHA-256 of every file and a digest
                                                  of itself; readers use only the files that it lists
"""

import logging
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, Generic

from dalle_ds.errors import Damaged, DataError, StoreUnreachable, UserError, telling
from dalle_ds.parallel.ranks import Ranks
from dalle_ds.storage import objects
from dalle_ds.storage.hashing import sha256_of_file
from dalle_ds.storage.record import OtherFormat
from dalle_ds.storage.verified_files import CommittedFile
from dalle_ds.training.checkpoint_record import (
    COMMIT_FILE,
    About,
    Checkpoint,
    CheckpointRecord,
    Files,
    damage_of,
    damage_of_sizes,
    is_name,
    name_of,
    read_checkpoint,
)

log = logging.getLogger(__name__)

NO_DAMAGE: Final = (OtherFormat, StoreUnreachable)
"""Errors of reading a checkpoint that may be whole: falling back to an older one would lose its updates."""


class CheckpointStore(Generic[About]):
    """The checkpoints of one run. All ranks must call every method that takes `ranks` together."""

    def __init__(self, url: str | Path, about: type[About], keep: int, update_in: Callable[[str], int] | None = None) -> None:
        """Use the checkpoints at `url`; the folder is created by the first save.

        Args:
            url: a path on a file system that all ranks share, or an s3:// url.
            about: record class of the run's description in checkpoint.json.
            keep: number of newest checkpoints to retain.
            update_in: reads the update from the trainer's state in the folder of the ranks' files. `newest` compares it with
                the commit. May raise DataError, OSError, ValueError, LookupError and TypeError for a damaged state.
        """
        self.url, self.keep = str(url), keep
        self.before_commit: Callable[[], None] = lambda: None
        """Called on the main rank before a commit. Raises UserError if another job uses the folder by now."""
        self._about, self._update_in = about, update_in
        self._open: _Save[About] | None = None
        self._passed_over: set[str] = set()
        """Names of checkpoints that `newest` found damaged."""

    def committed(self) -> list[str]:
        """Names of committed checkpoints, oldest first."""
        found = [url.split("/")[-2:] for url in objects.list_files(self.url, COMMIT_FILE)]
        return sorted(name for name, file in found if is_name(name) and file == COMMIT_FILE)

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
        with telling(f"the checkpoint of update {save.update} could not be written to {self.url}"):
            files = ranks.each(save.result)
            ranks.once(lambda: self._commit(save, files))

    def _write(self, update: int, attempt: str, write: Callable[[Path], None], rank: int) -> Files:
        data, files = objects.join(self.url, name_of(update), attempt), {}
        with _folder_of(data, rank) as folder:
            write(folder)
            for path in sorted(folder.iterdir()):
                size = path.stat().st_size
                files[f"{attempt}/{path.name}"] = CommittedFile(bytes=size, sha256=sha256_of_file(path))
                objects.move_file(path, objects.join(data, path.name))
        return files

    def _commit(self, save: "_Save[About]", files: list[Files]) -> None:
        name = name_of(save.update)
        record = CheckpointRecord[self._about](  # type: ignore[name-defined]
            format=3,
            update=save.update,
            world_size=len(files),
            attempt=save.attempt,
            about=save.about,
            files={path: found for part in files for path, found in part.items()},
        )
        self.before_commit()
        self._require_stored(name, record)
        # if an update is saved again, e.g. after falling back to an older checkpoint, the new save replaces the old one
        objects.write_bytes(objects.join(self.url, name, COMMIT_FILE), record.to_json())
        log.info("saved %s", objects.join(self.url, name))
        # damaged checkpoints do not count towards `keep`: otherwise they would displace the sound ones to fall back to
        self._passed_over.discard(name)
        sound = [found for found in self.committed() if found <= name and found not in self._passed_over]
        for old in sound[: -self.keep]:
            objects.delete(objects.join(self.url, old, COMMIT_FILE))  # first: half a checkpoint must not count as committed
        self._sweep()

    def _require_stored(self, name: str, record: CheckpointRecord[About]) -> None:
        """Raises UserError if a file of a save is gone: committing it would delete an older checkpoint that is whole."""
        found = objects.list_sizes(objects.join(self.url, name, record.attempt))
        for path, file in record.files.items():
            size = found.get(objects.join(self.url, name, path))
            if size != file.bytes:
                raise UserError(
                    f"{name}/{path} was written but {'is gone' if size is None else f'has {size} of {file.bytes} bytes'}: "
                    "does something else delete files in this folder?"
                )

    def _sweep(self) -> None:
        """Delete files that no commit lists: of old or replaced checkpoints and of killed saves."""
        committed, attempts = self.committed(), {}
        for url in objects.list_files(self.url):
            name, *rest = url.removeprefix(objects.join(self.url, "")).split("/")
            if is_name(name):
                attempts.setdefault(name, set()).update(rest[:-1][:1])
        for name in attempts.keys() - committed:
            objects.delete_tree(objects.join(self.url, name))
        for name in committed:
            with suppress(DataError):  # a damaged checkpoint.json: its files are kept for inspection
                for attempt in attempts[name] - {self._read(name).record.attempt}:
                    objects.delete_tree(objects.join(self.url, name, attempt))

    # ---- reading ---------------------------------------------------------------------------------------------------------

    def newest(
        self, ranks: Ranks, load: Callable[[Checkpoint[About]], Iterable[str]] = lambda _: ()
    ) -> Checkpoint[About] | None:
        """Return the newest checkpoint whose files all have the size and SHA-256 of the commit. None if there is no checkpoint.

        A damaged checkpoint is skipped, with an error in the log. Each file is read by one rank, except by `load`.

        Args:
            load: called on all ranks with a checkpoint, until one is whole. Must not communicate with other ranks. Returns the
                files of the commit that it has read and verified, so that they are not read again. Raises Damaged.

        Raises:
            DataError: there are checkpoints, but all are damaged.
            UserError: the checkpoints cannot be listed or read.
        """

        def damage_in(checkpoint: Checkpoint[About]) -> str | None:
            outcomes = ranks.each(partial(_outcome, partial(load, checkpoint)))
            problem = next((problem for problem, _ in outcomes if problem), None)
            if problem is None:
                rest = sorted(checkpoint.record.files.keys() - {file for _, verified in outcomes for file in verified})
                own = rest[ranks.rank :: ranks.world_size]
                check = partial(_first_problem, checkpoint, own)
                problem = next(filter(None, ranks.each(check) if rest else []), None)
            return problem

        return self._first(ranks, damage_in)

    def candidate(self, ranks: Ranks) -> Checkpoint[About] | None:
        """Return the checkpoint that `newest` tries first: its commit is undamaged, its files have the right sizes, and its
        state is of the right update. Raises like `newest`."""
        return self._first(ranks, lambda _: None)

    def _first(self, ranks: Ranks, damage: Callable[[Checkpoint[About]], str | None]) -> Checkpoint[About] | None:
        """The newest checkpoint in which neither the main rank's first look nor `damage` finds a problem. The main rank reads,
        and the others get what it has read."""
        with telling(f"checkpoints in {self.url} cannot be listed"):
            names = ranks.once(self.committed)[::-1]
        for name in names:
            with telling(f"checkpoint {objects.join(self.url, name)} cannot be read"):
                record, problem = ranks.once(partial(self._opened, name))
            if problem is None:
                commit = CheckpointRecord[self._about].model_validate_json(record)  # type: ignore[name-defined]
                checkpoint = Checkpoint(objects.join(self.url, name), commit)
                # all ranks take the same checkpoint, even if only one of them can see the damage
                problem = damage(checkpoint)
                if problem is None:
                    return checkpoint
            self._passed_over.add(name)
            if ranks.is_main:
                log.error("checkpoint %s is DAMAGED and skipped: %s", objects.join(self.url, name), problem)
        if names:
            raise DataError(f"all {len(names)} checkpoints in {self.url} are damaged; move the folder away to start a new run")
        return None

    def find(self, name: str | None) -> Checkpoint[About]:
        """Return checkpoint `name`, or the newest if None. `require_whole` verifies its files. Raises DataError if there is
        none."""
        names = self.committed()
        if not names:
            folder = objects.local_path(self.url)
            if folder is not None and not folder.exists():
                raise DataError(f"{self.url}: no such folder; expected the checkpoints of a run, such as runs/demo/prior")
            raise DataError(f"{self.url} has no committed checkpoint; `deepspeed launchers/train_prior.sh` writes checkpoints")
        if name is not None and name not in names:
            raise DataError(f"{self.url} has no checkpoint {name!r}, expected one of {', '.join(names)}")
        return self._read(name or names[-1])

    def require_whole(self, checkpoint: Checkpoint[About], files: Iterable[str]) -> None:
        """Verify the sizes of all files of a checkpoint, and the contents of some, by their names in the ranks' folder.

        Raises:
            DataError: a file has changed or is missing.
        """
        problem = damage_of_sizes(checkpoint, objects.list_sizes(checkpoint.data), checkpoint.record.files)
        problem = problem or _first_problem(checkpoint, [f"{checkpoint.record.attempt}/{name}" for name in files])
        if problem is not None:
            raise self.refusal(checkpoint, problem)

    def refusal(self, checkpoint: Checkpoint[About], problem: str) -> DataError:
        """The error to raise for a damaged checkpoint that was asked for. It names the others."""
        others = [name for name in self.committed() if name != checkpoint.name]
        return DataError(f"checkpoint {checkpoint.url} is damaged: {problem}; other checkpoints: {', '.join(others) or 'none'}")

    def _read(self, name: str) -> Checkpoint[About]:
        """Raises DataError if the checkpoint.json is missing or damaged."""
        return read_checkpoint(objects.join(self.url, name), self._about)

    def _opened(self, name: str) -> tuple[bytes, str | None]:
        """The commit of a checkpoint, and the first problem of the commit, of the sizes of its files, and of its state."""
        try:
            checkpoint = self._read(name)
        except NO_DAMAGE:
            raise
        except DataError as error:
            return b"", str(error)
        files = checkpoint.record.files
        if not files:
            return b"", f"{COMMIT_FILE} lists no files"
        problem = damage_of_sizes(checkpoint, objects.list_sizes(checkpoint.data), files)
        return checkpoint.record.to_json(), problem or self._damage_of_state(checkpoint)

    def _damage_of_state(self, checkpoint: Checkpoint[About]) -> str | None:
        if self._update_in is None:
            return None
        try:
            update = self._update_in(checkpoint.data)
        except NO_DAMAGE:
            raise
        except DataError as error:
            return str(error)
        except (OSError, ValueError, LookupError, TypeError) as error:
            return f"its state cannot be read: {type(error).__name__}: {error}"
        return None if update == checkpoint.update else f"its state is of update {update}, expected {checkpoint.update}"

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

        with telling(f"checkpoints cannot be written to {self.url}"):
            ranks.once(prepare)
            ranks.each(write)
            ranks.once(lambda: objects.delete(seen))

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
        self._work, self._files = work, {}
        self._error: UserError | None = None

    def run(self) -> None:
        try:
            self._files = self._work()
        except UserError as error:  # `result` raises it, in the caller's thread
            self._error = error
        except Exception as error:
            self._error = UserError(f"{type(error).__name__}: {error}")

    def result(self) -> Files:
        """Wait for the end of the write. Returns the files. Raises UserError if the write failed."""
        if self.ident is not None:
            self.join()
        if self._error is not None:
            raise self._error
        return self._files


@contextmanager
def _folder_of(data: str, rank: int) -> Iterator[Path]:
    """Yields an empty local folder for a rank's files. If `data` is a path, the folder is on the same disk."""
    local = objects.local_path(data)
    if local is not None:
        local.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"rank-{rank:05d}-", dir=local) as folder:
        yield Path(folder)


def _outcome(load: Callable[[], Iterable[str]]) -> tuple[str | None, list[str]]:
    """The damage that `load` has found, and what it returned."""
    try:
        return None, list(load())
    except Damaged as error:
        return str(error), []


def _first_problem(checkpoint: Checkpoint[About], files: Iterable[str]) -> str | None:
    return next(filter(None, (damage_of(checkpoint, file) for file in files)), None)
