"""Runs on raw shards, of a dVAE or a CLIP: which run it is, whether it is finished, its checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dalle_ds.data.raw import list_raw_shards
from dalle_ds.errors import DataError
from dalle_ds.parallel.ranks import Ranks
from dalle_ds.recipes import Config
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import fingerprint, require_same
from dalle_ds.storage.record import Record
from dalle_ds.training.checkpoint import CheckpointStore

KEPT_CHECKPOINTS = 2
STATE_FILE = "state.pt"
BYTES_PER_PARAMETER = 16
"""Of a checkpoint: fp32 weights, two moments and the average."""

# What may differ between a run and its restart without making it another run.
_NOT_IDENTITY = {"folder", "tracking", "checkpoint_every", "report_every", "threads", "workers", "device", "failure"}
_OTHER_RUN = "It is of another recipe or other pictures: choose another folder, or move it away."


class ImageRunAbout(Record):
    """What checkpoint.json says of a dVAE's or a CLIP's run."""

    run: str
    """`identity_of` the run."""


def shards_digest(raw: str) -> str:
    """The fingerprint of raw shards, wherever they lie."""
    return fingerprint({"shards": [[shard.name, shard.bytes, shard.checksum] for shard in list_raw_shards(raw)]})


def identity_of(stage: str, recipe: Config, shards: str) -> str:
    """The fingerprint of all that decides the result: the recipe (`data.raw` aside) and the digest of the raw shards."""
    settings = recipe.model_dump(mode="json", exclude=_NOT_IDENTITY)
    return fingerprint({"stage": stage, **settings, "data": {**settings["data"], "raw": shards}})


def finished_report(path: Path, identity: str) -> dict[str, Any] | None:
    """The report of a finished run; None where there is none. Raises DataError where it is damaged or of another run."""
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        found = report["run"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is damaged; move it away to train again") from None
    require_same(f"finished run {path}", identity, found, _OTHER_RUN)
    return report


class ImageCheckpoints:
    """The checkpoints of one run, whose whole state every rank holds: the main rank writes it, all read it.

    All ranks call every method together.
    """

    def __init__(self, folder: Path, identity: str, ranks: Ranks) -> None:
        self._store = CheckpointStore(folder / "checkpoints", ImageRunAbout, KEPT_CHECKPOINTS)
        self._about, self._ranks = ImageRunAbout(run=identity), ranks

    @property
    def url(self) -> str:
        return self._store.url

    def require_room(self, n_parameters: int) -> None:
        """Raises UserError where the folder can't be written to, or checkpoints would fill the disk."""
        self._store.require_room(n_parameters * BYTES_PER_PARAMETER, self._ranks)

    def newest(self) -> dict[str, Any] | None:
        """The state that the run goes on from; None where it is new.

        Raises:
            DataError: all checkpoints are damaged. FingerprintMismatch: they are of another run.
        """
        checkpoint = self._store.newest(self._ranks)
        if checkpoint is None:
            return None
        require_same(f"checkpoint {checkpoint.url}", self._about.run, checkpoint.about.run, _OTHER_RUN)
        with objects.local_copy(objects.join(checkpoint.data, STATE_FILE)) as file:
            return torch.load(file, map_location="cpu", weights_only=True)

    def save(self, update: int, state: Mapping[str, Any]) -> None:
        """Raises UserError where the disk refuses it."""

        def write(folder: Path) -> None:
            if self._ranks.is_main:
                torch.save(dict(state), folder / STATE_FILE)

        self._store.begin(update, write, self._about, self._ranks)
        self._store.finish(self._ranks)
