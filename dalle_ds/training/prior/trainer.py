"""Train the prior: the story of a run, from recipe to last checkpoint."""

import json
import logging
import math
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dalle_ds.data.tokens import TokenBatch, TokenStream, validation_batches
from dalle_ds.errors import ConfigError, TrainingDiverged
from dalle_ds.models.presets import effective_parameters
from dalle_ds.models.prior import Prior, PriorConfig
from dalle_ds.optim.ema import WeightAverage
from dalle_ds.optim.plateau import Plateau
from dalle_ds.parallel.failure_detection import RankWatch, limit_waiting
from dalle_ds.parallel.ranks import Ranks
from dalle_ds.planning.memory import CHECKPOINT_BYTES, state_bytes
from dalle_ds.recipes import dump_recipe, flatten
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import require_same
from dalle_ds.tracking.provenance import code_tags
from dalle_ds.tracking.tracker import NullTracker, Tracker
from dalle_ds.training.checkpoint import Checkpoint, CheckpointStore
from dalle_ds.training.preemption import EXIT_STOPPED, RunLock, StopFlag
from dalle_ds.training.prior.build import build_engine, read_engine_config
from dalle_ds.training.prior.config import PriorRun
from dalle_ds.training.prior.diagnosis import Patience, diagnose
from dalle_ds.training.prior.metrics import RunReport, describe
from dalle_ds.training.prior.parity import PARITY_FILE
from dalle_ds.training.prior.samples import SampleSheets
from dalle_ds.training.prior.state import RunIdentity, TrainState

log = logging.getLogger(__name__)

SUMMARY_FILE = "summary.json"
PARITY_SAMPLES = 4
COMPARED = ("updates", "global_batch", "seed", "model.", "optimizer.", "learning_rate.", "data.bpe_", "data.caption_")
"""Settings that are MLflow parameters where they differ from the paper's; others are in recipe.yaml alone. Its page lists all
parameters above each picture, which a few leave in sight."""


def train_prior(run: PriorRun, ranks: Ranks) -> dict[str, Any]:
    """Train, or go on with, the run in `run.folder`. All ranks call it; the summary is the same on each.

    Raises:
        UserError: anything about the recipe, the data or the disk that would stop the run later.
        TrainingDiverged: losses or gradients stay non-finite; RankLost: another rank died, failed or hangs.
        SystemExit(143): asked to stop; the state is saved.
    """
    run = run.on_ranks(ranks.world_size)
    # Only the main rank holds the lock: the others are its own.
    with StopFlag() as stop, RunLock(Path(run.folder)) if ranks.is_main else nullcontext(), ExitStack() as at_end:
        ranks.barrier()  # the lock is held before anybody reads the folder
        with RankWatch(ranks, run.failure.collective_timeout) as watch:
            trainer = _Trainer(run, ranks)
            if trainer.is_finished:
                return trainer.finished_summary()
            at_end.callback(trainer.end_tracking)
            watch.before_exit = trainer.end_tracking
            trainer.prepare()
            return trainer.run(stop)


