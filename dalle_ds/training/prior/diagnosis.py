"""Diagnosis of a diverged run: what every block computes on the failing batch, saved with everything needed to replay it.

diagnosis/update_00000123/
    diagnosis.json               blocks, ranks and samples with non-finite values
    magnitudes.png               chart of the largest magnitudes in all blocks
    batch/*.safetensors          the samples of each rank; keys, captions and shards in the metadata
    state/                       weights, moments and gradient scales, as in a checkpoint
    recipe.yaml, deepspeed.json  the settings
"""

import json
import logging
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dalle_ds.data.tokens.batches import TokenBatch
from dalle_ds.errors import ConfigError, DataError, UserError
from dalle_ds.models.prior import PriorConfig
from dalle_ds.parallel.engine import PriorEngine, UpdateReport
from dalle_ds.parallel.ranks import Ranks
from dalle_ds.recipes import dump_recipe
from dalle_ds.storage import objects
from dalle_ds.storage.record import SealedRecord, read_record
from dalle_ds.storage.text import parse_json
from dalle_ds.tracking.tracker import NullTracker
from dalle_ds.training.prior.build import build_engine, read_engine_config
from dalle_ds.training.prior.config import PriorFailureConfig, PriorRunConfig
from dalle_ds.training.prior.magnitudes import look_into, magnitudes_chart

log = logging.getLogger(__name__)

FOLDER, DIAGNOSIS_FILE, IMAGE_FILE = "diagnosis", "diagnosis.json", "magnitudes.png"
BATCHES, STATE_FOLDER, RECIPE_FILE, DEEPSPEED_FILE = "batch", "state", "recipe.yaml", "deepspeed.json"


class DiagnosisRecord(SealedRecord):
    """Content of diagnosis.json."""

    format: Literal[2]
    update: int
    reason: str
    event: str
    world_size: int
    learning_rate: float
    text_loss: float
    image_loss: float
    problems: tuple[str, ...]
    """Why the batch and the state could not be saved. Empty if they were saved."""
    samples: tuple[dict[str, Any], ...]
    model: PriorConfig
    blocks: tuple[dict[str, Any], ...]


class DivergenceMonitor:
    """Counts consecutive updates without a finite loss or without an optimizer step. Reports are the same on every rank, so the
    counts are too."""

    def __init__(self, limits: PriorFailureConfig) -> None:
        self._limits, self._n_losses, self._n_without_step = limits, 0, 0
        self._n_of_block: Counter[str] = Counter()

    def observe(self, report: UpdateReport) -> str | None:
        """Call after every update. Returns why training should stop, or None."""
        self._n_losses = 0 if math.isfinite(report.loss) else self._n_losses + 1
        self._n_without_step = 0 if report.took_step else self._n_without_step + 1
        self._n_of_block = Counter({block: self._n_of_block[block] + 1 for block in report.nonfinite_blocks})
        if self._n_losses >= self._limits.nonfinite_losses:
            return f"no finite loss in {self._n_losses} consecutive updates (failure.nonfinite_losses)"
        if self._n_without_step >= self._limits.updates_without_step:
            return f"no optimizer step in {self._n_without_step} consecutive updates (failure.updates_without_step)"
        for block, n in self._n_of_block.most_common(1):
            if n >= self._limits.updates_without_step:
                return f"no optimizer step of {block} in {n} consecutive updates (failure.updates_without_step)"
        return None


def diagnose(
    run: PriorRunConfig,
    engine: PriorEngine,
    micro_batches: Sequence[TokenBatch],
    lr: float,
    update: int,
    reason: str,
    tracker: NullTracker,
) -> str:
    """Save the engine's state and this batch, repeat the update with every block observed, and log the result to MLflow.

    The files go to the run folder or, if `checkpoint.folder` is set, to that folder, because the ranks may share no other.
    All ranks must call it together. The engine must not be used for training afterwards.

    Returns:
        The error message for the user.
    """
    ranks, url = engine.ranks, objects.join(run.checkpoint.folder or run.folder, FOLDER, f"update_{update:08d}")
    if ranks.is_main:
        objects.delete_tree(url)
    ranks.barrier()
    problem = None
    try:
        with _files_of(url) as folder:
            _save_batch(micro_batches, folder, ranks)
            engine.save(folder / STATE_FOLDER, {"update": update})
    except (OSError, UserError) as error:  # e.g. the disk is full: the rest of the diagnosis is still useful
        problem = f"rank {ranks.rank}: {error}"
    problems = [found for found in ranks.gather_objects(problem) if found]
    finding = look_into(engine, micro_batches, lr)
    if ranks.is_main:
        record = DiagnosisRecord(
            format=2,
            update=update,
            reason=reason,
            event=finding.event,
            world_size=ranks.world_size,
            learning_rate=lr,
            text_loss=finding.report.text_loss,
            image_loss=finding.report.image_loss,
            problems=tuple(problems),
            samples=tuple(finding.samples),
            model=engine.module.config,
            blocks=tuple(asdict(block) for block in finding.blocks),
        )
        log.error("update %d, repeated:\n%s", update, finding.table())
        chart = magnitudes_chart(finding, f"Update {update}, first non-finite value: {finding.event}")
        tracker.image("diagnosis", chart, update)
        with _files_of(url) as folder:
            (folder / DIAGNOSIS_FILE).write_bytes(record.to_json())
            (folder / RECIPE_FILE).write_text(dump_recipe(run), encoding="utf-8")
            shutil.copyfile(run.deepspeed_path, folder / DEEPSPEED_FILE)
            chart.save(folder / IMAGE_FILE)
            tracker.artifact(folder / DIAGNOSIS_FILE, FOLDER)
    ranks.barrier()  # a launcher kills the other ranks as soon as one exits
    recipe = f" {run.folder}/recipe.yaml" if objects.is_s3(url) else ""
    state = (
        f"The batch could not be saved ({problems[0]})."
        if problems
        else f"To replay the batch, in one process or under a launcher:\n  dalle-ds diagnose {url}{recipe}"
    )
    return f"stopped at update {update}: {reason}. {finding.describe()} All blocks: {url}/{DIAGNOSIS_FILE}. {state}"


