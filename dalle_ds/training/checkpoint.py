"""Checkpoint folders: written aside, then committed; verified before use; a damaged newest one gives way to the one before.

checkpoints/update_00000500/      a committed checkpoint: the name alone says that all files were there
    checkpoint.json               size and SHA-256 of every file, written last
checkpoints/incoming/             one being written; after a crash it is swept away by the next save
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dalle_ds.errors import DataError, UserError
from dalle_ds.parallel.ranks import Ranks

log = logging.getLogger(__name__)

COMMIT_FILE = "checkpoint.json"
INCOMING = "incoming"
BYTES_PER_PARAMETER = 16
"""On disk: fp32 weights, two moments, and the average."""


class CheckpointStore:
    """The checkpoints of one run. Every method that takes `ranks` is called by all of them together."""

    def __init__(self, folder: Path, keep: int) -> None:
        """`keep` newest checkpoints are retained."""
        self.folder, self.keep = folder, keep

    def committed(self) -> list[Path]:
        """Committed checkpoints, oldest first."""
        return sorted(self.folder.glob("update_*"))

    def save(self, update: int, write: Callable[[Path], None], about: dict[str, Any], ranks: Ranks) -> Path:
        """Let `write(folder)` put every rank's files into a folder, then commit it under the update's name.

        `about` is kept in checkpoint.json, for readers that do not want to open the tensors.
        """
        incoming, final = self.folder / INCOMING, self.folder / f"update_{update:08d}"
        if ranks.is_main:
            shutil.rmtree(incoming, ignore_errors=True)
            incoming.mkdir(parents=True)
        ranks.barrier()
        write(incoming)
        ranks.barrier()
        digests = _digests(incoming, ranks)
        if ranks.is_main:
            commit = incoming / COMMIT_FILE
            commit.write_text(
                json.dumps({"update": update, "world_size": ranks.world_size, "about": about, "files": digests}, indent=1)
            )
            _sync(incoming)
            if final.exists():  # the same update saved again, e.g. after a fall-back: the new one counts
                shutil.rmtree(final)
            incoming.rename(final)
            for old in self.committed()[: -self.keep]:
                shutil.rmtree(old)
        ranks.barrier()
        return final

    def newest(self, ranks: Ranks) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint whose files are all what they were when committed, with the content of its checkpoint.json.

        A damaged one is passed over with a loud message; None where there was never any.

        Raises:
            DataError: there are checkpoints, but all are damaged.
        """
        candidates = ranks.from_main([path.name for path in reversed(self.committed())])
        for name in candidates:
            path = self.folder / name
            problem = _problem(path, ranks)
            if problem is None:
                return path, read_commit(path)
            if ranks.is_main:
                log.error("checkpoint %s is DAMAGED and passed over: %s", path, problem)
        if candidates:
            raise DataError(
                f"all {len(candidates)} checkpoints in {self.folder} are damaged; move the folder away to start anew"
            )
        return None

    def require_room(self, n_parameters: int, more_bytes: int = 0) -> None:
        """Raises UserError where the disk cannot take the checkpoints of a model of this size, before training starts.

        `more_bytes` a parameter are written beside the usual state.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        size = n_parameters * (BYTES_PER_PARAMETER + more_bytes)
        # one more than is kept: the new one is there before the oldest goes
        needed = size * max(1, self.keep + 1 - len(self.committed()))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"no room for checkpoints in {self.folder}: {free / 2**30:.2f} GiB free, {needed / 2**30:.2f} GiB needed "
                f"({size / 2**30:.2f} GiB each, {self.keep} kept while the next is written)"
            )


def read_commit(checkpoint: Path) -> dict[str, Any]:
    """Content of checkpoint.json. Raises DataError where it is missing or not JSON."""
    try:
        return json.loads((checkpoint / COMMIT_FILE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{checkpoint} has no readable {COMMIT_FILE}: {error}") from None


def _problem(checkpoint: Path, ranks: Ranks) -> str | None:
    # every rank comes to the same end, also where only one of them can see the fault
    problem: str | None = None
    try:
        files = read_commit(checkpoint)["files"]
    except (DataError, KeyError) as error:
        files, problem = {}, str(error)
    for name in sorted(files)[ranks.rank :: ranks.world_size]:
        path = checkpoint / name
        if not path.is_file():
            problem = f"{name} is missing"
        elif path.stat().st_size != files[name]["bytes"]:
            problem = f"{name} has {path.stat().st_size} bytes, expected {files[name]['bytes']}"
        elif _sha256(path) != files[name]["sha256"]:
            problem = f"{name} has another content than when it was written (checksum)"
    return next((found for found in ranks.gather_objects(problem) if found), None)


def _digests(folder: Path, ranks: Ranks) -> dict[str, dict[str, Any]]:
    # the ranks share the hashing: at 12 billion parameters there are 200 GB to read
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    own = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
        for name in names[ranks.rank :: ranks.world_size]
    }
    return {name: digest for part in ranks.gather_objects(own) for name, digest in part.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Bring the files to the disk before the rename says that they are there."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
