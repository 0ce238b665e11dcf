"""Train the prior: a run from its recipe to the last checkpoint."""

import json
import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from safetensors.torch import save_file
from torch import Tensor

from dalle_ds.data.tokens.batches import TokenBatch, TokenStream, validation_batches
from dalle_ds.errors import DataError, TrainingDiverged, telling
from dalle_ds.models.presets import n_effective_parameters
from dalle_ds.optim.ema import EMA
from dalle_ds.optim.plateau import Plateau
from dalle_ds.parallel.engine import UpdateReport
from dalle_ds.parallel.failure_detection import limit_waiting
from dalle_ds.parallel.ranks import Ranks
from dalle_ds.parallel.saved_state import SavedState, open_state
from dalle_ds.planning.memory import CHECKPOINT_BYTES, state_bytes
from dalle_ds.recipes import flatten
from dalle_ds.sampling.export_record import MlflowRun
from dalle_ds.storage import objects
from dalle_ds.storage.names import DVAE_FILE, TOKENIZER_FILE
from dalle_ds.storage.record import unseal
from dalle_ds.training.checkpoint import Checkpoint
from dalle_ds.training.prior.build import build_engine
from dalle_ds.training.prior.config import PriorRunConfig
from dalle_ds.training.prior.diagnosis import DivergenceMonitor, diagnose
from dalle_ds.training.prior.job import PriorJob, check_job
from dalle_ds.training.prior.metrics import PriorMetrics, describe
from dalle_ds.training.prior.paper import differences
from dalle_ds.training.prior.parity import PARITY_FILE
from dalle_ds.training.prior.state import PriorAbout, TrainState
from dalle_ds.training.run import Stopwatch, TrainingRun, open_run

if TYPE_CHECKING:
    from dalle_ds.training.prior.samples import SampleSheets

log = logging.getLogger(__name__)

SUMMARY_FILE, DEEPSPEED_FILE = "summary.json", "deepspeed.json"
PARITY_SAMPLES = 4


def train_prior(recipe: PriorRunConfig, ranks: Ranks) -> dict[str, Any]:
    """Train or resume the run in `recipe.folder`. All ranks must call it. Returns the summary, the same on every rank.

    Raises:
        UserError: the recipe, the data or the disk has a problem that would stop the run later.
        TrainingDiverged: losses or gradients stay non-finite.
        RankLost: another rank died, failed or hangs.
        SystemExit(143): the run was asked to stop, and its state is saved.
    """
    recipe = recipe.on_ranks(ranks.world_size)
    with open_run(recipe.folder, ranks, recipe.failure.collective_timeout, recipe.checkpoint_folder) as run:
        job = check_job(recipe, ranks)
        job.checkpoints.before_commit = run.require_locks
        if job.is_finished and (newest := job.checkpoints.newest(ranks)) == job.newest and newest is not None:
            summary = ranks.from_main(_summary_of(run.folder, newest.update) if ranks.is_main else None)
            if summary is not None:
                log.info("%s is finished: %d updates; nothing to do", run.folder, newest.update)
                run.end_again(recipe.tracking, [SUMMARY_FILE])
                return {**summary, "resumed_at": newest.update}
        return PriorTrainer(run, job).train()


def _summary_of(folder: Path, update: int) -> dict[str, Any] | None:
    """Read the summary of a run that ended at this update. None if it is missing, damaged, or of another update: the run was
    killed between its last checkpoint and its summary."""
    try:
        summary = unseal((folder / SUMMARY_FILE).read_bytes(), folder / SUMMARY_FILE)
    except FileNotFoundError:
        return None
    except DataError as error:
        log.warning("%s; it is written again", error)
        return None
    return summary if summary.get("updates") == update else None


