"""The folder of a dVAE run: of which run it is, whether that is finished, how files come into it."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from dalle_ds.data.fingerprint import fingerprint, require_same
from dalle_ds.data.raw import list_raw_shards
from dalle_ds.data.weights import read_weights
from dalle_ds.errors import DataError, UserError
from dalle_ds.training.dvae_config import DVAERun

WEIGHTS_FILE = "dvae.safetensors"
REPORT_FILE = "dvae_report.json"
CHECKPOINT_FILE = "checkpoint.pt"
RECONSTRUCTIONS_FILE = "reconstructions.png"

# What may differ between a run and its restart without making it another run.
_NOT_IDENTITY = {"folder", "tracking", "checkpoint_every", "report_every", "threads", "workers", "device", "failure"}


def identity_of(run: DVAERun) -> str:
    """The fingerprint of all that decides the result: the recipe and the raw shards, wherever they lie."""
    settings = run.model_dump(mode="json", exclude=_NOT_IDENTITY)
    settings["data"] = {**settings["data"], "raw": shards_digest(run)}
    return fingerprint({"stage": "dvae", **settings})


def shards_digest(run: DVAERun) -> str:
    """The fingerprint of the raw shards."""
    shards = list_raw_shards(run.data.raw)
    return fingerprint({"shards": [[shard.name, shard.bytes, shard.checksum] for shard in shards]})


def finished_report(folder: Path, identity: str) -> dict[str, Any] | None:
    """The report of a finished run in this folder; None where there is none.

    Raises:
        DataError: it is damaged; FingerprintMismatch: it is of another run, or the weights are of another one.
    """
    path = folder / REPORT_FILE
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        found, mark = report["run"], report["dvae"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is damaged; move it away to train again") from None
    require_same(f"finished run {path}", identity, found,
                 "It is of another recipe or other pictures: choose another folder, or move it away.")  # fmt: skip
    if not (folder / WEIGHTS_FILE).exists():
        return None  # the last checkpoint is complete: the weights are written again from it
    require_same(f"weights {folder / WEIGHTS_FILE}", mark, read_weights(folder / WEIGHTS_FILE, "dvae").fingerprint)
    return report


def require_room(folder: Path, n_parameters: int) -> None:
    """Raises UserError where checkpoints would fill the disk."""
    # fp32 weights, two moments and the average, twice: a checkpoint is written beside the one before; and the weights file
    needed, free = n_parameters * (2 * 16 + 4), shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"no room in {folder}: {free / 2**20:.1f} MiB free, {needed / 2**20:.1f} MiB needed for checkpoints")


def write_aside(path: Path, write: Any) -> None:
    """Write under another name, bring it to the disk, then put it in place: a kill leaves the old file or the new one."""
    aside = path.with_name(path.name + ".incoming")
    try:
        write(aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    aside.replace(path)
