"""Checkpoints on a disk or on s3://: written beside training, then committed; verified before use; a damaged newest one gives
way to the one before.

update_00000500/3f2a.../state-*.safetensors ...   what the ranks wrote; each attempt has a folder of its own
update_00000500/3f2a.../part-00003.json           size and SHA-256 of a rank's files, written after them
update_00000500/checkpoint.json                   the commit, last of all: readers trust nothing else
"""

import hashlib
import json
import logging
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle_ds.data import storage
from dalle_ds.errors import DataError, UserError
from dalle_ds.parallel.ranks import Ranks

log = logging.getLogger(__name__)

COMMIT_FILE = "checkpoint.json"
HASHED_AT_ONCE = 64 << 20


@dataclass(frozen=True)
class Checkpoint:
    """One that was committed."""

    url: str
    commit: dict[str, Any]
    """Content of checkpoint.json."""

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]

    @property
    def data(self) -> str:
        """Folder of the ranks' files."""
        attempt = self.commit.get("attempt")  # the first format had the files beside checkpoint.json
        return storage.join(self.url, attempt) if attempt else self.url


class CheckpointStore:
    """The checkpoints of one run. Every method that takes `ranks` is called by all of them together."""

    def __init__(self, url: str | Path, keep: int) -> None:
        """`keep` newest checkpoints are retained. A path must be of a file system that all ranks share; s3:// need not be."""
        self.url, self.keep = str(url), keep
        self._open: _Save | None = None

    def committed(self) -> list[str]:
        """Names of committed checkpoints, oldest first."""
        found = [url.split("/")[-2:] for url in storage.list_files(self.url, COMMIT_FILE)]
        return sorted(name for name, file in found if name.startswith("update_") and file == COMMIT_FILE)

    # ---- writing ---------------------------------------------------------------------------------------------------------

    def begin(
        self, update: int, write: Callable[[Path], None], about: dict[str, Any], ranks: Ranks, background: bool = False
    ) -> None:
        """Let `write(folder)` of every rank put its files into an empty local folder; they are committed by `finish`.

        Args:
            write: must need no other rank; in the background it runs while training goes on.
            about: kept in checkpoint.json, for readers that do not want to open the tensors.
        """
        self.finish(ranks)
        if ranks.is_main:
            self._sweep()
        attempt = ranks.from_main(uuid.uuid4().hex[:12])
        self._open = _Save(update, attempt, about, lambda: self._write(update, attempt, write, ranks.rank))
        if background:
            self._open.start()
        else:
            self._open.run()

    @property
    def is_open(self) -> bool:
        """Whether there is a save that `finish` has not committed; the same on every rank."""
        return self._open is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still writing its part."""
        return self._open is not None and self._open.is_alive()

    def finish(self, ranks: Ranks) -> None:
        """Wait for the save that is under way and commit it.

        Raises:
            UserError: a rank could not write its part, on all ranks; nothing is committed then.
        """
        if self._open is None:
            return
        save, self._open = self._open, None
        problem = save.outcome()
        problems = {rank: found for rank, found in enumerate(ranks.gather_objects(problem)) if found}
        if not problems and ranks.is_main:
            try:
                self._commit(save, ranks.world_size)
            except (OSError, UserError) as error:
                problems[0] = f"{type(error).__name__}: {error}"
        problems = ranks.from_main(problems)
        for rank, found in problems.items():
            raise UserError(f"the checkpoint of update {save.update} could not be written to {self.url}: rank {rank}: {found}")

    def save(self, update: int, write: Callable[[Path], None], about: dict[str, Any], ranks: Ranks) -> None:
        """`begin` and `finish` in one."""
        self.begin(update, write, about, ranks)
        self.finish(ranks)

    def _write(self, update: int, attempt: str, write: Callable[[Path], None], rank: int) -> None:
        data = storage.join(self.url, _name(update), attempt)
        digests = {}
        with _folder_of(data, rank) as folder:
            write(folder)
            for path in sorted(folder.iterdir()):
                size = path.stat().st_size
                digests[f"{attempt}/{path.name}"] = {"bytes": size, "sha256": _sha256(str(path), size)}
                storage.move_file(path, storage.join(data, path.name))
        storage.write_bytes(_part_url(data, rank), json.dumps(digests).encode())

    def _commit(self, save: "_Save", world_size: int) -> None:
        checkpoint = storage.join(self.url, _name(save.update))
        files: dict[str, dict[str, Any]] = {}
        for rank in range(world_size):
            files |= json.loads(storage.read_bytes(_part_url(storage.join(checkpoint, save.attempt), rank)))
        commit = {
            "update": save.update, "world_size": world_size, "attempt": save.attempt, "about": save.about, "files": files
        }  # fmt: skip
        # of the same update saved again, e.g. after a fall-back, the new one counts
        storage.write_bytes(storage.join(checkpoint, COMMIT_FILE), json.dumps(commit, indent=1).encode())
        log.info("saved %s", checkpoint)
        for old in self.committed()[: -self.keep]:
            storage.delete(storage.join(self.url, old, COMMIT_FILE))  # first: half a checkpoint must not look like one
            storage.delete_tree(storage.join(self.url, old))

    def _sweep(self) -> None:
        """Remove what saves left behind that were never committed."""
        committed = self.committed()
        attempts = set()
        for url in storage.list_files(self.url):
            name, *rest = url.removeprefix(self.url.rstrip("/") + "/").split("/")
            if name.startswith("update_") and len(rest) > 1:
                attempts.add((name, rest[0]))
        for name, attempt in attempts:
            if name not in committed or attempt not in self._attempts_to_keep(name, attempt):
                storage.delete_tree(storage.join(self.url, name, attempt))

    def _attempts_to_keep(self, name: str, attempt: str) -> tuple[str, ...]:
        try:
            return (read_commit(storage.join(self.url, name)).get("attempt"),)
        except DataError:  # damaged: people may want to look at it
            return (attempt,)

    # ---- reading ---------------------------------------------------------------------------------------------------------

    def newest(self, ranks: Ranks) -> Checkpoint | None:
        """The newest checkpoint whose files are all what they were when committed.

        A damaged one is passed over with a loud message; None where there was never any.

        Raises:
            DataError: there are checkpoints, but all are damaged.
        """
        candidates = ranks.from_main(list(reversed(self.committed())) if ranks.is_main else None)
        for name in candidates:
            url = storage.join(self.url, name)
            problem = _problem(url, ranks)
            if problem is None:
                return Checkpoint(url, read_commit(url))
            if ranks.is_main:
                log.error("checkpoint %s is DAMAGED and passed over: %s", url, problem)
        if candidates:
            raise DataError(f"all {len(candidates)} checkpoints in {self.url} are damaged; move the folder away to start anew")
        return None

    def find(self, name: str | None) -> Checkpoint:
        """The checkpoint of this name, or the newest; not verified. Raises DataError where there is none."""
        names = self.committed()
        if not names:
            raise DataError(f"{self.url} has no committed checkpoint; `deepspeed launchers/train_prior.sh` writes them")
        if name is not None and name not in names:
            raise DataError(f"{self.url} has no checkpoint {name!r}; there are {', '.join(names)}")
        url = storage.join(self.url, name or names[-1])
        return Checkpoint(url, read_commit(url))

    def require_room(self, n_bytes: float) -> None:
        """Raises UserError where checkpoints of this size can't be written, before training starts."""
        probe = storage.join(self.url, "writable")
        try:
            storage.write_bytes(probe, b"")
            storage.delete(probe)
        except (OSError, UserError) as error:
            raise UserError(f"checkpoints cannot be written to {self.url}: {error}") from None
        # one more than is kept: the new one is there before the oldest goes
        needed = n_bytes * max(1, self.keep + 1 - len(self.committed()))
        free = storage.free_bytes(self.url)
        if free is not None and free < needed:
            raise UserError(
                f"no room for checkpoints in {self.url}: {free / 2**30:.2f} GiB free, {needed / 2**30:.2f} GiB needed "
                f"({n_bytes / 2**30:.2f} GiB each, {self.keep} kept while the next is written)"
            )