class PriorTrainer:
    """The training loop, and the state of an unfinished run, resumed from its newest checkpoint if there is one."""

    def __init__(self, run: TrainingRun, job: PriorJob) -> None:
        recipe, ranks, config = job.recipe, run.ranks, job.model_config
        self.run, self.job, self.recipe, self.ranks, self.checkpoints = run, job, recipe, ranks, job.checkpoints
        per_parameter = CHECKPOINT_BYTES + state_bytes(config, recipe.optimizer.moments).moments
        self.checkpoints.check_disk_space(job.n_parameters * (per_parameter + recipe.replicas.checkpoint_bytes), ranks)
        self.validation, self.parity_batch = self._validation_batches()
        self.stream = self._stream_from(job.newest.update if job.newest else 0)  # early, since it checks the recipe
        self.engine = build_engine(recipe, config, job.engine_config, ranks, initialised=job.newest is None)
        limit_waiting(recipe.failure.collective_timeout)  # again, for the process groups that the engine made
        self.ema = EMA(self.engine.shards(), recipe.ema, device="cpu", background=True)
        plateau = recipe.learning_rate.plateau
        self.plateau = Plateau(plateau, recipe.updates) if plateau else None
        self.divergence = DivergenceMonitor(recipe.failure)
        self.state = TrainState() if job.newest is None else self._restore()
        if job.newest is not None and self.state.update != job.newest.update:  # that checkpoint was damaged
            self.stream.close()
            self.stream = self._stream_from(self.state.update)
        self.resumed_at, self.watch = self.state.update, Stopwatch(self.state.seconds)
        self._start_tracking()
        self.metrics = PriorMetrics(recipe, config, self.engine, self.stream, self.state, run.tracker)
        self.sheets = self._sample_sheets() if ranks.is_main and recipe.tracking.samples_every is not None else None
        self.last_validation: dict[str, float] = {}
        self.last_scores: dict[str, float] = {}

    # ---- the loop --------------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Do the remaining updates. Returns the summary."""
        state, updates = self.state, self.recipe.updates
        with self.metrics.bar, self.stream:
            if state.update == 0 or state.update >= updates:  # the latter: killed after its last checkpoint, before the end
                self.validate()
                self.draw_samples()
            while state.update < updates:
                lr = self.learning_rate()
                batch = next(self.stream)
                if state.update == 0 and self.engine.calibrate(_tensors(batch)):
                    self.metrics.log_scales("calibrated gradient scales")
                with self.metrics.profile():  # engine.update does forward, backward, reduce and step
                    report = self.engine.update(_tensors(batch), lr, self.run.stop_requested, self.checkpoints.is_writing)
                state.advance(report.took_step, self.watch.seconds)
                if report.took_step:
                    self.watch_plateau(report.loss)
                self.average_weights()
                self.metrics.log(report, lr)
                if self.checkpoints.is_open and not report.saves_under_way:
                    self.checkpoints.finish(self.ranks)
                if reason := self.divergence.observe(report):
                    self.give_up(reason, batch, lr)
                if self.is_due(self.recipe.validation.every):
                    self.validate()
                if self.is_due(self.recipe.tracking.samples_every):
                    self.draw_samples()
                if self.is_save_due(report):
                    self.save()
                if report.stop_requested and state.update < updates:
                    self.stop()
            self.checkpoints.finish(self.ranks)
        return self.finish()

    def learning_rate(self) -> float:
        """Learning rate of the next update."""
        rate = self.recipe.learning_rate.at(self.state.update, self.recipe.updates)
        return rate * (self.plateau.factor if self.plateau else 1.0)

    def is_due(self, every: int | None) -> bool:
        """Whether the update just done is a multiple of `every` or the last one. False if `every` is None."""
        return every is not None and (self.state.update % every == 0 or self.state.update == self.recipe.updates)

    def is_save_due(self, report: UpdateReport) -> bool:
        """Whether to save now. A state with a non-finite loss must not replace a good checkpoint, unless it is the last one."""
        if self.state.update == self.recipe.updates:
            return True
        return (self.is_due(self.recipe.checkpoint.every) or report.stop_requested) and math.isfinite(report.loss)

    def watch_plateau(self, loss: float) -> None:
        """Call after a step. Halves the learning rate if the training loss has flattened (paper, appendix B.2)."""
        update = self.state.update
        if self.plateau and update > self.recipe.learning_rate.warmup_updates and self.plateau.observe(update, loss):
            log.info(
                "update %d: the training loss has flattened: learning rate halved (%d times so far)",
                update,
                len(self.plateau.state.halvings),
            )

    def average_weights(self) -> None:
        """Call after every update. Updates the EMA if this update is a multiple of `ema.every`.

        A skipped update counts too: its weights are those of the update before. Otherwise a skip now and then, at 1 of 25
        updates, would lose 1 of 25 averagings.
        """
        if self.state.update % self.recipe.ema.every == 0:
            self.ema.update(self.engine.shards())

    def validate(self) -> None:
        """Compute and log the losses of the EMA weights on the validation split."""
        with self._with_ema():
            text_loss, image_loss = self.engine.evaluate(_tensors(self.validation))
            first = self.validation[0]
            nll_BN = self.engine.image_nll(first.text_BT, first.image_BN)
        self.last_validation = {"loss/validation/image": image_loss, "loss/validation/text": text_loss}
        self.metrics.log_validation(text_loss, image_loss, nll_BN)

    def draw_samples(self) -> None:
        """Log a sheet of samples from the EMA weights, and scores of scenes, if `tracking.samples_every` is set."""
        if self.recipe.tracking.samples_every is None:
            return
        with self._with_ema():
            weights = self.engine.whole_weights()
        if self.sheets is not None and weights is not None:
            prior = self.sheets.prior(weights)
            self.metrics.log_samples(self.sheets.draw(prior, self.state.update))
            if self.state.update:  # an untrained prior draws no scene
                self.last_scores = self.sheets.scores(prior)
                self.metrics.log_scores(self.last_scores)

    def give_up(self, reason: str, batch: Sequence[TokenBatch], lr: float) -> NoReturn:
        """Diagnose the batch, then raise TrainingDiverged with the result."""
        self.checkpoints.finish(self.ranks)
        told = diagnose(self.recipe, self.engine, batch, lr, self.state.update, reason, self.run.tracker)
        raise TrainingDiverged(told)

    def stop(self) -> NoReturn:
        """Commit the open save, then raise SystemExit(143)."""
        self.checkpoints.finish(self.ranks)
        self.run.leave_stopped(self.state.update, f"the newest state in {self.checkpoints.url}")

    def finish(self) -> dict[str, Any]:
        """Write and return the summary."""
        checkpoints = self.checkpoints.committed()
        summary = {
            "folder": str(self.run.folder),
            "updates": self.state.update,
            "resumed_at": self.resumed_at,
            "skipped_updates": self.state.n_skipped,
            "seconds": round(self.state.seconds, 1),
            "checkpoint": objects.join(self.checkpoints.url, checkpoints[-1]) if checkpoints else None,
            **self.last_validation,
            **self.last_scores,
            "data_wait_seconds": round(self.stream.wait_seconds, 2),
            "n_parameters": self.job.n_parameters,
        }
        if self.ranks.is_main:
            self.run.tracker.artifact(self.run.write_results(SUMMARY_FILE, summary))
        self.run.finished()
        return summary

    def _with_ema(self) -> AbstractContextManager[None]:
        """Context in which the engine has the EMA weights."""
        return self.ema.in_place_of(self.engine.shards(), self.engine.refresh_gathered_parameters)

    # ---- checkpoints -----------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Start a checkpoint. If it is written in the background, it is committed after a later update, when all ranks have
        written their files."""
        self.checkpoints.finish(self.ranks)  # first, so that memory holds only one copy of the state
        with self._with_ema():
            nll_BN = self.engine.image_nll(self.parity_batch.text_BT, self.parity_batch.image_BN)
        state = {
            "train_state": self.state.to_dict(),
            "n_ema_updates": self.ema.n_updates,
            "plateau": self.plateau.state_dict() if self.plateau else None,
        }
        background = self.recipe.checkpoint.background
        snapshot = self.engine.snapshot(state, self.ema.averages, copy=background)

        def write(folder: Path) -> None:
            snapshot.write(folder)
            if self.ranks.is_main:
                save_file(_parity_tensors(self.parity_batch, nll_BN), folder / PARITY_FILE)

        tracked = self.run.tracker.run
        mlflow = None if tracked is None else MlflowRun(uri=tracked.uri, run_id=tracked.run_id)
        about = self.job.about.model_copy(update={"mlflow": mlflow})
        self.checkpoints.begin(self.state.update, write, about, self.ranks, background)

    def _restore(self) -> TrainState:
        """Load the newest checkpoint that is whole: each rank reads its part once, and verifies it meanwhile."""
        opened: list[SavedState] = []

        def load(checkpoint: Checkpoint[PriorAbout]) -> list[str]:
            self.job.about.require_same_run(checkpoint.about, checkpoint.url)
            opened[:] = [open_state(checkpoint.data, checkpoint.data_files)]
            return [f"{checkpoint.record.attempt}/{name}" for name in self.engine.read_state(opened[0], self.ema.averages)]

        checkpoint = self.checkpoints.newest(self.ranks, load)
        assert checkpoint is not None  # `check_job` has found one, and this run holds the lock of the folder
        saved = self.engine.start_from(opened[0])
        self.ema.n_updates = saved["n_ema_updates"]
        if self.plateau and saved["plateau"]:
            self.plateau.load_state_dict(saved["plateau"])
        if self.ranks.is_main:
            log.info("resumed from %s", checkpoint.url)
        return TrainState(**saved["train_state"])

    # ---- construction ----------------------------------------------------------------------------------------------------

    def _validation_batches(self) -> tuple[list[TokenBatch], TokenBatch]:
        """Returns this rank's part of the validation samples, and the parity batch.

        The parity batch has a few samples, the same on every rank. An export must reproduce the engine's losses on them.
        """
        samples, ranks, text_len = self.job.validation_set, self.ranks, self.job.model_config.text_len
        n = min(self.recipe.validation.samples or samples.n_samples, samples.n_samples)
        batch = max(1, min(self.recipe.micro_batch, n // ranks.world_size))
        place = {"rank": ranks.rank, "world_size": ranks.world_size}
        with telling(f"validation.samples {self.recipe.validation.samples}"):
            own = validation_batches(samples, text_len=text_len, **place, batch=batch, limit=n)
        n_parity = min(PARITY_SAMPLES, samples.n_samples)
        parity = validation_batches(samples, text_len=text_len, batch=n_parity, rank=0, world_size=1, limit=n_parity)
        return own, parity[0]

    def _sample_sheets(self) -> "SampleSheets":
        from dalle_ds.training.prior.samples import SampleSheets  # scipy, for one rank of all, and only if it draws

        first_set, n_captions = self.job.validation_set.sets[0], self.recipe.tracking.scene_captions
        return SampleSheets(self.job.model_config, first_set, self.ranks.device, n_captions)

    def _stream_from(self, update: int) -> TokenStream:
        """The training data of this rank from an update on. Raises ConfigError if the recipe does not fit the data."""
        return TokenStream(
            self.job.train_set,
            text_len=self.job.model_config.text_len,
            global_batch=self.recipe.global_batch,
            micro_batch=self.recipe.micro_batch,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            seed=self.recipe.seed,
            bpe_dropout=self.recipe.data.bpe_dropout,
            caption_dropout=self.recipe.data.caption_dropout,
            start_update=update,
            prefetch=self.recipe.data.prefetch,
        )

    def _start_tracking(self) -> None:
        run, job, recipe, about = self.run, self.job, self.recipe, self.job.about
        if not self.ranks.is_main:
            return
        world_size, sent = self.ranks.world_size, self.engine.replica_gradients
        fractions = [dataset.info.validation_fraction for dataset in job.train_set.sets]
        rank = sent.power_sgd.rank if sent and sent.power_sgd else None
        different = differences(recipe, job.model_config, job.engine_config, world_size, fractions, rank)
        # MLflow's page lists the parameters above each image: a long list, as of all sizes of a model, would push them out of
        # sight.
        set_here = flatten(recipe.model_dump(mode="json", exclude_defaults=True))
        of_model = {key: value for key, value in set_here.items() if key == "seed" or key.startswith("model.")}
        run.start_tracking(
            recipe,
            recipe.tracking,
            tags={
                "stage": "prior",
                "provenance.data": about.data,
                "provenance.data_root": job.train_set.root_url,
                "provenance.data_content": about.content,
                "provenance.dvae": about.dvae,
                "provenance.tokenizer": about.tokenizer,
                "world_size": world_size,
                "n_parameters": job.n_parameters,
                "n_effective_parameters": n_effective_parameters(job.model_config),
                "n_train_samples": job.train_set.n_samples,
            },
            params={one.key: one.here for one in different if not one.key.startswith("model.")} | of_model,
            text=describe(recipe, job.n_parameters, world_size, different),
        )
        for dataset in about.sets:
            run.tracker.input_dataset("token_shards", dataset.dataset, dataset.data)
        first = about.sets[0].dataset
        run.tracker.input_dataset("tokenizer", objects.join(first, TOKENIZER_FILE), about.tokenizer, "tokenizer")
        run.tracker.input_dataset("dvae", objects.join(first, DVAE_FILE), about.dvae, "codebook")
        run.tracker.artifact(run.write(DEEPSPEED_FILE, json.dumps(job.engine_config.json, indent=1)))
        n_micro_batches = recipe.accumulation(world_size)
        log.info(
            "prior of %.1f million parameters on %d ranks x %d micro-batches of %d",
            job.n_parameters / 1e6,
            world_size,
            n_micro_batches,
            recipe.micro_batch,
        )
        log.info("%d training samples, %d updates an epoch", job.train_set.n_samples, self.stream.updates_per_epoch)
        log.info("parameter groups: %s", self.engine.groups_description)
        if self.engine.replica_gradients:
            log.info("%d replicas: %s", recipe.replicas.count, self.engine.replica_gradients.describe())


def _tensors(batches: Sequence[TokenBatch]) -> list[tuple[Tensor, Tensor]]:
    """(text, image) of each micro-batch, the arguments of the engine."""
    return [(batch.text_BT, batch.image_BN) for batch in batches]


def _parity_tensors(batch: TokenBatch, nll_BN: Tensor) -> dict[str, Tensor]:
    return {"text": batch.text_BT.contiguous(), "image": batch.image_BN.contiguous(), "image_nll": nll_BN.float().contiguous()}
