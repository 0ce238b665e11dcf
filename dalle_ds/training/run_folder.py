"""The folder of a dVAE's or a CLIP's run: of which run it is, whether that is finished, how files come into it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dalle_ds.data.raw import list_raw_shards
from dalle_ds.errors import DataError, UserError
from dalle_ds.ops.devices import resolve_device
from dalle_ds.ops.exactness import exact_fp32
from dalle_ds.recipes import Config
from dalle_ds.storage.fingerprint import fingerprint, require_same

CHECKPOINT_FILE = "checkpoint.pt"

# What may differ between a run and its restart without making it another run.
_NOT_IDENTITY = {"folder", "tracking", "checkpoint_every", "report_every", "threads", "workers", "device", "failure"}
_OTHER_RUN = "It is of another recipe or other pictures: choose another folder, or move it away."


def shards_digest(raw: str) -> str:
    """The fingerprint of raw shards, wherever they lie."""
    return fingerprint({"shards": [[shard.name, shard.bytes, shard.checksum] for shard in list_raw_shards(raw)]})


def identity_of(stage: str, run: Config, shards: str) -> str:
    """The fingerprint of all that decides the result: the recipe (`run.data.raw` aside) and the digest of the raw shards."""
    settings = run.model_dump(mode="json", exclude=_NOT_IDENTITY)
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


def write_report(path: Path, report: dict[str, Any]) -> None:
    """The report, which says that the run is finished."""
    write_aside(path, lambda aside: aside.write_text(json.dumps(report, indent=1), encoding="utf-8"))


def load_checkpoint(folder: Path, identity: str) -> dict[str, Any] | None:
    """The state that a run goes on from; None where it is new. Raises DataError where it is damaged or of another run."""
    path = folder / CHECKPOINT_FILE
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and storage errors alike
        raise DataError(f"{path} is damaged ({type(error).__name__}); move it away to start anew") from None
    require_same(f"checkpoint {path}", identity, state["identity"], _OTHER_RUN)
    return state


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """What `load_checkpoint` gives again; `state["identity"]` says of which run it is."""
    write_aside(folder / CHECKPOINT_FILE, lambda path: torch.save(state, path))


def require_room(folder: Path, n_parameters: int) -> None:
    """Raises UserError where checkpoints would fill the disk."""
    # fp32 weights, two moments and the average, twice: a checkpoint is written beside the one before; and the weights file
    needed, free = n_parameters * (2 * 16 + 4), shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"no room in {folder}: {free / 2**20:.1f} MiB free, {needed / 2**20:.1f} MiB needed for checkpoints")


def write_aside(path: Path, write: Callable[[Path], Any]) -> None:
    """Write under another name, bring it to the disk, then put it in place: a kill leaves the old file or the new one."""
    aside = path.with_name(path.name + ".incoming")
    try:
        write(aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    aside.replace(path)


def exact_device(name: str) -> torch.device:
    """What a recipe's `device` names; fp32 is exact from here on. Raises ConfigError where that is no device, or not there."""
    exact_fp32()
    return resolve_device(name)