class _Save(threading.Thread):
    """A rank's part of a save. A daemon: a job that ends in an error does not wait for it."""

    def __init__(self, update: int, attempt: str, about: dict[str, Any], work: Callable[[], None]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.update, self.attempt, self.about = update, attempt, about
        self._work, self._problem = work, None

    def run(self) -> None:
        try:
            self._work()
        except Exception as error:  # whatever it is, `finish` tells it
            self._problem = f"{type(error).__name__}: {error}"

    def outcome(self) -> str | None:
        """Wait for the end -> what went wrong."""
        if self.ident is not None:
            self.join()
        return self._problem


def read_commit(checkpoint: str) -> dict[str, Any]:
    """Content of checkpoint.json. Raises DataError where it is missing or not JSON."""
    try:
        return json.loads(storage.read_bytes(storage.join(checkpoint, COMMIT_FILE)))
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{checkpoint} has no readable {COMMIT_FILE}: {error}") from None


def _name(update: int) -> str:
    return f"update_{update:08d}"


def _part_url(data: str, rank: int) -> str:
    return storage.join(data, f"part-{rank:05d}.json")


@contextmanager
def _folder_of(data: str, rank: int) -> Iterator[Path]:
    """An empty local folder for a rank's files, on the disk that they will be on."""
    local = storage.local_path(data)
    if local is not None:
        local.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"rank-{rank:05d}-", dir=local) as folder:
        yield Path(folder)


def _problem(checkpoint: str, ranks: Ranks) -> str | None:
    # every rank comes to the same end, also where only one of them can see the fault
    problem: str | None = None
    try:
        files = read_commit(checkpoint)["files"]
    except (DataError, KeyError) as error:
        files, problem = {}, str(error)
    for name in sorted(files)[ranks.rank :: ranks.world_size]:
        url, expected = storage.join(checkpoint, name), files[name]
        try:
            size = storage.size(url)
            if size != expected["bytes"]:
                problem = f"{name} has {size} bytes, expected {expected['bytes']}"
            elif _sha256(url, size) != expected["sha256"]:
                problem = f"{name} has another content than when it was written (checksum)"
        except FileNotFoundError:
            problem = f"{name} is missing"
    return next((found for found in ranks.gather_objects(problem) if found), None)


def _sha256(url: str, n_bytes: int) -> str:
    digest = hashlib.sha256()
    for start in range(0, n_bytes, HASHED_AT_ONCE):
        digest.update(storage.read_range(url, start, min(HASHED_AT_ONCE, n_bytes - start)))
    return digest.hexdigest()