class _Trainer:
    """One run: checked in the constructor, built by `prepare`, and its loop."""

    def __init__(self, run: PriorRun, ranks: Ranks) -> None:
        self.recipe, self.ranks, self.folder = run, ranks, Path(run.folder)
        self.tracker, self.status = NullTracker(), "FAILED"
        self.engine_config = read_engine_config(run, ranks)
        self.dataset, self.validation_set = run.data.open("train"), run.data.open("validation")
        info = self.dataset.info
        for what, expected, found in (("dVAE", run.data.dvae, info.dvae), ("tokenizer", run.data.tokenizer, info.tokenizer)):
            if expected is not None:
                require_same(f"{what} of data set {self.dataset.root_url}", expected, found, "The recipe asks for the former.")
        self.model_config = run.model.resolve(info, self.dataset.tokenizer.n_vocab, self.dataset.root_url)
        self.identity = RunIdentity(
            model=self.model_config.model_dump(),
            data=self.dataset.fingerprint,
            content=self.dataset.content_fingerprint,
            global_batch=run.global_batch,
            seed=run.seed,
        )
        self.checkpoints = CheckpointStore(run.checkpoint_folder, run.checkpoint.keep)
        self.newest = self.checkpoints.newest(ranks)
        if self.newest is not None:
            self.identity.require_same(self.newest.commit["about"], self.newest.url)
            self._require_same_moments(self.newest)
        self.n_parameters = _count_parameters(self.model_config)

    @property
    def is_finished(self) -> bool:
        """Whether a checkpoint holds all updates already."""
        return self.newest is not None and self.newest.commit["update"] >= self.recipe.updates

    def finished_summary(self) -> dict[str, Any]:
        """The summary of the run that finished here, for a job that has nothing to do; at any number of ranks."""
        assert self.newest is not None
        checkpoint, update = self.newest.url, self.newest.commit["update"]
        if self.ranks.is_main:
            log.info("%s is finished: %d updates; nothing to do", self.folder, update)
        path = self.folder / SUMMARY_FILE
        known = json.loads(path.read_text()) if path.exists() else {"updates": update, "checkpoint": checkpoint}
        return {**known, "resumed_at": update}

    def prepare(self) -> None:
        """Build the engine and the stream, and go to where the newest checkpoint was."""
        run, ranks, found = self.recipe, self.ranks, self.newest
        per_parameter = CHECKPOINT_BYTES + state_bytes(self.model_config, run.optimizer.moments).moments
        self.checkpoints.require_room(self.n_parameters * (per_parameter + run.replicas.checkpoint_bytes), ranks)
        n_held_out = min(run.validation.samples or self.validation_set.n_samples, self.validation_set.n_samples)
        self.validation = validation_batches(
            self.validation_set,
            text_len=self.model_config.text_len,
            rank=ranks.rank,
            world_size=ranks.world_size,
            batch=max(1, min(run.micro_batch, n_held_out // ranks.world_size)),
            limit=n_held_out,
        )
        # every rank takes the same few samples: their losses are what an export must reproduce
        n_parity = min(PARITY_SAMPLES, self.validation_set.n_samples)
        self.parity_batch = validation_batches(
            self.validation_set, text_len=self.model_config.text_len, batch=n_parity, rank=0, world_size=1, limit=n_parity
        )[0]
        self.state = TrainState()
        self.plateau = Plateau(run.learning_rate.plateau) if run.learning_rate.plateau else None
        self.stream = TokenStream(
            self.dataset,
            text_len=self.model_config.text_len,
            global_batch=run.global_batch,
            micro_batch=run.micro_batch,
            rank=ranks.rank,
            world_size=ranks.world_size,
            seed=run.seed,
            bpe_dropout=run.data.bpe_dropout,
            caption_dropout=run.data.caption_dropout,
            start_update=found.commit["update"] if found else 0,
            prefetch=run.data.prefetch,
        )
        self.engine = build_engine(run, self.model_config, self.engine_config, ranks)
        limit_waiting(run.failure.collective_timeout)
        self.average = WeightAverage(self.engine.shards(), run.average, device="cpu", background=True)
        if found is not None:
            self._restore(found)
        self.tracker = self._start_tracking() if ranks.is_main else NullTracker()
        is_sampling = ranks.is_main and run.tracking.samples_every is not None
        self.sheets = SampleSheets(self.model_config, self.dataset.sets[0], ranks.device) if is_sampling else None
        self.run_report = RunReport(run, self.model_config, self.engine, self.stream, self.state, self.tracker)
        self.last_validation: dict[str, float] = {}

    # ---- the loop --------------------------------------------------------------------------------------------------------

    def run(self, stop: StopFlag) -> dict[str, Any]:
        run, state = self.recipe, self.state
        resumed_at = state.update
        began, patience = time.monotonic(), Patience(run.failure)
        before = state.seconds
        optimizer_bytes = 0.0
        with self.run_report.bar, self.stream:
            if state.update == 0:
                self._validate()
                self._draw_samples()
            while state.update < run.updates:
                micro_batches = next(self.stream)
                lr = run.learning_rate.at(state.update, run.updates) * (self.plateau.factor if self.plateau else 1.0)
                tensors = [(batch.text_BT, batch.image_BN) for batch in micro_batches]
                if state.update == 0 and self.engine.calibrate(tensors):
                    self.run_report.scales("calibrated gradient scales")
                is_saving = self.checkpoints.is_writing
                report = self.run_report.profiled(partial(self.engine.update, tensors, lr, stop.requested, is_saving))
                state.update += 1
                state.seconds = before + time.monotonic() - began
                if report.took_step:
                    self._watch_plateau(report.loss)
                    if not optimizer_bytes:
                        optimizer_bytes = self.engine.optimizer_bytes_per_parameter()
                        self.run_report.optimizer_bytes(run.optimizer.moments, optimizer_bytes)
                    if state.update % run.average.every == 0:
                        self.average.update(self.engine.shards())
                else:
                    state.n_skipped += 1
                self.run_report.updated(report, lr)
                if self.checkpoints.is_open and not report.saves_under_way:
                    self.checkpoints.finish(self.ranks)
                if reason := patience.observe(report):
                    self.checkpoints.finish(self.ranks)
                    raise TrainingDiverged(diagnose(run, self.engine, micro_batches, lr, state.update, reason, self.tracker))
                if state.update % run.validation.every == 0 or state.update == run.updates:
                    self._validate()
                if state.update % (run.tracking.samples_every or run.updates) == 0 or state.update == run.updates:
                    self._draw_samples()
                is_due = state.update % run.checkpoint.every == 0 or report.stop_requested
                # states without a finite loss must not take the places of good ones
                if state.update == run.updates or (is_due and math.isfinite(report.loss)):
                    self._save()
                if report.stop_requested and state.update < run.updates:
                    self.checkpoints.finish(self.ranks)
                    self.status = "KILLED"
                    log.info(
                        "asked to stop (%s) at update %d: the same command goes on from the newest state in %s",
                        stop.reason or "another rank",
                        state.update,
                        self.checkpoints.url,
                    )
                    raise SystemExit(EXIT_STOPPED)
            self.checkpoints.finish(self.ranks)
        self.status = "FINISHED"
        summary = self._summary(resumed_at)
        if self.ranks.is_main:
            self._write(SUMMARY_FILE, json.dumps(summary, indent=1))
            self.tracker.artifact(self.folder / SUMMARY_FILE)
        return summary

    def end_tracking(self) -> None:
        """Tell MLflow how it ended. May wait for the server, up to a minute."""
        self.tracker.close(self.status)

    def _watch_plateau(self, loss: float) -> None:
        update = self.state.update
        if self.plateau and update > self.recipe.learning_rate.warmup_updates and self.plateau.observe(update, loss):
            log.info(
                "update %d: the training loss has stopped falling (smoothed %.4f): learning rate halved, %d times now",
                update,
                self.plateau.state.smoothed,
                len(self.plateau.state.halvings),
            )

    def _validate(self) -> None:
        with self._averaged():
            text_loss, image_loss = self.engine.evaluate([(b.text_BT, b.image_BN) for b in self.validation])
            first = self.validation[0]
            nll_BN = self.engine.image_nll(first.text_BT, first.image_BN)
        self.last_validation = {"held_out_image_loss": image_loss, "held_out_text_loss": text_loss}
        self.run_report.validated(text_loss, image_loss, nll_BN)

    def _draw_samples(self) -> None:
        if self.recipe.tracking.samples_every is None:
            return
        with self._averaged():
            weights = self.engine.whole_weights()
        if self.sheets is not None and weights is not None:
            self.run_report.sampled(self.sheets.draw(weights, self.state.update))

    def _averaged(self) -> Any:
        return self.average.in_place_of(self.engine.shards(), self.engine.refresh_gathered_parameters)

    # ---- checkpoints -----------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        self.checkpoints.finish(self.ranks)  # so that memory holds one copy
        with self._averaged():
            nll_BN = self.engine.image_nll(self.parity_batch.text_BT, self.parity_batch.image_BN)

        state = {
            "train_state": self.state.to_dict(),
            "n_averaged": self.average.n_updates,
            "plateau": self.plateau.state_dict() if self.plateau else None,
        }
        background = self.recipe.checkpoint.background
        snapshot = self.engine.snapshot(state, self.average.averages, copy=background)

        def write(folder: Path) -> None:
            snapshot.write(folder)
            if self.ranks.is_main:
                save_file(_parity_tensors(self.parity_batch, nll_BN), folder / PARITY_FILE)

        run = self.tracker.run
        about = {
            **asdict(self.identity),
            "dataset": self.dataset.sets[0].root_url,
            "dvae": self.dataset.info.dvae,
            "data_sets": [
                {"dataset": one.root_url, "weight": weight, "data": one.fingerprint, "content": one.content_fingerprint}
                for one, weight in zip(self.dataset.sets, self.dataset.weights, strict=True)
            ],
            "tokenizer": self.dataset.info.tokenizer,
            "caption_dropout": self.recipe.data.caption_dropout,
            "fp16_branches": self.engine.scaler is not None,
            "moments": self.recipe.optimizer.moments,
            "master": self.recipe.optimizer.master,
            "weight_dtype": str(self.engine_config.weight_dtype).removeprefix("torch."),
            "mlflow": {"uri": run.uri, "run_id": run.run_id} if run is not None else None,
        }
        self.checkpoints.begin(self.state.update, write, about, self.ranks, background)

    def _require_same_moments(self, checkpoint: Checkpoint) -> None:
        saved, ours = checkpoint.commit["about"].get("moments", "fp32"), self.recipe.optimizer.moments
        if saved != ours:
            raise ConfigError(
                f"{checkpoint.url} has {saved} moments, but the recipe's optimizer.moments is {ours}: set {saved}"
            )

    def _restore(self, checkpoint: Checkpoint) -> None:
        saved = self.engine.load(checkpoint.data, self.average.averages)
        self.state, self.average.n_updates = TrainState(**saved["train_state"]), saved["n_averaged"]
        if self.plateau and saved["plateau"]:
            self.plateau.load_state_dict(saved["plateau"])
        if self.ranks.is_main:
            log.info("resumed from %s", checkpoint.url)

    # ---- tracking --------------------------------------------------------------------------------------------------------

    def _start_tracking(self) -> Tracker:
        run, info = self.recipe, self.dataset.info
        accumulation = run.accumulation(self.ranks.world_size)
        set_here = flatten(run.model_dump(mode="json", exclude_defaults=True))
        self._write("deepspeed.json", json.dumps(self.engine_config.json, indent=1))
        self._write("recipe.yaml", dump_recipe(run))
        tracker = Tracker.start(
            self.folder,
            uri=run.tracking.uri,
            experiment=run.tracking.experiment,
            run_name=run.tracking.run_name,
            tags={
                **code_tags(),
                "stage": "train_prior",
                "lineage.data": self.identity.data,
                "lineage.dataset": self.dataset.root_url,
                "lineage.data_content": self.identity.content,
                "lineage.dvae": info.dvae,
                "lineage.tokenizer": info.tokenizer,
                "world_size": self.ranks.world_size,
                "n_parameters": self.n_parameters,
                "effective_parameters": effective_parameters(self.model_config),
                "n_train_samples": self.dataset.n_samples,
            },
            params={key: value for key, value in set_here.items() if key.startswith(COMPARED)},
            description=describe(run, self.n_parameters, self.ranks.world_size),
        )
        for dataset in self.dataset.sets:
            tracker.input_dataset("token_shards", dataset.root_url, dataset.fingerprint)
        first = self.dataset.sets[0].root_url
        tracker.input_dataset("tokenizer", objects.join(first, "tokenizer.model"), info.tokenizer, "tokenizer")
        tracker.input_dataset("dvae", objects.join(first, "dvae.safetensors"), info.dvae, "codebook")
        tracker.artifact(self.folder / "deepspeed.json")
        tracker.artifact(self.folder / "recipe.yaml")
        log.info(
            "prior of %.1f million parameters on %d ranks x %d micro-batches of %d",
            self.n_parameters / 1e6,
            self.ranks.world_size,
            accumulation,
            run.micro_batch,
        )
        log.info("%d train samples, %d updates an epoch", self.dataset.n_samples, self.stream.steps_per_epoch)
        log.info("parameter groups: %s", self.engine.groups_description)
        if self.engine.replica_gradients:
            log.info("%d replicas: %s", run.replicas.count, self.engine.replica_gradients.describe())
        return tracker

    def _write(self, name: str, text: str) -> None:
        temporary = self.folder / f".{name}.new"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.folder / name)

    def _summary(self, resumed_at: int) -> dict[str, Any]:
        state = self.state
        checkpoints = self.checkpoints.committed()
        return {
            "folder": str(self.folder),
            "updates": state.update,
            "resumed_at": resumed_at,
            "skipped_updates": state.n_skipped,
            "seconds": round(state.seconds, 1),
            "checkpoint": objects.join(self.checkpoints.url, checkpoints[-1]) if checkpoints else None,
            **self.last_validation,
            "data_wait_seconds": round(self.stream.wait_seconds, 2),
            "n_parameters": self.n_parameters,
        }


def _parity_tensors(batch: TokenBatch, nll_BN: Tensor) -> dict[str, Tensor]:
    return {"text": batch.text_BT.contiguous(), "image": batch.image_BN.contiguous(), "image_nll": nll_BN.float().contiguous()}


def _count_parameters(config: PriorConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Prior(config).parameters())
