"""What the dVAE and CLIP trainers share: run identity, completion report, checkpoints, training loop."""

import logging
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dalle_ds.console import progress
from dalle_ds.data.raw.shards import RawShard, list_raw_shards
from dalle_ds.data.raw.streams import Cursor, Cursors
from dalle_ds.errors import ConfigError, DataError, FingerprintMismatch, UserError
from dalle_ds.ops.devices import resolve_device
from dalle_ds.parallel.ranks import ALONE, Ranks
from dalle_ds.recipes import Config, differing, flatten, load_recipe
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import fingerprint, require_same
from dalle_ds.storage.record import Record, unseal
from dalle_ds.training.checkpoint import CheckpointStore
from dalle_ds.training.run import CHECKPOINTS, RECIPE_FILE, Stopwatch, TrainingRun

log = logging.getLogger(__name__)

STATE_FILE = "state.pt"
BYTES_PER_PARAMETER = 16
"""Bytes in a checkpoint: fp32 weights, two moments and the EMA."""

# Recipe sections that may change at a restart: they are not part of the run's identity.
_NOT_IDENTITY = {
    **dict.fromkeys(("folder", "tracking", "checkpoint", "threads", "workers", "device", "failure"), True),
    "validation": {"every"},
    "data": {"decoders"},
}
_OTHER_RUN = "It belongs to another recipe or other images: choose another folder, or move it away."


class ImageRunAbout(Record):
    """Description of a dVAE or CLIP run in checkpoint.json."""

    run: str
    """Fingerprint of the run, from `identity_of`."""


class RawData(NamedTuple):
    """The raw shards that a run reads."""

    shards: list[RawShard]
    digest: str
    """Fingerprint of their names, sizes and checksums. It does not depend on their location."""


def raw_data(raw: str, ranks: Ranks = ALONE) -> RawData:
    """List the shards under `raw` on the main rank, for all ranks. What is wrong with them is raised on every rank."""
    shards = ranks.once(lambda: list_raw_shards(raw))
    return RawData(shards, fingerprint({"shards": [[shard.name, shard.bytes, shard.checksum] for shard in shards]}))


def all_cursors(mine: Cursors, ranks: Ranks) -> dict[int, list[int]]:
    """The cursors of all ranks' parts, for a checkpoint. All ranks must call it together."""
    return {part: list(cursor) for cursors in ranks.gather_objects(mine) for part, cursor in sorted(cursors.items())}


def cursors_of(state: Mapping[str, Any]) -> Cursors:
    """The cursors of a checkpoint. Checkpoints of earlier versions have one position, which is none in a set that is streamed:
    no cursors then, which `Reading.start` refuses."""
    position = state.get("position", (0, 0, 0))
    saved = state["cursors"] if "cursors" in state else {} if position[1] else {0: position}
    return {part: Cursor(*cursor) for part, cursor in saved.items()}


def sum_over_ranks(ranks: Ranks, parameters: Sequence[Tensor], sums: dict[str, Any]) -> dict[str, Any]:
    """All-reduce (sum) the gradients in the parameters together with `sums`: one collective, in fp32."""
    if ranks.world_size == 1:
        return sums
    device = parameters[0].device
    values = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in sums.values()])
    flat = ranks.sum(torch.cat([*(p.grad.flatten() for p in parameters), values]))
    *gradients, values = flat.split([*(p.numel() for p in parameters), len(sums)])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad.copy_(gradient.view(parameter.shape))  # copy_ converts between memory formats
    return dict(zip(sums, values.unbind(), strict=True))


def identity_of(stage: str, recipe: Config, shards: str) -> str:
    """The fingerprint of everything that determines the result: the recipe without `data.raw`, and the digest of the shards."""
    settings = _settings_of(recipe)
    return fingerprint({"stage": stage, **settings, "data": {**settings["data"], "raw": shards}})


def finished_or_trained(
    run: TrainingRun,
    stage: str,
    recipe: Any,
    data: RawData,
    results: Sequence[str],
    finished: Callable[[Path, str], dict[str, Any] | None],
    train: Callable[[str], dict[str, Any]],
) -> dict[str, Any]:
    """Returns the report of a run, on every rank: of a finished one as it is, else of `train(identity)`.

    Args:
        results: names of the result files; the first is the model.
        finished: reads the report of this run's folder and identity; None if the run has more to do.

    Raises:
        FingerprintMismatch: the folder has another run; it names in what the recipe differs.
    """
    identity = identity_of(stage, recipe, data.digest)
    with telling_what_differs(run.folder, stage, recipe, data.digest):
        report = run.ranks.once(lambda: finished(run.folder, identity))
        if report is None:
            return train(identity)
        log.info("%s is finished: %d updates; nothing to do", run.folder / results[0], report["updates"])
        run.end_again(recipe.tracking, results, {f"fingerprint.{stage}": report[stage]})
        return report


