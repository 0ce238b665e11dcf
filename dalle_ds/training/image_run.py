"""What the dVAE and CLIP trainers share: run identity, completion report, checkpoints, training loop."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from dalle_ds.console import progress
from dalle_ds.data.raw import list_raw_shards
from dalle_ds.errors import DataError
from dalle_ds.parallel.ranks import Ranks
from dalle_ds.recipes import Config, flatten
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import fingerprint, require_same
from dalle_ds.storage.record import Record
from dalle_ds.training.checkpoint import CheckpointStore
from dalle_ds.training.run import Stopwatch, TrainingRun

STATE_FILE = "state.pt"
BYTES_PER_PARAMETER = 16
"""Bytes in a checkpoint: fp32 weights, two moments and the EMA."""

# Recipe sections that may change at a restart: they are not part of the run's identity.
_NOT_IDENTITY = {
    **dict.fromkeys(("folder", "tracking", "checkpoint", "threads", "workers", "device", "failure"), True),
    "validation": {"every"},
}
_OTHER_RUN = "It belongs to another recipe or other images: choose another folder, or move it away."


class ImageRunAbout(Record):
    """Description of a dVAE or CLIP run in checkpoint.json."""

    run: str
    """Fingerprint of the run, from `identity_of`."""


def shards_digest(raw: str) -> str:
    """The fingerprint of raw shards: their names, sizes and checksums. It does not depend on their location."""
    return fingerprint({"shards": [[shard.name, shard.bytes, shard.checksum] for shard in list_raw_shards(raw)]})


def identity_of(stage: str, recipe: Config, shards: str) -> str:
    """The fingerprint of everything that determines the result: the recipe without `data.raw`, and the digest of the shards."""
    settings = recipe.model_dump(mode="json", exclude=_NOT_IDENTITY)
    return fingerprint({"stage": stage, **settings, "data": {**settings["data"], "raw": shards}})


def finished_report(path: Path, identity: str) -> dict[str, Any] | None:
    """Read the report of a finished run. Returns None if the file does not exist.

    Raises:
        DataError: the report is damaged.
        FingerprintMismatch: the report belongs to another run.
    """
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
    """The checkpoints of one run. Every rank holds the whole state, so the main rank writes it and all ranks read it.

    All ranks must call every method together.
    """

    def __init__(self, folder: Path, identity: str, n_kept: int, ranks: Ranks) -> None:
        self._store = CheckpointStore(folder / "checkpoints", ImageRunAbout, n_kept)
        self._about, self._ranks = ImageRunAbout(run=identity), ranks

    @property
    def url(self) -> str:
        return self._store.url

    def check_disk_space(self, n_parameters: int) -> None:
        """Raises UserError if the folder is not writable or its disk is too small for the checkpoints."""
        self._store.check_disk_space(n_parameters * BYTES_PER_PARAMETER, self._ranks)

    def newest(self) -> dict[str, Any] | None:
        """Load the state to resume from. Returns None for a new run.

        Raises:
            DataError: all checkpoints are damaged.
            FingerprintMismatch: the checkpoint belongs to another run.
        """
        checkpoint = self._store.newest(self._ranks)
        if checkpoint is None:
            return None
        require_same(f"checkpoint {checkpoint.url}", self._about.run, checkpoint.about.run, _OTHER_RUN)
        with objects.local_copy(objects.join(checkpoint.data, STATE_FILE)) as file:
            return torch.load(file, map_location="cpu", weights_only=True)

    def save(self, update: int, state: Mapping[str, Any]) -> None:
        """Commit `state` as the checkpoint of `update`. Raises UserError if it cannot be written."""

        def write(folder: Path) -> None:
            if self._ranks.is_main:
                torch.save(dict(state), folder / STATE_FILE)

        self._store.begin(update, write, self._about, self._ranks)
        self._store.finish(self._ranks)


class ImageTrainer(ABC):
    """The training loop of the dVAE and of CLIP: when to validate, save and stop.

    A subclass sets `run`, `recipe`, `identity`, `shards`, `checkpoints`, `update` and `watch` before `train` is called.
    """

    stage: ClassVar[str]
    title: ClassVar[str]
    """Title of the progress bar."""

    run: TrainingRun
    recipe: Any
    identity: str
    shards: str
    checkpoints: ImageCheckpoints
    update: int
    watch: Stopwatch

    def train(self) -> dict[str, Any]:
        """Do the remaining updates. Returns the report, on every rank."""
        recipe, run, resumed_at = self.recipe, self.run, self.update
        run.start_tracking(
            recipe,
            recipe.tracking,
            tags={
                "stage": self.stage,
                "fingerprint.run": self.identity,
                "provenance.raw": self.shards,
                "provenance.raw_root": recipe.data.raw,
                "world_size": run.ranks.world_size,
                "n_parameters": self._n_parameters(),
            },
            params=flatten(recipe.model_dump(mode="json")),
            text=self._describe(),
        )
        run.tracker.input_dataset("raw", recipe.data.raw, self.shards)
        bar = progress(total=recipe.updates, initial=self.update, what=self.title, unit="update", enabled=run.ranks.is_main)
        with bar:
            while self.update < recipe.updates:
                metrics, stop_requested = self._step(run.stop_requested)
                self.update += 1
                bar.update(1)
                if self.update % recipe.tracking.every == 0:
                    rate = (self.update - resumed_at) * recipe.global_batch / self.watch.since_start
                    values = {name: float(value) for name, value in metrics.items()} | {"speed/images_per_second": rate}
                    run.tracker.metrics(values, self.update)
                    bar.set_postfix_str(f"loss {values['loss/train/total']:.3f}", refresh=False)
                is_last = self.update == recipe.updates
                if self.update % recipe.validation.every == 0 and not is_last:
                    self._validate()
                if self.update % recipe.checkpoint.every == 0 or is_last or stop_requested:
                    self._save()
                if stop_requested and not is_last:
                    run.leave_stopped(self.update, self.checkpoints.url)
        return self._finish()

    @abstractmethod
    def _n_parameters(self) -> int:
        """Number of parameters of the model."""

    @abstractmethod
    def _describe(self) -> str:
        """Describe the run and its main metrics in Markdown, for the run's MLflow page."""

    @abstractmethod
    def _step(self, stop_requested: bool) -> tuple[dict[str, Any], bool]:
        """Do one update.

        Args:
            stop_requested: whether this rank was asked to stop.

        Returns:
            Metrics, some of them tensors on the device; and whether any rank was asked to stop.
        """

    @abstractmethod
    def _validate(self) -> Any:
        """Measure on the validation split, and log the results to the tracker."""

    @abstractmethod
    def _save(self) -> None:
        """Commit a checkpoint."""

    @abstractmethod
    def _finish(self) -> dict[str, Any]:
        """Validate and write the results. Returns the report."""