def replay(run: PriorRunConfig, url: str, ranks: Ranks) -> dict[str, Any]:
    """Repeat the update of a diagnosis, on any number of ranks and in the number formats of the recipe. Returns a summary.

    Does not read or change the run itself. All ranks must call it together.

    Raises:
        DataError: there is no diagnosis at `url`, or it has no batch and state.
        ConfigError: the recipe's global_batch is not the size of the diagnosed batch.
    """
    record = read_record(DiagnosisRecord, objects.join(url, DIAGNOSIS_FILE))
    if record.problems:
        raise DataError(f"{url} has no batch, which could not be saved: {record.problems[0]}")
    run = run.on_ranks(ranks.world_size)
    engine = build_engine(run, record.model, read_engine_config(run, ranks), ranks)
    engine.load(objects.join(url, STATE_FOLDER))
    finding = look_into(engine, _load_batch(url, run, ranks), record.learning_rate)
    if ranks.is_main:
        log.info("update %d, repeated:\n%s\n%s", record.update, finding.table(), finding.describe())
    return {
        "diagnosis": url,
        "update": record.update,
        "event": record.event,
        "event_in_replay": finding.event,
        "reproduced": finding.event == record.event,
        "text_loss": _json_number(finding.report.text_loss),
        "image_loss": _json_number(finding.report.image_loss),
        "took_step": finding.report.took_step,
    }


# ---- files ---------------------------------------------------------------------------------------------------------------


@contextmanager
def _files_of(url: str) -> Iterator[Path]:
    """Yields an empty local folder. On success its files are moved to `url`."""
    parent = objects.local_path(url)
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        yield Path(folder)
        for path in [path for path in Path(folder).rglob("*") if path.is_file()]:
            objects.move_file(path, objects.join(url, str(path.relative_to(folder))))


def _save_batch(micro_batches: Sequence[TokenBatch], folder: Path, ranks: Ranks) -> None:
    tensors = {"text": torch.cat([b.text_BT for b in micro_batches]), "image": torch.cat([b.image_BN for b in micro_batches])}
    names = {what: json.dumps([x for b in micro_batches for x in getattr(b, what)]) for what in ("keys", "captions", "shards")}
    (folder / BATCHES).mkdir()
    save_file(tensors, folder / BATCHES / f"rank-{ranks.rank:05d}.safetensors", names)


def _load_batch(url: str, run: PriorRunConfig, ranks: Ranks) -> list[TokenBatch]:
    """Load this rank's part of the diagnosed batch, in the recipe's micro-batches.

    Raises:
        DataError: files are missing or damaged.
        ConfigError: the recipe's global_batch is not the size of the batch.
    """
    texts, images, names = [], [], {"keys": [], "captions": [], "shards": []}
    for file_url in sorted(objects.list_files(objects.join(url, BATCHES), ".safetensors")):
        try:
            with objects.local_copy(file_url) as path, safe_open(path, "pt") as file:
                texts.append(file.get_tensor("text"))
                images.append(file.get_tensor("image"))
                for what, values in names.items():
                    values += parse_json(file.metadata()[what])
        except (SafetensorError, ValueError, TypeError, LookupError) as error:
            raise DataError(f"{file_url} is not the batch of a diagnosis: {type(error).__name__}: {error}") from None
    if not texts:
        raise DataError(f"{url} has no batch: expected {BATCHES}/rank-*.safetensors")
    text_BT, image_BN = torch.cat(texts), torch.cat(images)
    n = len(text_BT)
    lengths = {"image": len(image_BN), **{what: len(values) for what, values in names.items()}}
    if set(lengths.values()) != {n}:
        raise DataError(f"{url}: the batch has {n} texts, and {lengths}; expected equally many")
    if n != run.global_batch:
        raise ConfigError(f"the recipe's global_batch is {run.global_batch}, but {url} has {n} samples")
    share = n // ranks.world_size
    starts = range(ranks.rank * share, (ranks.rank + 1) * share, run.micro_batch)
    return [
        TokenBatch(
            text_BT[s : s + run.micro_batch],
            image_BN[s : s + run.micro_batch],
            **{what: tuple(values[s : s + run.micro_batch]) for what, values in names.items()},
            n_truncated=0,
        )
        for s in starts
    ]


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