@contextmanager
def telling_what_differs(folder: Path, stage: str, recipe: Config, shards: str) -> Iterator[None]:
    """Add to the refusal of a folder of another run in what its recipe differs from `recipe`.

    The folder's recipe.yaml says it: only a start that was not refused has written it.
    """
    try:
        yield
    except FingerprintMismatch as error:
        if error.expected != identity_of(stage, recipe, shards):
            raise
        raise error.told_as("\n  ".join([str(error), *_differences(folder, stage, recipe, shards, error.found)])) from None


def _differences(folder: Path, stage: str, recipe: Config, shards: str, found: str) -> list[str]:
    try:
        there = load_recipe(type(recipe), folder / RECIPE_FILE)
    except UserError:  # missing, or of another version
        return []
    before, now = (flatten(_settings_of(one)) | {"data.raw": ""} for one in (there, recipe))  # an address is no identity
    lines = [f"{key}: there {old}, recipe {new}" for key, old, new in differing(before, now)]
    if identity_of(stage, there, shards) != found:
        lines.append("data.raw: other images than there, or the run is of another version")
    return lines


def _settings_of(recipe: Config) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude=_NOT_IDENTITY)


def device_of(name: str, ranks: Ranks) -> torch.device:
    """The device of this rank, from the recipe's `device`. Raises ConfigError if a launcher has given it another one."""
    device = resolve_device(name)
    if ranks.world_size == 1:
        return device
    if name not in ("auto", ranks.device.type):
        raise ConfigError(
            f"device is {name!r}, but rank {ranks.rank} of {ranks.world_size} has {ranks.device}: set device=auto"
        )
    return ranks.device


def finished_report(path: Path, identity: str) -> dict[str, Any] | None:
    """Read the report of a finished run. Returns None if the file does not exist.

    Raises:
        DataError: the report is damaged.
        FingerprintMismatch: the report belongs to another run.
    """
    if not path.exists():
        return None
    hint = "move it away: the results are then written again, from the last checkpoint"
    try:
        report = unseal(path.read_bytes(), path)
    except DataError as error:
        raise DataError(f"{error}; {hint}") from None
    if not isinstance(report.get("run"), str):
        raise DataError(f"{path} is damaged: it lacks the identity of its run; {hint}")
    require_same(f"finished run {path}", identity, report["run"], _OTHER_RUN)
    return report


class ImageCheckpoints:
    """The checkpoints of one run. Every rank holds the whole state, so the main rank writes it and all ranks read it.

    All ranks must call every method together.
    """

    def __init__(self, folder: Path, identity: str, n_kept: int, ranks: Ranks) -> None:
        self._store = CheckpointStore(folder / CHECKPOINTS, ImageRunAbout, n_kept, _saved_update)
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
        return _load_state(checkpoint.data)

    def save(self, update: int, state: Mapping[str, Any]) -> None:
        """Commit `state` as the checkpoint of `update`. Raises UserError if it cannot be written."""

        def write(folder: Path) -> None:
            if self._ranks.is_main:
                torch.save(dict(state), folder / STATE_FILE)

        self._store.begin(update, write, self._about, self._ranks)
        self._store.finish(self._ranks)


def _load_state(folder: str, **options: Any) -> dict[str, Any]:
    """Load the state in the folder of a checkpoint's files. Runs no code of the file. Raises DataError if it is no state."""
    url = objects.join(folder, STATE_FILE)
    with objects.local_copy(url) as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, **options)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
            # not torch's message: it advises to run the code of the file
            raise DataError(f"{url} is not the state of a run: {type(error).__name__} in torch.load") from None
    if not isinstance(state, dict):
        raise DataError(f"{url} is not the state of a run: it holds a {type(state).__name__}")
    return state


def _saved_update(folder: str) -> int:
    return _load_state(folder, mmap=True)["update"]  # mmap: the tensors stay on disk


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
                if self.update % recipe.validation.every == 0 and not is_last and self._can_validate():
                    self._validate()
                if self.update % recipe.checkpoint.every == 0 or is_last or stop_requested:
                    self._save()
                if stop_requested and not is_last:
                    run.leave_stopped(self.update, self.checkpoints.url)
        return self._finish()

    def _require_same_start(self) -> None:
        """Raises UserError unless all ranks start at the same update of the same run. All must call it together."""
        starts = self.run.ranks.gather_objects((self.update, self.identity))
        for rank, start in enumerate(starts):
            if start != starts[0]:
                raise UserError(
                    f"rank {rank} starts at update %d of run %s, rank 0 at update %d of run %s: all ranks must have the "
                    f"same {self.run.folder}, recipe and raw shards" % (*start, *starts[0])
                )

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

    def _can_validate(self) -> bool:
        """Whether the model can already do what validation measures."""
        return True

    @abstractmethod
    def _validate(self) -> Any:
        """Measure on the validation split, and log the results to the tracker."""

    @abstractmethod
    def _save(self) -> None:
        """Commit a checkpoint."""

    @abstractmethod
    def _finish(self) -> dict[str, Any]:
        """Validate and write the results. Returns the report."""
